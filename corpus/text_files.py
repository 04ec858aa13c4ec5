"""The text files of a folder, each read in blocks of whole lines, however large it is.

    *.train  *.dev  *.test  *.txt    UTF-8 text, as it is
    *.jsonl                          one JSON object a line; its string "text" is a text
    any of these with .gz .bz2 .xz   the same, compressed

A line is held in memory as a whole, a file never is.
"""

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import re
import zlib
from pathlib import Path

from corpus.cleaning import SPELLINGS
from training.io import UserError, warn

SUFFIXES = {".train", ".dev", ".test", ".txt", ".jsonl"}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NAMED = "*.train, *.dev, *.test, *.txt or *.jsonl, each also with .gz, .bz2 or .xz"
READ_BYTES = 1 << 18
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese: scripts without blanks between words
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u9fff]")
SPACE_PIECE = "\u2581"  # SentencePiece spells a space like this, so it cannot tell the two apart


# ---- the files of a folder


def text_suffix(path):
    """The suffix of a text file without compression: ".txt" of BOOK.TXT.gz. None for other files."""
    path = Path(path)
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = bare.suffix.lower()
    return suffix if suffix in SUFFIXES and not path.name.startswith(".") else None


def sub_corpus(path):
    """The name of the sub-corpus in a file: without suffixes, and as BabyLM spelled it in 2023.

    `childes.train.txt`, `childes.dev` and `aochildes.train` are all "aochildes".
    """
    path = Path(path)
    while path.suffix.lower() in SUFFIXES | COMPRESSED.keys():
        path = path.with_suffix("")
    return SPELLINGS.get(path.name, path.name)


def sub_corpora(folder):
    """{sub-corpus: its text file} of a folder, in the order of the file names.

    Raises `UserError` if there are none, or two of one sub-corpus, if one is a link to nothing, or
    has a name that is not UTF-8.
    """
    folder, paths = Path(folder), {}
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one of {NAMED}")
    for path in filter(text_suffix, sorted(folder.iterdir())):
        if not path.exists():
            raise UserError(f"{path} is a link to a file that does not exist: mend it or remove it")
        if not path.is_file():
            continue
        name = sub_corpus(path)
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"{path}: its name is not UTF-8 here: rename it, or set PYTHONUTF8=1")
        if name in paths:
            raise UserError(
                f"{folder} holds both {paths[name].name} and {path.name}, which are one sub-corpus by "
                "their names: give each split a folder of its own"
            )
        paths[name] = path
    if not paths:
        raise UserError(f"{folder} holds no text: files named {NAMED}")
    return paths


def warn_of_ignored_files(folder):
    """Names everything in a folder that is not read as text."""
    read = set(sub_corpora(folder).values())
    ignored = sorted(p.name + "/" * p.is_dir() for p in Path(folder).iterdir() if p not in read)
    if ignored:
        warn(f"{folder}: not read as text: {', '.join(ignored)} (text is {NAMED}, in no inner folder)")


# ---- the text of a file


def count_unspaced(text):
    """The characters of scripts that put no blanks between words."""
    return 0 if text.isascii() else len(UNSPACED.findall(text))


def read_text(path):
    """The whole text of a file, as `text_blocks` reads it."""
    return "".join(text_blocks(path))


def text_blocks(path, *, as_is=False, keep_cr=False, tell=True):
    """Yields the text of a file in blocks of whole lines.

    Unless `as_is`, a byte-order mark is left out, and carriage returns that end lines become
    newlines (not with `keep_cr`). With `tell`, warns of both and of U+2581. Raises `UserError` if
    the file is empty, unreadable, not UTF-8 or damaged, or if a line of *.jsonl has no text.
    """
    carriage_returns, spaces, empty = False, 0, True
    blocks = _decoded_blocks(path, as_is, tell)
    for block in _documents(path, blocks) if text_suffix(path) == ".jsonl" else blocks:
        if not as_is and not keep_cr and "\r" in block:
            carriage_returns, block = True, re.sub(r"\r+\n|\r", "\n", block)
        spaces += block.count(SPACE_PIECE)
        empty = empty and not block
        yield block
    if empty:
        raise UserError(f"{path} is empty: remove it or fill it")
    if tell and carriage_returns:
        warn(f"{path}: its carriage returns, as Windows writes them, are read as newlines (--keep-cr)")
    if tell and spaces:
        warn(f"{path}: {spaces} characters U+2581 will become spaces")


def _documents(path, blocks):
    """Yields the texts of the JSON objects in blocks of whole lines. Each text ends its line."""
    number = 0
    for block in blocks:
        texts = []
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # half of a surrogate pair is no character
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number}: not a JSON object with a string "text": mend it or remove it'
                ) from error
            texts.append(text and text.removesuffix("\n") + "\n")
        yield "".join(texts)


def _decoded_blocks(path, as_is, tell):
    """Yields a file's characters in blocks of whole lines: no character contains a newline."""
    start = 0
    with _opened(path) as file:
        # `readline` completes the last line of a block.
        while block := file.read(READ_BYTES):
            block += file.readline()
            if not as_is and not start and block.startswith(codecs.BOM_UTF8):
                start, block = len(codecs.BOM_UTF8), block.removeprefix(codecs.BOM_UTF8)
                if tell:
                    warn(f"{path}: its byte-order mark is left out")
            try:
                yield block.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 at byte {start + error.start}: convert it, for example "
                    "with iconv -f utf-16 -t utf-8, or -f latin1"
                ) from error
            start += len(block)


@contextlib.contextmanager
def _opened(path):
    """Yields a binary file of the text. Raises `UserError` where it cannot be read, then or later."""
    try:
        with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        raise UserError(
            f"{path} is damaged, or not compressed as its name says ({error}): copy it again"
        ) from error
