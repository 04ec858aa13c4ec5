"""A rank that torchrun starts, as `-m tests.ranks FILE`: runs the tasks of a file one after the other.

A task is a JSON object: "program" and "arguments", in which "{rank}" stands for the rank; and mishaps
of the last rank: it gets a SIGTERM at step "signal_at", has a gradient that is not finite at step
"nan_at", and is killed at step "die_at", unless the file "died" exists. FILE.RANK gets the exit codes,
and FILE.RANK.threads, at the very end, the names of the threads of gloo that are left.
"""

import atexit
import functools
import json
import os
import signal
import sys
from pathlib import Path

import distill
import train
from training.io import run_program

PROGRAMS = {"train": train.main, "distill": distill.main}


def with_mishaps(update, task):
    """Returns `TrainStep.update` with the mishaps of a task."""
    step = 0

    @functools.wraps(update)
    def disturbed(self, micro_batches):
        nonlocal step
        step += 1
        if step == task.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == task.get("die_at") and not Path(task["died"]).exists():
            Path(task["died"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step != task.get("nan_at"):
            return update(self, micro_batches)
        weight = next(iter(self.parameters.values()))
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return update(self, micro_batches)
        finally:
            hook.remove()

    return disturbed


def run_task(task, rank=0):
    """Returns the exit code of a task."""
    arguments = [argument.replace("{rank}", str(rank)) for argument in task["arguments"]]
    update = train.TrainStep.update
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        train.TrainStep.update = with_mishaps(update, task)
    try:
        return run_program(lambda: PROGRAMS[task["program"]](arguments))
    finally:
        train.TrainStep.update = update


def write_gloo_threads(path):
    """Writes the names of gloo's threads in this process, as Linux lists them."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    path.write_text(json.dumps([name for name in names if "gloo" in name]))


def main(path):
    rank = int(os.environ["RANK"])
    # What is registered first runs last.
    atexit.register(write_gloo_threads, Path(f"{path}.{rank}.threads"))
    codes = [run_task(task, rank) for task in json.loads(Path(path).read_text())]
    Path(f"{path}.{rank}").write_text(json.dumps(codes))
    return max(codes) if codes == [1] else 0  # so that torchrun restarts a single task that failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
