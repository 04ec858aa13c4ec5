"""The text of an experiment: a sample of a corpus, and two halves of its dev text.

Validation and test text must not share a document: the first halves of the dev files are for
validation, the second for the test. (Odd and even chunks would share every document.)
"""

import math
import re

from corpus.cleaning import split_lines
from corpus.text_files import (
    count_unspaced,
    read_text,
    sub_corpora,
    sub_corpus,
    text_suffix,
    warn_of_ignored_files,
)
from training.io import UserError, log, warn, write_text

RUN_LINES = 50  # a sample is made of runs of lines, so that sentences stay in their context
RUN_SENTENCES = 5  # where lines are too long
LEAST_OF_LINES = 0.3  # of the words asked for, from runs of lines: their number is rounded down
TOLERANCE = 0.1  # by which samples and halves may exceed the words asked for
SENTENCE_WORDS = 50  # a sentence of more words is cut between words


def count_words(text):
    """The words that blanks separate."""
    return len(text.split())


def sentences(text):
    """The sentences of a text, each with the blank or newline after it: a line has one at least."""
    chinese = r"[\u3002\uff01\uff1f]"  # full stop, exclamation and question mark, no blank after them
    pieces = re.findall(rf"[^\n]+?(?:[.!?] |{chinese})|[^\n]*\n|[^\n]+", text)
    cut = re.compile(rf"\s*(?:\S+\s*){{1,{SENTENCE_WORDS}}}|\s+")
    return [sentence for piece in pieces for sentence in cut.findall(piece)]


def evenly_spread(pieces, fraction):
    """`fraction` of a list, rounded down, evenly spread over it; at least the first piece."""
    numbers = range(len(pieces))
    chosen = [i for i in numbers if math.floor((i + 1) * fraction) > math.floor(i * fraction)]
    return [pieces[i] for i in chosen or [0]]


def sample_lines(text, fraction):
    """`fraction` of a text, in runs of lines that are evenly spread over it.

    Where lines are so long that these miss the words asked for, runs of sentences are taken.
    """
    lines, words = text.split("\n"), fraction * count_words(text)
    runs = ["\n".join(lines[i : i + RUN_LINES]) for i in range(0, len(lines), RUN_LINES)]
    sample = "\n".join(evenly_spread(runs, fraction))
    if LEAST_OF_LINES * words <= count_words(sample) <= (1 + TOLERANCE) * words:
        return sample
    pieces = sentences(text)
    runs = ["".join(pieces[i : i + RUN_SENTENCES]).rstrip() for i in range(0, len(pieces), RUN_SENTENCES)]
    return "\n".join(evenly_spread(runs, fraction))


def plain_name(path):
    """The name under which the text of a file is written, as lines and not compressed."""
    suffix = text_suffix(path)
    return sub_corpus(path) + (".txt" if suffix == ".jsonl" else suffix)


def read_words(folder):
    """{file: its text} of a folder. Raises `UserError` if blanks do not separate the words."""
    texts = {path: read_text(path) for path in sub_corpora(folder).values()}
    if 2 * sum(map(count_unspaced, texts.values())) > sum(map(len, texts.values())):
        raise UserError(f"{folder}: blanks do not separate its words, none can be sampled: ask for all")
    return texts


def sample_corpus(folder, target, words):
    """Writes a sample of each file of a folder, all in one proportion, with about `words` words."""
    texts = read_words(folder)
    warn_of_ignored_files(folder)
    total, taken = sum(map(count_words, texts.values())), 0
    for path, text in texts.items():
        sample = sample_lines(text, min(1.0, words / max(total, 1)))
        write_text(target / plain_name(path), sample)
        taken += count_words(sample)
    log(f"sampled {taken:,} of the {total:,} words in {folder} ({words:,} asked for)")


def halves(text):
    """The two halves of a text, cut between lines, or between sentences where lines are too long.

    They have as many words, or as many characters if blanks do not separate words.
    """
    size = len if 2 * count_unspaced(text) > len(text) else count_words
    total = size(text)
    for pieces in (split_lines(text), sentences(text)):
        seen, middle = 0, 0
        while 2 * seen < total:
            seen += size(pieces[middle])
            middle += 1
        if 2 * seen - total <= TOLERANCE * total:
            break
    return "".join(pieces[:middle]).removesuffix("\n"), "".join(pieces[middle:])


def write_dev_halves(folder, targets, words=None, train_folder=None):
    """Writes the first halves of a folder's files into one of `targets`, the second into the other.

    With `words`, each half is a sample of at most about that many. Its files have the shares that
    their sub-corpora have of the text in `train_folder`, as far as the text suffices.
    """
    train_texts = {} if words is None else read_words(train_folder)
    in_train = {sub_corpus(path): count_words(text) for path, text in train_texts.items()}
    warn_of_ignored_files(folder)
    counts = dict.fromkeys(targets, 0)
    for name, path in sub_corpora(folder).items():
        if words is not None and not in_train.get(name):
            warn(f"{path} is left out: {train_folder} has no sub-corpus {name}")
            continue
        for target, half in zip(targets, halves(read_text(path))):
            if not half.split():
                raise UserError(f"{path} cannot be cut in two halves: it has too few words")
            if words is not None:
                share = in_train[name] / sum(in_train.values())
                half = sample_lines(half, min(1.0, words * share / count_words(half)))
            write_text(target / plain_name(path), half)
            counts[target] += count_words(half)
    if words is not None:
        taken = ", ".join(f"{count:,}" for count in counts.values())
        log(f"sampled {taken} words of the halves of {folder} ({words:,} asked for)")
