"""Cleaning: removes markup and noise from the text of each sub-corpus of BabyLM.

    light    the default: removes markup and credits, and keeps text on lines of its own
    paper    does exactly what the original does (mrclean.py of timinar/BabyLlama, 6b821af)
    none     nothing

The paper's way joins lines where a blank line was (Wikipedia's headings to the sentence before or
after them), and removes every line of subtitles with "subtitle" in it. Every cleaner takes time
proportional to the text.
"""

import re

CREDIT_CHARACTERS = 80


def split_lines(text):
    """The lines of `text`, each with its newline; unlike `splitlines`, at newlines only."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def unchanged(text):
    """The text as it is: the sub-corpus is known, and needs no cleaning."""
    return text


# ---- light


def tidy_spaces(text):
    """Runs of blanks become one space, and a space before punctuation is removed."""
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    return re.sub(r" (?=[.,;!?](?!\d))", "", text)  # but ` .5` is a number


def clean_cbt(text):
    """Tidies spaces and joins apostrophes to their word: `queen 's` becomes `queen's`."""
    return re.sub(r"(?<=\w) (?='\w)", "", tidy_spaces(text))


def clean_open_subtitles(text):
    """Removes the lines that credit the makers of the subtitles.

    A credit is short: a long line that names subtitles has dialogue in it, and stays.
    """
    works = "captioned|corrected|encoded|ripped|subbed|synced|synchroni[sz]ed|transcribed|translated"
    credit = rf"\bsubtitle[ds]\b|^\W*(?:{works}) by\b|\bwww\.|https?://"
    is_credit = re.compile(credit, re.IGNORECASE).search
    lines = split_lines(text)
    return "".join(line for line in lines if len(line) > CREDIT_CHARACTERS or not is_credit(line))


def clean_qed(text):
    """Tidies spaces, puts shouted lines in sentence case, and reads l as I where it stands for I."""
    lines = [sentence_case(line) for line in split_lines(tidy_spaces(text))]
    text = re.sub(r"(?<![\w'-])l(?='(?:m|ll|d|ve)\b)", "I", "".join(lines))
    # At the start of a sentence only: elsewhere `ln` is a logarithm. The lookahead keeps a long run
    # of punctuation from being read again from each of its characters.
    start = r"^[^\w\n]*|(?<=\w)(?=[^\w\n]+l)[^\w\n]*[.!?] [^\w\n]*"
    return re.sub(rf"(?m)({start})l(?=[fnst]\b)", r"\1I", text)


def sentence_case(line):
    """`WHAT DO l SEE?` as `What do I see?`; a line that is not shouted as it is.

    A shouted line has two words or more, and no small letter but an l that stands for an I.
    """
    words = re.findall(r"[^\W\d_]{2,}", line)
    if len(words) < 2 or not line.replace("l", "").isupper():
        return line
    line = line.replace("l", "I").lower()
    start = r"^\W*|(?<=\w)(?=\W+\w)\W*[.!?] \W*"
    line = re.sub(rf"({start})(\w)", lambda m: m[1] + m[2].upper(), line)
    return re.sub(r"\bi\b", "I", line)


def clean_wikipedia(text):
    """Headings, `= = = Title = = =`, keep their words only; blank lines are removed."""
    lines = (unmark_heading(line) for line in split_lines(text))
    return "".join(line for line in lines if line.strip())


def unmark_heading(line):
    """The title of a heading line, or any other line as it is."""
    marked = line.strip()
    if re.match(r"= ?=", marked) and re.search(r"= ?=$", marked):
        return marked.strip("= ") + "\n"
    return line


# ---- as the paper's text was


def paper_spaces(text):
    """Runs of blanks become one space; one before punctuation is removed, in ` .5` too."""
    return re.sub(r" ([.,;!?])", r"\1", re.sub(r"[ \t\u00a0]+", " ", text))


def join_paragraphs(text):
    """Removes two newlines in a row, which joins the lines before and after them."""
    return text.replace("\n\n", "")


def paper_bnc_spoken(text):
    """Spaces as above, paragraphs joined."""
    return join_paragraphs(paper_spaces(text))


def paper_cbt(text):
    """Spaces as above; straight and curly apostrophes are joined to the word before them."""
    return re.sub(r"(\w) (['\u2019]\w)", r"\1\2", paper_spaces(text))


def paper_open_subtitles(text):
    """Removes each line with "subtitle" in it, in any case, except a last line without newline."""
    lines = split_lines(text)
    return "".join(line for line in lines if not line.endswith("\n") or "subtitle" not in line.lower())


def paper_qed(text):
    """Lines lose their outer blanks; those of capitals, by half or more, get sentence case.

    The share is of what is left without parentheses and ends of sentences. Where nothing is left
    the original divides by zero: here such a line is kept.
    """
    return "\n".join(_lower_capitals(line).strip() for line in text.splitlines())


def _lower_capitals(line):
    # Only before the last ")" can a parenthesis be closed: none is searched for in vain.
    closed, mark, rest = line.rpartition(")")
    body = re.sub(r"\(.*?\)|[.!?]", "", closed + mark) + re.sub(r"[.!?]", "", rest)
    if not body or 2 * sum(map(str.isupper, body)) < len(body):
        return line
    sentences = re.split(r"([.!?]\s*)", line.replace("l", "I"))  # an l was an I
    return "".join(sentence.capitalize() for sentence in sentences)


def paper_wikipedia(text):
    """Headings, `= = = Title = = =`, lose their marks and their newline; the first character goes.

    Lines lose their outer blanks, and paragraphs are joined.
    """
    text = "".join(map(_join_heading, split_lines(text)))
    return join_paragraphs("\n".join(line.strip() for line in text.splitlines())[1:])


def _join_heading(line):
    """What `re.sub("= = = (.+?) = = =\\n", r"\\1", line)` gives, in one pass."""
    before, mark, title = line.removesuffix(" = = =\n").partition("= = = ")
    return before + title if line.endswith(" = = =\n") and mark and title else line


# ---- which cleaner a text gets

SUB_CORPORA = {  # of BabyLM, by their names of 2023: the cleaners light and paper
    "aochildes": (tidy_spaces, paper_spaces),
    "bnc_spoken": (tidy_spaces, paper_bnc_spoken),
    "cbt": (clean_cbt, paper_cbt),
    "children_stories": (unchanged, unchanged),
    "gutenberg": (unchanged, unchanged),
    "open_subtitles": (clean_open_subtitles, paper_open_subtitles),
    "qed": (clean_qed, paper_qed),
    "simple_wikipedia": (clean_wikipedia, join_paragraphs),
    "switchboard": (unchanged, unchanged),
    "wikipedia": (clean_wikipedia, paper_wikipedia),
}
SPELLINGS = {"childes": "aochildes", "simple_wiki": "simple_wikipedia"}  # names since 2024
CLEANERS = {
    "light": {name: light for name, (light, _) in SUB_CORPORA.items()},
    "paper": {name: paper for name, (_, paper) in SUB_CORPORA.items()},
    "none": {},
}
# Written into a shard's header: raise a number when any of its cleaners changes.
VERSIONS = {"light": "1", "paper": "paper-1", "none": "none"}


def clean(name, text, cleaning="light"):
    """`text` as the cleaner of the sub-corpus `name` leaves it."""
    return CLEANERS[cleaning].get(name, unchanged)(text)


def clean_blocks(name, blocks, cleaning="light"):
    """Yields `clean(name, text, cleaning)` in pieces, of a text given in blocks of whole lines.

    A light cleaner looks at one line at a time. The paper's join lines: they get the text as a whole.
    """
    if cleaning == "paper" and CLEANERS[cleaning].get(name, unchanged) is not unchanged:
        blocks = ["".join(blocks)]
    for block in blocks:
        yield clean(name, block, cleaning)
