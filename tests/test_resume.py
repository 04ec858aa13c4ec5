"""The checkpoint that a run continues from: after kills, damage, failed reads, earlier versions."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import distill
import train
from conftest import (
    comparable,
    config_for,
    needs_full_device,
    run,
    same,
    stopped,
    trained,
    weights,
    write_in_background,
)
from data import open_corpus
from training import checkpoint as checkpoints
from training import io, logger, resume
from training.checkpoint import read_checkpoint
from training.io import UserError, locked, run_program

FIXTURES = Path(__file__).parent / "fixtures"
OLD_OPTIONS = (
    "--data data --batch-size 4 --sequence-length 16 --learning-rate 0.003 --warmup-steps 3 "
    "--weight-decay 0.1 --log-every 2 --save-every 100 --eval-sequences 8 --device cpu "
    "--precision fp32 --steps 30"
).split()
OLD_COMMANDS = {
    ("1d4d709", "trained"): (train, "--model gpt2-tiny --init gpt2.pt --out trained"),
    ("1d4d709", "distilled"): (
        distill,
        "--teachers gpt2.pt llama.pt --model llama-tiny --init llama.pt --out distilled "
        "--cache-teachers distilled.cache",
    ),
    ("e2b7f27", "trained"): (
        train,
        "--model llama-tiny --init llama.pt --out trained --optimizer muon --no-decay norms "
        "--schedule linear --min-lr-ratio 0.1 --beta2 0.95 --dropout 0.1 --micro-batch-size 2",
    ),
    ("e2b7f27", "distilled"): (
        distill,
        "--teachers gpt2.pt llama.pt --model llama-tiny --init llama.pt --out distilled "
        "--kl-reduction token --temperature 1 --alpha 0.25 --teacher-weights 1 2 --random-offset "
        "--dropout 0.1",
    ),
}


# ---- what an earlier version wrote


def this_machine():
    """What decides over the last bits of a float32 sum on a CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else ()
    keys = ("model name", "cpu family", "model", "stepping", "flags")
    processor = [line for line in lines if line.split("\t")[0].strip(" :") in keys]
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": io.sha256("\n".join(processor).encode()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


@pytest.mark.parametrize(("commit", "name"), OLD_COMMANDS)
def test_a_run_of_an_earlier_version_is_continued_with_the_same_bits(
    tmp_path, monkeypatch, capsys, commit, name
):
    shutil.copytree(FIXTURES / "1d4d709", tmp_path, dirs_exist_ok=True)  # data and models too
    shutil.copytree(FIXTURES / commit, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    program, command = OLD_COMMANDS[commit, name]
    cached = (tmp_path / "distilled.cache").read_bytes()
    assert run(program, *command.split(), *OLD_OPTIONS) == 0
    printed = capsys.readouterr()
    assert "continuing after step" in printed.out and "damaged" not in printed.out + printed.err
    result = read_checkpoint(tmp_path / name / "checkpoint.pt")
    expected = torch.load(tmp_path / f"{name}-end.pt", weights_only=True)
    made = json.loads((FIXTURES / commit / "made.json").read_text())
    same_machine = this_machine() == {k: v for k, v in made.items() if k != "commit"}
    tolerance = {"rtol": 0, "atol": 0 if same_machine else 1e-4}
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][key], weight, **tolerance)
    for key, state in expected["optimizer"].items():
        for moment, value in state.items():
            torch.testing.assert_close(result["training"]["optimizer"][key][moment], value, **tolerance)
    difference = abs(result["progress"]["dev_cross_entropy"] - expected["dev_cross_entropy"])
    assert difference <= tolerance["atol"]
    # Chunks that the earlier version had kept were read, and not computed again.
    now = (tmp_path / "distilled.cache").read_bytes()
    digests = range(io.PAGE_BYTES, io.PAGE_BYTES + 87 * 32, 32)
    filled = [i for i in digests if any(cached[i : i + 32])]
    assert len(filled) == 28 and all(cached[i : i + 32] == now[i : i + 32] for i in filled)


def test_an_option_that_an_old_run_does_not_have_means_its_default(tmp_path, monkeypatch, refused):
    shutil.copytree(FIXTURES / "1d4d709", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = [*OLD_COMMANDS["1d4d709", "trained"][1].split(), *OLD_OPTIONS]
    saved = torch.load("trained/checkpoint.pt", weights_only=True)["config"]
    for name, value in (("clip", 0.5), ("beta2", 0.95), ("min_lr_ratio", 0.1), ("average_last", 0.2)):
        assert name not in saved
        assert name in refused(train, *command, f"--{name.replace('_', '-')}", value)


# ---- kills


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_same_run(out, expected):
    assert names(out) == names(expected)
    assert comparable(out) == comparable(expected)
    assert same(weights(out / "previous.pt"), weights(expected / "previous.pt"))


@pytest.mark.parametrize("call", range(1, 5))
def test_a_run_that_was_killed_within_a_save_ends_as_if_it_had_not_been(
    whole_run, data_folder, tmp_path, monkeypatch, call
):
    """A kill before each rename and link by which checkpoint.pt and previous.pt get their names."""
    config, count = config_for(data_folder, tmp_path / "r"), [0]
    with monkeypatch.context() as patch:
        for name in ("replace", "link"):
            original = getattr(os, name)

            def killed(source, target, original=original):
                count[0] += Path(target).name in ("checkpoint.pt", "previous.pt")
                if count[0] == call:
                    raise KeyboardInterrupt
                return original(source, target)

            patch.setattr(os, name, killed)
        with pytest.raises(KeyboardInterrupt):
            trained(config)
    assert trained(config)["step"] == 12
    assert_same_run(tmp_path / "r", whole_run)


def test_a_checkpoint_new_of_an_earlier_version_is_the_newest(whole_run, data_folder, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "r")
    (tmp_path / "r/checkpoint.pt").rename(tmp_path / "r/checkpoint.new")
    shutil.copy(tmp_path / "r/previous.pt", tmp_path / "r/checkpoint.pt")
    assert trained(config_for(data_folder, tmp_path / "r"))["step"] == 12
    assert "is finished" in capsys.readouterr().out
    assert names(tmp_path / "r") == names(whole_run)


def test_a_damaged_checkpoint_never_becomes_the_previous_one(
    whole_run, data_folder, tmp_path, monkeypatch, capsys
):
    config, path = config_for(data_folder, tmp_path / "r"), tmp_path / "r/checkpoint.pt"
    stopped(config, monkeypatch, 8)
    path.write_bytes(path.read_bytes()[:-100])
    assert trained(config)["step"] == 12
    assert f"{path} is damaged; falling back" in capsys.readouterr().err
    assert_same_run(tmp_path / "r", whole_run)


def test_a_save_always_leaves_a_checkpoint(data_folder, tmp_path, monkeypatch):
    config, seen = config_for(data_folder, tmp_path / "r", save_every=2), []
    for name in ("replace", "link", "unlink", "fsync"):
        original = getattr(os, name)

        def watched(*arguments, original=original):
            result = original(*arguments)
            seen.append((tmp_path / "r" / "checkpoint.pt").exists())
            return result

        monkeypatch.setattr(os, name, watched)
    trained(config)
    assert len(seen) > 20 and all(seen[seen.index(True) :])


def test_a_file_system_without_hard_links_works_too(whole_run, data_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    trained(config_for(data_folder, tmp_path / "r"))
    assert_same_run(tmp_path / "r", whole_run)


def test_the_folder_is_locked_before_its_checkpoint_is_read(whole_run, data_folder, monkeypatch):
    read = []
    monkeypatch.setattr(resume, "read_checkpoint", read.append)
    with locked(whole_run), pytest.raises(UserError, match="in use by another run"):
        trained(config_for(data_folder, whole_run))
    assert not read


# ---- damage and failed reads

DAMAGES = [b"\377\n", b"}\n", b"\0\0\0\0\n", b'{"step": null}\n', b'{"step": "seven"}\n', b"[1, 2]\n"]
DAMAGES += [b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": 4, "lo']


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_and_later_lines_of_a_log_are_left_out(tmp_path, capsys, damage):
    path, text = tmp_path / "log.jsonl", '{"step": 3, "note": "a\u2028b"}'
    path.write_bytes(f"{text}\n".encode() + damage + b'\n{"step": 9}\n')
    logger.JSONLog(path, {"config": {}}, from_step=5)
    assert path.read_text(encoding="utf-8") == f'{text}\n{{"config": {{}}}}\n'
    assert "1 damaged lines are left out" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_failed_read_ends_the_run_and_loses_nothing(data_folder, tmp_path, monkeypatch, capsys, error):
    config = config_for(data_folder, tmp_path / "r")
    stopped(config, monkeypatch, 7)
    before = {p: p.read_bytes() for p in (tmp_path / "r").iterdir()}

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "load", fail)
        if isinstance(error, OSError):
            patch.setattr(checkpoints, "open", fail, raising=False)
        assert run_program(lambda: trained(config)) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "falling back" not in message
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    assert trained(config)["step"] == 12


def test_too_little_memory_is_told_from_a_size_that_was_made_up(tmp_path):
    """torch reports both alike; no checkpoint asks for more than its own file has."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"x" * 1000)
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes."
    with pytest.raises(MemoryError):
        checkpoints._raise_unless_damaged(path, RuntimeError(message.format(900)))
    checkpoints._raise_unless_damaged(path, RuntimeError(message.format(10**15)))


@needs_full_device
def test_a_full_disk_under_the_log_is_told_once_with_its_name(tmp_path):
    log = logger.JSONLog(tmp_path / "log.jsonl", {}, 0)
    log.path = "/dev/full"
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        log.write({"step": 1})


# ---- small things


def test_a_checkpoint_names_its_data_by_digests(whole_run, data_folder):
    checkpoint, corpus = read_checkpoint(whole_run / "best.pt"), open_corpus(data_folder)
    assert checkpoint["config"]["train_shard"] == corpus.train.digest
    assert checkpoint["config"]["dev_shard"] == corpus.dev.digest
    assert checkpoint["config"]["shape"] == checkpoint["model"]["shape"]


def test_the_commit_comes_from_the_environment_where_git_has_none(monkeypatch):
    monkeypatch.setenv("BABYLLAMA_COMMIT", "abc123")
    assert logger.commit() != "abc123" or not shutil.which("git")
    monkeypatch.setenv("PATH", "")
    assert logger.commit() == "abc123"


def test_differences_name_each_setting_that_differs():
    saved = {"seed": 0, "data": "a", "shape": {"layers": 2, "heads": 4}, "removed": None, "digest": "a" * 64}
    current = {"seed": 1, "data": "b", "shape": {"layers": 2, "heads": 8}, "added": True, "digest": "b" * 64}
    expected = ["added: None -> True", "digest changed", "seed: 0 -> 1", "shape.heads: 4 -> 8"]
    assert resume.differences(saved, current, ignore=["data"]) == expected
    assert resume.differences({"files": ("a", "b")}, {"files": ["a", "b"]}) == []
    # An option of a later version that was off is no difference.
    assert resume.differences({"later": False}, {}) == []
    assert resume.differences({"later": 5}, {}) == ["later: 5 -> None"]
    teachers = [{"name": "x"}, {"name": "y"}]
    assert resume.differences({"t": teachers}, {"t": [{"name": "x"}, {"name": "z"}]}) == ["t.1.name: y -> z"]


# ---- saving


def test_training_goes_on_while_a_checkpoint_is_written(data_folder, tmp_path, monkeypatch):
    """The first write waits for a step that comes after it; the run ends with the same bits."""
    options = {"steps": 6, "save_every": 2, "eval_every": 3}
    trained(config_for(data_folder, tmp_path / "plain", **options))
    count, write, later = logger.TrainingLogger.count, logger.write_checkpoint, threading.Event()

    def noted_count(self, step):
        count(self, step)
        if step == 3:
            later.set()

    def slow_write(path, **fields):
        assert later.wait(60)
        write(path, **fields)

    write_in_background(monkeypatch.setattr)
    monkeypatch.setattr(logger.TrainingLogger, "count", noted_count)
    monkeypatch.setattr(logger, "write_checkpoint", slow_write)
    trained(config_for(data_folder, tmp_path / "slow", **options))
    assert comparable(tmp_path / "slow") == comparable(tmp_path / "plain")

    def failing_write(path, **fields):
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr(logger, "write_checkpoint", failing_write)
    with pytest.raises(UserError, match="cannot write"):
        trained(config_for(data_folder, tmp_path / "failed", **options))


@pytest.mark.parametrize("minutes, steps", [(None, [3, 6]), (0, [1, 2, 3, 4, 5, 6]), (60, [6])])
def test_a_checkpoint_is_due_by_steps_or_by_minutes(data_folder, tmp_path, monkeypatch, minutes, steps):
    saved, save = [], logger.TrainingLogger.save
    monkeypatch.setattr(
        logger.TrainingLogger, "save", lambda self: (saved.append(self.progress["step"]), save(self))
    )
    options = {"steps": 6, "save_every": 3, "save_every_minutes": minutes}
    trained(config_for(data_folder, tmp_path / "r", **options))
    assert saved == steps
