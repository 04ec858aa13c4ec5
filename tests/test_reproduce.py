"""The whole recipe on a sliver of text: it ends with a report, resumes, says what it measured."""

import json
import re
import sys
from itertools import pairwise

import pytest

import reproduce
from conftest import interrupt_after, write_text
from files import run
from model import PRESETS
from reproduce import RECIPES, Recipe, sample_lines, text_chart


@pytest.fixture
def short_recipe(monkeypatch):
    """The demo's recipe with models and steps for a test."""
    recipe = Recipe(
        ("gpt2-tiny", "llama-tiny"), "llama-tiny-student", 400, words=1500,
        options=("--steps", "4", "--batch-size", "4", "--sequence-length", "32",
                 "--eval-sequences", "8", "--log-every", "2"),
    )  # fmt: skip
    for name in ("demo", "small"):
        monkeypatch.setitem(RECIPES, name, recipe)


def test_the_demo_ends_with_a_report_and_is_not_done_twice(short_recipe, tmp_path, capsys):
    out = tmp_path / "demo"
    arguments = ["--recipe", "demo", "--out", str(out), "--seeds", "2", "--device", "cpu"]
    assert run(lambda: reproduce.main(arguments)) == 0
    printed = capsys.readouterr().out
    for command in ("make_toy_corpus.py", "tokenize_corpus.py", "train.py", "distill.py"):
        assert f"$ python {command}" in printed
    report = (out / "report.md").read_text()
    for role in ("GPT-2 teacher", "LLaMA teacher", "ensemble of both", "control", "student"):
        assert role in report and role in printed
    assert "±" in report and "of 2 seeds" in report
    # The numbers are those of the evaluation, not of anything else.
    scores = [
        json.loads((out / f"seed-{seed}/scores.json").read_text())["checkpoints"][3]
        for seed in range(2)
    ]
    mean = sum(s["perplexity"] for s in scores) / 2
    row = next(line for line in report.split("\n") if line.startswith("| student"))
    assert f"{mean:.2f} ±" in row
    won = sum(
        json.loads((out / f"seed-{s}/scores.json").read_text())["checkpoints"][3]["cross_entropy"]
        < json.loads((out / f"seed-{s}/scores.json").read_text())["checkpoints"][2]["cross_entropy"]
        for s in range(2)
    )
    assert f"dev cross-entropy: the student beats the control (alone) in {won} of 2 seeds" in report
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert run(lambda: reproduce.main(arguments)) == 0
    assert written == {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}


def test_a_given_corpus_is_sampled_and_resumed(short_recipe, tmp_path, monkeypatch, capsys):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        text = write_text(6000, seed=len(split))
        (tmp_path / split / f"qed.{split}").write_text(text)
    arguments = ["--recipe", "small", "--train", str(tmp_path / "train"), "--device", "cpu"]
    arguments += ["--dev", str(tmp_path / "dev"), "--out", str(tmp_path / "out")]
    arguments += ["--words", "3000"]
    for options in (["--stop-after", "0"], ["--stop-after", "1e-9"]):
        assert run(lambda o=options: reproduce.main([*arguments, *o])) == 0
        assert "the same command continues" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run(lambda: reproduce.main(arguments)) == 143
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    assert not (tmp_path / "out/report.md").exists()
    assert run(lambda: reproduce.main(arguments)) == 0
    words = len((tmp_path / "out/corpus/train/qed.train").read_text().split())
    assert 2000 < words < 4000
    assert "| student" in (tmp_path / "out/report.md").read_text()
    assert run(lambda: reproduce.main([*arguments[:-1], "2000"])) == 1
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["small"], ["demo", "--train", "text"], ["tiny"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--recipe", *arguments])
    assert stop.value.code == 2


def test_pairs_are_read_before_anything_is_trained(tmp_path, capsys):
    arguments = ["--recipe", "small", "--train", "a", "--dev", "b", "--pairs", str(tmp_path)]
    assert run(lambda: reproduce.main(arguments)) == 1
    assert "minimal pairs" in capsys.readouterr().err


def test_recipes_name_presets_that_exist():
    for recipe in RECIPES.values():
        assert {*recipe.teachers, recipe.student} <= set(PRESETS)


def test_a_sample_is_made_of_runs_of_lines_from_all_over():
    lines = [f"line {i}" for i in range(10_000)]
    kept = sample_lines("\n".join(lines), 0.1).split("\n")
    assert len(kept) == 1000 and set(kept) <= set(lines)
    numbers = [int(line.split()[1]) for line in kept]
    assert numbers == sorted(numbers) and numbers[-1] > 9000
    following = sum(b == a + 1 for a, b in pairwise(numbers))
    assert following > 900


def test_without_matplotlib_the_curves_are_text(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not reproduce.draw_curves({"a": [(1, 2.0)]}, tmp_path / "c.png")
    chart = "\n".join(text_chart({"GPT": [(10, 3.0), (20, 2.0)], "LLaMA": [(20, 1.5)]}))
    assert "3.000" in chart and "1.500" in chart
    assert len(re.findall("G", chart)) == 2 and "L" in chart
