"""Token shards (format, writer, memory-mapped reader), the tokenizer, and the order of batches.

A shard is one file: a header that `head` shows in plain text, then the token ids.

    header (harness/files.py)                a JSON object, covered by the digest in the first line
    uint16 or uint32 ids, little-endian      one after another, no separator

The JSON holds one digest per `block_bytes` of the payload, so that any changed byte is found on
opening. A batch is a function of (seed, step) and of nothing else: resuming, or asking what step
1234 saw, needs only the number.
"""

import functools
import hashlib
import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from harness.files import (
    UserError,
    atomic_write,
    first_line_bytes,
    json_memory,
    pack_header,
    sha256,
    unpack_first_line,
)

MAGIC = "babyllama-shard"
VERSION = 1
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 26
FIRST_LINE_BYTES = first_line_bytes(MAGIC)
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

PAD, BOS, EOS, UNK = 0, 1, 2, 3  # the paper's ids, and unk; none occurs in training text
DEV_SUBSET_SEED = 2023  # the original's: every model is compared on the same dev chunks


# ---- tokenizer


class Tokenizer:
    """A SentencePiece model with an identity.

    `identity` is the SHA-256 of the list of (piece, type, score): two files of the same pieces are
    the same tokenizer, two tokenizers of the same size are not.
    """

    def __init__(self, model_bytes, name="tokenizer.model"):
        self.model_bytes = bytes(model_bytes)
        # A piece begins with this byte, and takes up to 80 bytes of memory.
        if 80 * self.model_bytes.count(b"\n") > (64 << 20) + 6 * len(self.model_bytes):
            raise UserError(f"{name} is not a SentencePiece model: it is nothing but empty pieces")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocabulary_size = self.processor.vocab_size()
            self.identity = self._identity()
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: pieces in no UTF-8
            raise UserError(f"{name} is not a SentencePiece model, or is damaged") from error
        if not self.vocabulary_size:
            raise UserError(f"{name} is not a SentencePiece model: it has no pieces")

    def _identity(self):
        flags = ("is_control", "is_unknown", "is_byte", "is_unused")
        digest = hashlib.sha256()
        for i in range(self.vocabulary_size):
            properties = [int(getattr(self.processor, flag)(i)) for flag in flags]
            piece = [self.processor.id_to_piece(i), properties, repr(self.processor.get_score(i))]
            digest.update(json.dumps(piece).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, path):
        """The tokenizer in `path`. Raises `UserError` where there is none."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: make it with python tokenize_corpus.py")
        return cls(path.read_bytes(), str(path))

    @classmethod
    def of_checkpoint(cls, checkpoint, path):
        """The tokenizer in a checkpoint that was read from `path`.

        Raises `UserError` if it is damaged, another than the checkpoint says, or too large for it.
        """
        described = checkpoint["tokenizer"]
        tokenizer = cls(described["model"].numpy(), f"the tokenizer in {path}")
        fits = tokenizer.vocabulary_size <= checkpoint["model"]["shape"]["vocab_size"]
        if not fits or tokenizer.identity != described["identity"]:
            raise UserError(f"the tokenizer in {path} is not that of its model: use another")
        return tokenizer

    def encode(self, text):
        """The ids of `text`; no special token is added, and none is ever produced by text."""
        return self.processor.encode(text)

    def decode(self, ids):
        """The text of `ids`: what was encoded, but for U+2581, which comes back as a space."""
        return self.processor.decode([int(i) for i in ids])


# ---- shards


@dataclass(frozen=True)
class SourceFile:
    """One text of a shard: its token span, and words and UTF-8 bytes of its cleaned text."""

    name: str
    start: int
    stop: int
    words: int
    bytes: int


def write_shard(path, texts, tokenizer, cleaning):
    """Writes `texts`, a list of (name, ids, words, bytes), as one shard, and returns its header.

    Raises `UserError` if an id lies beyond the vocabulary or there are no tokens.
    """
    ids = np.concatenate([np.asarray(t[1]) for t in texts] or [np.zeros(0, int)])
    if not len(ids):
        raise UserError(f"{path}: there is no text to write")
    if ids.min() < 0 or ids.max() >= tokenizer.vocabulary_size:
        raise UserError(f"{path}: token ids reach beyond {tokenizer.vocabulary_size} pieces")
    dtype = "uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32"
    payload = memoryview(ids.astype(DTYPES[dtype])).cast("B")
    sources, start = [], 0
    for name, file_ids, words, num_bytes in texts:
        stop = start + len(file_ids)
        sources.append(
            {"name": name, "start": start, "stop": stop, "words": words, "bytes": num_bytes}
        )
        start = stop
    header = {
        "shard": 1,
        "shards": 1,
        "dtype": dtype,
        "tokens": len(ids),
        "words": sum(t[2] for t in texts),
        "bytes": sum(t[3] for t in texts),
        "vocabulary_size": tokenizer.vocabulary_size,
        "largest_id": int(ids.max()),
        "tokenizer": tokenizer.identity,
        "cleaning": cleaning,
        "files": sources,
        "block_bytes": BLOCK_BYTES,
        "digests": _block_digests(payload, BLOCK_BYTES),
    }
    with atomic_write(path) as file:
        file.write(pack_header(MAGIC, VERSION, json.dumps(header, indent=1).encode() + b"\n"))
        file.write(payload)
    return header


def _block_digests(payload, block_bytes):
    return [sha256(payload[i : i + block_bytes]) for i in range(0, len(payload), block_bytes)]


class TokenShard:
    """A verified, memory-mapped shard: `tokens` (N,) ids, `files`, and the header's facts.

    Raises `UserError`, naming the file and the remedy, if it is missing, is no shard, is of a newer
    version, or if any byte of it is not what was written.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path} does not exist: make it with "
                f"python tokenize_corpus.py --train DIR --dev DIR --out {self.path.parent}"
            )
        with open(self.path, "rb") as file:
            first_line = file.read(FIRST_LINE_BYTES)
            header_bytes, digest = self._parse_first_line(first_line)
            body = file.read(header_bytes - FIRST_LINE_BYTES)
            if sha256(body) != digest:
                raise self._damaged("its header does not match its digest")
            header = self._parse_header(body)
            expected = header_bytes + header["tokens"] * DTYPES[header["dtype"]].itemsize
            actual = self.path.stat().st_size
            if actual != expected:
                raise self._damaged(f"it has {actual} bytes where {expected} are expected")
            payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        payload = payload[header_bytes:]
        if _block_digests(payload, header["block_bytes"]) != header["digests"]:
            raise self._damaged("its tokens do not match their digests")
        self.tokens = np.frombuffer(payload, dtype=DTYPES[header["dtype"]])
        self.words, self.bytes = header["words"], header["bytes"]
        self.vocabulary_size, self.tokenizer = header["vocabulary_size"], header["tokenizer"]
        self.files = [SourceFile(**f) for f in header["files"]]
        self.digest = digest  # covers the header, and in it the digests of the tokens

    def _parse_first_line(self, line):
        try:
            fields = unpack_first_line(line, MAGIC)
        except ValueError as error:
            raise self._damaged("its first line is incomplete") from error
        if fields is None:
            raise UserError(f"{self.path} is not a token shard: make one with tokenize_corpus.py")
        version, header_bytes, digest = fields
        if version != VERSION:
            raise UserError(
                f"{self.path} has format version {version}, this program reads {VERSION}: "
                "make it again with tokenize_corpus.py"
            )
        if not FIRST_LINE_BYTES <= header_bytes <= MAX_HEADER_BYTES:
            raise self._damaged(f"a header of {header_bytes} bytes is impossible")
        return header_bytes, digest

    def _parse_header(self, body):
        # In what `write_shard` writes there is far more text to each value.
        if json_memory(body) > (64 << 20) + 6 * len(body):
            raise self._damaged("its header is not one that is written here")
        try:
            header = json.loads(body)
            counts = [header[k] for k in ("tokens", "words", "bytes", "vocabulary_size")]
            counts += [header["largest_id"], header["block_bytes"]]
            files = [SourceFile(**f) for f in header["files"]]
            counts += [n for f in files for n in (f.start, f.stop, f.words, f.bytes)]
            valid = all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
            valid = valid and header["dtype"] in DTYPES and header["block_bytes"] > 0
            valid = valid and isinstance(header["tokenizer"], str)
            bounds = [0] + [f.stop for f in files]
            valid = valid and bounds == [f.start for f in files] + [header["tokens"]]
            valid = valid and bounds == sorted(bounds)
            valid = valid and isinstance(header["digests"], list)
            single = (header["shard"], header["shards"]) == (1, 1)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged("its header cannot be read") from error
        if not valid:
            raise self._damaged("its header contradicts itself")
        if not single:
            raise UserError(f"{self.path} is one of several shards: only single shards are read")
        if header["largest_id"] >= header["vocabulary_size"]:
            raise UserError(
                f"{self.path}: token id {header['largest_id']} lies beyond its vocabulary of "
                f"{header['vocabulary_size']}: make it again with tokenize_corpus.py"
            )
        return header

    def _damaged(self, what):
        return UserError(
            f"{self.path} is damaged: {what}: make it again with tokenize_corpus.py, "
            "or copy it again from where it is whole"
        )

    def chunks(self, starts, sequence_length):
        """Inputs and targets (B, T), int64, of the chunks that begin at `starts` (B,)."""
        positions = np.asarray(starts)[:, None] + np.arange(sequence_length + 1)
        chunk = torch.from_numpy(self.tokens[positions].astype(np.int64))  # (B, T + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


@dataclass(frozen=True)
class Corpus:
    """What tokenize_corpus.py wrote into a folder: both shards, and their tokenizer."""

    folder: Path
    train: TokenShard
    dev: TokenShard
    tokenizer: Tokenizer


def open_corpus(folder):
    """The corpus in `folder`. `UserError` if a file is missing, damaged or foreign."""
    folder = Path(folder)
    corpus = Corpus(
        folder,
        TokenShard(folder / "train.bin"),
        TokenShard(folder / "dev.bin"),
        Tokenizer.load(folder / "tokenizer.model"),
    )
    tokenizer = (corpus.tokenizer.identity, corpus.tokenizer.vocabulary_size)
    for shard in (corpus.train, corpus.dev):
        if (shard.tokenizer, shard.vocabulary_size) != tokenizer:
            raise UserError(
                f"{shard.path} was not made with {folder / 'tokenizer.model'}: "
                "run tokenize_corpus.py again"
            )
    return corpus


# ---- the order of batches


@dataclass(frozen=True)
class Batch:
    """B chunks, or a part of them: `chunk_ids` (B,), `tokens` (B, T), `targets` (B, T).

    `teacher_states`, K × (B, T, C_k), are there once an objective with teachers has prepared it.
    `num_sequences` and `num_targets` count the whole step, not this part of it: losses divide by
    them, so that micro-batches, however uneven, add up to the one batch.
    """

    chunk_ids: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor
    num_sequences: int
    num_targets: int
    teacher_states: tuple = ()

    @classmethod
    def whole(cls, chunk_ids, tokens, targets):
        """The batch of a whole step; targets below 0, which have no loss, are not counted."""
        return cls(chunk_ids, tokens, targets, len(tokens), int((targets >= 0).sum()))

    def share(self, rank, size):
        """The sequences of one of `size` processes; the counts stay those of the whole step."""
        tensors = (t[rank::size].contiguous() for t in (self.chunk_ids, self.tokens, self.targets))
        return Batch(*tensors, self.num_sequences, self.num_targets)

    def split(self, size):
        """Parts of at most `size` sequences, or of the sizes in that list."""
        parts = zip(self.chunk_ids.split(size), self.tokens.split(size), self.targets.split(size))
        return [Batch(*part, self.num_sequences, self.num_targets) for part in parts]

    def tensors(self):
        """All that a step reads of it on the device."""
        return (self.tokens, self.targets, *self.teacher_states)

    def counts(self):
        """Sequences and positions of this part, and what losses divide by."""
        return (*self.tokens.shape, self.num_sequences, self.num_targets)

    def clone(self):
        """The same in memory of its own."""
        tokens, targets, *states = (tensor.clone() for tensor in self.tensors())
        return replace(self, tokens=tokens, targets=targets, teacher_states=tuple(states))

    def to(self, device):
        """The batch on `device`, but for the chunk ids; a copy to CUDA does not wait for it."""

        def move(tensor):
            if device.type == "cuda" and not tensor.is_cuda:
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return replace(
            self,
            tokens=move(self.tokens),
            targets=move(self.targets),
        )


def count_chunks(num_tokens, sequence_length, random_offset=False):
    """Chunks of T inputs and T targets; with a random offset the last one may start T - 1 later."""
    if random_offset:
        return max(num_tokens // sequence_length - 1, 0)
    return max((num_tokens - 1) // sequence_length, 0)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, num_chunks, sequence_length, random_offset):
    """The epoch's permutation of chunk ids and where each chunk starts, both (N,), by position.

    A function of its arguments alone. The generator gets 32 bits, all that it uses, of a hash.
    """
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    chunk_ids = torch.randperm(num_chunks, generator=generator)
    starts = chunk_ids * sequence_length
    if random_offset:
        starts = starts + torch.randint(sequence_length, (num_chunks,), generator=generator)
    return chunk_ids, starts


class BatchStream:
    """`stream(step)` is the step's batch: consecutive positions of the epochs' permutations.

    Every chunk is seen once an epoch, no batch is ragged, and a batch may span two epochs. On a GPU
    the whole shard is kept there, four bytes a token, and a batch is gathered without a copy of
    tokens. `num_tokens` and `words` are those of an epoch. Raises `UserError` if the shard is
    shorter than one batch.
    """

    def __init__(self, shard, batch_size, sequence_length, seed, random_offset=False, device="cpu"):
        self.shard, self.batch_size, self.seed = shard, batch_size, seed
        self.num_tokens, self.words = len(shard.tokens), shard.words
        self.sequence_length, self.random_offset = sequence_length, random_offset
        self.resident = None
        if torch.device(device).type == "cuda":
            self.keep_on(device)
        self.num_chunks = count_chunks(len(shard.tokens), sequence_length, random_offset)
        if self.num_chunks < batch_size:
            raise UserError(
                f"{shard.path} has {self.num_chunks} chunks of {sequence_length} tokens, fewer "
                f"than one batch of {batch_size}: lower --batch-size or add text"
            )

    def __call__(self, step):
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chunk_ids, starts = [], []
        for epoch in np.unique(positions // self.num_chunks):
            order = epoch_order(
                self.seed, int(epoch), self.num_chunks, self.sequence_length, self.random_offset
            )
            here = positions[positions // self.num_chunks == epoch] % self.num_chunks
            chunk_ids.append(order[0][here])
            starts.append(order[1][here])
        chunk_ids, starts = torch.cat(chunk_ids), torch.cat(starts)
        if self.resident is None:
            tokens, targets = self.shard.chunks(starts.numpy(), self.sequence_length)
        else:
            device = self.resident.device
            positions = torch.arange(self.sequence_length + 1, device=device)
            positions = positions + starts.to(device, non_blocking=True)[:, None]  # (B, T + 1)
            chunk = self.resident[positions].long()
            tokens, targets = chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()
        # Every target counts: to count them on the device would wait for it.
        return Batch(chunk_ids, tokens, targets, len(tokens), targets.numel())

    def keep_on(self, device):
        """Keeps the shard's tokens on `device`, and gathers batches there."""
        self.resident = torch.from_numpy(self.shard.tokens.astype(np.int32)).to(device)


def dev_subset(shard, sequence_length, num_sequences):
    """Starts (at most `num_sequences`,) of dev chunks: in order, and the same for every run.

    Raises `UserError` if the shard holds no whole chunk.
    """
    num_chunks = count_chunks(len(shard.tokens), sequence_length)
    if not num_chunks:
        raise UserError(
            f"{shard.path} has {len(shard.tokens)} tokens, fewer than one chunk of "
            f"{sequence_length}: add text or lower --sequence-length"
        )
    generator = torch.Generator().manual_seed(DEV_SUBSET_SEED)
    chosen = torch.randperm(num_chunks, generator=generator)[:num_sequences]
    return (chosen.sort().values * sequence_length).numpy()
