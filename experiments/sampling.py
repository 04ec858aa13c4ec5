"""The text of an experiment: a sample of a corpus, and two halves of its dev text.

What chooses and what is reported must not share a document: the first halves of the dev files
choose, the second are reported. (Odd and even chunks would share them all.)
"""

import math

from corpus.text_files import list_text_files, read_text, split_name
from training.io import UserError, write_text

BLOCK_LINES = 50  # a sample is made of runs of lines, so that sentences keep company


def sample_lines(text, fraction):
    """`fraction` of a text's runs of lines, rounded down, evenly spread over it; at least one."""
    lines = text.split("\n")
    blocks = [lines[i : i + BLOCK_LINES] for i in range(0, len(lines), BLOCK_LINES)]
    kept = [
        block for i, block in enumerate(blocks) if math.floor((i + 1) * fraction) > math.floor(i * fraction)
    ]
    return "\n".join(line for block in kept or blocks[:1] for line in block)


def plain_name(path):
    """The name under which a file's text is written, as lines and not compressed."""
    name, suffix = split_name(path)
    return name + (".txt" if suffix == ".jsonl" else suffix)


def sample_corpus(folder, target, words):
    """Writes a sample of each file of a folder, all in one proportion, with about `words` words."""
    texts = {plain_name(path): read_text(path) for path in list_text_files(folder)}
    fraction = min(1.0, words / max(sum(len(text.split()) for text in texts.values()), 1))
    for name, text in texts.items():
        write_text(target / name, sample_lines(text, fraction))


def halves(text):
    """The two halves of a text, by words, cut between lines."""
    lines = text.split("\n")
    words = [len(line.split()) for line in lines]
    total, seen, middle = sum(words), 0, 0
    while 2 * seen < total:
        seen += words[middle]
        middle += 1
    return "\n".join(lines[:middle]), "\n".join(lines[middle:])


def write_dev_halves(folder, targets, words=None, train_folder=None):
    """Writes the first halves of a folder's files into one of `targets`, the second into the other.

    With `words`, each half is a sample of at most about so many, whose files have the shares that
    they have of the text in `train_folder`, as far as they last; what it has not is left out.
    """
    shares = {}
    if words is not None:
        paths = list_text_files(train_folder)
        counts = {split_name(p)[0]: len(read_text(p).split()) for p in paths}
        shares = {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}
    for path in list_text_files(folder):
        name, _ = split_name(path)
        if words is not None and not shares.get(name):
            continue
        for target, half in zip(targets, halves(read_text(path))):
            if not half.split():
                raise UserError(f"{path} cannot be cut in two halves: it has too few lines")
            if words is not None:
                share = words * shares[name] / len(half.split())
                half = sample_lines(half, min(1.0, share))
            write_text(target / plain_name(path), half)


def folder_state(folder):
    """What tells a folder of text from another: its files and their sizes, or None."""
    if folder is None:
        return None
    return {path.name: path.stat().st_size for path in list_text_files(folder)}
