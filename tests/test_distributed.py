"""Several processes compute the run of one, on gloo and two cores; what kills them: -m faults."""

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

import ranks
import train
from conftest import save_model, write_split, write_text
from data import Batch
from model import build_model
from training.checkpoint import read_checkpoint
from training.io import UserError
from training.logger import AGREE_STEPS

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
COMMON = "--device cpu --precision fp32 --log-every 5 --eval-sequences 8 --save-every 25".split()
TRAIN = "--model llama-tiny --steps 50 --sequence-length 32".split()
DISTILL = "--model llama-tiny-student --steps 50 --sequence-length 128 --batch-size 5".split()
EVEN = [*TRAIN, "--batch-size", "6", "--micro-batch-size", "2"]
UNEVEN = [*TRAIN, "--batch-size", "5"]
DROPOUT = [*TRAIN, "--model", "gpt2-tiny", "--batch-size", "4", "--steps", "20"]
DROPOUT_LONG = [*DROPOUT, "--steps", "60"]
TERMS = ("loss", "cross_entropy", "kl", "dev_cross_entropy")


class Runs:
    """Runs of train.py and distill.py below one folder, on one process or on several."""

    def __init__(self, folder, data_folder, tokenizer):
        self.folder, self.data_folder = folder, data_folder
        torch.manual_seed(7)
        for name in ("gpt2-tiny", "llama-tiny"):
            save_model(folder / f"{name}.pt", build_model(name, 300), tokenizer, name, length=128)

    def task(self, name, options, program="train", **mishaps):
        """The task of a run that is called `name`."""
        arguments = ["--data", str(self.data_folder), "--out", str(self.folder / name)]
        if program == "distill":
            teachers = [str(self.folder / f"{t}.pt") for t in ("gpt2-tiny", "llama-tiny")]
            arguments += ["--teachers", *teachers]
        arguments += [*COMMON, *options]
        return {"program": program, "arguments": arguments} | mishaps

    def command(self, processes, tasks, *options):
        """The command of tasks on several processes."""
        path = self.folder / f"tasks-{time.monotonic_ns()}.json"
        path.write_text(json.dumps(tasks))
        count = f"--nproc-per-node={processes}"
        return [*TORCHRUN, count, *options, str(ROOT / "tests" / "ranks.py"), str(path)], path

    def on_several(self, processes, tasks):
        """What the processes printed, and their lists of exit codes."""
        command, path = self.command(processes, tasks)
        done = subprocess.run(
            command,
            env=environment(),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for i in range(processes):  # a thread that is left can abort a process that has finished
            assert json.loads(Path(f"{path}.{i}.threads").read_text()) == []
        return done, [json.loads(Path(f"{path}.{i}").read_text()) for i in range(processes)]

    def on_one(self, name, options, program="train"):
        """A run in this process, if it has not been made yet; its name."""
        if (self.folder / name).exists():
            return name
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as each of several has: threads change the order of sums
        try:
            assert ranks.do(self.task(name, options, program), rank=0) == 0
        finally:
            torch.set_num_threads(threads)
        return name

    def weights(self, name):
        """The last weights of a run."""
        return read_checkpoint(self.folder / name / "checkpoint.pt")["weights"]

    def difference(self, one, other):
        """Between two runs: the largest relative one of losses, and that of weights."""
        logs = [
            [e for e in map(json.loads, (self.folder / name / "log.jsonl").open()) if "step" in e]
            for name in (one, other)
        ]
        assert [e["step"] for e in logs[0]] == [e["step"] for e in logs[1]]
        losses = max(abs(a[key] - b[key]) / a[key] for a, b in zip(*logs) for key in TERMS if key in a)
        weights = [self.weights(name) for name in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        pairs = zip(weights[0].values(), weights[1].values())
        return losses, max((a - b).abs().max().item() for a, b in pairs)


def name_of(options):
    """The name of the options above."""
    named = {"EVEN": EVEN, "UNEVEN": UNEVEN, "DISTILL": DISTILL}
    return next(name for name, value in named.items() if value == options)


def environment():
    """One thread for each process, and what docs/scaling.md asks for where torchrun restarts."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_folder, tokenizer):
    return Runs(tmp_path_factory.mktemp("runs"), data_folder, tokenizer)


@pytest.fixture(scope="module")
def on_two(runs, tokenizer):
    """All runs on two processes, by one torchrun: {name of a task: exit code}, and what it said."""
    for i in range(2):
        folder = runs.folder / f"data-{i}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        for split in ("train", "dev"):
            write_split(folder, split, tokenizer, {"a": write_text(500, seed=i)})
        torch.manual_seed(i)
        teacher = build_model("llama-tiny", 300)
        save_model(runs.folder / f"teacher-{i}.pt", teacher, tokenizer, "llama-tiny", length=128)
    cache = ["--cache-teachers", str(runs.folder / "cache")]
    tasks = {
        "even": runs.task("even-2", EVEN),
        "uneven": runs.task("uneven-2", UNEVEN),
        "shard": runs.task("shard-2", [*UNEVEN, "--shard"]),
        "distilled": runs.task("distilled-2", DISTILL, "distill"),
        "cached": runs.task("cached-2", [*DISTILL, *cache], "distill"),
        "shard, distilled": runs.task(
            "shard-distilled-2", [*DISTILL, "--shard", "--micro-batch-size", "2"], "distill"
        ),
        "dropout": runs.task("dropout-2", DROPOUT),
        "dropout again": runs.task("dropout-2-again", DROPOUT),
        "dropout, stopped": runs.task("dropout-2-stopped", DROPOUT, signal_at=9),
        "dropout, continued": runs.task("dropout-2-stopped", DROPOUT),
        "nan": runs.task("nan-2", UNEVEN, nan_at=7),
        "stopped": runs.task("stopped", EVEN, signal_at=9),
        "shard, stopped": runs.task("stopped-shard", [*EVEN, "--shard"], signal_at=9),
        "other data": runs.task("other", [*UNEVEN, "--data", str(runs.folder / "data-{rank}")]),
        "other teacher": runs.task(
            "other", [*DISTILL, "--teachers", str(runs.folder / "teacher-{rank}.pt")], "distill"
        ),
        "in memory": runs.task("host", [*DISTILL, "--cache-teachers", "host"], "distill"),
        "few": runs.task("few", [*TRAIN, "--batch-size", "1"]),
        "graph": runs.task("graph", [*UNEVEN, "--cuda-graph"]),
    }
    done, codes = runs.on_several(2, list(tasks.values()))
    assert codes[0] == codes[1]
    return dict(zip(tasks, codes[0])), done


def test_a_share_is_every_nth_sequence_and_counts_stay_those_of_the_step():
    tokens = torch.arange(20).view(5, 4)
    batch = Batch.whole(torch.arange(5), tokens, tokens)
    shares = [batch.rank_slice(i, 3) for i in range(3)]
    assert [s.chunk_ids.tolist() for s in shares] == [[0, 3], [1, 4], [2]]
    assert all((s.num_sequences, s.num_targets) == (5, 20) for s in shares)
    assert torch.equal(torch.cat([s.tokens for s in shares]).sort(0).values, tokens)


@pytest.mark.parametrize(
    "name, options, program",
    [
        ("even", EVEN, "train"),
        ("uneven", UNEVEN, "train"),
        ("shard", UNEVEN, "train"),
        ("distilled", DISTILL, "distill"),
        ("cached", DISTILL, "distill"),
        ("shard-distilled", DISTILL, "distill"),
    ],
)
def test_two_processes_compute_the_run_of_one(runs, on_two, name, options, program):
    """The bound of the weights is beside what another micro-batch changes on one process."""
    one = runs.on_one(f"one-{name_of(options)}", options, program)
    micro = runs.on_one(f"{one}-micro", [*options, "--micro-batch-size", "1"], program)
    losses, weights = runs.difference(one, f"{name}-2")
    floor = runs.difference(one, micro)
    print(f"losses {losses:.1e} ({floor[0]:.1e}), weights {weights:.1e} ({floor[1]:.1e})")
    assert losses < max(3e-6, 2 * floor[0]) and weights < 1e-4 and 0 < floor[1] < 1e-4


def test_three_processes_compute_the_run_of_one_and_continue_what_two_began(runs, on_two):
    assert on_two[0]["stopped"] == on_two[0]["shard, stopped"] == 128 + signal.SIGTERM
    for name in ("stopped", "stopped-shard"):
        step = read_checkpoint(runs.folder / name / "checkpoint.pt")["progress"]["step"]
        assert 9 <= step <= 9 + AGREE_STEPS
    tasks = [runs.task("uneven-3", UNEVEN), runs.task("stopped", EVEN)]
    tasks += [runs.task("stopped-shard", [*EVEN, "--shard"])]
    assert runs.on_several(3, tasks)[1] == [[0, 0, 0]] * 3
    even, uneven = (runs.on_one(f"one-{name_of(o)}", o) for o in (EVEN, UNEVEN))
    for one, other in ((uneven, "uneven-3"), (even, "stopped"), (even, "stopped-shard")):
        losses, weights = runs.difference(one, other)
        assert losses < 3e-6 and weights < 1e-4


def test_one_process_continues_what_a_sharded_run_of_two_began(runs, on_two, tmp_path):
    out = runs.folder / "stopped-shard"
    options = [*EVEN, "--resume", str(out / "previous.pt")]
    runs.on_one("from-shard", options)
    expected = runs.weights(runs.on_one(f"one-{name_of(EVEN)}", EVEN))
    for key, weight in runs.weights("from-shard").items():
        assert (weight - expected[key]).abs().max() < 1e-4


def test_a_run_with_dropout_repeats_its_bits_on_so_many_processes_also_after_a_stop(runs, on_two):
    assert on_two[0]["dropout, stopped"] == 128 + signal.SIGTERM
    for other in ("dropout-2-again", "dropout-2-stopped"):
        assert runs.difference("dropout-2", other) == (0, 0)


def test_the_processes_draw_different_masks(runs, on_two):
    """A process that drew the first one's masks would train on half of the randomness."""
    random = read_checkpoint(runs.folder / "dropout-2" / "checkpoint.pt")["training"]["random"]
    assert len(random["others"]) == 1
    assert not torch.equal(random["cpu"], random["others"][0]["cpu"])


def test_a_gradient_that_is_not_finite_on_one_process_changes_nothing_on_any(runs, on_two):
    assert on_two[0]["nan"] == 0
    entries = [json.loads(line) for line in (runs.folder / "nan-2" / "log.jsonl").open()]
    counts = [e["nonfinite_steps"] for e in entries if "nonfinite_steps" in e]
    assert counts[0] == 0 and counts[-1] == 1
    assert np.isfinite(entries[-1]["dev_cross_entropy"])


def test_the_first_process_alone_prints_and_writes(runs, on_two):
    codes, done = on_two
    of_six = sum(name in ("even", "stopped", "shard, stopped") for name in codes)  # a step
    assert done.stdout.count("50 steps = 0.57 epochs of 525 chunks") == of_six
    entries = [json.loads(line) for line in (runs.folder / "even-2" / "log.jsonl").open()]
    assert entries[0]["processes"] == 2 and [e["step"] for e in entries[1:]].count(50) == 2
    assert not list(runs.folder.glob("*/*.tmp"))


def test_what_cannot_be_done_by_several_is_refused_in_one_line(on_two):
    codes, done = on_two
    for name in ("other data", "other teacher", "in memory", "few", "graph"):
        assert codes[name] == 1, name
    assert "process 1 has another train_shard, dev_shard than process 0" in done.stderr
    assert "process 1 has another set of teachers than process 0" in done.stderr
    assert "--cache-teachers host: each of 2 processes" in done.stderr
    assert "--batch-size 1: 2 processes need a sequence each" in done.stderr
    assert "--cuda-graph is not for torchrun's" in done.stderr
    assert "error: rank 1: --batch-size 1" in done.stderr


def test_sharding_wants_several_processes(runs):
    task = runs.task("alone-shard", [*UNEVEN, "--shard"])
    with pytest.raises(UserError, match="start them with torchrun"):
        train.main(task["arguments"])


# ---- what kills them


def processes_of(path):
    """Whether any process of a command's tasks is left."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(path).encode() in command.read_bytes():
                return True
    return False


@pytest.mark.faults
def test_a_killed_process_ends_the_others_soon_and_the_next_launch_continues(runs):
    """SIGKILL at a step; the run that was never disturbed has the same bits, dropout included."""
    task = runs.task("killed", DROPOUT_LONG, die_at=31, died=str(runs.folder / "died"))
    command, path = runs.command(2, [task])
    started = time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, cwd=ROOT, check=False)
    took = time.monotonic() - started
    assert done.returncode == 1 and not processes_of(path)
    died = (runs.folder / "died").stat().st_mtime
    print(f"torchrun ended {time.time() - died:.0f} seconds after the kill, {took:.0f} in all")
    assert time.time() - died < 60
    assert runs.on_several(2, [task, runs.task("undisturbed", DROPOUT_LONG)])[1] == [[0, 0]] * 2
    assert runs.difference("killed", "undisturbed") == (0, 0)


@pytest.mark.faults
def test_torchrun_restarts_the_processes_and_they_continue(runs):
    task = runs.task("restarted", DROPOUT_LONG, die_at=31, died=str(runs.folder / "died-again"))
    command, path = runs.command(2, [task], "--max-restarts=3")
    subprocess.run(command, env=environment(), capture_output=True, cwd=ROOT, check=True)
    assert (runs.folder / "died-again").exists() and not processes_of(path)
    runs.on_several(2, [runs.task("not-restarted", DROPOUT_LONG)])
    assert runs.difference("restarted", "not-restarted") == (0, 0)


@pytest.mark.faults
def test_a_signal_to_torchrun_saves_once(runs):
    """torchrun passes it on, waits, and ends with 1 and a traceback that says SignalException."""
    task = runs.task("signalled", [*DROPOUT_LONG, "--steps", "4000", "--save-every", "5000"])
    command, path = runs.command(2, [task])
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log = runs.folder / "signalled" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"loss"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "SignalException" in said and not processes_of(path)
    step = read_checkpoint(runs.folder / "signalled" / "checkpoint.pt")["progress"]["step"]
    assert step < 4000 and not (runs.folder / "signalled" / "previous.pt").exists()


@pytest.mark.faults
def test_compiled_layers_on_two_processes_compute_the_run_of_one(runs):
    for name, options, program in (("UNEVEN", UNEVEN, "train"), ("DISTILL", DISTILL, "distill")):
        tasks = [runs.task(f"compiled-{name}", [*options, "--compile"], program)]
        tasks += [runs.task(f"compiled-shard-{name}", [*options, "--compile", "--shard"], program)]
        assert runs.on_several(2, tasks)[1] == [[0, 0]] * 2
        one = runs.on_one(f"one-{name}", options, program)
        for other in (f"compiled-{name}", f"compiled-shard-{name}"):
            losses, weights = runs.difference(one, other)
            print(f"{other}: losses {losses:.1e}, weights {weights:.1e}")
            assert losses < 2e-5 and weights < 1e-4


@pytest.mark.gpu
def test_one_process_on_nccl_computes_the_run_of_one(runs):
    on_gpu = ["--device", "cuda", "--no-compile"]
    tasks = [
        runs.task("nccl", [*UNEVEN, *on_gpu]),
        runs.task("nccl-2", [*UNEVEN, *on_gpu, "--shard"]),
    ]
    assert runs.on_several(1, tasks)[1] == [[0, 0]]
    one = runs.on_one("one-on-gpu", [*UNEVEN, *on_gpu, "--no-cuda-graph"])
    for other in ("nccl", "nccl-2"):
        losses, weights = runs.difference(one, other)
        assert losses < 3e-6 and weights < 1e-4
