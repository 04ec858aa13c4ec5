"""Several ways to do one thing, side by side on one machine: how the benchmarks here are timed.

Each contestant is a process of its own, so that its peak memory is its own. On a CPU all are built
and warmed up first; then they take turns, one round each, while the others sleep: what disturbs the
machine disturbs all of them. A GPU is not shared, because its memory would be: there they come one
after the other. Ratios are of medians.
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from training.io import GIB

MARK = "@contest "  # begins what a contestant says to the referee, among whatever else it prints


# ---- a contestant


def serve(work, prepare=lambda: None, device="cpu"):
    """Makes this process a contestant: it times `work()`, one round for every line that it reads.

    `prepare()` is the warm-up. When the input ends, the contestant tells its peak memory in GiB:
    "peak_gb" is what the rounds took of the GPU or, elsewhere, what was ever resident; "own_gb" is
    what was allocated beyond what stood before the warm-up.
    """
    cuda = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident_bytes()
    prepare()
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # to verify a graph takes more than to replay it
    print(MARK + json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        print(MARK + json.dumps(time.perf_counter() - started), flush=True)
    peak = highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        peak, highest = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    memory = {"peak_gb": peak / GIB, "own_gb": (highest - before) / GIB}
    print(MARK + json.dumps(memory), flush=True)


def resident_bytes():
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# ---- the referee


class Contestant:
    """The referee's end of a contestant. What the contestant says is None once it has died."""

    def __init__(self, command):
        self.complaints = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
        )

    def hear(self):
        """What it says next."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return None

    def take_turn(self):
        """The seconds of one round."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.hear()

    def leave(self):
        """Its peak memory, {"peak_gb", "own_gb"}, after which it ends."""
        self.process.stdin.close()
        memory = self.hear()
        self.process.wait()
        return memory

    def last_words(self):
        """The last line that it wrote to standard error."""
        code = self.process.wait()
        self.complaints.seek(0)
        lines = self.complaints.read().strip().splitlines()
        return lines[-1] if lines else f"it ended with exit code {code} and said nothing"

    def stop(self):
        """Ends it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.complaints):
            with contextlib.suppress(BrokenPipeError):  # a line that the dead did not read
                file.close()


def contest(commands, rounds, device, report):
    """Times contestants, {name: argv}, and calls `report(name, result)` as soon as one is there.

    A result is {"seconds": [of each round], "peak_gb", "own_gb"}, or {"error": last words}. Before
    a contestant has finished, each of its rounds is reported too, with "unfinished" in the result.
    """
    if torch.device(device).type == "cpu":
        take_turns(commands, rounds, report)
        return
    for name, command in commands.items():
        take_turns({name: command}, rounds, report)


def take_turns(commands, rounds, report):
    """`contest` for contestants that are there together."""
    present, seconds, started = {}, {name: [] for name in commands}, []
    try:
        for name, command in commands.items():
            contestant = Contestant(command)
            started.append(contestant)
            if contestant.hear() == "ready":
                present[name] = contestant
            else:
                report(name, {"error": contestant.last_words()})
        for _ in range(rounds):
            for name, contestant in list(present.items()):
                seconds[name].append(contestant.take_turn())
                if seconds[name][-1] is None:
                    report(name, {"error": present.pop(name).last_words()})
                else:
                    report(name, {"seconds": list(seconds[name]), "unfinished": True})
        for name, contestant in present.items():
            memory = contestant.leave()
            if memory is None:
                report(name, {"error": contestant.last_words()})
            else:
                report(name, {"seconds": seconds[name], **memory})
    finally:
        for contestant in started:
            contestant.stop()


def compete(findings, commands, rounds, device, judge):
    """A contest whose results become findings of the same names, {name: finding}, errors included.

    `judge(name, result)` makes a finding of a result that is no error. Contestants that are known
    from an earlier try do not compete again. Standard error says who has finished, so that one sees
    how far it is, and so that this process ends when nobody is there to read it.
    """

    def report(name, result):
        if "unfinished" in result:
            findings.add(name, judge(name, result) | {"unfinished": True})
            return
        findings.add(name, result if "error" in result else judge(name, result))
        outcome = "failed" if "error" in result else "finished"
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)

    for name in commands:
        if name in findings.known:
            findings.add(name, findings.known[name])
    others = {name: argv for name, argv in commands.items() if name not in findings.known}
    contest(others, rounds, device, report)
    return {name: findings.found[name] for name in commands}


def median(result):
    """The median seconds of a round."""
    return statistics.median(result["seconds"])
