"""Work that runs side by side, in processes of its own: `reproduce.py --jobs`."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

from training.io import UserError, run_program

INCOMPLETE = 75  # the exit code of a job that has saved its work and is not finished
STOPPING = (signal.SIGTERM, signal.SIGHUP)


class Job(NamedTuple):
    """A call of `function(*arguments)` in a process of its own; its output goes to the file `log`.

    It starts when the jobs with the names `needs` have finished. `function` returns an exit code.
    """

    name: str
    needs: frozenset
    function: Callable
    arguments: tuple
    log: Path


def run_jobs(jobs, limit):
    """Runs jobs, at most `limit` at a time, each with its share of this process's threads.

    Returns 0 if all have finished, else the exit code of the first that did not. Then the others are
    asked to stop: those that train save first. Raises `UserError` with the last line of a job that
    failed. If this process is stopped, so are the jobs.
    """
    waiting, running, finished = list(jobs), {}, set()
    code, threads = 0, max(1, torch.get_num_threads() // limit)
    spawn = multiprocessing.get_context("spawn")
    with stopped_by_signals(), contextlib.ExitStack() as stack:
        stack.callback(stop_all, running)
        while running or (waiting and not code):
            ready = [] if code else [job for job in waiting if job.needs <= finished]
            for job in ready[: limit - len(running)]:
                process = spawn.Process(target=run_job, args=(job, threads))
                process.start()
                waiting.remove(job)
                running[process] = job, time.monotonic()
                print(f"started    {job.name}: output in {job.log}", flush=True)
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                job, started = running.pop(process)
                if process.exitcode == 0:
                    finished.add(job.name)
                    print(f"finished   {job.name}, {time.monotonic() - started:.0f} s", flush=True)
                elif process.exitcode == INCOMPLETE:  # the others have the same end of their time
                    code = INCOMPLETE
                elif process.exitcode == 1:
                    raise UserError(f"{job.name}: {last_line(job.log)}")
                elif process.exitcode < 0:
                    raise UserError(f"{job.name}: signal {-process.exitcode} killed it, see {job.log}")
                else:
                    return process.exitcode
    return code


@contextlib.contextmanager
def stopped_by_signals():
    """A context in which SIGTERM and SIGHUP end this process through `SystemExit`: `finally` runs."""

    def leave(number, _frame):
        raise SystemExit(128 + number)

    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
    previous = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_all(processes):
    """Asks processes to stop, and waits until they have."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def last_line(path):
    """The last line of a text file, without "error: "."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"failed, see {path}"


def run_job(job, threads):
    """Runs a job in this process and exits; stops as by SIGTERM if the process that started it is gone."""

    def stop_with_parent():
        wait([multiprocessing.parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    # Ctrl-C in a terminal reaches the parent alone, which asks all jobs to stop, once: a second signal
    # would end a training before it has saved.
    os.setsid()
    threading.Thread(target=stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = run_program(lambda: job.function(*job.arguments))
        raise SystemExit(code)
