"""One of several processes that torchrun starts: does the tasks of a file, one after the other.

Each task is a JSON object: "program" and "arguments", where "{rank}" stands for the process's rank;
"signal_at": a step at which the last process gets a SIGTERM; "nan_at": a step at which its gradient
is not finite; "die_at": a step at which it is killed, the first time. Exit codes go to FILE.RANK.
At the very end FILE.RANK.threads gets the names of gloo's threads that are left.
"""

import atexit
import functools
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
import train  # noqa: E402
from training.io import run_program  # noqa: E402

PROGRAMS = {"train": train.main, "distill": distill.main}


def disturbed(task, rank):
    """The train step's update, to which a task's mishaps come."""
    update, count = train.TrainStep.update, 0

    @functools.wraps(update)
    def with_mishaps(self, parts):
        nonlocal count
        count += 1
        if count == task.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if count == task.get("die_at") and not Path(task["died"]).exists():
            Path(task["died"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if count != task.get("nan_at"):
            return update(self, parts)
        weight = next(iter(self.parameters.values()))
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return update(self, parts)
        finally:
            hook.remove()

    is_last = rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
    return with_mishaps if is_last else update


def do(task, rank):
    """The exit code of a task."""
    arguments = [argument.replace("{rank}", str(rank)) for argument in task["arguments"]]
    update = train.TrainStep.update
    train.TrainStep.update = disturbed(task, rank)
    try:
        return run_program(lambda: PROGRAMS[task["program"]](arguments))
    finally:
        train.TrainStep.update = update


def write_gloo_threads(path):
    """Writes the names of gloo's threads in this process, as Linux has them."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    path.write_text(json.dumps([name for name in names if "gloo" in name]))


def main(path):
    rank = int(os.environ.get("RANK", "0"))
    atexit.register(write_gloo_threads, Path(f"{path}.{rank}.threads"))  # the first is the last
    codes = [do(task, rank) for task in json.loads(Path(path).read_text())]
    Path(f"{path}.{rank}").write_text(json.dumps(codes))
    return max(codes) if codes == [1] else 0  # a lone task that failed is one to be restarted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
