"""Several ways to do one thing, side by side on one machine: how the benchmarks here are timed.

Each contestant is a process of its own, so that its peak memory is its own. All are built and
warmed up first; then they take turns, one round each, while the others sleep: what disturbs the
machine disturbs all of them. Ratios are of medians.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

MARK = "@contest "  # what a contestant says to the referee, among whatever else it prints


def serve(round, prepare=lambda: None, device="cpu"):
    """A contestant: says that it is ready, then runs and times `round()` for every line it reads.

    Ends when its input ends, with its peak memory in GiB: allocated on a GPU, resident elsewhere.
    """
    cuda = torch.device(device).type == "cuda"
    prepare()
    print(MARK + json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        round()
        if cuda:
            torch.cuda.synchronize()
        print(MARK + json.dumps(time.perf_counter() - started), flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if cuda else resident
    print(MARK + json.dumps(peak / (1 << 30)), flush=True)


class Contestant:
    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self):
        """What it says next; None if it has died."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return None

    def last_words(self):
        """The last line of its complaint."""
        return (self.process.stderr.read().strip().splitlines() or ["no message"])[-1]

    def turn(self):
        """The seconds of one round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def leave(self):
        self.process.stdin.close()
        peak = self.hear()
        self.process.wait()
        return peak


def contest(commands, rounds):
    """{name: {"seconds": [per round], "peak_gb"}} or {"error"} of `commands` {name: argv}."""
    ready, results = {}, {}
    for name, command in commands.items():
        contestant = Contestant(command)
        if contestant.hear() == "ready":
            ready[name], results[name] = contestant, {"seconds": []}
        else:
            results[name] = {"error": contestant.last_words()}
    for _ in range(rounds):
        for name, contestant in list(ready.items()):
            seconds = contestant.turn()
            if seconds is None:
                results[name] = {"error": ready.pop(name).last_words()}
            else:
                results[name]["seconds"].append(seconds)
    for name, contestant in ready.items():
        results[name]["peak_gb"] = contestant.leave()
    return results


def median(result):
    """The median seconds of a round."""
    return statistics.median(result["seconds"])


def matmul_flops(device, dtype, size=2048):
    """Floating-point operations per second of one square product: the ceiling of the figures."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        if a.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def device_name(device):
    """What the figures are of: the GPU, or the processor with its number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    bf16 = ", native bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{torch.get_num_threads()} CPU threads{bf16}"
