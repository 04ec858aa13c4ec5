"""The one loop: schedule, step, resuming, what it writes, what it refuses."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import export_hf
import finetune
import generate
import make_toy_corpus
import model as models
import reproduce
import tokenize_corpus
import train
from conftest import (
    OPTIONS,
    comparable,
    config_for,
    fitted,
    interrupt_after,
    log_entries,
    run,
    same,
    save_model,
    step_of,
    stopped,
    trained,
    weights,
    write_split,
    write_text,
)
from data import Batch, BatchStream, TokenShard
from distill import DistillConfig
from train import CrossEntropyObjective, TrainConfig, learning_rate
from training.average import WeightAverage
from training.checkpoint import read_checkpoint
from training.io import UserError
from training.options import GROUPS, parse

ROOT = Path(__file__).parent.parent


# ---- schedule, optimizer, step


def test_learning_rate_endpoints():
    rates = [learning_rate(s, 1000, 0.5, 100) for s in range(1001)]
    assert rates[0] == 0 and rates[50] == 0.25 and rates[100] == 0.5
    assert math.isclose(rates[550], 0.25) and abs(rates[1000]) < 1e-12
    assert max(rates) == 0.5 and 0 < rates[999] < 1e-5
    assert [learning_rate(s, 100, 1.0, 10, 0.1) for s in (10, 55, 100)] == pytest.approx([1.0, 0.55, 0.1])
    # Warm-up never exceeds a tenth of the steps.
    assert learning_rate(2, 20, 1.0, 200) == learning_rate(0, 5, 1.0, 200) == 1.0


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_accumulated_micro_batches_equal_one_batch(train_shard, micro_batch_size):
    torch.manual_seed(0)
    model = models.build_model("llama-tiny", 300)
    twin = copy.deepcopy(model)
    batch = BatchStream(train_shard, 8, 32, seed=0)(0)
    batch.targets[0, 3:] = -100  # so that micro-batches have unequal numbers of targets
    batch = Batch.whole(batch.chunk_ids, batch.tokens, batch.targets)
    uninterrupted = step_of(CrossEntropyObjective(model))(batch, 1e-3)
    parts = step_of(CrossEntropyObjective(twin), micro_batch_size)(batch, 1e-3)
    for key in uninterrupted:
        torch.testing.assert_close(uninterrupted[key], parts[key], rtol=1e-5, atol=1e-6)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_a_run_without_finite_gradients_gives_up(data_folder, tmp_path):
    config = config_for(data_folder, tmp_path / "r", steps=40)
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    objective.model.ln_f.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="no finite gradient"):
        fitted(objective, config)


def test_one_batch_can_be_learned_by_heart(train_shard):
    torch.manual_seed(0)
    for name in ("gpt2-tiny", "llama-tiny"):
        model = models.build_model(name, 300).eval()
        step, batch = step_of(CrossEntropyObjective(model)), BatchStream(train_shard, 2, 32, seed=0)(0)
        losses = [step(batch, 3e-3)["loss"].item() for _ in range(60)]
        assert losses[0] > 4 and losses[-1] < 0.1


# ---- runs


def test_a_run_writes_what_it_promises(whole_run):
    assert {p.name for p in whole_run.iterdir()} == {"checkpoint.pt", "previous.pt", "best.pt", "log.jsonl"}
    first, *entries = map(json.loads, (whole_run / "log.jsonl").read_text().splitlines())
    assert first.keys() >= {"config", "model", "parameters", "tokenizer", "commit", "versions", "device"}
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == [2, 4, 6, 8, 10, 12]
    keys = {"epoch", "tokens", "words", "loss", "cross_entropy", "learning_rate", "gradient_norm"}
    assert steps[-1].keys() >= keys | {"tokens_per_second"}
    assert steps[-1]["tokens"] == 12 * 4 * 32
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [e for e in entries if "dev_cross_entropy" in e]
    assert evaluations[-1]["step"] == 12
    progress = read_checkpoint(whole_run / "checkpoint.pt")["progress"]
    assert progress["dev_cross_entropy"] == evaluations[-1]["dev_cross_entropy"]
    best = read_checkpoint(whole_run / "best.pt")
    assert best["training"] is None
    assert best["progress"]["dev_cross_entropy"] == min(e["dev_cross_entropy"] for e in evaluations)
    assert best["progress"]["step"] == progress["best_step"]


def test_same_seed_same_bits(whole_run, data_folder, tmp_path):
    trained(config_for(data_folder, tmp_path / "r"))
    assert comparable(tmp_path / "r") == comparable(whole_run)
    trained(config_for(data_folder, tmp_path / "s", seed=1))
    assert not same(weights(tmp_path / "s/checkpoint.pt"), weights(whole_run / "checkpoint.pt"))


@pytest.mark.parametrize("steps", [3, 8])
def test_resuming_equals_not_stopping(whole_run, data_folder, tmp_path, monkeypatch, steps):
    config = config_for(data_folder, tmp_path / "r")
    assert stopped(config, monkeypatch, steps)["stopped_by"] == signal.SIGTERM
    assert trained(config)["step"] == 12
    assert comparable(tmp_path / "r") == comparable(whole_run)


def test_average_last_gives_the_mean_of_the_last_weights(whole_run, data_folder, tmp_path, monkeypatch):
    options = {"average_last": 0.5, "eval_every": 9}
    after, update = [], WeightAverage.update

    def recorded(self, step):
        after.append({name: p.detach().clone() for name, p in self.parameters.items()})
        update(self, step)

    def assert_mean(path, steps):
        for name, weight in weights(path).items():
            mean = torch.stack([values[name] for values in steps]).mean(0)
            torch.testing.assert_close(weight, mean, rtol=1e-5, atol=1e-6)

    config = config_for(data_folder, tmp_path / "cut", **options)
    monkeypatch.setattr(WeightAverage, "update", recorded)
    assert stopped(config, monkeypatch, 9)["best_step"] == 9
    assert_mean(tmp_path / "cut/best.pt", after[6:])
    assert same(weights(tmp_path / "cut/checkpoint.pt"), after[8])  # training goes on with these
    trained(config)
    assert same(after[-1], weights(whole_run / "checkpoint.pt"))  # those of a run without the option
    assert_mean(tmp_path / "cut/checkpoint.pt", after[6:])
    trained(config_for(data_folder, tmp_path / "whole", **options))
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_resuming_on_a_gpu_ends_where_running_again_does(data_folder, tmp_path, monkeypatch, cuda_graph):
    """To the bit, if the GPU repeats its own bits; else not farther away than a repetition is."""
    options = {"device": "cuda", "precision": "bf16", "cuda_graph": cuda_graph}

    uninterrupted, again, cut = (
        config_for(data_folder, tmp_path / n, **options) for n in ("whole", "again", "cut")
    )
    assert stopped(cut, monkeypatch, 8)["step"] == 8
    ends = []
    for config in (uninterrupted, again, cut):
        assert trained(config)["step"] == 12
        ends.append(torch.cat([w.flatten() for w in weights(Path(config.out) / "checkpoint.pt").values()]))
    assert (ends[2] - ends[0]).abs().max() <= 4 * (ends[1] - ends[0]).abs().max()


def test_a_run_whose_states_are_all_damaged_says_what_to_do(whole_run, data_folder, tmp_path):
    shutil.copytree(whole_run, tmp_path / "r")
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "r" / name).write_bytes(b"")
    with pytest.raises(UserError, match="delete it, or choose another --out"):
        trained(config_for(data_folder, tmp_path / "r"))


def test_a_best_checkpoint_that_is_gone_is_written_anew(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r", eval_every=3)
    stopped(config, monkeypatch, 5)
    (tmp_path / "r/best.pt").unlink()
    trained(config)
    assert read_checkpoint(tmp_path / "r/best.pt")["progress"]["step"] > 5


def test_a_finished_run_says_so_writes_nothing_and_gives_back_its_weights(whole_run, data_folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole_run.iterdir()}
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    fitted(objective, config_for(data_folder, whole_run))
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in whole_run.iterdir()}
    assert same(objective.model.state_dict(), weights(whole_run / "checkpoint.pt"))


def test_a_finished_run_names_the_ways_on(data_folder, tmp_path, capsys):
    out = tmp_path / "r"
    short = {"model": "llama-tiny", "steps": 2}
    trained(config_for(data_folder, out, **short))
    with pytest.raises(UserError, match="to train these weights on"):
        trained(config_for(data_folder, out, **short | {"steps": 4}))
    with pytest.raises(UserError, match=r"for a new run$"):
        trained(config_for(data_folder, out, **short | {"steps": 4, "seed": 5}))
    (out / "best.pt").unlink()
    trained(config_for(data_folder, out, **short))
    assert "best.pt is gone" in capsys.readouterr().err


def test_what_may_change_on_resuming_does(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny")
    assert stopped(config, monkeypatch, 5)["step"] == 5
    changes = {"save_every": 7, "log_every": 3, "micro_batch_size": 2, "stop_after": 60.0}
    assert trained(dataclasses.replace(config, **changes))["step"] == 12
    trained(config_for(data_folder, tmp_path / "whole", model="llama-tiny"))
    ours, theirs = (weights(tmp_path / name / "checkpoint.pt") for name in ("r", "whole"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-4)


def test_what_is_left_of_another_run_is_not_overwritten(whole_run, data_folder, tmp_path):
    shutil.copy(whole_run / "best.pt", tmp_path)
    with pytest.raises(UserError, match="learning_rate"):
        trained(config_for(data_folder, tmp_path, learning_rate=1e-3))
    assert trained(config_for(data_folder, tmp_path))["step"] == 12


def start(data_folder, out, steps):
    """Starts train.py as a shell does."""
    command = [sys.executable, ROOT / "train.py", *OPTIONS, "--model", "llama-tiny", "--data", data_folder]
    command += ["--out", out, "--steps", str(steps), "--log-every", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_nobody_reading_the_output_does_not_end_a_run(data_folder, tmp_path):
    process = start(data_folder, tmp_path / "r", 30)
    for _ in range(8):
        process.stdout.readline()
    process.stdout.close()
    process.wait(60)
    assert read_checkpoint(tmp_path / "r/checkpoint.pt")["progress"]["step"] == 30


def test_ctrl_c_saves_and_is_the_exit_code(data_folder, tmp_path):
    process, printed = start(data_folder, tmp_path / "r", 100_000), ""
    while "step 3/" not in printed:
        printed += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command continues" in printed
    assert "\r" not in printed  # which only a terminal gets
    assert (tmp_path / "r/checkpoint.pt").exists()


def test_another_recipe_or_other_data_is_not_continued(whole_run, tokenizer, data_folder, tmp_path):
    with pytest.raises(UserError, match=r"learning_rate.*seed"):
        trained(config_for(data_folder, whole_run, seed=5, learning_rate=1e-3))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    for split in ("train", "dev"):
        write_split(tmp_path, split, tokenizer, {"other": write_text(3000, seed=9)})
    with pytest.raises(UserError, match="train_shard"):
        trained(config_for(tmp_path, whole_run))


def test_never_and_a_path_start_new_runs(whole_run, data_folder, tmp_path):
    with pytest.raises(UserError, match="holds a run"):
        trained(config_for(data_folder, whole_run, resume="never"))
    from_path = config_for(data_folder, tmp_path / "n", resume=str(whole_run / "previous.pt"))
    assert trained(from_path)["step"] == 12
    assert same(weights(tmp_path / "n/checkpoint.pt"), weights(whole_run / "checkpoint.pt"))
    with pytest.raises(UserError, match="weights only"):
        trained(config_for(data_folder, tmp_path / "m", resume=str(whole_run / "best.pt")))


def test_a_dry_run_prints_the_arithmetic_and_nothing_else_happens(data_folder, tmp_path, capsys):
    config = config_for(data_folder, tmp_path / "r", dry_run=True)
    trained(config)
    printed = capsys.readouterr().out
    assert "4 sequences x 32 = 128 tokens" in printed and "12 steps" in printed
    assert "warm-up    1 steps, a tenth of the run, instead of 50" in printed
    # Epochs decide the number of steps.
    chunks = (len(TokenShard(data_folder / "train.bin").tokens) - 1) // 32
    epochs = config_for(data_folder, tmp_path / "r", steps=None, epochs=2.5, dry_run=True)
    assert trained(epochs)["steps"] == round(chunks * 2.5 / 4)
    assert not (tmp_path / "r").exists()


def test_stop_after_saves_and_stops(data_folder, tmp_path):
    progress = trained(config_for(data_folder, tmp_path / "r", stop_after=1e-9))
    assert progress["step"] == 1 and progress["stopped_by"] is None
    assert read_checkpoint(tmp_path / "r/checkpoint.pt")["progress"]["step"] == 1


def test_bfloat16_is_near_float32(data_folder, tmp_path):
    fp32, bf16 = (
        trained(config_for(data_folder, tmp_path / name, model="llama-tiny", precision=name))
        for name in ("fp32", "bf16")
    )
    assert bf16["dev_cross_entropy"] == pytest.approx(fp32["dev_cross_entropy"], rel=0.02)


# ---- the command line


def test_help_lists_each_option_in_the_order_of_the_groups_and_then_the_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        distill.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "(default: 128)" in text and re.search(r"\nllama-58m +58,343,936 +16 x 512\n", text)
    assert all(f"\n{name} " in text for name in models.PRESETS)
    headings = [line[:-1] for line in text.splitlines() if line[:-1] in GROUPS]
    assert headings == [group for group in GROUPS if group in headings] and len(headings) > 3
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(DistillConfig)}
    assert all(f"\n  --{name.replace('_', '-')}" in text for name in helps)
    assert len({*helps.values()}) == len(helps) and min(map(len, helps.values())) > 5


@pytest.mark.parametrize(
    "program, argument, nearest",
    [
        (train, "--batchsize", "--batch-size"),
        (train, "--eval-evry=3", "--eval-every"),
        (train, "--fdsp", "--fsdp"),
        (evaluate, "--pears", "--pairs"),
        (export_hf, "--import-from", "--import"),
        (finetune, "--sede", "--seeds"),
        (generate, "--promt", "--prompt"),
        (make_toy_corpus, "--wrods", "--words"),
        (reproduce, "--recipie", "--recipe"),
        (tokenize_corpus, "--vocabsize", "--vocab-size"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(capsys, program, argument, nearest):
    with pytest.raises(SystemExit) as stop:
        program.main([argument])
    assert stop.value.code == 2 and f"did you mean {nearest}?" in capsys.readouterr().err


def test_a_file_of_options_stands_where_its_name_stands(tmp_path, capsys):
    path = tmp_path / "options.txt"
    path.write_text("# it's\n--model llama-tiny  # a comment\n--steps\n5\n--data 'my data#1'\n")
    expected = TrainConfig(model="llama-tiny", steps=7, data="my data#1", seed=3)
    assert parse(TrainConfig, "", ["--seed", "3", f"@{path}", "--steps", "7"]) == expected
    mistakes = ("--data 'no end", "No closing quotation"), ("--stpes 5", "did you mean --steps?")
    for content, message in (*mistakes, (None, "No such file")):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(SystemExit) as stop:
            parse(TrainConfig, "", [f"@{path}"])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_alias_is_the_same_option():
    assert parse(TrainConfig, "", ["--fsdp", "--lr", "1"]) == TrainConfig(shard=True, learning_rate=1.0)


WRONG = ["--no-such-option", "--steps many", "--steps 1 --epochs 1", "--batch-size 0", "--steps 0"]
WRONG += ["--epochs nan", "--learning-rate inf", "--seed 100000000000000000000", "--precision fp8"]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model llama-7b", "llama-58m"),
        ("--data nowhere", "tokenize_corpus.py"),
        ("--device cuda:7", "--device"),
        ("--device cpu --cuda-graph", "--cuda-graph"),
        ("--device meta", "--device"),
        ("--sequence-length 512", "--sequence-length"),
        ("--batch-size 100000", "--batch-size"),
        ("--resume none.pt", "no such checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(data_folder, tmp_path, refused, arguments, message):
    defaults = ["--data", data_folder, "--out", tmp_path / "r", "--model", "llama-tiny"]
    assert message in refused(train, *defaults, *arguments.split())
    assert not (tmp_path / "r").exists()


def test_shards_and_weights_of_another_tokenizer_are_refused(data_folder, other_tokenizer, tmp_path, refused):
    for name in ("train.bin", "dev.bin"):
        shutil.copy(data_folder / name, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(other_tokenizer.model_bytes)
    assert "was not made with" in refused(train, "--data", tmp_path)
    save_model(tmp_path / "a.pt", models.build_model("llama-tiny", 300), other_tokenizer)
    arguments = ["--init", tmp_path / "a.pt", "--data", data_folder, "--out", tmp_path / "run"]
    assert "another tokenizer" in refused(train, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number, handler, code",
    [
        (signal.SIGTERM, signal.SIG_DFL, 143),
        (signal.SIGHUP, signal.SIG_DFL, 129),
        (signal.SIGHUP, signal.SIG_IGN, 0),
    ],
    ids=["terminated", "terminal closed", "nohup"],
)
def test_a_signal_saves_and_nohup_goes_on(data_folder, tmp_path, monkeypatch, number, handler, code):
    interrupt_after(monkeypatch, 2, then=lambda: os.kill(os.getpid(), number))
    before = signal.signal(number, handler)
    try:
        arguments = ["--model", "llama-tiny", "--data", data_folder, "--out", tmp_path, *OPTIONS]
        assert run(train, *arguments) == code
    finally:
        signal.signal(number, before)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["progress"]["step"] == (2 if code else 6)


# ---- checkpoints at word counts, and other beginnings than chance


def test_weights_are_kept_when_so_many_words_have_been_seen(data_folder, tmp_path):
    """At the first step that has seen them; interrupted and continued, the same files."""
    shard = TokenShard(data_folder / "train.bin")
    words_a_step = 4 * shard.words / ((len(shard.tokens) - 1) // 32)
    marks = ["100", "400", "300"]
    config = config_for(data_folder, tmp_path / "run", save_at_words=marks)
    trained(config)
    for name, mark in (("100", 100), ("300", 300), ("400", 400)):
        checkpoint = read_checkpoint(tmp_path / "run" / f"chck_{name}.pt")
        assert checkpoint["training"] is None
        assert checkpoint["progress"]["step"] == math.ceil(mark / words_a_step)
        assert mark <= checkpoint["progress"]["words"] < mark + words_a_step + 1
    last = weights(tmp_path / "run" / "checkpoint.pt")
    assert not same(weights(tmp_path / "run" / "chck_400.pt"), last)

    other = config_for(data_folder, tmp_path / "cut", save_at_words=marks, stop_after=0)
    while (progress := trained(other))["step"] < progress["steps"]:
        pass
    for name in ("100", "300", "400"):
        pair = [weights(tmp_path / run / f"chck_{name}.pt") for run in ("run", "cut")]
        assert same(*pair)


def test_training_can_begin_with_the_weights_of_another_run(whole_run, data_folder, tmp_path, refused):
    first, second = shutil.copy(whole_run / "best.pt", tmp_path), tmp_path / "second"
    arguments = ["--model", "llama-tiny", "--data", data_folder, "--out", second, *OPTIONS]
    arguments += ["--steps", "1", "--learning-rate", "0", "--init"]
    assert run(train, *arguments, first) == 0
    assert same(weights(first), weights(second / "best.pt"))
    model, checkpoint = models.load_checkpoint(second / "best.pt")
    assert models.architecture(model.config) == "gpt2" and checkpoint["model"]["name"] == "gpt2-tiny"
    # The same beginning from elsewhere is the same run; another one is not.
    assert run(train, *arguments, whole_run / "best.pt") == 0
    assert "init_digest" in refused(train, *arguments, whole_run / "previous.pt")


@pytest.mark.parametrize(
    "changes, best", [({"steps": 6}, "there is no .*best.pt"), ({}, "best.pt has step 1")]
)
def test_a_run_that_diverges_fails_and_says_what_to_do(data_folder, tmp_path, changes, best):
    """Also where patience ends it, and where the same command is given again."""
    changes = {"steps": 20, "eval_every": 1, "patience": 2, "learning_rate": 1e15, "clip": 0.0} | changes
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny", **changes)
    for _ in range(2):
        with pytest.raises(UserError, match=f"diverged.*{best}.*lower --learning-rate"):
            trained(config)


def test_tensorboard_shows_what_the_log_says_also_of_a_run_that_was_stopped(
    data_folder, tmp_path, monkeypatch
):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_for(data_folder, tmp_path / "r", tensorboard=True)
    stopped(config, monkeypatch, 8)
    trained(config)
    events = reader.EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    for tag in ("loss", "learning_rate", "dev_cross_entropy"):
        logged = {e["step"]: e[tag] for e in log_entries(tmp_path / "r") if tag in e}
        assert {e.step: e.value for e in events.Scalars(tag)} == pytest.approx(logged)


def test_weights_and_biases_has_what_the_log_says_also_of_a_run_that_was_stopped(
    data_folder, tmp_path, monkeypatch
):
    """In its offline mode; its file is LevelDB's log: blocks of 32 KiB, records with 7 bytes before them."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_for(data_folder, tmp_path / "r", wandb=True)
    stopped(config, monkeypatch, 8)
    trained(config)
    paths = sorted((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1  # one run, in two parts

    def history():
        steps = {}
        for path in paths:
            content, position = path.read_bytes(), 7
            assert len(content) < 1 << 15
            while position < len(content):
                _, size, _ = struct.unpack_from("<IHB", content, position)
                record = Record.FromString(content[position + 7 : position + 7 + size])
                position += 7 + size
                for item in record.history.item:
                    key = item.key or item.nested_key[0]
                    steps.setdefault(record.history.step.num, {})[key] = json.loads(item.value_json)
        return steps

    entries, deadline = log_entries(tmp_path / "r"), time.monotonic() + 30
    while not {entry["step"] for entry in entries} <= history().keys() and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of its own writes the file
    for entry in entries:
        assert entry.items() <= history()[entry["step"]].items() | {("step", entry["step"])}


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(data_folder, tmp_path, monkeypatch, refused, tracker):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["--model", "llama-tiny", "--data", data_folder, "--out", tmp_path / "r", *OPTIONS]
    assert f"pip install {tracker}" in refused(train, *arguments, f"--{tracker}")


def test_the_log_line_says_how_long_it_will_take_and_what_the_gpu_does(
    data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.logger.peak_flops", lambda compute: 1e12)
    trained(config_for(data_folder, tmp_path / "r"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    entries = [entry for entry in log_entries(tmp_path / "r", speeds=True) if "loss" in entry]
    model = models.build_model("gpt2-tiny", 300)
    parameters = sum(p.numel() for p in model.blocks.parameters()) + model.head.numel()
    for line, entry in zip(lines, entries, strict=True):
        share = 6 * parameters * entry["tokens_per_second"] / 1e12
        assert re.search(rf"tokens/s  MFU {share:.1%}  0:00:\d\d left$", line)
    assert lines[-1].endswith("  0:00:00 left")


def test_a_trace_shows_the_steps_that_were_asked_for(data_folder, tmp_path):
    trained(config_for(data_folder, tmp_path / "r", steps=14, profile=2))
    events = json.loads((tmp_path / "r" / "trace.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == 2 and any("mm" in str(e.get("name")) for e in events)
