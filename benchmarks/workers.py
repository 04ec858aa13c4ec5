"""Time variants of one computation on one machine, each in a process of its own: a worker.

A process of its own gives each variant a peak memory of its own. On a CPU all workers are built and
warmed up first. Then they take rounds in turn while the others sleep, so that a disturbance of the
machine hits all of them. On a GPU they run one after the other, because they would share its memory.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import torch

from training.io import GIB

SPAWN = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process


def synchronize(device):
    """Waits until the device has computed all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def serve(connection, build, variant, device):
    """Builds a variant and warms it up, then times a round for each True that arrives.

    False ends the rounds. The answer is the peak memory in GiB: "peak_gb" is what the rounds reserved
    on the GPU, or elsewhere the largest resident size. "own_gb" is above what the process had before
    the warm-up.
    """
    try:
        run_round, warm_up = build(variant)
        cuda = device.type == "cuda"
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = torch.cuda.memory_allocated() if cuda else pages * resource.getpagesize()
        warm_up()
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # to check a CUDA graph takes more than to replay it
        connection.send({})
        while connection.recv():
            synchronize(device)
            started = time.perf_counter()
            run_round()
            synchronize(device)
            connection.send({"seconds": time.perf_counter() - started})
        peak = highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cuda:
            peak, highest = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        connection.send({"peak_gb": peak / GIB, "own_gb": (highest - before) / GIB})
    except EOFError:  # the benchmark was killed
        return
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})
        raise


class Worker:
    """The benchmark's end of a worker."""

    def __init__(self, build, variant, device):
        self.connection, other_end = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(other_end, build, variant, device))
        self.process.start()
        other_end.close()  # so that the death of the worker ends `recv`

    def answer(self, message=None):
        """Sends a message, if there is one. Returns the worker's answer, {"error": message} if it died."""
        try:
            if message is not None:
                self.connection.send(message)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"error": f"exit code {self.process.exitcode}"}

    def end(self):
        """Ends the process, which has a second to do it by itself."""
        self.connection.close()
        self.process.join(1)
        self.process.kill()
        self.process.join()


def time_variants(results, build, variants, to_result, prefix=""):
    """Times variants, and returns {variant: result}.

    In the worker, `build(variant)` returns two functions: one computes a round, one warms up. A result
    has what `to_result(variant, seconds of the rounds)` makes, the number of rounds and, once it is
    known, the memory. It is added to `results` as `prefix + variant` after each round, so that a
    benchmark that is cut off leaves it. A variant that fails has the result {"error": message}.
    """
    groups = [variants] if results.device.type == "cpu" else [[variant] for variant in variants]
    for group in groups:
        workers, seconds = {}, {variant: [] for variant in group}

        def receive(variant, message=None, workers=workers, seconds=seconds):
            answer = workers[variant].answer(message)
            if "error" in answer:
                results.add(prefix + variant, answer)
                workers.pop(variant).end()
            elif answer:
                if "seconds" in answer:
                    seconds[variant].append(answer.pop("seconds"))
                result = to_result(variant, seconds[variant]) | {"rounds": len(seconds[variant])}
                results.add(prefix + variant, result | answer)

        try:
            for variant in group:
                workers[variant] = Worker(build, variant, results.device)
                receive(variant)
            for message in [True] * results.args.rounds + [False]:
                for variant in list(workers):
                    receive(variant, message)
        finally:
            for worker in workers.values():
                worker.end()
    return {variant: results.values[prefix + variant] for variant in variants}
