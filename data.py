"""Batches of a tokenised corpus and their order.

A chunk is `sequence_length` consecutive tokens of a shard, with the next token of each as target. A
batch depends on (seed, step) only: the number of a step says which text it saw.
"""

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from corpus.token_shards import TokenShard
from tokenizer import Tokenizer
from training.io import UserError

GPU_FRACTION = 1 / 8  # of a GPU's free memory that the training tokens may take
DEV_SUBSET_SEED = 2023  # as in the paper's code: every model is compared on the same dev chunks


# ---- a corpus


@dataclass(frozen=True)
class Corpus:
    """A folder that tokenize_corpus.py wrote: both splits and their tokenizer."""

    folder: Path
    train: TokenShard
    dev: TokenShard
    tokenizer: Tokenizer


def open_corpus(folder):
    """The corpus in `folder`. Raises `UserError` if a file is missing, damaged or of another corpus."""
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
    """Sequences of one step: `chunk_ids` (B,), `tokens` (B, T), and the next tokens, `targets` (B, T).

    `num_sequences` and `num_targets` count the whole step even in a micro-batch or in a rank's
    slice. Losses divide by them, so that parts of any size add up to the loss of the one batch.
    `teacher_states`, K × (B, T, C_k), are filled in by an objective with teachers.
    """

    chunk_ids: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor
    num_sequences: int
    num_targets: int
    teacher_states: tuple = ()

    @classmethod
    def whole(cls, chunk_ids, tokens, targets):
        """The batch of a whole step. Targets below 0 have no loss and are not counted."""
        return cls(chunk_ids, tokens, targets, len(tokens), int((targets >= 0).sum()))

    def rank_slice(self, rank, world_size):
        """The sequences of a rank: number `rank`, and every `world_size`-th after it."""
        tensors = (t[rank::world_size].contiguous() for t in (self.chunk_ids, self.tokens, self.targets))
        return Batch(*tensors, self.num_sequences, self.num_targets)

    def split(self, size):
        """Micro-batches of at most `size` sequences, or of the sizes in the list `size`."""
        parts = zip(self.chunk_ids.split(size), self.tokens.split(size), self.targets.split(size))
        return [Batch(*part, self.num_sequences, self.num_targets) for part in parts]

    def tensors(self):
        """All tensors that a step reads on the device."""
        return (self.tokens, self.targets, *self.teacher_states)

    def counts(self):
        """(B, T, num_sequences, num_targets)."""
        return (*self.tokens.shape, self.num_sequences, self.num_targets)

    def to(self, device):
        """The batch with tokens and targets on `device`; the CPU does not wait for a copy to CUDA."""

        def move(tensor):
            if device.type == "cuda" and not tensor.is_cuda:
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        return replace(self, tokens=move(self.tokens), targets=move(self.targets))


def count_chunks(num_tokens, sequence_length, random_offset=False):
    """The number of chunks; a random offset of up to T - 1 tokens needs room behind the last one."""
    if random_offset:
        return max(num_tokens // sequence_length - 1, 0)
    return max((num_tokens - 1) // sequence_length, 0)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, num_chunks, sequence_length, random_offset):
    """The chunk ids of an epoch in their order, and the first token of each chunk: both (N,).

    The same arguments give the same order. torch's generator uses only 32 bits of a seed, so seed
    and epoch are hashed into these 32 bits.
    """
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    chunk_ids = torch.randperm(num_chunks, generator=generator)
    starts = chunk_ids * sequence_length
    if random_offset:
        starts = starts + torch.randint(sequence_length, (num_chunks,), generator=generator)
    return chunk_ids, starts


class BatchStream:
    """`stream(step)` is the batch of a step: the next chunks in the order of epochs 0, 1, 2, ...

    Every chunk is seen once an epoch, all batches have the same size, and a batch may span two
    epochs. `num_chunks`, `num_tokens` and `words` are those of an epoch. On CUDA all tokens are
    copied to the GPU if they fit in `GPU_FRACTION` of its free memory, and batches are gathered
    there. Raises `UserError` if the shard has fewer chunks than one batch.
    """

    def __init__(self, shard, batch_size, sequence_length, seed, random_offset=False, device="cpu"):
        self.shard, self.batch_size, self.seed = shard, batch_size, seed
        self.num_tokens, self.words = shard.num_tokens, shard.words
        self.sequence_length, self.random_offset = sequence_length, random_offset
        self.tokens_on_gpu = None
        if torch.device(device).type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.num_tokens * shard.dtype.itemsize <= GPU_FRACTION * free:
                self.load_to_device(device)
        self.num_chunks = count_chunks(shard.num_tokens, sequence_length, random_offset)
        if self.num_chunks < batch_size:
            raise UserError(
                f"{shard.path} has {self.num_chunks} chunks of {sequence_length} tokens, fewer "
                f"than one batch of {batch_size}: lower --batch-size or add text"
            )

    def __call__(self, step):
        first, stop, N = step * self.batch_size, (step + 1) * self.batch_size, self.num_chunks
        parts = []
        for epoch in range(first // N, (stop - 1) // N + 1):
            order = epoch_order(self.seed, epoch, N, self.sequence_length, self.random_offset)
            parts.append([column[max(0, first - epoch * N) : stop - epoch * N] for column in order])
        chunk_ids, starts = map(torch.cat, zip(*parts))  # (B,)
        if self.tokens_on_gpu is None:
            tokens, targets = self.shard.chunks(starts.numpy(), self.sequence_length)
        else:
            tokens, targets = self.gather(starts)
        # Every target counts here: counting them on the device would wait for it.
        return Batch(chunk_ids, tokens, targets, len(tokens), targets.numel())

    def load_to_device(self, device):
        """Copies all tokens of the shard to `device`, with as many bytes per token as in the shard."""
        # As signed integers of the same size: torch cannot index uint16 on all devices.
        ids = self.shard.tokens.view(f"int{8 * self.shard.dtype.itemsize}")
        self.tokens_on_gpu = torch.from_numpy(ids.copy()).to(device)

    def gather(self, starts):
        """Tokens and targets (B, T), int64, of the chunks at `starts`, from the tokens on the GPU."""
        device = self.tokens_on_gpu.device
        offsets = torch.arange(self.sequence_length + 1, device=device)
        positions = offsets + starts.to(device, non_blocking=True)[:, None]  # (B, T + 1)
        chunk = self.tokens_on_gpu[positions].long()
        if self.tokens_on_gpu.dtype == torch.int16:
            chunk &= 0xFFFF  # ids above 32,767 are negative as int16
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def dev_subset(shard, sequence_length, num_sequences):
    """The starts of at most `num_sequences` dev chunks, in order, and the same for every run.

    Raises `UserError` if the shard holds no whole chunk.
    """
    num_chunks = count_chunks(shard.num_tokens, sequence_length)
    if not num_chunks:
        raise UserError(
            f"{shard.path} has {shard.num_tokens} tokens, fewer than one chunk of "
            f"{sequence_length}: add text or lower --sequence-length"
        )
    generator = torch.Generator().manual_seed(DEV_SUBSET_SEED)
    chunk_ids = torch.randperm(num_chunks, generator=generator)[:num_sequences]
    return (chunk_ids.sort().values * sequence_length).numpy()
