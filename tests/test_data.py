"""Shards keep what they are given and say when they cannot; a batch depends on its step alone."""

import numpy as np
import pytest
import torch

from conftest import write_shard_file
from data import BatchStream, TokenShard, count_chunks, dev_subset
from tokenizer import Tokenizer
from training.io import UserError


class Pieces:
    """Stands for a tokenizer of any size where no text is encoded."""

    def __init__(self, vocabulary_size):
        self.vocabulary_size, self.identity = vocabulary_size, "an identity"


def shard_of(path, ids, vocabulary_size=1000):
    write_shard_file(path, [("text", ids, len(ids), 2 * len(ids))], Pieces(vocabulary_size))
    return TokenShard(path)


def assert_same_batch(batch, expected):
    for value, other in zip(vars(batch).values(), vars(expected).values(), strict=True):
        assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(other))


# ---- the order of batches


def test_targets_are_the_next_tokens(tmp_path):
    shard = shard_of(tmp_path / "x.bin", np.arange(1000))
    batch = BatchStream(shard, 4, 16, seed=0)(0)
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.tokens[:, 0], batch.chunk_ids * 16)
    assert (batch.num_sequences, batch.num_targets) == (4, 64)


@pytest.mark.parametrize("random_offset", [False, True])
def test_every_chunk_is_seen_once_an_epoch(tmp_path, random_offset):
    shard = shard_of(tmp_path / "x.bin", np.arange(997))
    stream = BatchStream(shard, 3, 10, seed=7, random_offset=random_offset)
    assert stream.num_chunks == (98 if random_offset else 99)
    batches = [stream(step) for step in range(2 * stream.num_chunks)]
    ids = torch.cat([b.chunk_ids for b in batches]).view(6, -1)
    for epoch in ids:
        assert torch.equal(epoch.sort().values, torch.arange(stream.num_chunks))
    assert not torch.equal(ids[0], ids[1])
    if random_offset:
        offsets = torch.cat([b.tokens[:, 0] - 10 * b.chunk_ids for b in batches])
        assert offsets.min() == 0 and offsets.max() == 9
        assert torch.cat([b.targets for b in batches]).max() <= 996


def test_a_batch_is_a_function_of_seed_and_step(train_shard):
    stream = BatchStream(train_shard, 8, 16, seed=3, random_offset=True)
    later = [stream(step).tokens for step in (40, 2, 17)]
    again = BatchStream(train_shard, 8, 16, seed=3, random_offset=True)
    assert all(torch.equal(a, again(s).tokens) for a, s in zip(later, (40, 2, 17)))
    other = BatchStream(train_shard, 8, 16, seed=4, random_offset=True)
    assert not torch.equal(other(2).tokens, again(2).tokens)


@pytest.mark.parametrize("random_offset", [False, True])
def test_a_shard_that_is_kept_on_the_device_gives_the_same_batches(train_shard, random_offset):
    mapped, on_device = (BatchStream(train_shard, 8, 32, 0, random_offset) for _ in range(2))
    on_device.load_to_device("cpu")
    for step in (0, 1, 65, 66, 200):  # some span two epochs
        assert_same_batch(on_device(step), mapped(step))


@pytest.mark.parametrize("vocabulary_size", [65_536, 65_537])
def test_every_id_outlives_being_kept_in_as_few_bits_as_it_needs(tmp_path, vocabulary_size):
    ids = np.random.default_rng(0).permutation(vocabulary_size)
    shard = shard_of(tmp_path / "x.bin", ids, vocabulary_size)
    mapped, on_device = (BatchStream(shard, 64, 128, seed=0) for _ in range(2))
    on_device.load_to_device("cpu")
    assert on_device.tokens_on_gpu.element_size() == shard.dtype.itemsize
    for step in range(8):
        assert_same_batch(on_device(step), mapped(step))


@pytest.mark.gpu
def test_a_batch_that_is_gathered_on_a_gpu_is_the_same(train_shard):
    mapped = BatchStream(train_shard, 8, 32, 0)
    on_device = BatchStream(train_shard, 8, 32, 0, device="cuda")
    for step in (0, 65, 200):
        batch = on_device(step)
        assert batch.tokens.is_cuda and batch.to(torch.device("cuda")).tokens is batch.tokens
        assert_same_batch(batch, mapped(step))


def test_the_last_chunk_is_used_as_far_as_it_goes():
    assert [count_chunks(n, 10) for n in (0, 10, 11, 20, 21)] == [0, 0, 1, 1, 2]
    assert [count_chunks(n, 10, True) for n in (0, 10, 19, 20, 30)] == [0, 0, 0, 1, 2]


def test_a_corpus_shorter_than_one_batch_is_refused(train_shard):
    with pytest.raises(UserError, match="--batch-size"):
        BatchStream(train_shard, 10_000, 128, seed=0)


def test_the_dev_subset_is_always_the_same(train_shard):
    starts = dev_subset(train_shard, 16, 20)
    assert np.array_equal(starts, dev_subset(train_shard, 16, 20))
    assert len(set(starts)) == 20 and list(starts) == sorted(starts)
    with pytest.raises(UserError, match="fewer than one chunk"):
        dev_subset(train_shard, 10**6, 20)


# ---- the tokenizer


def test_text_comes_back_as_it_was(tokenizer):
    nasty = ["", " a  b ", "tabs\tand\r\nreturns\n\n", "\u2028 e\u0301 \U0001f999", "\0", "<s></s>"]
    for text in nasty:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert min(tokenizer.encode(text), default=4) > 3


def test_the_identity_is_that_of_the_pieces(tokenizer, other_tokenizer):
    assert Tokenizer.read(tokenizer.model_bytes).identity == tokenizer.identity
    assert other_tokenizer.vocabulary_size == tokenizer.vocabulary_size
    assert other_tokenizer.identity != tokenizer.identity


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="tokenize_corpus"):
        Tokenizer.load(tmp_path / "missing.model")
