"""A split of several shards is read as one file is, and each shard is verified when it is read."""

import json

import numpy as np
import pytest
import torch

from corpus import token_shards
from corpus.token_shards import (
    FIRST_LINE_BYTES,
    INDEX_MAGIC,
    MAGIC,
    finished_shards,
    split_header,
    write_shard,
    write_split,
)
from data import BatchStream, TokenShard, count_chunks, dev_subset, epoch_order
from training.io import UserError, pack_header, unpack_first_line

PAST_32_BITS = 1 << 31


class Pieces:
    """Stands for a tokenizer where no text is encoded."""

    vocabulary_size, identity = 1000, "an identity"


def texts(ids, block=37):
    """Two texts of those ids, in blocks: (name, ids, words, bytes) of each."""
    middle = len(ids) // 3
    for name, part in (("a", ids[:middle]), ("b", ids[middle:])):
        for i in range(0, len(part), block):
            piece = part[i : i + block]
            yield name, piece, len(piece), 2 * len(piece)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 1000, 997)


@pytest.fixture
def several(tmp_path, monkeypatch, ids):
    """A split in shards of about 150 tokens, and one of the same tokens in one file."""
    write_split(tmp_path / "whole" / "train.bin", texts(ids), Pieces, "none")
    monkeypatch.setattr(token_shards, "SHARD_TOKENS", 150)
    write_split(tmp_path / "train.bin", texts(ids), Pieces, "none")
    return tmp_path / "train.bin"


def rewrite(path, change):
    """Changes the JSON of an index, and makes its digest right again."""
    whole = path.read_bytes()
    header = json.loads(whole[FIRST_LINE_BYTES:])
    change(header)
    path.write_bytes(pack_header(INDEX_MAGIC, 1, json.dumps(header).encode()))


# ---- writing


def test_a_split_in_one_file_is_a_shard_as_it_was_before_there_were_several(tmp_path, ids):
    path = tmp_path / "train.bin"
    header = write_split(path, texts(ids), Pieces, "none")
    middle = len(ids) // 3
    whole = [("a", ids[:middle], middle, 2 * middle)]
    whole.append(("b", ids[middle:], len(ids) - middle, 2 * (len(ids) - middle)))
    assert write_shard(tmp_path / "other.bin", whole, Pieces, "none") == header
    assert (tmp_path / "other.bin").read_bytes() == path.read_bytes()
    payload = ids.astype("<u2").tobytes()
    content = json.dumps(header, indent=1).encode() + b"\n"
    assert path.read_bytes() == pack_header(MAGIC, 1, content) + payload
    assert (header["shard"], header["shards"]) == (1, 1) and sorted(tmp_path.iterdir())[1] == path


def test_digests_are_of_blocks_however_the_ids_arrive(tmp_path, monkeypatch, ids):
    monkeypatch.setattr(token_shards, "BLOCK_BYTES", 100)
    headers = [
        write_split(tmp_path / f"{block}.bin", texts(ids, block), Pieces, "none") for block in (1, 50, 2000)
    ]
    assert headers[0] == headers[1] == headers[2] and len(headers[0]["digests"]) == 20


def test_no_shard_is_empty_however_the_text_ends(tmp_path, monkeypatch):
    for tokens, count in ((99, 0), (100, 0), (101, 2), (200, 2), (201, 3)):
        monkeypatch.setattr(token_shards, "SHARD_TOKENS", 100)
        path = tmp_path / str(tokens) / "x.bin"
        write_split(path, texts(np.zeros(tokens, int), 1), Pieces, "none")
        assert len(finished_shards(path)) == count
        assert TokenShard(path).num_tokens == tokens


def test_a_split_goes_on_after_the_shards_that_are_finished(several, ids):
    written = {path.name: path.read_bytes() for path in several.parent.glob("train*")}
    for kept in range(1, 6):
        several.unlink()
        for later in range(kept + 1, 7):
            (several.parent / f"train-{later:05d}.bin").unlink(missing_ok=True)
        finished = finished_shards(several)
        assert len(finished) == kept
        rest, skip = list(texts(ids)), sum(header["bytes"] for header, _ in finished)
        while skip:
            skip -= rest.pop(0)[3]
        write_split(several, rest, Pieces, "none", finished)
        assert {p.name: p.read_bytes() for p in several.parent.glob("train*")} == written


# ---- reading


def test_several_shards_are_read_as_one_file_is(several, ids):
    shard, whole = TokenShard(several), TokenShard(several.parent / "whole" / "train.bin")
    assert len(list(several.parent.glob("train-*"))) > 4
    assert np.array_equal(shard.tokens, ids) and np.array_equal(whole.tokens, ids)
    assert np.array_equal(np.concatenate(list(shard.pieces())), ids)
    for fact in ("num_tokens", "words", "bytes", "files", "vocabulary_size", "tokenizer", "dtype"):
        assert getattr(shard, fact) == getattr(whole, fact)
    for length in (1, 16, 400):  # the last one spans several files
        starts = np.arange(0, len(ids) - length - 1)
        for a, b in zip(shard.chunks(starts, length), whole.chunks(starts, length)):
            assert torch.equal(a, b) and a.dtype == torch.int64
    streams = [BatchStream(s, 4, 16, 0, True) for s in (shard, whole, shard)]
    streams[2].keep_on("cpu")
    for step in (0, 1, 20):
        assert len({tuple(s(step).tokens.flatten().tolist()) for s in streams}) == 1


def test_the_index_is_readable_by_eye_and_says_what_its_shards_hold(several):
    text = several.read_bytes().decode()
    assert text.startswith(INDEX_MAGIC) and '"name": "train-00001.bin"' in text
    header = split_header(several)
    assert sum(shard["tokens"] for shard in header["shards"]) == header["tokens"] == 997


def test_the_digest_of_a_split_is_that_of_every_token(several, monkeypatch, ids):
    before = TokenShard(several).digest
    ids[-1] ^= 1
    write_split(several, texts(ids), Pieces, "none")
    assert TokenShard(several).digest != before


def test_a_shard_is_verified_when_it_is_first_read_and_not_before(several):
    path = several.with_name("train-00003.bin")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    shard = TokenShard(several)
    shard.chunks([0, 100], 16)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train-00003\.bin is damaged: its tokens"):
            shard.chunks([0, 300, 400], 16)
    shard.chunks([900], 16)


@pytest.mark.parametrize("name", ["train.bin", "train-00001.bin", "train-00004.bin"])
def test_any_changed_byte_of_any_file_is_found(several, name):
    path = several.with_name(name)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    places = generator.integers(0, len(whole), 60)
    for place in [0, FIRST_LINE_BYTES - 1, FIRST_LINE_BYTES, len(whole) - 1, *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train"):
            _ = TokenShard(several).tokens


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def swap(path):
    path.write_bytes(path.with_name("train-00001.bin").read_bytes())


@pytest.mark.parametrize(
    "spoil, message",
    [(remove, "does not exist: copy it"), (cut, "bytes where"), (swap, "its index lists")],
)
def test_a_shard_that_is_not_the_listed_one_is_refused_on_opening(several, spoil, message):
    spoil(several.with_name("train-00002.bin"))
    with pytest.raises(UserError, match=rf"train-00002\.bin .*{message}"):
        TokenShard(several)


def test_one_shard_of_several_is_no_split(several):
    with pytest.raises(UserError, match="one of several shards"):
        TokenShard(several.with_name("train-00002.bin"))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(tokens=h["tokens"] + 1),
        lambda h: h["shards"][1].update(name="../train-00002.bin"),
        lambda h: h["shards"][1].update(tokens="many"),
        lambda h: h["shards"].pop(),
        lambda h: h.update(shards=[]),
        lambda h: h.update(shards=3),
        lambda h: h.update(dtype="object"),
        lambda h: h["shards"][0].pop("digest"),
        lambda h: h.pop("files"),
        lambda h: h.update(largest_id=1000),
    ],
)
def test_an_index_that_lies_is_refused(several, change):
    rewrite(several, change)
    with pytest.raises(UserError, match=r"train\.bin"):
        TokenShard(several)


# ---- more tokens than 32 bits count


def sparse_shard(path, number, tokens):
    """Writes a shard that is a header and a hole of so many tokens: its header and its digest."""
    header = {"shard": number, "shards": None, "dtype": "uint16", "tokens": tokens}
    header |= {"words": tokens, "bytes": tokens, "vocabulary_size": 1000, "largest_id": 0}
    header |= {"tokenizer": "an identity", "cleaning": "none", "block_bytes": 1 << 20}
    file = {"name": "hole", "start": 0, "stop": tokens, "words": tokens, "bytes": tokens}
    header |= {"files": [file], "digests": []}
    packed = pack_header(MAGIC, 1, json.dumps(header).encode())
    with open(path.with_name(f"{path.stem}-{number:05d}.bin"), "wb") as file:
        file.write(packed)
        file.truncate(len(packed) + 2 * tokens)
    return header, unpack_first_line(packed[:FIRST_LINE_BYTES], MAGIC)[2]


def test_positions_beyond_two_to_the_31_are_read(tmp_path):
    path, hole = tmp_path / "train.bin", 1_200_000_000
    finished = [sparse_shard(path, number, hole) for number in (1, 2)]
    last = np.arange(5000) % 1000
    write_split(path, [("b", last, 5000, 5000)], Pieces, "none", finished)
    assert sum(p.stat().st_blocks for p in tmp_path.iterdir()) * 512 < 1 << 20
    shard = TokenShard(path)
    assert shard.num_tokens == 2 * hole + 5000 > PAST_32_BITS
    starts = np.array([2 * hole, 2 * hole + 4000])
    tokens, targets = shard.chunks(starts, 128)
    assert torch.equal(tokens, torch.from_numpy(np.stack([last[:128], last[4000:4128]])))
    assert torch.equal(targets[0], torch.arange(1, 129))
    with pytest.raises(UserError, match=r"train-00002\.bin"):  # its digests are not those of zeros
        shard.chunks([2 * hole - 1], 128)
    length = 1 << 20
    chunks = count_chunks(shard.num_tokens, length)
    assert chunks == (shard.num_tokens - 1) // length == 2288
    for starts in (dev_subset(shard, length, chunks), epoch_order(0, 0, chunks, length, True)[1]):
        assert starts.max() > PAST_32_BITS and starts.min() >= 0
        assert len(set(starts.tolist())) == chunks
    assert BatchStream(shard, 4, 128, seed=0).resident_bytes == 2 * shard.num_tokens
