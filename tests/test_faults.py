"""Kills, full disks, damaged bytes, hostile files, two runs at once.

The quick tests run in `make test`, those marked `faults` in `make test-faults`, which also writes
benchmarks/results/faults.md. A kill at any call: test_kills.py; changed fields: test_fuzzing.py.
"""

import os
import random
import shutil
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
from conftest import FIGURES, comparable, config_for, needs_full_device, resign, run, trained
from training import checkpoint as checkpoints
from training import io, plan
from training.io import UserError, locked

ROOT = Path(__file__).parent.parent

OPTIONS = ["--model", "gpt2-tiny", "--steps", "30", "--batch-size", "4", "--sequence-length", "32"]
OPTIONS += ["--eval-sequences", "8", "--save-every", "7", "--eval-every", "10", "--log-every", "5"]
OPTIONS += ["--device", "cpu", "--precision", "fp32"]


def command(data_folder, out):
    return [*OPTIONS, "--data", data_folder, "--out", out]


@pytest.fixture(scope="module")
def uninterrupted(data_folder, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(train, *command(data_folder, out)) == 0
    return out


def run_and_kill(data_folder, out, name, call):
    """A run in a process that kills itself at the n-th call of a function of `os`; its exit code."""
    program = (
        "import os, signal, sys, torch, train\n"
        f"original, left = os.{name}, [{call}]\n"
        "def counted(*arguments):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*arguments)\n"
        f"os.{name} = counted\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", program, *map(str, command(data_folder, out))]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False).returncode


# ---- kills


def test_a_kill_within_a_save_loses_nothing(data_folder, tmp_path, uninterrupted):
    """A real one, before the bytes of a checkpoint are on the disk. A kill at any call: test_kills.py."""
    out = tmp_path / "r"
    assert run_and_kill(data_folder, out, "fsync", 5) == -signal.SIGKILL
    assert list(out.glob("*.tmp"))
    assert run(train, *command(data_folder, out)) == 0
    assert comparable(out) == comparable(uninterrupted)
    assert {path.name for path in out.iterdir()} == {path.name for path in uninterrupted.iterdir()}


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
    assert run(train, *command(data_folder, tmp_path / "r")) == 130
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


# ---- disk


def test_a_full_disk_loses_nothing_and_says_so(data_folder, tmp_path, monkeypatch, refused):
    """Full when the second checkpoint is saved: the first one stays, and the run can go on later."""
    out, save = tmp_path / "r", torch.save

    def save_to_full_disk(checkpoint, file):
        if checkpoint["training"] and checkpoint["progress"]["step"] > 7:
            file.write(bytes(1000))
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_to_full_disk)
        error = refused(train, *command(data_folder, out))
    assert "untouched" in error
    assert checkpoints.read_checkpoint(out / "checkpoint.pt")["progress"]["step"] == 7
    assert not list(out.glob("*.tmp"))
    assert run(train, *command(data_folder, out)) == 0


@needs_full_device
def test_torchs_error_of_a_full_disk_is_one_line_too(whole_run, tmp_path, monkeypatch):
    checkpoint = checkpoints.read_checkpoint(whole_run / "best.pt")
    monkeypatch.setattr(checkpoints, "make_checkpoint", lambda **_: checkpoint)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # what cannot be written is deleted: the link, not the device
    monkeypatch.setattr(io, "open", lambda *_: open(full, "wb"), raising=False)
    with pytest.raises(UserError, match=r"cannot write .*a\.pt: No space left on device"):
        checkpoints.write_checkpoint(tmp_path / "a.pt")


def test_too_little_room_is_known_before_training(data_folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert "bytes needed, 1000 free" in refused(train, *command(data_folder, tmp_path / "r"))


# ---- damage


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.faults)])
def test_flipped_bits_are_refused_or_harmless(uninterrupted, tmp_path, count):
    """One random bit, `count` times."""
    original, generator, refused = (uninterrupted / "checkpoint.pt").read_bytes(), random.Random(0), 0
    expected = checkpoints.content_digest(checkpoints.read_checkpoint(uninterrupted / "checkpoint.pt"))
    for _ in range(count):
        position, bit = generator.randrange(len(original)), generator.randrange(8)
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            checkpoint = checkpoints.read_checkpoint(tmp_path / "a.pt")
        except UserError:
            refused += 1
        else:  # padding, or a name in the archive that nobody reads
            assert checkpoints.content_digest(checkpoint) == expected, (position, bit)
    assert refused > 0.9 * count
    if count == 1000:
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


def test_no_program_executes_a_pickle(data_folder, tmp_path, refused):
    content = {"format": checkpoints.FORMAT, "version": 1, "weights": Payload(tmp_path / "executed")}
    evil, data = tmp_path / "evil.pt", ["--data", data_folder]
    (tmp_path / "run").mkdir()
    for path in (evil, tmp_path / "run" / "checkpoint.pt"):
        torch.save(content, path)
    for program, *arguments in [
        (distill, "--teachers", evil, *data, "--out", tmp_path / "a"),
        (train, "--resume", evil, *data, "--out", tmp_path / "b", *OPTIONS),
        (train, *data, "--out", tmp_path / "run", *OPTIONS),
        (train, "--init", evil, *data, "--out", tmp_path / "c", *OPTIONS),
        (evaluate, evil, *data),
        (export_hf, evil, "--out", tmp_path / "d"),
    ]:
        refused(program, *arguments)
    assert not (tmp_path / "executed").exists()


def test_a_name_reaches_no_terminal_and_no_card_raw(whole_run, data_folder, tmp_path, capsys):
    def change(checkpoint):
        checkpoint["model"]["name"] = "a\x1b[31m|<script>\n\ud800"
        checkpoint["weights"] = {k: v * 1e30 for k, v in checkpoint["weights"].items()}

    path = shutil.copy(whole_run / "best.pt", tmp_path)
    resign(path, change)
    assert run(evaluate, path, "--data", data_folder, "--device", "cpu") in (0, 1)  # such weights overflow
    assert run(export_hf, path, "--out", tmp_path / "hf") == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "&lt;script&gt;" in card
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err + card


@pytest.mark.parametrize("size", [3, 10**6])
def test_moments_of_another_size_are_refused(whole_run, data_folder, tmp_path, size):
    """A fused optimizer would write beyond their end, and no digest is against it."""
    shutil.copytree(whole_run, tmp_path / "r")
    (tmp_path / "r/checkpoint.pt").unlink()

    def change(checkpoint):
        checkpoint["training"]["optimizer"]["ln_f.weight"]["exp_avg"] = torch.zeros(size)

    resign(tmp_path / "r/previous.pt", change)
    with pytest.raises(UserError, match="no state of this run's model"):
        trained(config_for(data_folder, tmp_path / "r"))
