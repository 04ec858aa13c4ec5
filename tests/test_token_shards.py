"""A shard gives back what was written, in any number of parts, and no damaged token is ever read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_shard_file
from corpus import token_shards
from corpus.token_shards import FIRST_LINE_BYTES, MAGIC, TokenShard
from data import BatchStream, count_chunks, dev_subset, epoch_order
from training.io import UserError, pack_header

FIXTURE = Path(__file__).parent / "fixtures" / "1d4d709" / "data" / "train.bin"


class Pieces:
    """Stands for a tokenizer of any size where no text is encoded."""

    def __init__(self, vocabulary_size=1000):
        self.vocabulary_size, self.identity = vocabulary_size, "an identity"


def texts(ids, block=37):
    """Two texts of those ids, in blocks: (name, ids, words, bytes) of each."""
    middle = len(ids) // 3
    for name, text in (("a", ids[:middle]), ("b", ids[middle:])):
        for i in range(0, len(text), block):
            piece = text[i : i + block]
            yield name, piece, len(piece), 2 * len(piece)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 1000, 997)


@pytest.fixture
def path(tmp_path, monkeypatch, ids):
    """A shard of blocks of 50 tokens."""
    monkeypatch.setattr(token_shards, "BLOCK_BYTES", 100)
    write_shard_file(tmp_path / "train.bin", texts(ids), Pieces())
    return tmp_path / "train.bin"


def rewrite(path, **changes):
    """Changes the JSON of a shard, and makes its digest right again."""
    content = path.read_bytes()
    size = int(content.split()[2])
    header = json.loads(content[FIRST_LINE_BYTES:size]) | changes
    path.write_bytes(pack_header(MAGIC, 1, json.dumps(header).encode()) + content[size:])


# ---- writing


@pytest.mark.parametrize("vocabulary_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_shard_gives_back_what_was_written(tmp_path, vocabulary_size, dtype):
    path, first, second = tmp_path / "x.bin", np.arange(700), np.array([vocabulary_size - 1, 0, 5])
    write_shard_file(path, [("a", first, 300, 4000), ("b", second, 2, 9)], Pieces(vocabulary_size), "1")
    assert path.read_bytes().startswith(MAGIC.encode()) and b'"tokens": 703' in path.read_bytes()
    shard = TokenShard(path)
    assert shard.tokens.dtype == dtype
    assert np.array_equal(shard.tokens, np.concatenate([first, second]))
    assert [(f.name, f.start, f.stop) for f in shard.files] == [("a", 0, 700), ("b", 700, 703)]
    assert (shard.words, shard.bytes, shard.tokenizer) == (302, 4009, "an identity")


def test_the_parts_in_which_a_text_arrives_do_not_matter(tmp_path, monkeypatch, ids):
    monkeypatch.setattr(token_shards, "BLOCK_BYTES", 100)
    files = [tmp_path / f"{block}.bin" for block in (1, 50, 2000)]
    for file in files:
        header = write_shard_file(file, texts(ids, int(file.stem)), Pieces())
        assert len(header["digests"]) == 20
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_an_earlier_versions_shard_is_read_and_written_again_the_same(tmp_path):
    shard = TokenShard(FIXTURE)
    entries = [(f.name, shard.tokens[f.start : f.stop], f.words, f.bytes) for f in shard.files]
    tokenizer = Pieces(shard.vocabulary_size)
    tokenizer.identity = shard.tokenizer
    header = json.loads(FIXTURE.read_bytes()[FIRST_LINE_BYTES:].split(b"\n}\n")[0] + b"}")
    write_shard_file(tmp_path / "train.bin", entries, tokenizer, header["cleaning"])
    assert (tmp_path / "train.bin").read_bytes() == FIXTURE.read_bytes()


def test_an_empty_shard_is_never_written(tmp_path):
    with pytest.raises(UserError, match="no token of the text"):
        write_shard_file(tmp_path / "x.bin", [("a", [], 1, 1)], Pieces(100))
    assert list(tmp_path.iterdir()) == []


# ---- reading


def test_chunks_are_inputs_and_the_tokens_that_follow(path, ids):
    shard = TokenShard(path)
    for length in (1, 16, 400):  # the last one spans several blocks
        starts = np.arange(len(ids) - length)
        tokens, targets = shard.chunks(starts, length)
        assert tokens.dtype == torch.int64
        assert np.array_equal(tokens, np.stack([ids[i : i + length] for i in starts]))
        assert np.array_equal(targets, np.stack([ids[i + 1 : i + length + 1] for i in starts]))
    streams = [BatchStream(shard, 4, 16, 0, True) for _ in range(2)]
    streams[1].load_to_device("cpu")
    assert all(torch.equal(streams[0](step).tokens, streams[1](step).tokens) for step in (0, 1, 20))


def test_any_changed_byte_is_found(path):
    intact, generator = path.read_bytes(), np.random.default_rng(0)
    positions = generator.integers(0, len(intact), 200)
    for position in [0, FIRST_LINE_BYTES - 1, FIRST_LINE_BYTES, len(intact) - 1, *positions]:
        damaged = bytearray(intact)
        damaged[position] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.bin"):
            _ = TokenShard(path).tokens


def test_a_block_is_checked_when_it_is_first_read_and_not_before(path):
    damaged = bytearray(path.read_bytes())
    damaged[-2 * 400] ^= 1  # token 597
    path.write_bytes(damaged)
    shard = TokenShard(path)
    shard.chunks([0, 100, 700], 16)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.bin is damaged: its tokens"):
            shard.chunks([0, 500], 120)
    shard.chunks([900], 16)


@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_a_truncated_shard_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="tokenize_corpus"):
        TokenShard(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"largest_id": 1000}, "contradicts itself"),
        ({"tokens": 996}, "contradicts itself"),
        ({"dtype": "object"}, "cannot be read"),
        ({"block_bytes": 0}, "cannot be read"),
        ({"block_bytes": 101}, "contradicts itself"),
        ({"digests": []}, "contradicts itself"),
        ({"files": "none"}, "cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(UserError, match=message):
        TokenShard(path)


def test_a_missing_shard_and_one_of_another_version_name_the_remedy(path):
    with pytest.raises(UserError, match=r"python tokenize_corpus\.py"):
        TokenShard(path.with_name("other.bin"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b" 00000001 ", b" 00000002 ", 1))
    with pytest.raises(UserError, match=r"version 2.*make it again"):
        TokenShard(path)
    path.write_bytes(pack_header("babyllama-index", 1, b'{"shards": []}'))  # of a split in several shards
    with pytest.raises(UserError, match=r"lists several shards.*make it again"):
        TokenShard(path)


def test_positions_beyond_two_to_the_31_are_read(path):
    hole, last = 2_400_000_000, np.arange(5000) % 1000
    write_shard_file(path, [("end", last, 5000, 5000)], Pieces())
    payload = path.read_bytes()[int(path.read_bytes().split()[2]) :]
    tokens = hole + len(last)
    file = {"name": "a", "start": 0, "stop": tokens, "words": tokens, "bytes": tokens}
    blocks = [token_shards.sha256(payload)]
    header = {"tokens": tokens, "words": tokens, "bytes": tokens, "files": [file]}
    rewrite(path, **header, block_bytes=2 * hole, digests=["of zeros", *blocks])
    size = int(path.read_bytes().split()[2])
    with open(path, "r+b") as opened:
        opened.truncate(size + 2 * hole)
        opened.seek(size + 2 * hole)
        opened.write(payload)
        opened.seek(size)
        opened.write(bytes(len(payload)))
    assert path.stat().st_blocks * 512 < 1 << 20
    shard = TokenShard(path)
    inputs, targets = shard.chunks([hole, hole + 4000], 128)
    assert np.array_equal(inputs, np.stack([last[:128], last[4000:4128]]))
    assert torch.equal(targets[0], torch.arange(1, 129))
    length = 1 << 20
    chunks = count_chunks(shard.num_tokens, length)
    assert chunks == (shard.num_tokens - 1) // length == 2288
    for starts in (dev_subset(shard, length, chunks), epoch_order(0, 0, chunks, length, True)[1]):
        assert starts.max() > 1 << 31 and starts.min() >= 0
        assert len(set(starts.tolist())) == chunks
