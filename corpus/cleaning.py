"""What is done to the text of each sub-corpus of BabyLM before anything is trained on it.

    light    the default: what is no text goes, and what is text stays on lines of its own
    paper    what the original's preprocessing does (mrclean.py of timinar/BabyLlama, 6b821af)
    none     nothing

The paper's way glues lines where a blank line was (Wikipedia's headings to the sentence before or
after them), and drops every line of subtitles with "subtitle" in it.
"""

import re

CREDIT_CHARACTERS = 80


def split_lines(text):
    """The lines of `text`, each with its newline; unlike `splitlines`, at newlines only."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# ---- light


def tidy_spaces(text):
    """Runs of blanks become one space, and none stays before punctuation."""
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    return re.sub(r" (?=[.,;!?](?!\d))", "", text)  # but ` .5` is a number


def clean_cbt(text):
    """Tidy spaces, and apostrophes joined to their word: `queen 's` becomes `queen's`."""
    return re.sub(r"(?<=\w) (?='\w)", "", tidy_spaces(text))


def clean_open_subtitles(text):
    """Drops the lines that credit the makers of the subtitles.

    A credit is short: a long line that names subtitles has dialogue in it, and stays.
    """
    works = "captioned|corrected|encoded|ripped|subbed|synced|synchroni[sz]ed|transcribed|translated"
    credit = rf"\bsubtitle[ds]\b|^\W*(?:{works}) by\b|\bwww\.|https?://"
    is_credit = re.compile(credit, re.IGNORECASE).search
    lines = split_lines(text)
    return "".join(line for line in lines if len(line) > CREDIT_CHARACTERS or not is_credit(line))


def clean_qed(text):
    """Tidy spaces; shouted lines in sentence case; I where text recognition read l."""
    lines = [sentence_case(line) for line in split_lines(tidy_spaces(text))]
    text = re.sub(r"(?<![\w'-])l(?='(?:m|ll|d|ve)\b)", "I", "".join(lines))
    # At the start of a sentence only: elsewhere `ln` is a logarithm.
    return re.sub(r"(?m)(^[^\w\n]*|[.!?] [^\w\n]*)l(?=[fnst]\b)", r"\1I", text)


def sentence_case(line):
    """`WHAT DO l SEE?` as `What do I see?`; a line that is not shouted as it is.

    A shouted line has two words or more, and no small letter but an l that was read for an I.
    """
    words = re.findall(r"[^\W\d_]{2,}", line)
    if len(words) < 2 or not line.replace("l", "").isupper():
        return line
    line = line.replace("l", "I").lower()
    line = re.sub(r"(^\W*|[.!?] \W*)(\w)", lambda m: m[1] + m[2].upper(), line)
    return re.sub(r"\bi\b", "I", line)


def clean_wikipedia(text):
    """Headings, `= = = Title = = =`, keep their words only; blank lines go."""
    lines = (unmark_heading(line) for line in split_lines(text))
    return "".join(line for line in lines if line.strip())


def unmark_heading(line):
    """The title of a heading line, or any other line as it is."""
    marked = line.strip()
    if re.match(r"= ?=", marked) and re.search(r"= ?=$", marked):
        return marked.strip("= ") + "\n"
    return line


LIGHT = {  # children_stories, gutenberg, switchboard and unknown names are left as they are
    "aochildes": tidy_spaces,
    "bnc_spoken": tidy_spaces,
    "cbt": clean_cbt,
    "open_subtitles": clean_open_subtitles,
    "qed": clean_qed,
    "simple_wikipedia": clean_wikipedia,
    "wikipedia": clean_wikipedia,
}


# ---- as the paper's text was


def paper_spaces(text):
    """Runs of blanks become one space; one before punctuation goes, in ` .5` too."""
    return re.sub(r" ([.,;!?])", r"\1", re.sub(r"[ \t\u00a0]+", " ", text))


def join_paragraphs(text):
    """Two newlines in a row go, and what they parted is one line."""
    return text.replace("\n\n", "")


def paper_bnc_spoken(text):
    """Spaces as above, paragraphs joined."""
    return join_paragraphs(paper_spaces(text))


def paper_cbt(text):
    """Spaces as above; straight and curly apostrophes are joined to the word before them."""
    return re.sub(r"(\w) (['\u2019]\w)", r"\1\2", paper_spaces(text))


def paper_open_subtitles(text):
    """Every line goes that has "subtitle" in it, large or small, but for a last one without end."""
    keep = (line for line in split_lines(text) if not _is_subtitle_credit(line))
    return "".join(keep)


def _is_subtitle_credit(line):
    return line.endswith("\n") and "subtitle" in line.lower()


def paper_qed(text):
    """Lines lose their outer blanks; those of capitals, by half or more, get sentence case.

    The share is of what is left without parentheses and ends of sentences. Where nothing is left
    the original divides by zero: here such a line is kept.
    """
    return "\n".join(_lower_capitals(line).strip() for line in text.splitlines())


def _lower_capitals(line):
    body = re.sub(r"\(.*?\)|[.!?]", "", line)
    if not body or 2 * sum(map(str.isupper, body)) < len(body):
        return line
    sentences = re.split(r"([.!?]\s*)", line.replace("l", "I"))  # an l was an I
    return "".join(sentence.capitalize() for sentence in sentences)


def paper_wikipedia(text):
    """Headings, `= = = Title = = =`, lose their marks and their newline; the first character goes.

    Lines lose their outer blanks, and paragraphs are joined.
    """
    text = re.sub(r"= = = (.+?) = = =\n", r"\1", text)
    return join_paragraphs("\n".join(line.strip() for line in text.splitlines())[1:])


PAPER = {  # children_stories, gutenberg, switchboard are left as they are
    "aochildes": paper_spaces,
    "bnc_spoken": paper_bnc_spoken,
    "cbt": paper_cbt,
    "open_subtitles": paper_open_subtitles,
    "qed": paper_qed,
    "simple_wikipedia": join_paragraphs,
    "wikipedia": paper_wikipedia,
}

# What a shard's header says of its text: raise a number when any cleaner of it changes.
VERSIONS = {"light": "1", "paper": "paper-1", "none": "none"}
CLEANERS = {"light": LIGHT, "paper": PAPER, "none": {}}


def clean(name, text, how="light"):
    """`text` as the cleaner of the sub-corpus `name` leaves it."""
    cleaner = CLEANERS[how].get(name)
    return cleaner(text) if cleaner else text


# ---- a text that is too large to be held


def clean_blocks(name, blocks, how="light"):
    """Yields, piece by piece, what `clean` makes of the text whose blocks of whole lines are given.

    The light cleaners look at no more than a line. The paper's join lines, and treat the beginning
    and the end of a text apart: they are given pieces that end where nothing is joined.
    """
    cleaner = CLEANERS[how].get(name)
    if cleaner is None:
        yield from blocks
    elif how == "light":
        yield from map(cleaner, blocks)
    else:
        yield from _clean_pieces(cleaner, blocks)


def _clean_pieces(cleaner, blocks):
    """What one of the paper's cleaners makes of a text in blocks.

    A letter on a line of its own stands for the text that follows a piece, and is taken off again.
    """
    before, kept = "", ""
    for block in blocks:
        kept += block
        if cut := _last_cut(kept):
            yield cleaner(before + kept[:cut] + "x")[:-1]
            kept = kept[cut:]
            # The first character of all goes there: in a later piece, this one.
            before = "\n" if cleaner is paper_wikipedia else ""
    yield cleaner(before + kept)


def _last_cut(text):
    """The last place in whole lines at which no cleaner of the paper joins anything, or 0.

    It is before a line that begins with more than blanks, with a heading on neither side.
    """
    stop = len(text)
    while start := text.rfind("\n", 0, stop - 1) + 1:
        line, previous = text[start:stop], text[text.rfind("\n", 0, start - 1) + 1 : start]
        if line.splitlines()[0].strip() and "= = =" not in line + previous:
            return start
        stop = start
    return 0
