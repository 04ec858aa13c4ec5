"""Several processes compute the run of one, with gloo on two cores. Tests that kill them: -m faults."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import save_model, write_split, write_text
from data import Batch
from model import build_model
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
EVEN = [*TRAIN, "--batch-size", "6", "--micro-batch-size", "2"]
UNEVEN = [*TRAIN, "--batch-size", "5"]
DROPOUT = [*TRAIN, "--model", "gpt2-tiny", "--batch-size", "4", "--steps", "20"]
DROPOUT_LONG = [*DROPOUT, "--steps", "60"]
TERMS = ("loss", "cross_entropy", "kl", "dev_cross_entropy")


class Runs:
    """Runs of train.py and distill.py in one folder, on one process or on several."""

    def __init__(self, folder, data_folder, tokenizer):
        self.folder, self.data_folder = folder, data_folder
        torch.manual_seed(7)
        for name in ("gpt2-tiny", "llama-tiny"):
            save_model(folder / f"{name}.pt", build_model(name, 300), tokenizer, name, length=128)

    def task(self, name, options, **mishaps):
        """Returns the task of a run into the folder `name`: a distillation if the model is a student."""
        arguments = ["--data", str(self.data_folder), "--out", str(self.folder / name)]
        program = "distill" if "llama-tiny-student" in options else "train"
        if program == "distill":
            arguments += ["--teachers", *(str(self.folder / f"{t}.pt") for t in ("gpt2-tiny", "llama-tiny"))]
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

    def on_one(self, name, options):
        """Runs in this process, unless there is such a run; returns its name."""
        if (self.folder / name).exists():
            return name
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as each of several has: threads change the order of sums
        try:
            assert ranks.run_task(self.task(name, options)) == 0
        finally:
            torch.set_num_threads(threads)
        return name

    def step(self, name):
        """Returns the last step that a run has saved."""
        return read_checkpoint(self.folder / name / "checkpoint.pt")["progress"]["step"]

    def weights(self, name):
        """Returns the last weights that a run has saved."""
        return read_checkpoint(self.folder / name / "checkpoint.pt")["weights"]

    def log(self, name):
        """Returns the lines of a run's log that belong to a step."""
        lines = map(json.loads, (self.folder / name / "log.jsonl").open())
        return [line for line in lines if "step" in line]

    def difference(self, name, other):
        """Returns the largest relative difference of two runs' losses, and the largest of weights."""
        log, other_log = self.log(name), self.log(other)
        assert [line["step"] for line in log] == [line["step"] for line in other_log]
        pairs = [(a[key], b[key]) for a, b in zip(log, other_log) for key in TERMS if key in a]
        weights, other_weights = self.weights(name), self.weights(other)
        assert weights.keys() == other_weights.keys()
        distances = [(weights[key] - other_weights[key]).abs().max().item() for key in weights]
        return max(abs(a - b) / a for a, b in pairs), max(distances)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_folder, tokenizer):
    return Runs(tmp_path_factory.mktemp("runs"), data_folder, tokenizer)


@pytest.fixture(scope="module")
def on_two(runs, tokenizer):
    """All runs on two processes, by one torchrun: {folder: exit code}, and the output."""
    for i in range(2):
        folder = runs.folder / f"data-{i}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        for split in ("train", "dev"):
            write_split(folder, split, tokenizer, {"a": write_text(500, seed=i)})
        torch.manual_seed(i)
        teacher = build_model("llama-tiny", 300)
        save_model(runs.folder / f"teacher-{i}.pt", teacher, tokenizer, "llama-tiny", length=128)
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


def one_name(options):
    """Returns the name of the run with these options on one process."""
    return "one" + "".join(options).replace("--", "-")


@pytest.mark.parametrize("name", ["even", "uneven", "shard", "distilled", "cached", "shard-distilled"])
def test_two_processes_compute_the_run_of_one(runs, on_two, name):
    """The bounds stand beside what another micro-batch size changes on one process."""
    options = ON_ONE.get(name, DISTILL)
    one = runs.on_one(one_name(options), options)
    micro = runs.on_one(f"{one}-micro", [*options, "--micro-batch-size", "1"])
    losses, weights = runs.difference(one, name)
    floor = runs.difference(one, micro)
    print(f"losses {losses:.1e} ({floor[0]:.1e}), weights {weights:.1e} ({floor[1]:.1e})")
    assert losses < max(3e-6, 2 * floor[0]) and weights < 1e-4 and 0 < floor[1] < 1e-4


def test_three_processes_compute_the_run_of_one_and_continue_what_two_began(runs, on_two):
    for name in ("stopped", "shard-stopped"):
        assert on_two[0][name] == 128 + signal.SIGTERM and runs.step(name) == 9
    tasks = [runs.task("uneven-3", UNEVEN), runs.task("stopped", EVEN)]
    tasks += [runs.task("shard-stopped", [*EVEN, "--shard"])]
    assert runs.on_several(3, tasks)[1] == [0, 0, 0]
    for name, options in (("uneven-3", UNEVEN), ("stopped", EVEN), ("shard-stopped", EVEN)):
        losses, weights = runs.difference(runs.on_one(one_name(options), options), name)
        assert losses < 3e-6 and weights < 1e-4


def test_one_process_continues_what_a_sharded_run_of_two_began(runs, on_two):
    checkpoint = runs.folder / "shard-stopped" / "previous.pt"
    runs.on_one("from-shard", [*EVEN, "--resume", str(checkpoint)])
    expected = runs.weights(runs.on_one(one_name(EVEN), EVEN))
    for key, weight in runs.weights("from-shard").items():
        assert (weight - expected[key]).abs().max() < 1e-4


def test_a_run_with_dropout_repeats_its_bits_on_as_many_processes_also_after_a_stop(runs, on_two):
    assert on_two[0]["dropout-stopped"] == 128 + signal.SIGTERM
    for other in ("dropout-again", "dropout-stopped"):
        assert runs.difference("dropout", other) == (0, 0)


def test_ranks_draw_different_dropout_masks(runs, on_two):
    random = read_checkpoint(runs.folder / "dropout" / "checkpoint.pt")["training"]["random"]
    assert len(random["others"]) == 1
    assert not torch.equal(random["cpu"], random["others"][0]["cpu"])


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(runs, on_two):
    log = runs.log("nan")
    counts = [line["nonfinite_steps"] for line in log if "nonfinite_steps" in line]
    assert on_two[0]["nan"] == 0 and counts[0] == 0 and counts[-1] == 1
    assert np.isfinite(log[-1]["dev_cross_entropy"])


def test_rank_zero_alone_prints_and_writes(runs, on_two):
    runs_of_six = 3  # sequences a step: even, stopped and shard-stopped
    assert on_two[1].stdout.count("50 steps = 0.57 epochs of 525 chunks") == runs_of_six
    assert [line["step"] for line in runs.log("even")].count(50) == 2
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
    task = runs.task(
        f"killed-{restarts}", DROPOUT_LONG, die_at=31, died=str(runs.folder / f"died-{restarts}")
    )
    command, path = runs.command(2, [task], f"--max-restarts={restarts}")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, cwd=ROOT, check=False)
    ended = time.time() - Path(task["died"]).stat().st_mtime
    assert done.returncode == (0 if restarts else 1) and not any_process_left(path)
    print(f"torchrun ended {ended:.0f} seconds after the kill")
    assert restarts or ended < 60
    runs.on_several(2, [task, runs.task(f"undisturbed-{restarts}", DROPOUT_LONG)])
    assert runs.difference(f"killed-{restarts}", f"undisturbed-{restarts}") == (0, 0)


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
    assert runs.step("signalled") < 4000 and not (log.parent / "previous.pt").exists()


@pytest.mark.faults
@pytest.mark.parametrize("options", [UNEVEN, DISTILL], ids=["trained", "distilled"])
def test_compiled_layers_on_two_processes_compute_the_run_of_one(runs, options):
    one = runs.on_one(one_name(options), options)
    tasks = {f"{one}-compiled": ["--compile"], f"{one}-compiled-shard": ["--compile", "--shard"]}
    assert runs.on_several(2, [runs.task(name, [*options, *more]) for name, more in tasks.items()])[1] == [
        0,
        0,
    ]
    for name in tasks:
        losses, weights = runs.difference(one, name)
        assert losses < 2e-5 and weights < 1e-4


@pytest.mark.gpu
def test_one_process_on_nccl_computes_the_run_of_one(runs):
    options = [*UNEVEN, "--device", "cuda", "--no-compile"]
    assert runs.on_several(1, [runs.task("nccl", options), runs.task("nccl-2", [*options, "--shard"])])[
        1
    ] == [0, 0]
    one = runs.on_one("one-on-gpu", [*options, "--no-cuda-graph"])
    for name in ("nccl", "nccl-2"):
        losses, weights = runs.difference(one, name)
        assert losses < 3e-6 and weights < 1e-4
