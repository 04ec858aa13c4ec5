"""The whole recipe on a sliver of text: it ends with a report, resumes, says what it measured."""

import json
from itertools import pairwise

import pytest

import make_toy_corpus
import reproduce
from conftest import interrupt_after, write_text
from harness.files import run_program
from model import PRESETS
from reproduce import RECIPES, Experiment, read_log, sample_lines


@pytest.fixture
def short_recipe(monkeypatch):
    """The demo's recipe with models, steps and minimal pairs for a test."""
    experiment = Experiment(
        ("gpt2-tiny", "llama-tiny"), "llama-tiny-student", 400, words=1500,
        options=("--steps", "4", "--batch-size", "4", "--sequence-length", "32",
                 "--eval-sequences", "8", "--log-every", "2"),
    )  # fmt: skip
    for name in ("demo", "small"):
        monkeypatch.setitem(RECIPES, name, experiment)
    monkeypatch.setattr(make_toy_corpus, "PAIRS_PER_PARADIGM", 20)  # scoring takes the most time


def test_the_demo_ends_with_a_report_and_is_not_done_twice(short_recipe, tmp_path, capsys):
    out = tmp_path / "demo"
    arguments = ["--recipe", "demo", "--out", str(out), "--seeds", "2", "--device", "cpu"]
    assert run_program(lambda: reproduce.main(arguments)) == 0
    printed = capsys.readouterr().out
    for command in ("make_toy_corpus.py", "tokenize_corpus.py", "train.py", "distill.py"):
        assert f"$ python {command}" in printed
    report = (out / "report.md").read_text()
    for role in ("GPT-2 teacher", "LLaMA teacher", "ensemble of both", "control", "student"):
        assert role in report and role in printed
    assert "±" in report and "of 2 seeds" in report
    # The numbers are those of the evaluation, not of anything else.
    scores = [
        json.loads((out / f"seed-{seed}/scores.json").read_text())["checkpoints"]
        for seed in range(2)
    ]
    mean = sum(s[3]["perplexity"] for s in scores) / 2
    row = next(line for line in report.split("\n") if line.startswith("| student"))
    assert f"{mean:.2f} ±" in row
    won = sum(s[3]["cross_entropy"] < s[2]["cross_entropy"] for s in scores)
    assert f"dev cross-entropy: the student beats the control (alone) in {won} of 2 seeds" in report
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}
    assert run_program(lambda: reproduce.main(arguments)) == 0
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
        assert run_program(lambda o=options: reproduce.main([*arguments, *o])) == 0
        assert "the same command continues" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run_program(lambda: reproduce.main(arguments)) == 143
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    assert not (tmp_path / "out/report.md").exists()
    assert run_program(lambda: reproduce.main(arguments)) == 0
    words = len((tmp_path / "out/corpus/train/qed.train").read_text().split())
    assert 2000 < words < 4000
    assert "| student" in (tmp_path / "out/report.md").read_text()
    assert run_program(lambda: reproduce.main([*arguments[:-1], "2000"])) == 1
    assert "choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["small"], ["demo", "--train", "text"], ["tiny"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--recipe", *arguments])
    assert stop.value.code == 2


def test_pairs_are_read_before_anything_is_trained(tmp_path, capsys):
    arguments = ["--recipe", "small", "--train", "a", "--dev", "b", "--pairs", str(tmp_path)]
    assert run_program(lambda: reproduce.main(arguments)) == 1
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


def training_line(step):
    """A log line of training with 5 steps an epoch, 8 tokens a step and 4 tokens a second."""
    entry = {"step": step, "epoch": step / 5, "tokens": 8 * step, "tokens_per_second": 4.0}
    return json.dumps(entry).encode()


def test_a_log_tells_seconds_epochs_and_the_curve(tmp_path):
    dev = [b'{"step": 5, "dev_cross_entropy": 3.5}', b'{"step": 10, "dev_cross_entropy": 3.25}']
    lines = [b'{"config": {}}', training_line(5), dev[0], training_line(10), dev[1], b""]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(tmp_path / "log.jsonl") == {
        "seconds": 20.0, "epochs": 2.0, "steps": 10, "curve": [(5, 3.5), (10, 3.25)],
    }  # fmt: skip


def test_damaged_lines_of_a_log_are_passed_over(tmp_path):
    damage = [
        b'{"step": 6, "dev_cross_en', b"\xff\x00\xfe", b"[1, 2]", b"7", b"null", b"[" * 100_000,
        b'{"step": 7, "dev_cross_entropy": null}', b'{"step": "7", "dev_cross_entropy": 1}',
        b'{"step": 8, "dev_cross_entropy": NaN}', b'{"dev_cross_entropy": 1}',
        b'{"step": 9, "tokens_per_second": 4.0}', b'{"step": 1' + b"0" * 5000 + b"}",
    ]  # fmt: skip
    whole = [training_line(5), b'{"step": 5, "dev_cross_entropy": 3.5}', training_line(10)]
    lines = [line for good in whole for line in (*damage, good)]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines + damage))
    expected = {"seconds": 20.0, "epochs": 2.0, "steps": 10, "curve": [(5, 3.5)]}
    assert read_log(tmp_path / "log.jsonl") == expected
    (tmp_path / "log.jsonl").write_bytes(whole[1])
    assert read_log(tmp_path / "log.jsonl")["curve"] == []  # nothing tells the length of an epoch
