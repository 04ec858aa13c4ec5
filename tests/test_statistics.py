"""Differences and their intervals follow their definitions, on made-up numbers."""

import numpy as np
import pytest

import evaluate
from evaluation import statistics
from evaluation.statistics import block_bootstrap, mean_loss, read_losses, t_interval, t_quantile
from training.io import UserError, run_program

FILES = [("novels", 4000, 0.5), ("letters", 6000, 0.5)]
SHARES = {"novels": 0.9, "letters": 0.1}


def written(path, losses, files=FILES, text="digest", sequence_length=128, **details):
    """The `Losses` of a file of these losses."""
    statistics.write_losses(path, text, files, losses, sequence_length, **details)
    return read_losses(path)


@pytest.fixture
def losses():
    return np.random.default_rng(0).gamma(2.0, 2.0, 6000)


def test_losses_are_sums_over_chunks_that_end_with_their_file(losses, tmp_path):
    result = written(tmp_path / "a.npz", losses, scaled=losses / 2, shares=SHARES)
    assert [*result.files] == ["novels", "letters"] and result.targets.sum() == 6000
    assert result.targets.max() == 128 and result.nats.sum() == pytest.approx(losses.sum(), rel=1e-6)
    assert result.targets[result.file_of == 0].sum() == 4000
    assert result.scaled_nats.sum() == pytest.approx(losses.sum() / 2, rel=1e-6)
    assert mean_loss(result, result.nats, "plain") == pytest.approx(losses.mean(), rel=1e-6)
    weighted = 0.9 * losses[:4000].mean() + 0.1 * losses[4000:].mean()
    assert mean_loss(result, result.nats, "train") == pytest.approx(weighted, rel=1e-6)


TABLE = [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (1000, 1.9623)]


@pytest.mark.parametrize("degrees, expected", TABLE)
def test_students_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_the_paired_interval_is_the_textbooks():
    low, high = t_interval([-0.03, -0.05, -0.04])
    half = 4.302653 * 0.01 / 3**0.5
    assert (low, high) == pytest.approx((-0.04 - half, -0.04 + half), abs=1e-6)
    assert t_interval([-0.03]) is None


def test_blocks_stay_in_their_file_and_have_about_as_many_words(losses, tmp_path):
    result = written(tmp_path / "a.npz", losses)
    blocks = statistics.block_of_pieces(result)
    assert not set(blocks[result.file_of == 0]) & set(blocks[result.file_of == 1])
    assert (np.diff(blocks) >= 0).all() and len(set(blocks)) == 16  # at least eight a file
    result = written(tmp_path / "b.npz", np.ones(60_000), [("novel", 60_000, 0.5)])
    words = np.bincount(statistics.block_of_pieces(result), result.targets * 0.5)
    assert len(words) == 60 and words.min() > 400 and words.max() < 600


def test_chunks_longer_than_a_block_are_blocks(tmp_path):
    result = written(tmp_path / "a.npz", np.ones(5000), [("novel", 5000, 0.9)], sequence_length=2000)
    assert list(statistics.block_of_pieces(result)) == [0, 1, 2]
    assert block_bootstrap(result, result.nats, "plain") == (1.0, 1.0)


def test_the_bootstrap_covers_the_true_mean_of_95_texts_in_100(tmp_path):
    generator, hits = np.random.default_rng(1), 0
    text = written(tmp_path / "a.npz", np.ones(60), [("novel", 60, 500.0)], sequence_length=1)
    for _ in range(200):
        means = generator.normal(0.0, 1.0, 60)
        low, high = block_bootstrap(text, means, "plain", resamples=500)
        hits += low <= 0.0 <= high
    assert 180 <= hits <= 198


def test_correlated_neighbours_widen_the_interval(tmp_path):
    """Chunks of one document rise and fall together: a bootstrap of single chunks would miss it."""
    documents = np.repeat(np.random.default_rng(2).normal(3.0, 1.0, 50), 1024)
    result = written(tmp_path / "a.npz", documents, [("novel", len(documents), 0.5)])
    low, high = block_bootstrap(result, result.nats, "plain")
    of_chunks = 3.92 * result.nats.std() / 128 / len(result.nats) ** 0.5
    assert 2.0 < (high - low) / of_chunks < 3.5  # a document has eight chunks: the root of 8 is 2.8


def test_a_difference_is_the_mean_over_seeds_and_changes_sign_with_the_order(losses, tmp_path):
    noise = np.random.default_rng(3).normal(0, 0.1, (2, 6000))
    control = [written(tmp_path / f"c{i}.npz", losses + noise[i], shares=SHARES) for i in range(2)]
    student = [written(tmp_path / f"s{i}.npz", losses - 0.1, shares=SHARES) for i in range(2)]
    result = statistics.compare(student, control)
    expected = [-0.1 - 0.9 * n[:4000].mean() - 0.1 * n[4000:].mean() for n in noise]
    assert result.per_seed == pytest.approx(expected, abs=1e-5)
    assert result.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert result.over_text[0] < result.mean < result.over_text[1] < 0
    reverse = statistics.compare(control, student)
    assert reverse.mean == pytest.approx(-result.mean)
    assert reverse.over_text == pytest.approx((-result.over_text[1], -result.over_text[0]))


def test_evaluate_prints_the_comparison(losses, tmp_path, capsys):
    for i in range(2):
        written(tmp_path / f"c{i}.npz", losses, shares=SHARES)
        written(tmp_path / f"s{i}.npz", losses - 0.1 - 0.01 * i, shares=SHARES)
    arguments = ["--compare", *(str(tmp_path / f"s{i}.npz") for i in range(2))]
    arguments += ["--against", *(str(tmp_path / f"c{i}.npz") for i in range(2))]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    printed = capsys.readouterr().out
    assert "train" in printed and "plain" in printed and "-0.1050" in printed
    seed = str(tmp_path / "s0.npz")
    for against, reason in (([seed, seed], "twice"), (["gone.npz", "x"], "gone.npz does not exist")):
        assert run_program(lambda a=against: evaluate.main(["--compare", seed, seed, "--against", *a])) == 1
        assert reason in capsys.readouterr().err


def test_the_interval_over_clusters_is_that_of_a_normal_mean():
    values = np.random.default_rng(4).normal(1.0, 2.0, 100)
    mean, (low, high) = statistics.cluster_bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)


def test_losses_that_do_not_belong_together_are_refused(losses, tmp_path):
    first = written(tmp_path / "a.npz", losses)
    for other in ({"sequence_length": 64}, {"text": "other"}):
        with pytest.raises(UserError, match="not of the same text"):
            statistics.compare([first], [written(tmp_path / "b.npz", losses, **other)], "plain")
    in_bf16 = written(tmp_path / "b.npz", losses, precision="bf16")
    with pytest.raises(UserError, match="different precision"):
        statistics.compare([written(tmp_path / "c.npz", losses, precision="fp32")], [in_bf16], "plain")
    assert statistics.compare([first], [in_bf16], "plain").mean == 0  # older files do not say it
    with pytest.raises(UserError, match="one per seed"):
        statistics.compare([first], [first, first])


@pytest.mark.parametrize(
    "change",
    [
        {"nats": None},
        {"nats": np.full(48, np.nan, np.float32)},
        {"nats": np.ones((48, 1), np.float32)},
        {"targets": np.zeros(48, np.uint32)},
        {"file_of": np.full(48, 7, np.uint16)},
        {"files": np.array([1.0, 2.0])},
        {"share": np.array([1.0])},
        {"words_per_token": np.array([1e300, -1e300])},
    ],
)
def test_odd_arrays_are_no_losses(losses, tmp_path, change):
    written(tmp_path / "a.npz", losses, shares=SHARES)
    arrays = dict(np.load(tmp_path / "a.npz")) | change
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=r"a\.npz holds no losses"):
        read_losses(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="holds no losses"):
        read_losses(tmp_path / "a.npz")
