"""Kills, full disks, damaged bytes, hostile files, two runs at once.

The quick tests run in `make test`, those marked `faults` in `make test-faults`, which also writes
benchmarks/results/faults.md. A kill at any call: test_kills.py; changed fields: test_fuzzing.py.
"""

import copy
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import export_hf
import train
from conftest import (
    FIGURES,
    comparable,
)
from training import checkpoint as checkpoints
from training import io, plan
from training.io import UserError, locked, run_program

ROOT = Path(__file__).parent.parent

OPTIONS = ["--model", "gpt2-tiny", "--steps", "30", "--batch-size", "4", "--sequence-length", "32"]
OPTIONS += ["--eval-sequences", "8", "--save-every", "7", "--eval-every", "10", "--log-every", "5"]
OPTIONS += ["--device", "cpu", "--precision", "fp32"]


def command(data_folder, out):
    return [*OPTIONS, "--data", str(data_folder), "--out", str(out)]


@pytest.fixture(scope="module")
def whole_run(data_folder, tmp_path_factory):
    """A run that nothing disturbed; in a process of its own, as the disturbed ones are."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(data_folder, out)
    return out


def start(data_folder, out, kill_at=None):
    """A run in a process of its own, which kills itself at the n-th call of a function of `os`."""
    program = (
        "import sys, train\n"
        "from training.io import run_program\n"
        "sys.exit(run_program(lambda: train.main(sys.argv[1:])))"
    )
    if kill_at is not None:
        name, call = kill_at
        program = (
            "import os, signal\n"
            f"original, left = os.{name}, [{call}]\n"
            "def counted(*arguments):\n"
            "    left[0] -= 1\n"
            "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return original(*arguments)\n"
            f"os.{name} = counted\n"
        ) + program
    arguments = [sys.executable, "-c", program, *command(data_folder, out)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(data_folder, out):
    """The same command, left alone, to its end."""
    process = start(data_folder, out)
    _, error = process.communicate()
    assert process.returncode == 0, error


def assert_undisturbed(out, whole_run):
    assert comparable(out) == comparable(whole_run)
    names = {"checkpoint.pt", "previous.pt", "best.pt", "log.jsonl"}
    assert {path.name for path in out.iterdir()} == names  # no debris


# ---- kills


def kill_at_stages(data_folder, tmp_path, whole_run, stages):
    killed = 0
    for name, call in stages:
        out = tmp_path / f"{name}-{call}"
        process = start(data_folder, out, (name, call))
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        finish(data_folder, out)
        assert_undisturbed(out, whole_run)
    return killed


def test_a_kill_within_a_save_loses_nothing(data_folder, tmp_path, whole_run):
    stages = [("fsync", 5), ("replace", 3)]
    assert kill_at_stages(data_folder, tmp_path, whole_run, stages) == len(stages)


@pytest.mark.faults
def test_a_kill_at_every_stage_of_a_save_loses_nothing(data_folder, tmp_path, whole_run):
    """Before each fsync, link and rename of a whole run, until one has no call left to be killed at."""
    count = {name: 0 for name in ("fsync", "link", "replace")}
    for name in count:
        while kill_at_stages(data_folder, tmp_path, whole_run, [(name, count[name] + 1)]):
            count[name] += 1
    assert count["link"] == 4 and min(count.values()) > 3
    FIGURES["kills at a stage"] = (
        f"SIGKILL before each fsync, link and rename of a run, {sum(count.values())} of them",
        "every run continued and ended with the same weights, moments, best.pt and log; no debris",
    )


def test_a_second_interrupt_leaves_at_once(data_folder, tmp_path, monkeypatch):
    step, calls = train.TrainStep.__call__, []

    def twice(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return step(self, *arguments)

    monkeypatch.setattr(train.TrainStep, "__call__", twice)
    before = signal.getsignal(signal.SIGINT)
    assert run_program(lambda: train.main(command(data_folder, tmp_path / "r"))) == 130
    assert len(calls) == 3 and signal.getsignal(signal.SIGINT) is before


# ---- two runs, one folder


def test_a_folder_in_use_is_refused_until_its_process_has_died(tmp_path):
    program = (
        "import sys, time; from training.io import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "r")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="in use"), locked(tmp_path / "r"):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path / "r"):
        pass
    assert list((tmp_path / "r").iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused(data_folder, tmp_path, capsys):
    out = tmp_path / "r"
    with locked(out):
        assert run_program(lambda: train.main(command(data_folder, out))) == 1
    assert "in use by another run" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert run_program(lambda: train.main(command(data_folder, out))) == 0


def test_without_a_terminal_no_carriage_return_is_written(data_folder, tmp_path, capfd):
    assert run_program(lambda: train.main(command(data_folder, tmp_path / "r"))) == 0
    printed = capfd.readouterr()
    assert "\r" not in printed.out + printed.err and "step 30/30" in printed.out


# ---- disk


def test_a_full_disk_loses_nothing_and_says_so(data_folder, tmp_path, monkeypatch, capsys):
    """Full when the second checkpoint is saved: the first one stays, and the run can go on later."""
    out, save = tmp_path / "r", torch.save

    def save_to_full_disk(checkpoint, file):
        if checkpoint["training"] and checkpoint["progress"]["step"] > 7:
            file.write(bytes(1000))
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_to_full_disk)
        assert run_program(lambda: train.main(command(data_folder, out))) == 1
    error = capsys.readouterr().err
    assert "untouched" in error and " free" in error and error.count("\n") == 1
    assert checkpoints.read_checkpoint(out / "checkpoint.pt")["progress"]["step"] == 7
    assert not list(out.glob("*.tmp"))
    assert run_program(lambda: train.main(command(data_folder, out))) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_torchs_error_of_a_full_disk_is_one_line_too(whole_run, tmp_path, monkeypatch):
    checkpoint = checkpoints.read_checkpoint(whole_run / "best.pt")
    monkeypatch.setattr(checkpoints, "make_checkpoint", lambda **_: checkpoint)
    monkeypatch.setattr(io, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(UserError, match=r"cannot write .*a\.pt: No space left on device"):
        checkpoints.write_checkpoint(tmp_path / "a.pt")


def test_too_little_room_is_known_before_training(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert run_program(lambda: train.main(command(data_folder, tmp_path / "r"))) == 1
    assert "bytes needed, 1000 free" in capsys.readouterr().err


# ---- damage


def flip_bits(whole_run, folder, count):
    """Flips one random bit `count` times, each in a fresh copy; the number of refused copies."""
    original, generator, refused = (whole_run / "checkpoint.pt").read_bytes(), random.Random(0), 0
    expected = checkpoints.content_digest(checkpoints.read_checkpoint(whole_run / "checkpoint.pt"))
    for _ in range(count):
        position, bit = generator.randrange(len(original)), generator.randrange(8)
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        (folder / "a.pt").write_bytes(damaged)
        try:
            checkpoint = checkpoints.read_checkpoint(folder / "a.pt")
        except UserError:
            refused += 1
        else:  # padding, or a name in the archive that nobody reads
            assert checkpoints.content_digest(checkpoint) == expected, (position, bit)
    return refused


def test_flipped_bits_are_refused_or_harmless(whole_run, tmp_path):
    assert flip_bits(whole_run, tmp_path, 40) > 30


@pytest.mark.faults
def test_a_thousand_flipped_bits_are_refused_or_harmless(whole_run, tmp_path):
    refused = flip_bits(whole_run, tmp_path, 1000)
    assert refused > 900
    FIGURES["flips"] = (
        "one bit of a checkpoint flipped, 1000 times",
        f"{refused} refused, {1000 - refused} harmless: the same tensors and values",
    )


# ---- hostile files


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_program_executes_a_pickle(data_folder, tmp_path, capsys):
    content = {"format": checkpoints.FORMAT, "version": 1, "weights": Payload(tmp_path / "executed")}
    evil, data = str(tmp_path / "evil.pt"), ["--data", str(data_folder)]
    (tmp_path / "run").mkdir()
    for path in (evil, tmp_path / "run" / "checkpoint.pt"):
        torch.save(content, path)
    commands = [
        lambda: distill.main(["--teachers", evil, *data, "--out", str(tmp_path / "a")]),
        lambda: train.main(["--resume", evil, *data, "--out", str(tmp_path / "b"), *OPTIONS]),
        lambda: train.main([*data, "--out", str(tmp_path / "run"), *OPTIONS]),
        lambda: train.main(["--init", evil, *data, "--out", str(tmp_path / "c"), *OPTIONS]),
        lambda: evaluate.main([evil, *data]),
        lambda: export_hf.main([evil, "--out", str(tmp_path / "d")]),
    ]
    for main in commands:
        assert run_program(main) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def resigned(source, target, change):
    """A copy of a checkpoint with other content and a valid digest, as someone else may give it."""
    checkpoint = copy.deepcopy(checkpoints.read_checkpoint(source))
    del checkpoint["digest"]
    change(checkpoint)
    torch.save(checkpoint | {"digest": checkpoints.content_digest(checkpoint)}, target)


def test_a_name_reaches_no_terminal_and_no_card_raw(whole_run, data_folder, tmp_path, capsys):
    def change(checkpoint):
        checkpoint["model"]["name"] = "a\x1b[31m|<script>\n\ud800"
        checkpoint["weights"] = {k: v * 1e30 for k, v in checkpoint["weights"].items()}

    resigned(whole_run / "best.pt", tmp_path / "a.pt", change)
    path, data = str(tmp_path / "a.pt"), ["--data", str(data_folder), "--device", "cpu"]
    assert run_program(lambda: evaluate.main([path, *data])) in (0, 1)  # such weights overflow
    assert run_program(lambda: export_hf.main([path, "--out", str(tmp_path / "hf")])) == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "&lt;script&gt;" in card
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err + card


@pytest.mark.parametrize("size", [3, 10**6])
def test_moments_of_another_size_are_refused(data_folder, tmp_path, capsys, size):
    """A fused optimizer would write beyond their end, and no digest is against it."""
    arguments, path = command(data_folder, tmp_path), tmp_path / "checkpoint.pt"
    assert run_program(lambda: train.main([*arguments, "--stop-after", "0"])) == 0

    def change(checkpoint):
        checkpoint["training"]["optimizer"]["ln_f.weight"]["exp_avg"] = torch.zeros(size)

    resigned(path, path, change)
    assert run_program(lambda: train.main(arguments)) == 1
    assert "no state of this run's model" in capsys.readouterr().err
