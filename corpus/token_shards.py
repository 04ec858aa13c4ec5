"""Token shards: the ids of a split in one file or in several, memory-mapped.

A shard is one file: a header that `head` shows in plain text, then the token ids.

    header (training/io.py)                a JSON object, covered by the digest in the first line
    uint16 or uint32 ids, little-endian      one after another, no separator

The JSON holds one digest per `block_bytes` of the payload, so that any changed byte is found. A
split of more than `SHARD_TOKENS` is an index, a header alone, and beside it the shards that it
lists, each with the digest of its header: the index's own digest covers every token.
"""

import functools
import json
import mmap
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.io import (
    UserError,
    atomic_write,
    first_line_bytes,
    json_memory,
    pack_header,
    scratch_file,
    sha256,
    unpack_first_line,
)

MAGIC = "babyllama-shard"
INDEX_MAGIC = "babyllama-index"
VERSION = 1
BLOCK_BYTES = 1 << 20
SHARD_TOKENS = 100_000_000  # of each of several shards, and up to a block of text more
MAX_HEADER_BYTES = 1 << 26
FIRST_LINE_BYTES = first_line_bytes(MAGIC)
COUNTED = ("tokens", "words", "bytes")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class SourceFile:
    """One text of a shard: its token span, and words and UTF-8 bytes of its cleaned text."""

    name: str
    start: int
    stop: int
    words: int
    bytes: int


# ---- writing


class _Unwritten:
    """A shard that grows: its ids in a file without a name, what its header says in memory."""

    def __init__(self, file, path, tokenizer):
        self.file, self.path, self.tokenizer = file, path, tokenizer
        self.dtype = "uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32"
        self.tokens, self.largest, self.files = 0, 0, []
        self.digests, self.block = [], bytearray()

    def add(self, name, ids, words, num_bytes):
        """Adds the ids of a text, or of a further part of it; `UserError` if one is no piece's."""
        ids = np.asarray(ids)
        if len(ids):
            if ids.min() < 0 or ids.max() >= self.tokenizer.vocabulary_size:
                pieces = self.tokenizer.vocabulary_size
                raise UserError(f"{self.path}: token ids reach beyond {pieces} pieces")
            self.largest = max(self.largest, int(ids.max()))
        self.tokens += len(ids)
        span = {"name": name, "start": self.tokens - len(ids), "stop": self.tokens}
        _append_file(self.files, span | {"words": words, "bytes": num_bytes})
        self.block += ids.astype(DTYPES[self.dtype]).tobytes()
        while len(self.block) >= BLOCK_BYTES:
            self._flush()

    def _flush(self):
        with memoryview(self.block)[:BLOCK_BYTES] as block:
            self.digests.append(sha256(block))
            self.file.write(block)
        del self.block[:BLOCK_BYTES]

    def write(self, path, cleaning, number=1, total=1):
        """Writes it to `path` as shard `number` of `total`: its header and that one's digest."""
        if self.block:
            self._flush()
        header = {
            "shard": number,
            "shards": total,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "words": sum(file["words"] for file in self.files),
            "bytes": sum(file["bytes"] for file in self.files),
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "largest_id": self.largest,
            "tokenizer": self.tokenizer.identity,
            "cleaning": cleaning,
            "files": self.files,
            "block_bytes": BLOCK_BYTES,
            "digests": self.digests,
        }
        self.file.seek(0)
        packed = _packed(MAGIC, header)
        with atomic_write(path) as file:
            file.write(packed)
            shutil.copyfileobj(self.file, file, BLOCK_BYTES)
        return header, unpack_first_line(packed[:FIRST_LINE_BYTES], MAGIC)[2]


def _packed(magic, header):
    return pack_header(magic, VERSION, json.dumps(header, indent=1).encode() + b"\n")


def _append_file(files, more):
    """Appends a file's span to those before it, or makes the last one longer if it is the same."""
    if files and files[-1]["name"] == more["name"]:
        counts = {key: files[-1][key] + more[key] for key in ("words", "bytes")}
        files[-1] = files[-1] | counts | {"stop": more["stop"]}
    else:
        files.append(more)


def write_shard(path, texts, tokenizer, cleaning):
    """Writes `texts`, a list of (name, ids, words, bytes), as one shard, and returns its header.

    Raises `UserError` if an id lies beyond the vocabulary or there are no tokens.
    """
    with scratch_file(path) as file:
        shard = _Unwritten(file, path, tokenizer)
        for text in texts:
            shard.add(*text)
        if not shard.tokens:
            raise UserError(f"{path}: there is no text to write")
        return shard.write(path, cleaning)[0]


def write_split(path, texts, tokenizer, cleaning, finished=()):
    """Writes `texts`, an iterable of (name, ids, words, bytes), as one shard or as several.

    `texts` are what follows the shards that are `finished`, as `finished_shards` finds them. The
    name `path` is there once all is. Returns the header of the shard, or of the index. Raises
    `UserError` as `write_shard` does.
    """
    path, texts, shards = Path(path), iter(texts), list(finished)
    text = next(texts, None)
    if text is None and not shards:
        raise UserError(f"{path}: there is no text to write")
    while text is not None:
        with scratch_file(path) as file:
            shard = _Unwritten(file, path, tokenizer)
            while text is not None and shard.tokens < SHARD_TOKENS:
                shard.add(*text)
                text = next(texts, None)
            if text is None and not shards:
                return shard.write(path, cleaning)[0]
            number = len(shards) + 1  # of how many, only the index knows
            shards.append(shard.write(shard_path(path, number), cleaning, number, None))
    index = _index(path, shards)
    with atomic_write(path) as file:
        file.write(_packed(INDEX_MAGIC, index))
    return index


def shard_path(path, number):
    """The file of a shard of several: train-00001.bin beside train.bin."""
    return path.with_name(f"{path.stem}-{number:05d}{path.suffix}")


def finished_shards(path):
    """[(header, digest)] of the shards beside `path` that are whole, from the first without gap.

    Their payloads are not read.
    """
    found = []
    while (part := shard_path(path, len(found) + 1)).is_file():
        try:
            header, digest = _read_shard_header(part, len(found) + 1)
        except UserError:
            break
        found.append((header, digest))
    return found


def _index(path, shards):
    """The header of the index `path` of shards, [(header, digest)]."""
    listed, files, start = [], [], 0
    for number, (header, digest) in enumerate(shards, 1):
        counts = {key: header[key] for key in COUNTED}
        listed.append({"name": shard_path(path, number).name, **counts, "digest": digest})
        for file in header["files"]:
            span = {"start": start + file["start"], "stop": start + file["stop"]}
            _append_file(files, file | span)
        start += header["tokens"]
    first = shards[0][0]
    return {
        "shards": listed,
        **{key: sum(shard[key] for shard in listed) for key in COUNTED},
        **{key: first[key] for key in ("dtype", "vocabulary_size", "tokenizer", "cleaning")},
        "largest_id": max(header["largest_id"] for header, _ in shards),
        "files": files,
    }


# ---- reading


def _damaged(path, what):
    return UserError(
        f"{path} is damaged: {what}: make it again with tokenize_corpus.py, "
        "or copy it again from where it is whole"
    )


def _read_header(path, *magics):
    """The magic of a file, its header as JSON, the header's bytes and digest."""
    with open(path, "rb") as file:
        magic, header_bytes, digest = _parse_first_line(path, file.read(FIRST_LINE_BYTES), magics)
        body = file.read(header_bytes - FIRST_LINE_BYTES)
    if sha256(body) != digest:
        raise _damaged(path, "its header does not match its digest")
    # In what is written here there is far more text to each value.
    if json_memory(body) > (64 << 20) + 6 * len(body):
        raise _damaged(path, "its header is not one that is written here")
    try:
        return magic, json.loads(body), header_bytes, digest
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error


def _parse_first_line(path, line, magics):
    """The magic, the bytes of the header and its digest. Raises `UserError` for another file."""
    for magic in magics:
        try:
            fields = unpack_first_line(line, magic)
        except ValueError as error:
            raise _damaged(path, "its first line is incomplete") from error
        if fields is None:
            continue
        version, header_bytes, digest = fields
        if version != VERSION:
            raise UserError(
                f"{path} has format version {version}, this program reads {VERSION}: "
                "make it again with tokenize_corpus.py"
            )
        if not FIRST_LINE_BYTES <= header_bytes <= MAX_HEADER_BYTES:
            raise _damaged(path, f"a header of {header_bytes} bytes is impossible")
        return magic, header_bytes, digest
    raise UserError(f"{path} is not a token shard: make one with tokenize_corpus.py")


def _check_totals(path, header):
    """Raises `UserError` unless what shards and indices have in common makes sense."""
    try:
        counts = [header[k] for k in ("tokens", "words", "bytes", "vocabulary_size", "largest_id")]
        files = [SourceFile(**f) for f in header["files"]]
        counts += [n for f in files for n in (f.start, f.stop, f.words, f.bytes)]
        valid = all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
        valid = valid and header["dtype"] in DTYPES and isinstance(header["tokenizer"], str)
        bounds = [0] + [f.stop for f in files]
        valid = valid and bounds == [f.start for f in files] + [header["tokens"]]
        valid = valid and bounds == sorted(bounds)
    except (KeyError, TypeError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not valid:
        raise _damaged(path, "its header contradicts itself")
    if header["largest_id"] >= header["vocabulary_size"]:
        raise UserError(
            f"{path}: token id {header['largest_id']} lies beyond its vocabulary of "
            f"{header['vocabulary_size']}: make it again with tokenize_corpus.py"
        )


def _check_shard(path, header, number, header_bytes):
    """Raises `UserError` unless it is the header of a shard: of that number if it is of several."""
    _check_totals(path, header)
    try:
        valid = type(header["block_bytes"]) is int and 0 < header["block_bytes"] < 1 << 63
        valid = valid and isinstance(header["digests"], list)
        place = header["shard"], header["shards"]
    except KeyError as error:
        raise _damaged(path, "its header cannot be read") from error
    if not valid:
        raise _damaged(path, "its header contradicts itself")
    if number is None and place != (1, 1):
        raise UserError(f"{path} is one of several shards: their index, without a number, is read")
    if number is not None and place != (number, None):
        raise _damaged(path, "it is another shard than its name says")
    _check_size(path, header_bytes, header["tokens"], header["dtype"])


def _check_size(path, header_bytes, tokens, dtype):
    expected, actual = header_bytes + tokens * DTYPES[dtype].itemsize, path.stat().st_size
    if actual != expected:
        raise _damaged(path, f"it has {actual} bytes where {expected} are expected")


def _read_shard_header(path, number):
    """The header and the digest of a shard, the one of that number if it is of several."""
    _, header, header_bytes, digest = _read_header(path, MAGIC)
    _check_shard(path, header, number, header_bytes)
    return header, digest


def split_header(path):
    """The header of a split, a shard or an index, without a look at its payload."""
    magic, header, header_bytes, _ = _read_header(path, MAGIC, INDEX_MAGIC)
    if magic == INDEX_MAGIC:
        _check_index(path, header)
    else:
        _check_shard(path, header, None, header_bytes)
    return header


def _check_index(path, header):
    """Raises `UserError` unless it is the header of an index."""
    _check_totals(path, header)
    try:
        shards = header["shards"]
        names = [shard_path(path, number + 1).name for number in range(len(shards))]
        valid = len(names) > 0 and [shard["name"] for shard in shards] == names
        valid = valid and all(isinstance(shard["digest"], str) for shard in shards)
        counts = [shard[key] for shard in shards for key in COUNTED]
        valid = valid and all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
        valid = valid and all(sum(s[key] for s in shards) == header[key] for key in COUNTED)
    except (KeyError, TypeError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not valid:
        raise _damaged(path, "its header contradicts itself")


class _Part:
    """One file of a split: `ids` are mapped, and verified, when they are first asked for."""

    def __init__(self, path, tokens, dtype, digest, number=None):
        self.path, self.tokens, self.dtype = path, tokens, dtype
        self.digest, self.number = digest, number

    def check(self):
        """Raises `UserError` if the file is not there, or by its first line is another one."""
        if not self.path.is_file():
            raise UserError(
                f"{self.path} does not exist: copy it there, beside its index, or make "
                "all again with tokenize_corpus.py"
            )
        with open(self.path, "rb") as file:
            line = file.read(FIRST_LINE_BYTES)
        _, header_bytes, digest = _parse_first_line(self.path, line, [MAGIC])
        if digest != self.digest:
            raise _damaged(self.path, "it is not the shard that its index lists")
        _check_size(self.path, header_bytes, self.tokens, self.dtype)

    @functools.cached_property
    def ids(self):
        """The ids (N,) of the file. Raises `UserError` if any byte is not what was written."""
        _, header, header_bytes, digest = _read_header(self.path, MAGIC)
        _check_shard(self.path, header, self.number, header_bytes)
        if (digest, header["tokens"], header["dtype"]) != (self.digest, self.tokens, self.dtype):
            raise _damaged(self.path, "it is not the shard that its index lists")
        with open(self.path, "rb") as file:
            payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        payload, block_bytes = payload[header_bytes:], header["block_bytes"]
        starts, digests = range(0, len(payload), block_bytes), header["digests"]
        pairs = zip(starts, digests)
        if len(starts) != len(digests) or not all(
            sha256(payload[start : start + block_bytes]) == digest for start, digest in pairs
        ):
            raise _damaged(self.path, "its tokens do not match their digests")
        return np.frombuffer(payload, dtype=DTYPES[self.dtype])


class TokenShard:
    """The tokens of a split, memory-mapped: `num_tokens`, `files`, and the header's facts.

    `path` is a shard, which is verified here, or an index, whose shards are verified each when it
    is first read. `UserError`, then or now, names the file and the remedy if it is missing, is no
    shard, is of a newer version, or if any byte of it is not what was written.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path} does not exist: make it with "
                f"python tokenize_corpus.py --train DIR --dev DIR --out {self.path.parent}"
            )
        magic, header, header_bytes, digest = _read_header(self.path, MAGIC, INDEX_MAGIC)
        if magic == INDEX_MAGIC:
            _check_index(self.path, header)
            self._parts = [
                _Part(self.path.with_name(s["name"]), s["tokens"], header["dtype"], s["digest"], k)
                for k, s in enumerate(header["shards"], 1)
            ]
            for part in self._parts:
                part.check()
        else:
            _check_shard(self.path, header, None, header_bytes)
            self._parts = [_Part(self.path, header["tokens"], header["dtype"], digest)]
            self._parts[0].ids  # noqa: B018, to verify it
        self.dtype = DTYPES[header["dtype"]]
        self.num_tokens, self.words, self.bytes = (header[k] for k in ("tokens", "words", "bytes"))
        self.vocabulary_size, self.tokenizer = header["vocabulary_size"], header["tokenizer"]
        self.files = [SourceFile(**f) for f in header["files"]]
        self.digest = digest  # covers the header, and in it the digests of the tokens
        self._stops = np.cumsum([part.tokens for part in self._parts], dtype=np.int64)

    @property
    def tokens(self):
        """All ids (N,): as they are mapped from one file, or a copy of those of several."""
        arrays = [part.ids for part in self._parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def pieces(self):
        """Yields all ids in order, (N_k,) of each file."""
        for part in self._parts:
            yield part.ids

    def chunks(self, starts, sequence_length):
        """Inputs and targets (B, T), int64, of the chunks that begin at `starts` (B,)."""
        starts = np.asarray(starts, dtype=np.int64)
        positions = starts[:, None] + np.arange(sequence_length + 1, dtype=np.int64)
        chunk = torch.from_numpy(self._gathered(positions))  # (B, T + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()

    def _gathered(self, positions):
        """The ids at `positions`, of any shape, as int64."""
        if len(self._parts) == 1:
            return self._parts[0].ids[positions].astype(np.int64)
        which = np.searchsorted(self._stops, positions, side="right")
        ids = np.empty(positions.shape, np.int64)
        for k in np.unique(which):  # a chunk may begin in one file and end in the next
            here, start = which == k, self._stops[k] - self._parts[k].tokens
            ids[here] = self._parts[k].ids[positions[here] - start]
        return ids
