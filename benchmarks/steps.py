"""Training steps as variants to time, and the table of their rates: for two benchmarks."""

import functools
import statistics
import timeit

import torch

from benchmarks.measurement import print_table
from benchmarks.workers import synchronize, time_variants
from data import Batch
from gpt2 import GPT2Config
from train import TrainStep, build_optimizer
from training.cuda_graph import GRAPH_WARM_UP, GraphedStep
from training.device import autocast_for, compile_blocks

VOCABULARY = 16_000


def our_train_step(objective, device, precision, compiled, graphed):
    """Returns `step(batch)` as train.py and distill.py take it."""
    objective = objective.to(device).train()
    step = TrainStep(objective, build_optimizer(objective, 0.1), autocast_for(device, precision))
    if compiled:
        compile_blocks(objective)
    if not graphed:
        return lambda batch: step(batch, 1e-4)
    graph = GraphedStep(step)

    def graphed_step(batch):
        graph(batch, 1e-4)
        if graph.warm_up < 0 and not graph.replay:
            raise RuntimeError("no CUDA graph was captured: this would measure plain steps")

    return graphed_step


def random_batches(count, batch_size, length, vocabulary_size, device):
    """Returns batches of random tokens, the same for every variant."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, batch_size, length + 1)
    ids = torch.randint(4, vocabulary_size, shape, generator=generator)
    chunk_ids = torch.arange(count * batch_size).view(count, batch_size)
    return [
        Batch.whole(chunks, rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).to(device)
        for chunks, rows in zip(chunk_ids, ids)
    ]


def round_and_warm_up(step, batches, steps, device, warm_up_steps=1):
    """Returns two functions: one takes `steps` steps on the batches in turn, the other `warm_up_steps`.

    On CUDA the warm-up is at least as long as the capture of a CUDA graph takes.
    """
    steps_done = 0

    def take(count):
        nonlocal steps_done
        for _ in range(count):
            step(batches[steps_done % len(batches)])
            steps_done += 1

    if device.type == "cuda":
        warm_up_steps = max(warm_up_steps, GRAPH_WARM_UP + 1)
    return lambda: take(steps), lambda: take(warm_up_steps)


@functools.cache
def matmul_flops(device, precision):
    """Returns the operations per second of a square matrix product: the ceiling of all rates."""
    cuda = device.type == "cuda"
    size, products = (8192, 10) if cuda else (4096, 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply():
        for _ in range(products):
            a @ b
        synchronize(device)

    seconds = min(timeit.repeat(multiply, number=1, repeat=5)) / products
    if cuda:
        del a, b
        torch.cuda.empty_cache()  # the workers need the memory
    return 2 * size**3 / seconds


def flops_per_token(config, length, training):
    """Returns the operations of matrix products and causal attention: forward, and backward if `training`."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    mlp = (2 if isinstance(config, GPT2Config) else 3) * width * inner
    matrices = layers * (4 * width * width + mlp) + width * config.vocab_size
    return (2 * matrices + 2 * width * length * layers) * (3 if training else 1)


def time_steps(results, build, flops, tokens, prefix=""):
    """Times steps by `time_variants`, prints a table of their rates, and returns {variant: result}.

    `flops` is {variant: operations per token}. `tokens` is the number of tokens in a round.
    "utilisation" is the share of `matmul_flops`. The ratio in the table is to `huggingface` if it is
    among the variants, else to the first.
    """
    ceiling = matmul_flops(results.device, results.args.precision)
    results.add("setting", {"matmul_flops": ceiling})

    def to_result(variant, seconds):
        speed = tokens / statistics.median(seconds)
        spread = [tokens / max(seconds), tokens / min(seconds)]
        utilisation = speed * flops[variant] / ceiling
        return {"tokens_per_second": speed, "spread": spread, "utilisation": utilisation}

    by_variant = time_variants(results, build, list(flops), to_result, prefix)
    rates = {name: result for name, result in by_variant.items() if "error" not in result}
    base = rates.get("huggingface") or next(iter(rates.values()), None)
    rows = [["variant", "tokens/s", "spread", "peak GiB", "ratio", "of products"]]
    for name, result in rates.items():
        speed, (low, high) = result["tokens_per_second"], result["spread"]
        cells = f"{speed:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{result['peak_gb']:.2f}"
        rows.append(
            [name, *cells, f"{speed / base['tokens_per_second']:.2f}", f"{result['utilisation']:.0%}"]
        )
    print_table(rows)
    return by_variant
