"""Differences between models with intervals: over seeds, and over the text.

Two questions have two answers. Would other seeds show it too? A paired t interval of the seeds'
differences. Would other text show it too? A bootstrap of blocks of text, for the mean difference of
the seeds. `evaluate.py --compare` prints both from the files that `--losses` wrote.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.io import UserError, atomic_write

BLOCK_WORDS = 500  # neighbouring chunks share a document; blocks of this size are nearly independent
MIN_BLOCKS = 8  # per file, because a single block could not vary
RESAMPLES = 10_000
BOOTSTRAP_SEED = 2023
# 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom, and of the normal distribution.
T_QUANTILES = np.ravel(
    [
        [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281],
        [2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860],
        [2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423],
    ]
)
NORMAL_QUANTILE = 1.959964
LOSS_ARRAYS = {  # in a file of losses: kind of dtype as numpy names it, and the array of the same length
    "files": ("U", "files"),
    "words_per_token": ("f", "files"),
    "share": ("f", "files"),
    "file_of": ("u", "nats"),
    "targets": ("u", "nats"),
    "nats": ("f", "nats"),
    "scaled_nats": ("f", "nats"),
}


@dataclass(frozen=True)
class Losses:
    """The losses of one model on a dev shard, summed by piece: a chunk, or its part in one file."""

    path: str
    text: str  # digest of the shard
    precision: str  # of the matrix products; "" in a file that does not say it
    files: np.ndarray  # name of each file (F,)
    words_per_token: np.ndarray  # (F,)
    file_of: np.ndarray  # number of the file of each piece (N,)
    targets: np.ndarray  # predicted tokens of each piece (N,)
    nats: np.ndarray  # the sum of their losses (N,)
    shares: np.ndarray | None = None  # each file's share of the training text (F,)
    scaled_nats: np.ndarray | None = None  # nats at a fitted temperature (N,)

    def same_pieces(self, other):
        """True if both describe the same pieces of the same text, with the same shares."""
        names = ("files", "file_of", "targets", "shares")
        arrays = [(getattr(self, name), getattr(other, name)) for name in names]
        return self.text == other.text and all(np.array_equal(a, b) for a, b in arrays)


def write_losses(path, text, files, losses, sequence_length, scaled=None, shares=None, precision=""):
    """Writes the losses of one model for `read_losses`.

    `text` is the digest of the shard; `files` are [(name, end of its targets, words per token)] in
    order; `losses` (N,) are nats per target, `scaled` those at a fitted temperature, `shares`
    {name: share of the training text}, `precision` that of the matrix products.
    """
    names, ends, words_per_token = zip(*files)
    bounds = np.unique([*range(0, len(losses), sequence_length), *ends, len(losses)])

    def sum_by_piece(values):
        values = np.asarray(values, dtype=np.float64)
        return np.add.reduceat(values, bounds[:-1]).astype(np.float32)

    arrays = {
        "text": np.array(text),
        "precision": np.array(precision),
        "files": np.array(names),
        "words_per_token": np.array(words_per_token),
        "file_of": np.searchsorted(ends, bounds[:-1], side="right").astype(np.uint32),
        "targets": np.diff(bounds).astype(np.uint32),
        "nats": sum_by_piece(losses),
    }
    if scaled is not None:
        arrays["scaled_nats"] = sum_by_piece(scaled)
    if shares is not None:
        arrays["share"] = np.array([shares.get(name, 0.0) for name in names])
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def read_losses(path):
    """The `Losses` in an .npz of `evaluate.py --losses`. Raises `UserError` for any other file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist, or is no file: write it with evaluate.py --losses FILE")
    try:
        with np.load(path, allow_pickle=False) as archive:
            text, precision = str(archive["text"]), str(archive.get("precision", ""))
            arrays = {name: _checked(archive, name) for name in LOSS_ARRAYS if name in archive}
        num_files, file_of = len(arrays["files"]), arrays["file_of"]
        if not 0 <= file_of.min() <= file_of.max() < num_files or arrays["targets"].min() < 1:
            raise ValueError("a piece has an impossible file or length")
        shares = arrays.pop("share", None)
        return Losses(path=str(path), text=text, precision=precision, shares=shares, **arrays)
    except Exception as error:  # numpy and zlib raise errors of many kinds for a damaged file
        raise UserError(f"{path} holds no losses: write them with evaluate.py --losses FILE") from error


def _checked(archive, name):
    """The array of that name, as float64 or int64 if it has numbers; ValueError for an odd one."""
    array, (kind, same_length) = archive[name], LOSS_ARRAYS[name]
    if array.dtype.kind != kind or array.shape != (archive[same_length].size,):
        raise ValueError(f"{name} has another type or shape")
    if kind == "U":
        return array
    if not (np.abs(array) < 1e30).all():  # neither NaN nor so large that sums overflow
        raise ValueError(f"{name} is not finite")
    return array.astype(np.float64 if kind == "f" else np.int64)


def file_weights(losses, weights):
    """The weight of each file in the mean loss, (F,), with the sum 1.

    With "train" a file has the weight of its share of the training text, with "plain" that of its
    tokens in the shard. A file without a piece has weight 0.
    """
    tokens = np.bincount(losses.file_of, losses.targets, len(losses.files))
    if weights == "plain":
        return tokens / tokens.sum()
    shares = np.where(tokens > 0, losses.shares, 0.0)
    if not shares.sum() > 0:
        raise UserError(f"{losses.path}: the training text has none of its files: leave out --weight-by")
    return shares / shares.sum()


def mean_loss(losses, nats, weights):
    """The mean of nats per token over files, with the weights of `file_weights`."""
    sums = np.bincount(losses.file_of, nats, len(losses.files))
    tokens = np.bincount(losses.file_of, losses.targets, len(losses.files))
    return float((file_weights(losses, weights) * sums / np.maximum(tokens, 1)).sum())


# ---- intervals


def t_quantile(degrees):
    """The 97.5 % quantile of Student's t.

    Above 30 degrees of freedom by the expansion of Abramowitz and Stegun 26.7.5, right to 1e-4.
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def t_interval(values, least=-math.inf, most=math.inf):
    """The 95 % interval (low, high) of the mean of one value per seed, cut at `least` and `most`.

    None for fewer than two seeds.
    """
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return max(mean - half, least), min(mean + half, most)


def block_of_pieces(losses):
    """The number (N,) of the block of each piece: neighbours in one file, about `BLOCK_WORDS` words.

    A short file has `MIN_BLOCKS` smaller blocks, or as many as it has pieces. Numbers rise by one
    through the text, and no block has pieces of two files.
    """
    words = losses.targets * losses.words_per_token[losses.file_of]
    numbers, first = np.zeros(len(words), dtype=np.int64), 0
    for file in range(len(losses.files)):
        members = np.flatnonzero(losses.file_of == file)
        if not len(members):
            continue
        total = words[members].sum()
        count = max(MIN_BLOCKS, round(total / BLOCK_WORDS))
        middles = np.cumsum(words[members]) - words[members] / 2
        blocks = np.unique(middles * count // max(total, 1e-9), return_inverse=True)[1]
        numbers[members] = first + blocks
        first += blocks.max() + 1
    return numbers


def block_bootstrap(losses, nats, weights, resamples=RESAMPLES):
    """The 95 % interval (low, high) of `mean_loss` over bootstrap resamples of the text.

    Blocks are drawn with replacement within each file, as many as it has, so that every resample
    has the same sub-corpora. `nats` (N,) may be the differences of two models.
    """
    blocks, generator = block_of_pieces(losses), np.random.default_rng(BOOTSTRAP_SEED)
    means = np.zeros(resamples)
    for file, weight in enumerate(file_weights(losses, weights)):
        members = losses.file_of == file
        if not members.any():
            continue
        numbers = blocks[members] - blocks[members].min()
        sums = np.bincount(numbers, nats[members])
        tokens = np.bincount(numbers, losses.targets[members])
        draws = _draw_with_replacement(generator, len(sums), resamples)
        means += weight * (draws @ sums) / (draws @ tokens)
    return _percentile_interval(means)


def cluster_bootstrap(values):
    """The mean of values (N,), and its 95 % interval over bootstrap resamples of the values."""
    values, generator = np.asarray(values), np.random.default_rng(BOOTSTRAP_SEED)
    draws = _draw_with_replacement(generator, len(values), RESAMPLES)
    return float(values.mean()), _percentile_interval(draws @ values / len(values))


def _draw_with_replacement(generator, count, resamples):
    """How often each of `count` items is drawn in each resample: (resamples, count)."""
    return generator.multinomial(count, np.full(count, 1 / count), resamples)


def _percentile_interval(means):
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# ---- comparing


@dataclass(frozen=True)
class Difference:
    """One model's loss minus another's, nats per token: per seed, their mean, and two intervals."""

    per_seed: list[float]
    mean: float
    over_seeds: tuple[float, float] | None
    over_text: tuple[float, float]

    def shifted(self, nats):
        """The same difference with `nats` added."""
        seeds = self.over_seeds and tuple(bound + nats for bound in self.over_seeds)
        text = tuple(bound + nats for bound in self.over_text)
        return Difference([value + nats for value in self.per_seed], self.mean + nats, seeds, text)


def compare(models, baselines, weights="train", scaled=False):
    """The `Difference` of two models, from a list of `Losses` each, one entry per seed.

    `scaled` compares at the fitted temperatures. Raises `UserError` if the files do not belong
    together.
    """
    if len(models) != len(baselines):
        raise UserError(f"{len(models)} files against {len(baselines)}: give one per seed for each model")
    if len({losses.precision for losses in [*models, *baselines]} - {""}) > 1:
        raise UserError(f"{models[0].path} and others were scored in different precision: score them again")
    differences = []
    for model, baseline in zip(models, baselines):
        if not (model.same_pieces(baseline) and model.same_pieces(models[0])):
            raise UserError(f"{model.path} and {baseline.path} are not of the same text: score it again")
        if scaled:
            differences.append(model.scaled_nats - baseline.scaled_nats)
        else:
            differences.append(model.nats - baseline.nats)
    per_seed = [mean_loss(models[0], nats, weights) for nats in differences]
    over_text = block_bootstrap(models[0], np.mean(differences, axis=0), weights)
    return Difference(per_seed, statistics.fmean(per_seed), t_interval(per_seed), over_text)


def compare_variants(models, baselines):
    """{variant: Difference} for each variant that the losses allow.

    First "train", if all have shares of the training text; then "plain"; then "temperature-scaled",
    with the weights of the first.
    """
    every = [*models, *baselines]
    weights = ["plain"] if any(losses.shares is None for losses in every) else ["train", "plain"]
    variants = {name: compare(models, baselines, name) for name in weights}
    if all(losses.scaled_nats is not None for losses in every):
        variants["temperature-scaled"] = compare(models, baselines, weights[0], scaled=True)
    return variants


def format_interval(bounds, digits=4):
    """An interval as text, or "-"."""
    return "-" if bounds is None else f"[{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def comparison_table(models, baselines):
    """Heading and rows of a table with one row for each variant of the comparison."""
    rows = [["weights", "seeds", "mean difference", "paired t over seeds", "bootstrap of text blocks"]]
    for variant, difference in compare_variants(models, baselines).items():
        seeds, text = format_interval(difference.over_seeds), format_interval(difference.over_text)
        rows.append([variant, str(len(models)), f"{difference.mean:+.4f}", seeds, text])
    return rows
