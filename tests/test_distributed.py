"""Several processes compute the run of one, with gloo on two cores. Tests that kill them: -m faults."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import log_entries, write_split, write_text
from data import Batch
from tests import ranks
from training.checkpoint import read_checkpoint
from training.io import UserError

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# One thread for each process, and what docs/scaling.md asks for where torchrun restarts.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
COMMON = "--device cpu --precision fp32 --log-every 5 --eval-sequences 8 --save-every 25".split()
TRAIN = "--model llama-tiny --steps 50 --sequence-length 32".split()
DISTILL = "--model llama-tiny-student --steps 50 --sequence-length 128 --batch-size 5".split()
EVEN = [*TRAIN, "--batch-size", "6", "--micro-batch-size", "2", "--average-last", "0.5"]
UNEVEN = [*TRAIN, "--batch-size", "5", "--average-last", "0.5"]
DROPOUT = [*TRAIN, "--model", "gpt2-tiny", "--batch-size", "4", "--steps", "20"]
DROPOUT_LONG = [*DROPOUT, "--steps", "60"]
TERMS = ("loss", "cross_entropy", "kl", "dev_cross_entropy")


class Runs:
    """Runs of train.py and distill.py in one folder, on one process or on several."""

    def __init__(self, folder, data_folder, teachers):
        self.folder, self.data_folder, self.teachers = folder, data_folder, teachers

    def task(self, name, options, **mishaps):
        """Returns the task of a run into the folder `name`: a distillation if the model is a student."""
        arguments = ["--data", str(self.data_folder), "--out", str(self.folder / name)]
        program = "distill" if "llama-tiny-student" in options else "train"
        if program == "distill":
            arguments += ["--teachers", *self.teachers]
        return {"program": program, "arguments": [*arguments, *COMMON, *options], **mishaps}

    def command(self, processes, tasks, *options):
        """Returns the command of tasks on several processes, and the path of their file."""
        path = self.folder / f"tasks-{time.monotonic_ns()}.json"
        path.write_text(json.dumps(tasks))
        count = f"--nproc-per-node={processes}"
        return [*TORCHRUN, count, *options, "-m", "tests.ranks", str(path)], path

    def on_several(self, processes, tasks):
        """Runs tasks on several processes; returns their output and exit codes, the same on all."""
        command, path = self.command(processes, tasks)
        options = {"env": ENVIRONMENT, "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run(command, timeout=600, check=False, **options)
        assert done.returncode == 0, done.stderr
        for rank in range(processes):  # a thread that is left can abort a process at its end
            assert json.loads(Path(f"{path}.{rank}.threads").read_text()) == []
        first, *others = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(processes)]
        assert all(codes == first for codes in others)
        return done, first

    def on_one(self, options, name=None):
        """Runs in this process, unless there is such a run; returns its name."""
        name = name or "one" + "".join(options).replace("--", "-")
        if (self.folder / name).exists():
            return name
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as each of several has: threads change the order of sums
        try:
            assert ranks.run_task(self.task(name, options)) == 0
        finally:
            torch.set_num_threads(threads)
        return name

    def checkpoint(self, name):
        """Returns the last checkpoint that a run has saved."""
        return read_checkpoint(self.folder / name / "checkpoint.pt")

    def difference(self, name, other):
        """Returns the largest relative difference of two runs' losses, and the largest of weights."""
        log, other_log = log_entries(self.folder / name), log_entries(self.folder / other)
        assert [line["step"] for line in log] == [line["step"] for line in other_log]
        pairs = [(a[key], b[key]) for a, b in zip(log, other_log) for key in TERMS if key in a]
        weights, other_weights = self.checkpoint(name)["weights"], self.checkpoint(other)["weights"]
        assert weights.keys() == other_weights.keys()
        distances = [(weights[key] - other_weights[key]).abs().max().item() for key in weights]
        return max(abs(a - b) / a for a, b in pairs), max(distances)

    def assert_equal(self, name, other, losses=3e-6):
        """Up to the order of sums."""
        difference = self.difference(name, other)
        assert difference[0] < losses and difference[1] < 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_folder, teachers):
    return Runs(tmp_path_factory.mktemp("runs"), data_folder, teachers)


@pytest.fixture(scope="module")
def on_two(runs, tokenizer):
    """All runs on two processes, by one torchrun: {folder: exit code}, and the output."""
    for i in range(2):  # of which each rank gets one
        folder = runs.folder / f"data-{i}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        for split in ("train", "dev"):
            write_split(folder, split, tokenizer, {"a": write_text(500, seed=i)})
        shutil.copy(runs.teachers[i], runs.folder / f"teacher-{i}.pt")
    several = {
        "even": [EVEN],
        "uneven": [UNEVEN],
        "shard": [UNEVEN, "--shard"],
        "distilled": [DISTILL],
        "cached": [DISTILL, "--cache-teachers", str(runs.folder / "cache")],
        "shard-distilled": [DISTILL, "--shard", "--micro-batch-size", "2"],
        "dropout": [DROPOUT],
        "dropout-again": [DROPOUT],
        "other-data": [UNEVEN, "--data", str(runs.folder / "data-{rank}")],
        "other-teacher": [DISTILL, "--teachers", str(runs.folder / "teacher-{rank}.pt")],
        "cache-in-memory": [DISTILL, "--cache-teachers", "host"],
        "batch-of-one": [TRAIN, "--batch-size", "1"],
        "graph": [UNEVEN, "--cuda-graph"],
    }
    tasks = {name: runs.task(name, [*options, *more]) for name, (options, *more) in several.items()}
    tasks["nan"] = runs.task("nan", UNEVEN, nan_at=7)
    tasks["stopped"] = runs.task("stopped", EVEN, signal_at=9)
    tasks["shard-stopped"] = runs.task("shard-stopped", [*EVEN, "--shard"], signal_at=9)
    tasks["dropout-stopped"] = runs.task("dropout-stopped", DROPOUT, signal_at=9)
    tasks["dropout-continued"] = runs.task("dropout-stopped", DROPOUT)
    # The last, because rank 1 learns of a refusal when rank 0 ends.
    tasks["folder-of-another-run"] = runs.task("even", UNEVEN)
    done, codes = runs.on_several(2, list(tasks.values()))
    return dict(zip(tasks, codes)), done


def test_a_share_is_every_nth_sequence_and_counts_stay_those_of_the_step():
    tokens = torch.arange(20).view(5, 4)
    batch = Batch.whole(torch.arange(5), tokens, tokens)
    shares = [batch.rank_slice(i, 3) for i in range(3)]
    assert [s.chunk_ids.tolist() for s in shares] == [[0, 3], [1, 4], [2]]
    assert all((s.num_sequences, s.num_targets) == (5, 20) for s in shares)
    assert torch.equal(torch.cat([s.tokens for s in shares]).sort(0).values, tokens)


ON_ONE = {"even": EVEN, "uneven": UNEVEN, "shard": UNEVEN}  # the others are distilled


@pytest.mark.parametrize("name", ["even", "uneven", "shard", "distilled", "cached", "shard-distilled"])
def test_two_processes_compute_the_run_of_one(runs, on_two, name):
    """The bounds stand beside what another micro-batch size changes on one process."""
    options = ON_ONE.get(name, DISTILL)
    one = runs.on_one(options)
    micro = runs.on_one([*options, "--micro-batch-size", "1"])
    losses, weights = runs.difference(one, name)
    floor = runs.difference(one, micro)
    print(f"losses {losses:.1e} ({floor[0]:.1e}), weights {weights:.1e} ({floor[1]:.1e})")
    assert losses < max(3e-6, 2 * floor[0]) and weights < 1e-4 and 0 < floor[1] < 1e-4


def test_three_processes_compute_the_run_of_one_and_continue_what_two_began(runs, on_two):
    for name in ("stopped", "shard-stopped"):
        step = runs.checkpoint(name)["progress"]["step"]
        assert on_two[0][name] == 128 + signal.SIGTERM and step == 9
    tasks = [runs.task("uneven-3", UNEVEN), runs.task("stopped", EVEN)]
    tasks += [runs.task("shard-stopped", [*EVEN, "--shard"])]
    assert runs.on_several(3, tasks)[1] == [0, 0, 0]
    for name, options in (("uneven-3", UNEVEN), ("stopped", EVEN), ("shard-stopped", EVEN)):
        runs.assert_equal(runs.on_one(options), name)


def test_one_process_continues_what_a_sharded_run_of_two_began(runs, on_two):
    checkpoint = runs.folder / "shard-stopped" / "previous.pt"
    runs.on_one([*EVEN, "--resume", str(checkpoint)], "from-shard")
    expected = runs.checkpoint(runs.on_one(EVEN))["weights"]
    for key, weight in runs.checkpoint("from-shard")["weights"].items():
        assert (weight - expected[key]).abs().max() < 1e-4


def test_a_run_with_dropout_repeats_its_bits_on_as_many_processes_also_after_a_stop(runs, on_two):
    assert on_two[0]["dropout-stopped"] == 128 + signal.SIGTERM
    for other in ("dropout-again", "dropout-stopped"):
        assert runs.difference("dropout", other) == (0, 0)
    random = runs.checkpoint("dropout")["training"]["random"]
    assert len(random["others"]) == 1  # each rank draws its own masks
    assert not torch.equal(random["cpu"], random["others"][0]["cpu"])


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(runs, on_two):
    log = log_entries(runs.folder / "nan")
    counts = [line["nonfinite_steps"] for line in log if "nonfinite_steps" in line]
    assert on_two[0]["nan"] == 0 and counts[0] == 0 and counts[-1] == 1
    assert np.isfinite(log[-1]["dev_cross_entropy"])


def test_rank_zero_alone_prints_and_writes(runs, on_two):
    runs_of_six = 3  # sequences a step: even, stopped and shard-stopped
    assert on_two[1].stdout.count("50 steps = 0.57 epochs of 525 chunks") == runs_of_six
    assert [line["step"] for line in log_entries(runs.folder / "even")].count(50) == 2
    assert json.loads((runs.folder / "even" / "log.jsonl").open().readline())["processes"] == 2
    assert not list(runs.folder.glob("*/*.tmp"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("other-data", "process 1 has another train_shard, dev_shard than process 0"),
        ("other-teacher", "process 1 has another set of teachers than process 0"),
        ("cache-in-memory", "--cache-teachers host: each of 2 processes"),
        ("batch-of-one", "rank 1: --batch-size 1: 2 processes need a sequence each"),
        ("graph", "--cuda-graph needs a GPU of CUDA, one process"),
        ("folder-of-another-run", "even/checkpoint.pt is of another run"),
    ],
)
def test_several_processes_refuse_in_one_line(on_two, name, message):
    codes, done = on_two
    assert codes[name] == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_sharding_needs_several_processes(runs):
    with pytest.raises(UserError, match="start them with torchrun"):
        train.main(runs.task("alone-shard", [*UNEVEN, "--shard"])["arguments"])


# ---- kills


def any_process_left(path):
    """Returns whether a process of the tasks in that file is running."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(path).encode() in command.read_bytes():
                return True
    return False


@pytest.mark.faults
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_killed_rank_ends_the_others_soon_and_the_run_continues_to_the_same_bits(runs, restarts):
    """By the next launch, or by torchrun itself where it may restart."""
    name, died = f"killed-{restarts}", runs.folder / f"died-{restarts}"
    task = runs.task(name, DROPOUT_LONG, die_at=31, died=str(died))
    command, path = runs.command(2, [task], f"--max-restarts={restarts}")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, cwd=ROOT, check=False)
    ended = time.time() - died.stat().st_mtime
    assert done.returncode == (0 if restarts else 1) and not any_process_left(path)
    print(f"torchrun ended {ended:.0f} seconds after the kill")
    assert restarts or ended < 60
    runs.on_several(2, [task, runs.task(f"undisturbed-{restarts}", DROPOUT_LONG)])
    assert runs.difference(name, f"undisturbed-{restarts}") == (0, 0)


@pytest.mark.faults
def test_a_signal_to_torchrun_saves_once(runs):
    """torchrun passes it on, waits, and ends with 1 and a traceback that says SignalException."""
    task = runs.task("signalled", [*DROPOUT_LONG, "--steps", "4000", "--save-every", "5000"])
    command, path = runs.command(2, [task])
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log = runs.folder / "signalled" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "SignalException" in errors and not any_process_left(path)
    assert runs.checkpoint("signalled")["progress"]["step"] < 4000
    assert not (log.parent / "previous.pt").exists()


@pytest.mark.faults
@pytest.mark.parametrize("options", [UNEVEN, DISTILL], ids=["trained", "distilled"])
def test_compiled_layers_on_two_processes_compute_the_run_of_one(runs, options):
    one = runs.on_one(options)
    tasks = {f"{one}-compiled": ["--compile"], f"{one}-compiled-shard": ["--compile", "--shard"]}
    codes = runs.on_several(2, [runs.task(name, [*options, *more]) for name, more in tasks.items()])[1]
    assert codes == [0, 0]
    for name in tasks:
        runs.assert_equal(one, name, losses=2e-5)


@pytest.mark.gpu
def test_one_process_on_nccl_computes_the_run_of_one(runs):
    options = [*UNEVEN, "--device", "cuda", "--no-compile"]
    tasks = [runs.task("nccl", options), runs.task("nccl-2", [*options, "--shard"])]
    assert runs.on_several(1, tasks)[1] == [0, 0]
    one = runs.on_one([*options, "--no-cuda-graph"], "one-on-gpu")
    for name in ("nccl", "nccl-2"):
        runs.assert_equal(one, name)
