"""The whole experiment on a sliver of text: it ends with a report, resumes, repeats nothing."""

import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

import make_toy_corpus
import reproduce
from conftest import interrupt_after, write_text
from experiments import recipes
from experiments.results import read_result
from experiments.sampling import halves, sample_lines, write_dev_halves
from tokenizer import Tokenizer
from training.io import run_program
from training.io import write_text as write_file
from training.resume import differences

ROOT = Path(__file__).parent.parent
OPTIONS = {"steps": 4, "batch_size": 4, "sequence_length": 32, "eval_sequences": 8, "log_every": 2}
MODELS = {
    "gpt2-teacher": {"title": "GPT-2 teacher", "model": "gpt2-tiny"},
    "llama-teacher": {"title": "LLaMA teacher", "model": "llama-tiny"},
    "control": {"title": "control (alone)", "model": "llama-tiny-student"},
    "student": {
        "like": "control",
        "title": "student",
        "teachers": ["gpt2-teacher", "llama-teacher"],
    },
}


def test_a_stage_begins_with_the_memory_that_the_stage_before_has_left(monkeypatch):
    order = []
    monkeypatch.setattr(reproduce.torch.cuda, "empty_cache", lambda: order.append("emptied"))
    program = SimpleNamespace(__name__="train", main=order.append)
    for number in (1, 2):
        reproduce.run_stage(program, number)
    assert order == ["emptied", ["1"], "emptied", ["2"]]


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """`recipe(**changes)` writes a recipe with models, steps and pairs for a test; its path."""
    monkeypatch.setattr(make_toy_corpus, "PAIRS_PER_PARADIGM", 20)  # scoring takes the most time
    monkeypatch.setattr(reproduce, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(make_toy_corpus, "TASK_PAIRS", {"train": 4, "valid": 2})
    monkeypatch.setattr("experiments.plots.picture", lambda *_: None)  # test_report.py draws them

    def write(**changes):
        table = {"vocabulary_size": 400, "options": OPTIONS, "models": MODELS}
        table["finetune"] = {"epochs": 1}
        table |= {"control": "control", "student": "student", **changes}
        path = tmp_path / "short.json"
        path.write_text(json.dumps(table))
        return str(path)

    return write


def run(*arguments):
    return run_program(lambda: reproduce.main([*map(str, arguments), "--device", "cpu"]))


def refused(capsys, *arguments):
    """What a command that is refused writes to standard error."""
    capsys.readouterr()
    assert run(*arguments) == 1
    return capsys.readouterr().err


@pytest.fixture
def given_text(tmp_path):
    """Options that name a small text for training and dev."""
    for split in ("train", "dev"):
        write_file(tmp_path / split / f"qed.{split}", write_text(6000, seed=len(split)))
    return ["--train", tmp_path / "train", "--dev", tmp_path / "dev"]


def trained(out):
    return {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}


def test_an_experiment_ends_with_a_report_and_is_not_done_twice(recipe, tmp_path, capsys):
    out = tmp_path / "toy"
    arguments = ["--recipe", recipe(corpus="toy", words=1500), "--out", out, "--seeds", "2"]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    for command in ("make_toy_corpus.py", "tokenize_corpus.py", "train.py", "distill.py"):
        assert f"$ python {command}" in printed
    assert "FLOPs of training left; scoring" in printed
    report = (out / "report.md").read_text()
    for title in ("GPT-2 teacher", "LLaMA teacher", "ensemble", "control (alone)", "student"):
        assert title in report and title in printed
    # The numbers are those of the evaluation, not of anything else.
    results = [json.loads((out / f"seed-{s}/student.json").read_text()) for s in range(2)]
    mean = sum(r["report"]["weighted_cross_entropy"] for r in results) / 2
    row = next(line for line in report.split("\n") if line.startswith("| student |"))
    assert f"{mean:.3f} ±" in row
    assert results[0]["samples"].keys() == set(reproduce.PROMPTS)
    means = [r["finetuned"]["scores"]["acceptable"]["mean"] for r in results]
    row_of_task = next(line for line in report.split("\n") if line.startswith("| acceptable"))
    assert row_of_task.count("±") == 4 and f"{50 * sum(means):.1f} ±" in row_of_task
    before = trained(out)
    capsys.readouterr()
    assert run(*arguments) == 0
    assert before == trained(out)
    assert "0.0e+00 FLOPs of training left, 0 hours at the speed measured here" in capsys.readouterr().out
    # The report alone, from the results alone.
    (out / "report.md").unlink()
    capsys.readouterr()
    assert run("--report", out) == 0
    assert row in (out / "report.md").read_text() and "$ python train" not in capsys.readouterr().out
    assert run("--report", out, "--out", tmp_path / "elsewhere") == 0
    assert row in (tmp_path / "elsewhere/report.md").read_text()
    assert "is no folder of an experiment" in refused(capsys, "--report", out / "seed-0" / "control")
    error = refused(capsys, "--report", out, out, "--out", tmp_path / "elsewhere")
    assert "several folders have a report each" in error


def test_results_elsewhere_are_enough_to_train_nothing_again(recipe, tmp_path, capsys):
    path = recipe(corpus="toy", words=1500)
    results = tmp_path / "kept"
    assert run("--recipe", path, "--out", tmp_path / "a", "--results", results) == 0
    assert run("--recipe", path, "--out", tmp_path / "b", "--results", results) == 0
    assert not trained(tmp_path / "b") and (results / "report.html").exists()
    # One student more needs its teachers again, and nothing else.
    arguments = ["--recipe", path, "--out", tmp_path / "b", "--results", results]
    assert run(*arguments, "--vary", "student.alpha=0.25") == 0
    names = {"gpt2-teacher", "llama-teacher", "student.alpha=0.25"}
    assert {p.parent.name for p in trained(tmp_path / "b")} == names
    assert "student.alpha=0.25" in (results / "report.md").read_text()
    # The report of another recipe stays what it is, whatever models the two share.
    report = (results / "report.md").read_bytes()
    other = shutil.copy(path, tmp_path / "other.json")
    error = refused(capsys, "--recipe", other, *arguments[2:])
    assert "is of recipe short, not other: choose another --results" in error
    assert (results / "report.md").read_bytes() == report
    # Scores are added, and none is lost; a folder that was moved away is no seed.
    assert run(*arguments) == 0
    scores = json.loads((results / "seed-0/control.json").read_text())
    scores["report"]["pairs"]["others"] = scores["report"]["pairs"]["pairs"]
    (results / "seed-0/control.json").write_text(json.dumps(scores))
    (results / "seed-0-old").mkdir()
    assert run(*arguments) == 0
    del scores["report"]["pairs"]["pairs"]
    (results / "seed-0/control.json").write_text(json.dumps(scores))
    assert "would lose its scores in others: add these to --pairs" in refused(capsys, *arguments)
    (results / "seed-0/control.json").unlink()
    # A result of other options is refused, and not mixed in, by whichever models are asked for.
    recipe(corpus="toy", words=1500, options=OPTIONS | {"steps": 5})
    for more in (["--first-seed", 0], ["--first-seed", 1], ["--models", "control"]):
        assert "conditions.steps: 4 -> 5" in refused(capsys, *arguments, *more)


def test_tuning_never_reads_what_is_reported(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--recipe", recipe(corpus="toy", words=1500), "--out", out, "--tune"]
    arguments += ["--first-seed", "100", "--models", "control", "control.learning_rate=0.01"]
    arguments += ["--vary", "control.learning_rate=0.01,0.02"]
    assert run(*arguments) == 0
    scored = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ python evaluate")]
    assert len(scored) == 2 and not any("report" in command for command in scored)
    table = (out / "tuning.md").read_text()
    assert "control.learning_rate=0.01 | 100 |" in table and "=0.02" not in table
    assert not (out / "report.md").exists()


def test_what_was_scored_for_tuning_is_not_reported(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    models = {"teacher": MODELS["llama-teacher"], "control": MODELS["control"]}
    models["student"] = {"like": "control", "teachers": ["teacher"], "dropout": 0.1}
    arguments = ["--recipe", recipe(corpus="toy", words=1500, models=models), "--out", out]
    assert run(*arguments, "--tune", "--first-seed", "100") == 0
    assert run("--report", out) == 1  # no experiment yet
    assert run(*arguments, "--models", "control") == 0
    assert run(*arguments) == 0
    assert (out / "report.md").read_text().startswith("# Language models compared: recipe short, 1 seed\n")


def test_a_seed_can_be_anothers(recipe, tmp_path):
    models = {
        "control": MODELS["control"],
        "twin": {"like": "control", "seed_offset": 7},
        "student": {"like": "control", "teachers": ["twin"]},
    }
    out = tmp_path / "out"
    assert run("--recipe", recipe(corpus="toy", words=1500, models=models), "--out", out) == 0
    seeds = {n: json.loads((out / f"seed-0/{n}.json").read_text())["seed"] for n in models}
    assert seeds == {"control": 0, "twin": 7, "student": 0}
    student = json.loads((out / "seed-0/student.json").read_text())
    twin = json.loads((out / "seed-0/twin.json").read_text())
    assert student["taught_by"] == [twin["weights"]]


def test_a_given_corpus_is_sampled_and_resumed(recipe, given_text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--recipe", recipe(words=3000, dev_words=1500), "--out", out, *given_text]
    assert run(*arguments, "--dry-run") == 0
    assert not trained(out)
    assert run(*arguments, "--stop-after", "0") == 0
    assert "the same command continues" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run(*arguments) == 143
    assert "stopped after step" in capsys.readouterr().out
    assert not (out / "report.md").exists()
    assert run(*arguments) == 0
    words = [
        len((out / "corpus" / name).read_text().split())
        for name in ("train/qed.train", "dev-A/qed.dev", "dev-B/qed.dev")
    ]
    assert 2000 < words[0] < 4000 and 1000 < words[1] < 2000 and 1000 < words[2] < 2000
    assert "| student" in (out / "report.md").read_text()
    assert "choose another --out" in refused(capsys, *arguments, "--words", "2000")
    # The shards alone, elsewhere: all results are there, so that nothing is trained.
    data, elsewhere = out / "data", tmp_path / "elsewhere"
    shutil.rmtree(out / "corpus")
    arguments = ["--recipe", recipe(words=3000, dev_words=1500), "--out", elsewhere]
    assert run(*arguments, "--data", data, "--results", out) == 0 and not trained(elsewhere)
    assert run(*arguments[:1], recipe(), *arguments[2:], "--data", data, "--dry-run") == 0
    wrong = ["--recipe", recipe(vocabulary_size=500), "--out", elsewhere, "--data", data]
    assert "400 pieces" in refused(capsys, *wrong)
    (data / "report" / "dev.bin").unlink()
    assert "report" in refused(capsys, *arguments, "--data", data)


def test_a_recipe_can_ask_for_the_papers_kind_of_tokenizer(recipe, given_text, tmp_path):
    out, byte_bpe = tmp_path / "out", recipe(tokenizer="byte-bpe", vocabulary_size=300)
    assert run("--recipe", byte_bpe, "--out", out, "--dry-run", *given_text) == 0
    assert Tokenizer.load(out / "data" / "tokenizer.model").description == "BPE (tokenizer.json)"
    assert run("--recipe", recipe(vocabulary_size=300), "--out", out, "--dry-run", *given_text) == 1


def test_nothing_of_the_users_is_deleted(recipe, given_text, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "corpus").mkdir(parents=True)
    (out / "corpus/notes.txt").write_text("years of work")
    error = refused(capsys, "--recipe", recipe(), "--out", out, "--dry-run", *given_text)
    assert "holds files that are not from this command" in error
    assert [path.name for path in out.rglob("*")] == ["corpus", "notes.txt"]


def test_an_attempt_that_was_stopped_is_made_again_from_the_same_text_alone(
    recipe, given_text, tmp_path, monkeypatch, capsys
):
    arguments = ["--recipe", recipe(), "--out", tmp_path / "out", "--dry-run", *given_text]
    with monkeypatch.context() as patch:
        patch.setattr(reproduce.tokenize_corpus, "main", lambda _: 130)
        assert run(*arguments) == 130
    assert "words differ" in refused(capsys, *arguments, "--words", "2000")
    assert run(*arguments) == 0
    path = tmp_path / "train/qed.train"
    path.write_text(path.read_text().replace("a", "b"))  # of the same size
    assert "train differ" in refused(capsys, *arguments)


def test_scores_of_other_pairs_are_not_reported(recipe, given_text, tmp_path, capsys):
    pair = {"sentence_good": "the cat", "sentence_bad": "cat the"}
    write_file(tmp_path / "pairs/a.jsonl", json.dumps(pair))
    models = {"control": MODELS["control"], "student": {"like": "control", "teachers": ["control"]}}
    arguments = ["--recipe", recipe(models=models), "--out", tmp_path / "out", *given_text]
    arguments += ["--pairs", tmp_path / "pairs"]
    assert run(*arguments) == 0
    # Losses that are gone are scored again, and nothing is trained again.
    before = trained(tmp_path / "out")
    (tmp_path / "out/seed-0/control.losses.npz").unlink()
    assert run(*arguments) == 0 and trained(tmp_path / "out") == before
    write_file(tmp_path / "pairs/a.jsonl", json.dumps(pair | {"sentence_bad": "a cat"}))
    assert "has another content of pairs than this command: move it away" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_weights": [1]}, "1 given for 2 teachers"),
        ({"teacher_weights": [-1, 1]}, "weights of 0 or more"),
        ({"sequence_length": 300}, "sequence-length 300"),
        ({"batch_size": 10**6}, "fewer than one batch"),
        ({"cache_teachers": "gpu"}, "training is on cpu"),
        ({"cuda_graph": True}, "needs a GPU of CUDA"),
        ({"save_at_words": ["x"]}, "save-at-words x"),
    ],
)
def test_what_a_later_model_cannot_do_is_told_before_the_first_is_trained(
    recipe, data_folder, tmp_path, capsys, options, message
):
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    (data / "report").mkdir()
    shutil.copy(data / "dev.bin", data / "report")
    size = Tokenizer.load(data / "tokenizer.model").vocabulary_size
    models = MODELS | {"student": MODELS["student"] | options}
    path = recipe(models=models, vocabulary_size=size)
    error = refused(capsys, "--recipe", path, "--data", data, "--out", tmp_path / "out")
    assert re.search(f"error: student: .*{message}", error)
    assert not trained(tmp_path / "out")


def test_pairs_that_cannot_be_scored_are_told_before_training(recipe, given_text, tmp_path, capsys):
    arguments = ["--recipe", recipe(), "--out", tmp_path / "out", *given_text, "--pairs", tmp_path / "pairs"]
    pair = {"sentence_good": "the cat " * 300, "sentence_bad": "cat the"}
    write_file(tmp_path / "pairs/a.jsonl", json.dumps(pair))
    assert "tokens is longer than the context of" in refused(capsys, *arguments)
    assert not trained(tmp_path)


def test_halves_share_no_line_and_are_alike_in_words(tmp_path):
    text = "\n".join(f"{i} " * (i % 7) for i in range(200))
    first, second = halves(text)
    assert first + "\n" + second == text
    assert abs(len(first.split()) - len(second.split())) < 8
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/a.dev").write_text(text)
    write_dev_halves(tmp_path / "dev", [tmp_path / "A", tmp_path / "B"])
    assert (tmp_path / "A/a.dev").read_text() == first
    assert (tmp_path / "B/a.dev").read_text() == second


def test_a_sample_of_dev_has_the_shares_of_the_training_text(tmp_path):
    for folder, sizes in (("train", (9000, 1000)), ("dev", (20_000, 20_000))):
        (tmp_path / folder).mkdir()
        for name, words in zip(("a", "b"), sizes):
            text = "".join("one two three four\n" for _ in range(words // 4))
            (tmp_path / folder / f"{name}.txt").write_text(text)
    targets = [tmp_path / "A", tmp_path / "B"]
    write_dev_halves(tmp_path / "dev", targets, 5000, tmp_path / "train")
    for target in targets:
        counts = [len((target / f"{name}.txt").read_text().split()) for name in "ab"]
        assert 4000 <= counts[0] <= 4500 and 200 <= counts[1] <= 500


def test_the_recipes_are_listed(capsys):
    assert reproduce.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(recipes.recipe_names(), lines, strict=True):
        assert line.split("  ")[0] == name and line.endswith(recipes.read_experiment(name).about)


@pytest.mark.parametrize("arguments", [["paper"], ["demo", "--train", "text"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--recipe", *arguments])
    assert stop.value.code == 2


def test_pairs_are_read_before_anything_is_trained(tmp_path, capsys):
    arguments = ["--recipe", "paper", "--train", "a", "--dev", "b", "--pairs", tmp_path]
    assert "minimal pairs" in refused(capsys, *arguments)


def test_a_sample_is_made_of_runs_of_lines_from_all_over():
    lines = [f"line {i}" for i in range(10_000)]
    results = sample_lines("\n".join(lines), 0.1).split("\n")
    assert len(results) == 1000 and set(results) <= set(lines)
    numbers = [int(line.split()[1]) for line in results]
    assert numbers == sorted(numbers) and numbers[-1] > 9000
    following = sum(b == a + 1 for a, b in pairwise(numbers))
    assert following > 900


def changes(saved, current):
    current = current | {"conditions": {"precision": "fp32"} | current["conditions"]}
    return differences(*(reproduce.comparable_settings(settings, current) for settings in (saved, current)))


def test_a_result_from_before_an_option_existed_counts_with_its_default():
    saved = {"conditions": {"precision": "fp32", "alpha": 0.5}}
    assert not changes(saved, {"conditions": {"schedule": "cosine", "alpha": 0.5}})
    assert changes(saved, {"conditions": {"schedule": "linear", "alpha": 0.5}}) == [
        "conditions.schedule: cosine -> linear"
    ]
    # An option that is a condition since then is in the result's options.
    patient = saved | {"options": {"patience": 2}}
    assert not changes(patient, {"conditions": {"alpha": 0.5, "patience": 2}})
    assert changes(patient, {"conditions": {"alpha": 0.5, "patience": 0}}) == ["conditions.patience: 2 -> 0"]
    # An option that no longer exists must have been off.
    saved["conditions"]["hidden_weight"] = 0.0
    assert not changes(saved, {"conditions": {"alpha": 0.5}})
    saved["conditions"]["hidden_weight"] = 0.5
    assert changes(saved, {"conditions": {"alpha": 0.5}}) == ["conditions.hidden_weight: 0.5 -> None"]


def test_teachers_are_compared_one_by_one():
    teacher, other = ({"conditions": {"precision": "fp32", "alpha": alpha}} for alpha in (0.5, 0.25))
    current = teacher | {"teachers": [teacher, teacher]}
    assert not changes(current, current)
    assert changes(teacher | {"teachers": [teacher, other]}, current) == [
        "teachers.1.conditions.alpha: 0.25 -> 0.5"
    ]


@pytest.mark.parametrize("name, seeds", [("small", 3)])
def test_the_stored_results_of_a_recipe_still_count(name, seeds):
    """Those of benchmarks/results/claim, whose text is not here: its digests stand in."""
    folder = Path(reproduce.__file__).parent / "benchmarks/results/claim"
    experiment = recipes.read_experiment(name)
    shards = json.loads((folder / "seed-0/control.json").read_text())["shards"]
    context = SimpleNamespace(recipe=experiment, shards=shards)
    for seed in range(seeds):
        for model, (specs, weights) in experiment.all_scored().items():
            path = folder / f"seed-{seed}/{model}.json"
            settings = reproduce.result_settings(context, model, specs, weights, seed)
            reproduce.check_result(path, read_result(path), settings)


def test_the_models_of_a_seed_have_one_precision_and_another_seed_may_have_another(
    recipe, tmp_path, monkeypatch, capsys
):
    arguments = ["--recipe", recipe(corpus="toy", words=1500), "--out", tmp_path / "toy", "--tune"]

    def trained_where(native, model, seed):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: native)
        return run(*arguments, "--models", model, "--first-seed", seed)

    assert trained_where(False, "control", 0) == 0
    assert trained_where(True, "control", 0) == 0  # nothing is left to train
    assert trained_where(True, "llama-teacher", 0) == 1
    assert "control.json was trained in fp32" in capsys.readouterr().err
    assert trained_where(True, "llama-teacher", 1) == 0
    result = json.loads((tmp_path / "toy/seed-1/llama-teacher.json").read_text())
    assert result["conditions"]["precision"] == "bf16"
    # A run that was begun keeps its precision on another machine.
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert trained_where(True, "control", 2) == 143
    assert trained_where(False, "control", 2) == 0
    assert "cpu, bf16" in capsys.readouterr().out
    result = json.loads((tmp_path / "toy/seed-2/control.json").read_text())
    assert result["conditions"]["precision"] == "bf16"


def test_dev_text_of_other_sub_corpora_is_refused_before_training(recipe, tmp_path, capsys):
    for name in ("train/essays.txt", "dev/letters.txt"):
        write_file(tmp_path / name, f"{name} " + write_text(4000, seed=len(name)))
    folders = ["--train", tmp_path / "train", "--dev", tmp_path / "dev", "--out", tmp_path / "out"]
    error = refused(capsys, "--recipe", recipe(vocabulary_size=300), *folders, "--dry-run")
    assert "have no sub-corpus in common" in error


# ---- side by side


def weights_of(out):
    return {path.name: read_result(path).get("weights") for path in out.glob("seed-0/*.json")}


def test_models_that_train_side_by_side_are_those_of_one_after_the_other(
    recipe, given_text, tmp_path, capsys
):
    models = {name: MODELS[name] for name in ("llama-teacher", "control")}
    models["student"] = MODELS["student"] | {"teachers": ["llama-teacher"]}
    arguments = ["--recipe", recipe(models=models), *given_text]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    capsys.readouterr()
    assert run(*arguments, "--out", tmp_path / "two", "--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert weights_of(tmp_path / "two") == weights_of(tmp_path / "one")
    assert len(weights_of(tmp_path / "two")) == 3
    # The student waits for its teacher, the control does not.
    events = re.findall(r"^(started|finished) +([\w-]+), seed 0", printed, flags=re.M)
    assert set(events[:2]) == {("started", "llama-teacher"), ("started", "control")}
    assert events.index(("finished", "llama-teacher")) < events.index(("started", "student"))


def test_the_first_job_that_fails_stops_the_others_and_says_why(recipe, given_text, tmp_path, capsys):
    models = {name: MODELS[name] for name in ("llama-teacher", "control")}
    models["student"] = MODELS["student"] | {"teachers": ["llama-teacher"]}
    path = recipe(models=models | {"control": MODELS["control"] | {"steps": 10**6}})
    arguments = ["--recipe", path, *given_text, "--out", tmp_path / "out", "--jobs", "2"]
    write_file(tmp_path / "out" / "seed-0" / "llama-teacher" / "checkpoint.pt", "damaged")
    error = refused(capsys, *arguments)
    line = error.splitlines()[-1]
    assert line.startswith("error: llama-teacher, seed 0: ") and "checkpoint.pt is damaged" in line
    assert not multiprocessing.active_children()


@pytest.mark.faults
def test_side_by_side_continues_after_a_signal_and_trains_only_what_is_missing(recipe, given_text, tmp_path):
    models = {name: MODELS[name] for name in ("llama-teacher", "control")}
    models["student"] = MODELS["student"] | {"teachers": ["llama-teacher"]}
    models["second-student"] = models["student"] | {"alpha": 0.25}  # both wait for one teacher
    options = OPTIONS | {"steps": 60, "log_every": 1}
    arguments = ["--recipe", recipe(models=models, options=options), *given_text]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    out = tmp_path / "two"
    command = [
        sys.executable,
        ROOT / "reproduce.py",
        *arguments,
        "--out",
        out,
        "--jobs",
        "2",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen([*map(str, command)])
    while not any("step" in path.read_text() for path in out.glob("seed-0/*.log")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not list(out.glob("seed-0/*.json"))
    assert run(*arguments, "--out", out, "--jobs", "3") == 0
    assert weights_of(out) == weights_of(tmp_path / "one")
    # A student whose teacher's run is gone needs it again; the control does not.
    shutil.rmtree(out / "seed-0" / "llama-teacher")
    shutil.rmtree(out / "seed-0" / "student")
    shutil.rmtree(out / "seed-0" / "second-student")
    (out / "seed-0" / "student.json").unlink()
    (out / "seed-0" / "second-student.json").unlink()
    before = trained(out / "seed-0" / "control")
    assert run(*arguments, "--out", out, "--jobs", "2") == 0
    assert weights_of(out) == weights_of(tmp_path / "one")
    assert trained(out / "seed-0" / "control") == before
