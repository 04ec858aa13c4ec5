"""Token shards: the ids of a split in one memory-mapped file, train.bin or dev.bin.

The file begins with a header that `head` shows in plain text, then come the token ids.

    header (training/io.py)                a JSON object, covered by the digest in the first line
    uint16 or uint32 ids, little-endian      one after another, no separator

The JSON holds one digest for each `block_bytes` of the ids. A block is checked against its digest
when it is first read, so a damaged byte is never trained on.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.io import UserError, first_line_bytes, pack_header, sha256, unpack_first_line

MAGIC = "babyllama-shard"
INDEX_MAGIC = "babyllama-index"  # earlier versions wrote a large split as an index and several shards
VERSION = 1
BLOCK_BYTES = 1 << 20
FIRST_LINE_BYTES = first_line_bytes(MAGIC)
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class SourceFile:
    """One text of a shard: its token span, and the words and UTF-8 bytes of its cleaned text."""

    name: str
    start: int
    stop: int
    words: int  # 0 if blanks do not separate them
    bytes: int


# ---- writing


def write_shard(file, texts, tokenizer, cleaning):
    """Writes `texts`, an iterable of (name, ids, words, bytes), as a shard. Returns its header.

    `file` is a binary file. Consecutive texts of one name are parts of one file of the shard. Only one
    text is in memory at a time. Raises `UserError` if there are no tokens.
    """
    dtype = "uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32"
    tokens, largest_id, files = 0, 0, []
    # The header precedes the ids and is known after them: they wait in a file without a name.
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as payload:
        for name, ids, words, num_bytes in texts:
            ids = np.asarray(ids)
            largest_id = max(largest_id, int(ids.max(initial=0)))
            assert ids.min(initial=0) >= 0 and largest_id < tokenizer.vocabulary_size
            if not files or files[-1]["name"] != name:
                files.append({"name": name, "start": tokens, "stop": tokens, "words": 0, "bytes": 0})
            tokens += len(ids)
            entry = files[-1]
            entry.update(stop=tokens, words=entry["words"] + words, bytes=entry["bytes"] + num_bytes)
            payload.write(ids.astype(DTYPES[dtype]).tobytes())
        if not tokens:
            raise UserError("the tokenizer makes no token of the text: use another one")
        payload.seek(0)
        counts = [entry["words"] for entry in files]
        header = {
            "shard": 1,
            "shards": 1,
            "dtype": dtype,
            "tokens": tokens,
            "words": sum(counts) if all(counts) else 0,  # words per token would mean nothing otherwise
            "bytes": sum(entry["bytes"] for entry in files),
            "vocabulary_size": tokenizer.vocabulary_size,
            "largest_id": largest_id,
            "tokenizer": tokenizer.identity,
            "cleaning": cleaning,
            "files": files,
            "block_bytes": BLOCK_BYTES,
            "digests": [sha256(block) for block in iter(lambda: payload.read(BLOCK_BYTES), b"")],
        }
        payload.seek(0)
        file.write(pack_header(MAGIC, VERSION, json.dumps(header, indent=1).encode() + b"\n"))
        shutil.copyfileobj(payload, file, BLOCK_BYTES)
    return header


# ---- reading


def _damaged(path, reason):
    return UserError(
        f"{path} is damaged: {reason}: "
        "make it again with tokenize_corpus.py, or copy it again from where it is whole"
    )


def _read_header(path):
    """The header of a shard as a checked JSON object, its length in bytes, and its digest."""
    with open(path, "rb") as file:
        line = file.read(FIRST_LINE_BYTES)
        if line.startswith(INDEX_MAGIC.encode()):
            raise UserError(
                f"{path} lists several shards, which only earlier versions read: make it again with "
                "tokenize_corpus.py, then delete the shards"
            )
        try:
            fields = unpack_first_line(line, MAGIC)
        except ValueError as error:
            raise _damaged(path, "its first line is incomplete") from error
        if fields is None:
            raise UserError(f"{path} is not a token shard: make one with tokenize_corpus.py")
        version, header_bytes, digest = fields
        if version != VERSION:
            raise UserError(
                f"{path} has format version {version}, this program reads {VERSION}: "
                "make it again with tokenize_corpus.py"
            )
        if not FIRST_LINE_BYTES <= header_bytes <= path.stat().st_size:
            raise _damaged(path, f"a header of {header_bytes} bytes is impossible")
        body = file.read(header_bytes - FIRST_LINE_BYTES)
    if sha256(body) != digest:
        raise _damaged(path, "its header does not match its digest")
    try:
        header = json.loads(body)
        valid = _is_consistent(header)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not valid:
        raise _damaged(path, "its header contradicts itself")
    expected = header_bytes + header["tokens"] * DTYPES[header["dtype"]].itemsize
    if path.stat().st_size != expected:
        raise _damaged(path, f"it has {path.stat().st_size} bytes where {expected} are expected")
    return header, header_bytes, digest


def _is_consistent(header):
    """True if no field is missing, files follow each other, and there is a digest for each block."""
    files = [SourceFile(**file) for file in header["files"]]
    tokens, block_bytes = header["tokens"], header["block_bytes"]
    itemsize = DTYPES[header["dtype"]].itemsize
    return (
        header.keys() >= {"words", "bytes", "tokenizer", "cleaning"}
        and [0, *(file.stop for file in files)] == [*(file.start for file in files), tokens]
        and header["largest_id"] < header["vocabulary_size"]
        and block_bytes % itemsize == 0
        and isinstance(header["digests"], list)
        and len(header["digests"]) == -(-tokens * itemsize // block_bytes)
    )


class TokenShard:
    """The tokens of a split, memory-mapped: `num_tokens`, `files`, and other facts of the header.

    Raises `UserError`, which names the file and the remedy, if the file is missing, is no shard or
    is of a newer version. Tokens that are not what was written raise it when they are first read.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path} does not exist: make it with "
                f"python tokenize_corpus.py --train DIR --dev DIR --out {self.path.parent}"
            )
        header, header_bytes, self.digest = _read_header(self.path)
        self.dtype = DTYPES[header["dtype"]]
        self.num_tokens, self.words, self.bytes = (header[k] for k in ("tokens", "words", "bytes"))
        self.vocabulary_size, self.tokenizer = header["vocabulary_size"], header["tokenizer"]
        self.cleaning = header["cleaning"]
        self.files = [SourceFile(**file) for file in header["files"]]
        ids = np.memmap(self.path, self.dtype, "r", offset=header_bytes, shape=(self.num_tokens,))
        self._ids = np.asarray(ids)  # a plain view of the map: faster to index
        self._block_tokens = header["block_bytes"] // self.dtype.itemsize
        self._block_digests = header["digests"]
        self._unchecked = set(range(len(self._block_digests)))

    def _check_blocks(self, blocks):
        """Raises `UserError` if a block, by its number, is damaged. Each is checked once."""
        for block in self._unchecked.intersection(blocks):
            start = block * self._block_tokens
            if sha256(self._ids[start : start + self._block_tokens]) != self._block_digests[block]:
                raise _damaged(self.path, "its tokens do not match their digests")
            self._unchecked.discard(block)

    @property
    def tokens(self):
        """All ids (N,), mapped from the file."""
        self._check_blocks(self._unchecked.copy())
        return self._ids

    def chunks(self, starts, sequence_length):
        """Inputs and targets (B, T), int64, of the chunks that begin at `starts` (B,)."""
        starts = np.asarray(starts, dtype=np.int64)
        positions = starts[:, None] + np.arange(sequence_length + 1, dtype=np.int64)
        if self._unchecked:
            self._check_blocks(np.unique(positions // self._block_tokens).tolist())
        chunk = torch.from_numpy(self._ids[positions].astype(np.int64))  # (B, T + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()
