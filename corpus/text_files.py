"""Text as it comes: the files of a folder, read in blocks of whole lines, however large they are.

    *.train  *.dev  *.test  *.txt    UTF-8, as it is
    *.jsonl                          one JSON object a line; its string "text" is a text
    any of these with .gz            compressed by gzip

A line is held whole, a file never is.
"""

import codecs
import contextlib
import gzip
import json
import zlib
from pathlib import Path

from training.io import UserError, warn

SUFFIXES = {".train", ".dev", ".test", ".txt", ".jsonl"}
NAMED = "*.train, *.dev, *.test, *.txt or *.jsonl, each also with .gz"
READ_BYTES = 1 << 18
SPACE_PIECE = "\u2581"  # how SentencePiece spells a space: in text, it cannot be told from one


def split_name(path):
    """The name of a sub-corpus and the suffix of its file, without any .gz: ("qed", ".train")."""
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    return bare.stem, bare.suffix


def list_text_files(folder):
    """The text files of a folder, sorted by name. Raises `UserError` if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one of {NAMED}")
    here, inner = folder.glob("[!.]*"), folder.glob("*/[!.]*")
    paths = sorted(p for p in here if split_name(p)[1] in SUFFIXES and p.is_file())
    inner = sorted({p.parent.name for p in inner if split_name(p)[1] in SUFFIXES})
    if inner:
        warn(f"{folder}: text in its folders ({', '.join(inner)}) is not read: move it up")
    if not paths:
        raise UserError(f"{folder} holds no text: files named {NAMED}")
    return paths


def sub_corpora(folder):
    """{sub-corpus: its file} of a folder, in the order of the file names.

    Raises `UserError` if there are none, or two files of one name.
    """
    found = {}
    for path in list_text_files(folder):
        name, _ = split_name(path)
        if name in found:
            raise UserError(
                f"{folder} holds both {found[name].name} and {path.name}: give each split a folder of its own"
            )
        found[name] = path
    return found


def read_text(path, windows=True, keep_cr=False):
    """The whole text of a file; see `text_blocks`."""
    return "".join(text_blocks(path, windows, keep_cr))


def text_blocks(path, windows=True, keep_cr=False, tell=True):
    """Yields the text of a file in blocks of whole lines, but for what Windows adds to a text.

    With `windows` a byte-order mark goes, and line ends become newlines unless `keep_cr`. With
    `tell` both are told, and so are NULs and U+2581. Raises `UserError` if the file is empty, not
    UTF-8, not whole, or where a line of *.jsonl has no text.
    """
    marks, carriage_returns, nuls, spaces, empty = 0, 0, 0, 0, True
    for number, block in enumerate(_documents(path, windows)):
        if windows and number == 0 and block.startswith("\ufeff"):
            marks, block = 1, block[1:]
        if windows and not keep_cr and "\r\n" in block:
            carriage_returns, block = 1, block.replace("\r\n", "\n")
        nuls, spaces = nuls or "\0" in block, spaces + block.count(SPACE_PIECE)
        empty = empty and not block
        yield block
    if empty:
        raise UserError(f"{path} is empty: remove it or fill it")
    if tell and marks:
        warn(f"{path}: its byte-order mark is left out")
    if tell and carriage_returns:
        warn(f"{path}: its line ends are those of Windows, and are read as newlines (--keep-cr)")
    if tell and nuls:
        warn(f"{path} holds NULs, as UTF-16 does: convert it with iconv -f utf-16le -t utf-8")
    if tell and spaces:
        warn(f"{path}: {spaces} characters U+2581 will become spaces")


def _documents(path, windows):
    """Yields the text of a file in blocks of whole lines; of *.jsonl, those of its documents."""
    blocks = _decoded(path)
    if split_name(path)[1] != ".jsonl":
        yield from blocks
        return
    number = 0
    for block in blocks:
        if windows and not number:
            block = block.removeprefix("\ufeff")
        texts = []
        for line in block.split("\n"):
            number += 1
            if line.strip():
                texts.append(_document(path, number, line))
        number -= block.endswith("\n")  # what follows the last newline is the next block's
        yield "".join(text if text.endswith("\n") else text + "\n" for text in texts if text)


def _document(path, number, line):
    """The text in a line of *.jsonl."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # half of a surrogate pair is no character
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}, line {number}: not a JSON object with a string "text": mend it or remove it'
        ) from error


def _decoded(path):
    """Yields a file's characters in blocks of whole lines: no character contains a newline."""
    start = 0
    with _opened(path) as file:
        # `readline` completes the last line of what was read.
        while block := file.read(READ_BYTES):
            block += file.readline()
            try:
                yield block.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = not start and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                raise UserError(
                    f"{path} is not UTF-8 at byte {start + error.start}: convert it, "
                    f"for example with iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8"
                ) from error
            start += len(block)


@contextlib.contextmanager
def _opened(path):
    """Yields the binary file of a text; `UserError` where it cannot be read, then or later."""
    compressed = path.suffix == ".gz"
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or not compressed by gzip ({error}): copy it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
