"""Differences between models with intervals: over seeds, and over the text.

Two questions have two answers. Would other seeds show it too? A paired t interval over the seeds'
differences. Would other text show it too? A bootstrap of blocks of text, for the difference that is
averaged over the seeds. `evaluate.py --compare` prints both, from what `--losses` wrote.
"""

import math
import os
import statistics
from dataclasses import dataclass
from zipfile import ZipFile

import numpy as np

from training.io import UserError, atomic_write

BLOCK_WORDS = 500  # neighbouring chunks share a document: blocks of this size are near independent
LEAST_BLOCKS = 8  # in a file, however short, for one block alone would not vary
RESAMPLES = 10_000
KINDS = {  # of the arrays in a file of losses, as numpy names them
    "text": "U",
    "files": "U",
    "words_per_token": "f",
    "share": "f",
    "file_of": "u",
    "targets": "u",
    "nats": "f",
    "scaled_nats": "f",
}
BOOTSTRAP_SEED = 2023


@dataclass(frozen=True)
class Losses:
    """What one model loses on each piece of a dev shard.

    A piece is a chunk, or the part of a chunk that lies in one file. `file_of` (N,) is the number
    of a piece's file, `targets` (N,) its predicted tokens, `nats` (N,) the sum of their losses,
    `scaled_nats` (N,) the same at the temperature fitted elsewhere, or None. `files`, `shares` and
    `words_per_token` (F,) describe the files; the shares, of the training text, add up to 1, or
    are None. `text` is the digest of the shard.
    """

    path: str
    text: str
    files: tuple[str, ...]
    shares: np.ndarray | None
    words_per_token: np.ndarray
    file_of: np.ndarray
    targets: np.ndarray
    nats: np.ndarray
    scaled_nats: np.ndarray | None

    def same_pieces(self, other):
        """Whether both are losses of the same pieces of the same text, weighted alike."""
        mine = (self.file_of, self.targets, self.shares)
        theirs = (other.file_of, other.targets, other.shares)
        return (self.text, self.files) == (other.text, other.files) and all(
            a is b is None or np.array_equal(a, b) for a, b in zip(mine, theirs)
        )


def write_losses(path, text, files, losses, sequence_length, scaled=None, shares=None):
    """Writes what a model loses on each piece of a dev shard, for `read_losses`.

    `text` is the shard's digest; `files` are [(name, the first target after it, words per token)]
    in order; `losses` (N,) are nats for each target, `scaled` those at a fitted temperature,
    `shares` {name: share of the training text}.
    """
    names, ends, words_per_token = zip(*files)
    bounds = set(range(0, len(losses), sequence_length)) | {*ends, len(losses)}
    bounds = np.array(sorted(bounds))

    def sums(values):
        values = np.asarray(values, dtype=np.float64)
        return np.add.reduceat(values, bounds[:-1]).astype(np.float32)

    arrays = {
        "text": np.array(text),
        "files": np.array(names),
        "words_per_token": np.array(words_per_token),
        "file_of": np.searchsorted(ends, bounds[:-1], side="right").astype(np.uint16),
        "targets": np.diff(bounds).astype(np.uint32),
        "nats": sums(losses),
    }
    if scaled is not None:
        arrays["scaled_nats"] = sums(scaled)
    if shares is not None:
        arrays["share"] = np.array([shares.get(name, 0.0) for name in names])
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_losses(path):
    """The `Losses` in an .npz of `evaluate.py --losses`. Raises `UserError` if it is none."""
    try:
        with ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > (16 << 20) + 4 * os.path.getsize(path):
            raise ValueError("no losses can be packed as densely")
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        pieces = arrays["file_of"], arrays["targets"], arrays["nats"]
        per_file = arrays["files"], arrays["words_per_token"]
        if len({p.shape for p in pieces}) > 1 or len({p.shape for p in per_file}) > 1:
            raise ValueError("lengths differ")
        for name, like in (("share", per_file[0]), ("scaled_nats", pieces[0])):
            if name in arrays and arrays[name].shape != like.shape:
                raise ValueError("lengths differ")
        if any(arrays[name].dtype.kind not in kinds for name, kinds in KINDS.items() if name in arrays):
            raise ValueError("an array is of another type")
        numbers = [value for value in arrays.values() if value.dtype.kind == "f"]
        if not all(np.isfinite(value).all() for value in numbers):
            raise ValueError("a number is not finite")
        if pieces[0].min() < 0 or pieces[0].max() >= len(per_file[0]) or pieces[1].min() < 1:
            raise ValueError("a piece is impossible")
        if per_file[1].min() < 0 or ("share" in arrays and arrays["share"].min() < 0):
            raise ValueError("a file is impossible")
        return Losses(
            str(path),
            str(arrays["text"]),
            tuple(map(str, arrays["files"])),
            arrays.get("share"),
            arrays["words_per_token"],
            arrays["file_of"],
            arrays["targets"],
            arrays["nats"].astype(np.float64),
            arrays.get("scaled_nats"),
        )
    except Exception as error:  # a decompressor given foreign bytes may raise anything at all
        raise UserError(f"{path} holds no losses: write them with evaluate.py --losses FILE") from error


def file_weights(losses, weights):
    """What each file's mean loss counts, (F,), adding up to 1.

    "train": by its share of the training text; "plain": by its tokens here. A file that has no
    piece counts nothing.
    """
    tokens = np.bincount(losses.file_of, losses.targets, len(losses.files))
    if weights == "plain":
        return tokens / tokens.sum()
    if losses.shares is None:
        raise UserError(f"{losses.path} has no shares of the training text: use --weight-by")
    shares = np.where(tokens > 0, losses.shares, 0.0)
    if not shares.sum() > 0:
        raise UserError(f"{losses.path}: no file of it is in the training text: compare it plain")
    return shares / shares.sum()


def mean_loss(losses, nats, weights):
    """The mean over files, weighted as `file_weights` says, of nats per token."""
    sums = np.bincount(losses.file_of, nats, len(losses.files))
    tokens = np.bincount(losses.file_of, losses.targets, len(losses.files))
    return float((file_weights(losses, weights) * sums / np.maximum(tokens, 1)).sum())


# ---- intervals


def t_quantile(degrees, probability=0.975):
    """The quantile of Student's t: by bisection of its distribution function."""

    def distribution(t):  # by Simpson's rule from 0, where it is 1/2
        x = np.linspace(0, t, 20_001)
        y = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        area = (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (x[1] - x[0]) / 3
        log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        return 0.5 + area * math.exp(log_scale) / math.sqrt(degrees * math.pi)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return (low + high) / 2


def t_interval(values, least=-math.inf, most=math.inf):
    """The 95 % interval (low, high) of the mean of the seeds' values; None below two seeds.

    For values that lie between `least` and `most` it ends there.
    """
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return max(mean - half, least), min(mean + half, most)


def text_blocks(losses):
    """The number (N,) of the block of each piece: neighbours in a file, about `BLOCK_WORDS` words.

    A short file has `LEAST_BLOCKS` smaller ones, if it has so many pieces. Numbers rise by one
    through the text, and no block has pieces of two files.
    """
    words = losses.targets * losses.words_per_token[losses.file_of]
    numbers, number = np.zeros(len(words), dtype=np.int64), -1
    for file in range(len(losses.files)):
        members = np.flatnonzero(losses.file_of == file)
        if len(members):
            total = words[members].sum()
            count = max(LEAST_BLOCKS, round(total / BLOCK_WORDS))
            middles = np.cumsum(words[members]) - words[members] / 2
            blocks = np.unique(middles * count // total, return_inverse=True)[1]
            numbers[members] = number + 1 + blocks
            number += 1 + blocks.max()
    return numbers


def block_bootstrap(losses, nats, weights, resamples=RESAMPLES):
    """The 95 % interval (low, high) of `mean_loss` over texts that might have been drawn.

    Blocks of text are drawn with replacement within each file, as many as it has, so that every
    text has the same sub-corpora. `nats` (N,) may be differences, as they are here.
    """
    blocks, generator = text_blocks(losses), np.random.default_rng(BOOTSTRAP_SEED)
    total = np.zeros(resamples)
    for file, weight in enumerate(file_weights(losses, weights)):
        members = losses.file_of == file
        if not members.any():
            continue
        numbers = blocks[members] - blocks[members].min()
        sums = np.bincount(numbers, nats[members])
        tokens = np.bincount(numbers, losses.targets[members])
        count = len(sums)
        drawn = generator.multinomial(count, np.full(count, 1 / count), resamples)  # (R, blocks)
        total += weight * (drawn @ sums) / (drawn @ tokens)
    low, high = np.quantile(total, (0.025, 0.975))
    return float(low), float(high)


# ---- comparing


@dataclass(frozen=True)
class Difference:
    """One model's loss minus another's, nats per token: by seed, their mean, and two intervals."""

    per_seed: list[float]
    mean: float
    over_seeds: tuple[float, float] | None
    over_text: tuple[float, float]

    def plus(self, nats):
        """The same with so many nats more."""
        seeds, text = (
            bounds and tuple(bound + nats for bound in bounds) for bounds in (self.over_seeds, self.over_text)
        )
        return Difference([value + nats for value in self.per_seed], self.mean + nats, seeds, text)


def compare(ones, others, weights="train", scaled=False):
    """The `Difference` of two models, from a list of `Losses` each, one entry for each seed.

    `scaled` takes the losses at the fitted temperatures. Raises `UserError` where the lists do not
    belong together.
    """
    if len(ones) != len(others):
        raise UserError(f"{len(ones)} and {len(others)} files: give one for each seed, twice")
    differences = []
    for one, other in zip(ones, others):
        if not (one.same_pieces(other) and one.same_pieces(ones[0])):
            raise UserError(f"{one.path} and {other.path} are not of the same text: score it again")
        if scaled and (one.scaled_nats is None or other.scaled_nats is None):
            raise UserError(f"{one.path}: give both --temperature-scaled DIR when they are scored")
        pair = (one.scaled_nats, other.scaled_nats) if scaled else (one.nats, other.nats)
        differences.append(pair[0].astype(np.float64) - pair[1])
    per_seed = [mean_loss(ones[0], nats, weights) for nats in differences]
    average = np.mean(differences, axis=0)
    return Difference(
        per_seed,
        statistics.fmean(per_seed),
        t_interval(per_seed),
        block_bootstrap(ones[0], average, weights),
    )


def ways(ones, others):
    """{way: Difference} in as many ways as the losses allow.

    "train" (or, without shares, "plain") is the first, then "plain", then "temperature-scaled",
    which is weighted as the first.
    """
    every = [*ones, *others]
    weights = "train" if all(losses.shares is not None for losses in every) else "plain"
    found = {way: compare(ones, others, way) for way in dict.fromkeys((weights, "plain"))}
    if all(losses.scaled_nats is not None for losses in every):
        found["temperature-scaled"] = compare(ones, others, weights, scaled=True)
    return found


def mean_over_clusters(values):
    """The mean of values (N,), and its 95 % interval over draws of them with replacement."""
    values, generator = np.asarray(values), np.random.default_rng(BOOTSTRAP_SEED)
    drawn = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    low, high = np.quantile(drawn @ values / len(values), (0.025, 0.975))
    return float(values.mean()), (float(low), float(high))


def interval(bounds, digits=4):
    """An interval as text, or "-"."""
    return "-" if bounds is None else f"[{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def comparison_rows(ones, others):
    """Heading and rows of a table: a row for each way in which the two may be compared."""
    rows = [["way", "seeds", "mean difference", "paired t over seeds", "blocks of text"]]
    for way, found in ways(ones, others).items():
        rows.append(
            [way, str(len(ones)), f"{found.mean:+.4f}", interval(found.over_seeds), interval(found.over_text)]
        )
    return rows
