"""Several ways to do one thing, side by side on one machine: how the benchmarks here are timed.

Each contestant is a process of its own, so that its peak memory is its own. On a CPU all are built
and warmed up first; then they take turns, one round each, while the others sleep: what disturbs the
machine disturbs all of them. A GPU is not shared, but its memory would be: there they come one
after the other. Ratios are of medians.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import train
from data import Batch
from gpt2 import GPT2Config

MARK = "@contest "  # what a contestant says to the referee, among whatever else it prints


def serve(round, prepare=lambda: None, device="cpu"):
    """A contestant: says that it is ready, then runs and times `round()` for every line it reads.

    Ends when its input ends, with its peak memory in GiB: what it took of the GPU or, elsewhere,
    had resident; and what `prepare` (the warm-up) and the rounds allocated beyond what stood
    before.
    """
    cuda = torch.device(device).type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident()
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
    peak = highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        peak, highest = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    gib = {"peak_gb": peak / (1 << 30), "own_gb": (highest - before) / (1 << 30)}
    print(MARK + json.dumps(gib), flush=True)


def resident():
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Contestant:
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
        """What it says next; None if it has died."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return None

    def last_words(self):
        """The last line of its complaint."""
        self.process.wait()
        self.complaints.seek(0)
        return (self.complaints.read().strip().splitlines() or ["no message"])[-1]

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


def contest(commands, rounds, device):
    """{name: {"seconds": [per round], "peak_gb", "own_gb"} or {"error"}} of {name: argv}."""
    if torch.device(device).type != "cpu":
        return {name: take_turns({name: argv}, rounds)[name] for name, argv in commands.items()}
    return take_turns(commands, rounds)


def take_turns(commands, rounds):
    """`contest`, all together."""
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
        results[name] |= contestant.leave()
    return results


def median(result):
    """The median seconds of a round."""
    return statistics.median(result["seconds"])


def matmul_flops(device, dtype, size=4096):
    """Floating-point operations per second of one square product: the ceiling of the figures."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        if a.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def describe(device):
    """What the figures are of: the chip, torch's version, the project's commit."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        bf16 = ", native bf16" if torch.cpu._is_avx512_bf16_supported() else ""
        name = f"{torch.get_num_threads()} CPU threads{bf16}"
    described = {"device": name, "torch": torch.__version__, "commit": train.commit()}
    print(f"{name}, torch {described['torch']}, commit {described['commit']}")
    return described


def hugging_face_step(model, loss, compiled):
    """A training step of transformers' model on `loss(ids)`, as the original's Trainer takes it.

    fp16 with loss scaling on CUDA, float32 elsewhere; bf16 and fused AdamW where `compiled`.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True if compiled else None)
    scaler = torch.amp.GradScaler(enabled=cuda and not compiled)
    half = torch.bfloat16 if compiled else torch.float16

    def step(batch):
        with torch.autocast(device.type, half, enabled=compiled or cuda):
            value = loss(batch.tokens)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def random_batches(count, batch_size, length, vocabulary_size, device):
    """Batches of random tokens, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, batch_size, length + 1)
    ids = torch.randint(4, vocabulary_size, shape, generator=generator)
    return [
        Batch.whole(
            torch.arange(i * batch_size, (i + 1) * batch_size),
            ids[i, :, :-1].contiguous(),
            ids[i, :, 1:].contiguous(),
        ).to(device)
        for i in range(count)
    ]


def flops_per_token(config, length, training):
    """Matrix products and causal attention, forward, or with the backward pass."""
    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    mlp = (2 if isinstance(config, GPT2Config) else 3) * C * inner
    matrices = layers * (4 * C * C + mlp) + C * config.vocab_size
    return (2 * matrices + 2 * C * length * layers) * (3 if training else 1)


def show_rates(results, tokens, flops, ceiling):
    """Prints a table of tokens/s; {name: {"tokens_per_second", "spread", "peak_gb"}}.

    `tokens` of a round; `flops` {name: per token}, of which the share of `ceiling` is shown. Ratios
    are to the first that did not fail.
    """
    rates, base = {}, None
    heading = f"{'variant':22} {'tokens/s':>10} {'spread':>16} {'peak GiB':>9}"
    print(f"{heading} {'ratio':>6} {'of peak':>8}")
    for name, result in results.items():
        if "error" in result:
            rates[name] = {"error": result["error"]}
            print(f"{name:22} {result['error']}")
            continue
        rate = tokens / median(result)
        spread = [tokens / max(result["seconds"]), tokens / min(result["seconds"])]
        base = base or rate
        rates[name] = {"tokens_per_second": rate, "peak_gb": result["peak_gb"], "spread": spread}
        rates[name]["utilisation"] = rate * flops[name] / ceiling
        low_high = f"{spread[0]:,.0f}-{spread[1]:,.0f}"
        print(
            f"{name:22} {rate:10,.0f} {low_high:>16} {result['peak_gb']:9.2f} {rate / base:6.2f} "
            f"{rates[name]['utilisation']:8.0%}"
        )
    return rates
