"""What tokenize_corpus.py wrote into a folder, and the order of batches.

A batch is a function of (seed, step) and of nothing else: resuming, or asking what step 1234 saw,
needs only the number. How tokens are kept in files: corpus/token_shards.py.
"""

import concurrent.futures
import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from corpus.token_shards import TokenShard
from tokenizer import Tokenizer
from training.io import UserError

GPU_SHARE = 1 / 8  # of a GPU's free memory that tokens may take
COPIED_TOKENS = 1 << 24  # at a time, on their way to a GPU
DEV_SUBSET_SEED = 2023  # the original's: every model is compared on the same dev chunks


# ---- a corpus


@dataclass(frozen=True)
class Corpus:
    """What tokenize_corpus.py wrote into a folder: both splits, and their tokenizer."""

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
                f"{shard.path} was not made with {folder / 'tokenizer.model'}: run tokenize_corpus.py again"
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

    def rank_slice(self, rank, size):
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
    all tokens are kept there, in two bytes each where the vocabulary allows, if they fit into
    `GPU_SHARE` of its free memory: a batch is then gathered without a copy of tokens. `num_tokens`
    and `words` are those of an epoch. Raises `UserError` if the shard is shorter than one batch.
    """

    def __init__(self, shard, batch_size, sequence_length, seed, random_offset=False, device="cpu"):
        self.shard, self.batch_size, self.seed = shard, batch_size, seed
        self.num_tokens, self.words = shard.num_tokens, shard.words
        self.sequence_length, self.random_offset = sequence_length, random_offset
        self.resident = None
        if torch.device(device).type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.resident_bytes <= GPU_SHARE * free:
                self.keep_on(device)
        self.num_chunks = count_chunks(shard.num_tokens, sequence_length, random_offset)
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
            if self.resident.dtype == torch.int16:
                chunk &= 0xFFFF  # an id above 32,767 was kept as the negative number of its bits
            tokens, targets = chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()
        # Every target counts: to count them on the device would wait for it.
        return Batch(chunk_ids, tokens, targets, len(tokens), targets.numel())

    @property
    def resident_bytes(self):
        """What `keep_on` takes."""
        return self.num_tokens * (2 if self.shard.dtype.itemsize == 2 else 4)

    def keep_on(self, device):
        """Keeps the shard's tokens on `device`, and gathers batches there."""
        narrow = self.shard.dtype.itemsize == 2
        dtype = torch.int16 if narrow else torch.int32  # uint16 cannot be indexed everywhere
        self.resident = torch.empty(self.num_tokens, dtype=dtype, device=device)
        ids = self.shard.tokens
        for start in range(0, len(ids), COPIED_TOKENS):
            part = ids[start : start + COPIED_TOKENS]
            part = part.view(np.int16) if narrow else part.astype(np.int32)
            self.resident[start : start + len(part)] = torch.from_numpy(part.copy())


class PrefetchStream:
    """The batches of a stream, each gathered from the files while the one before it is computed on.

    `stream(step)` is on the device. To a GPU a batch is copied from pinned memory, on a CUDA stream
    of its own, so that what is still computed there is not waited for. The thread that gathers
    calls nothing of CUDA, which could disturb the capture of a graph. What goes wrong in it is
    raised when that batch is asked for.
    """

    def __init__(self, stream, device):
        self.stream, self.device = stream, torch.device(device)
        self.num_chunks, self.words = stream.num_chunks, stream.words
        self.num_tokens = stream.num_tokens
        self.copies = torch.cuda.Stream(device) if self.device.type == "cuda" else None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.step, self.gathered = None, None

    def __call__(self, step):
        if step != self.step:  # the first one, or that of a run which is resumed
            self.gathered = self.thread.submit(self.stream, step)
        batch = self.gathered.result()
        self.step, self.gathered = step + 1, self.thread.submit(self.stream, step + 1)
        if self.copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.copies):
            batch = batch.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        for tensor in batch.tensors():
            tensor.record_stream(computing)  # until that is done, no later copy gets its memory
        return batch


def prefetch(stream, device):
    """The stream, or, where a GPU has no room for its tokens, an `PrefetchStream` of it."""
    away = torch.device(device).type == "cuda" and stream.resident is None
    return PrefetchStream(stream, device) if away else stream


def dev_subset(shard, sequence_length, num_sequences):
    """Starts (at most `num_sequences`,) of dev chunks: in order, and the same for every run.

    Raises `UserError` if the shard holds no whole chunk.
    """
    num_chunks = count_chunks(shard.num_tokens, sequence_length)
    if not num_chunks:
        raise UserError(
            f"{shard.path} has {shard.num_tokens} tokens, fewer than one chunk of "
            f"{sequence_length}: add text or lower --sequence-length"
        )
    generator = torch.Generator().manual_seed(DEV_SUBSET_SEED)
    chosen = torch.randperm(num_chunks, generator=generator)[:num_sequences]
    return (chosen.sort().values * sequence_length).numpy()
