"""Differences and their intervals are what their definitions log, on numbers made for it."""

import numpy as np
import pytest

import evaluate
from evaluation import statistics as compare
from evaluation.statistics import block_bootstrap, mean_loss, read_losses, t_interval, t_quantile
from training.io import UserError, run_program

FILES = [("novels", 4000, 0.5), ("letters", 6000, 0.5)]
SHARES = {"novels": 0.9, "letters": 0.1}


def kept(path, losses, **details):
    compare.write_losses(path, "digest", FILES, losses, 128, **details)
    return read_losses(path)


@pytest.fixture
def losses():
    return np.random.default_rng(0).gamma(2.0, 2.0, 6000)


def test_what_is_read_are_sums_over_chunks_that_end_with_their_file(losses, tmp_path):
    found = kept(tmp_path / "a.npz", losses, scaled=losses / 2, shares=SHARES)
    assert found.files == ("novels", "letters") and found.targets.sum() == 6000
    assert found.targets.max() == 128 and found.nats.sum() == pytest.approx(losses.sum(), rel=1e-6)
    assert found.targets[found.file_of == 0].sum() == 4000
    assert found.scaled_nats.sum() == pytest.approx(losses.sum() / 2, rel=1e-6)
    novels, letters = losses[:4000].mean(), losses[4000:].mean()
    assert mean_loss(found, found.nats, "plain") == pytest.approx(losses.mean(), rel=1e-6)
    weighted = 0.9 * novels + 0.1 * letters
    assert mean_loss(found, found.nats, "train") == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("degrees, expected", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)])
def test_students_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_the_paired_interval_is_the_textbooks():
    low, high = t_interval([-0.03, -0.05, -0.04])
    half = 4.302653 * 0.01 / 3**0.5
    assert (low, high) == pytest.approx((-0.04 - half, -0.04 + half), abs=1e-6)
    assert t_interval([-0.03]) is None


def test_blocks_stay_in_their_file_and_have_about_as_many_words(losses, tmp_path):
    found = kept(tmp_path / "a.npz", losses)
    blocks = compare.text_blocks(found)
    assert not set(blocks[found.file_of == 0]) & set(blocks[found.file_of == 1])
    assert (np.diff(blocks) >= 0).all() and len(set(blocks)) == 16  # at least eight a file
    long = [("novel", 60_000, 0.5)]
    compare.write_losses(tmp_path / "b.npz", "digest", long, np.ones(60_000), 128)
    found = read_losses(tmp_path / "b.npz")
    words = np.bincount(compare.text_blocks(found), found.targets * 0.5)
    assert len(words) == 60 and words.min() > 400 and words.max() < 600


def test_the_bootstrap_covers_what_it_should():
    """Of texts drawn from one distribution, about 95 % have the true mean in their interval."""
    generator = np.random.default_rng(1)
    blocks, hits = 60, 0
    for _ in range(200):
        means = generator.normal(0.0, 1.0, blocks)
        text = compare.Losses(
            "a",
            "digest",
            ("novel",),
            None,
            np.array([500.0]),
            np.zeros(blocks, int),
            np.ones(blocks, int),
            means,
            None,
        )
        low, high = block_bootstrap(text, means, "plain", resamples=500)
        hits += low <= 0.0 <= high
    assert 180 <= hits <= 198


def test_neighbours_that_go_together_widen_the_interval(tmp_path):
    """Chunks of one document rise and fall together: blocks notice, single chunks would not."""
    generator = np.random.default_rng(2)
    documents = np.repeat(generator.normal(3.0, 1.0, 50), 1024)
    compare.write_losses(tmp_path / "a.npz", "digest", [("novel", len(documents), 0.5)], documents, 128)
    found = read_losses(tmp_path / "a.npz")
    low, high = block_bootstrap(found, found.nats, "plain")
    of_chunks = 3.92 * found.nats.std() / 128 / len(found.nats) ** 0.5
    assert 2.0 < (high - low) / of_chunks < 3.5  # a document has eight chunks: the root of 8 is 2.8


def test_a_difference_is_the_means_over_seeds_and_the_same_for_every_order(losses, tmp_path):
    noise = np.random.default_rng(3).normal(0, 0.1, (2, 6000))
    control = [kept(tmp_path / f"c{i}.npz", losses + noise[i], shares=SHARES) for i in range(2)]
    student = [kept(tmp_path / f"s{i}.npz", losses - 0.1, shares=SHARES) for i in range(2)]
    found = compare.compare(student, control)
    expected = [-0.1 - 0.9 * n[:4000].mean() - 0.1 * n[4000:].mean() for n in noise]
    assert found.per_seed == pytest.approx(expected, abs=1e-5)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.over_text[0] < found.mean < found.over_text[1] < 0
    turned = compare.compare(control, student)
    assert turned.mean == pytest.approx(-found.mean)
    assert turned.over_text == pytest.approx((-found.over_text[1], -found.over_text[0]))


def test_evaluate_prints_the_comparison(losses, tmp_path, capsys):
    for i in range(2):
        kept(tmp_path / f"c{i}.npz", losses, shares=SHARES)
        kept(tmp_path / f"s{i}.npz", losses - 0.1 - 0.01 * i, shares=SHARES)
    arguments = ["--compare", *(str(tmp_path / f"s{i}.npz") for i in range(2))]
    arguments += ["--against", *(str(tmp_path / f"c{i}.npz") for i in range(2))]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    printed = capsys.readouterr().out
    assert "train" in printed and "plain" in printed and "-0.1050" in printed


def test_chunks_longer_than_a_block_are_blocks(tmp_path):
    compare.write_losses(tmp_path / "a.npz", "digest", [("novel", 5000, 0.9)], np.ones(5000), 2000)
    found = read_losses(tmp_path / "a.npz")
    assert list(compare.text_blocks(found)) == [0, 1, 2]
    low, high = block_bootstrap(found, found.nats, "plain")
    assert low == high == 1.0


def test_clusters_vary_as_their_mean_does():
    values = np.random.default_rng(4).normal(1.0, 2.0, 100)
    mean, (low, high) = compare.mean_over_clusters(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)


def test_losses_of_other_text_and_other_files_are_refused(losses, tmp_path):
    one = kept(tmp_path / "a.npz", losses)
    compare.write_losses(tmp_path / "b.npz", "digest", FILES, losses, 64)
    other = read_losses(tmp_path / "b.npz")
    with pytest.raises(UserError, match="not of the same text"):
        compare.compare([one], [other])
    with pytest.raises(UserError, match="one for each seed"):
        compare.compare([one], [one, one])
    with pytest.raises(UserError, match="no shares"):
        compare.compare([one], [one], "train")
    with pytest.raises(UserError, match="temperature-scaled"):
        compare.compare([one], [one], "plain", scaled=True)
    for name, content in (("c.npz", b"PK"), ("d.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="holds no losses"):
            read_losses(tmp_path / name)
    compare.write_losses(tmp_path / "f.npz", "other", FILES, losses, 128)
    with pytest.raises(UserError, match="not of the same text"):
        compare.compare([one], [read_losses(tmp_path / "f.npz")], "plain")
    np.savez(tmp_path / "e.npz", files=np.array(["a"]))
    with pytest.raises(UserError, match="holds no losses"):
        read_losses(tmp_path / "e.npz")
