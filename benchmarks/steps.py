"""What the benchmarks of whole training steps share: Hugging Face's step, batches, rates."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.contest import median, serve
from benchmarks.findings import print_errors, print_table
from data import Batch
from gpt2 import GPT2Config
from train import TrainStep, build_optimizer
from training.cuda_graph import GRAPH_WARM_UP, GraphedStep
from training.device import autocast_for, compile_blocks

VOCABULARY = 16_000
CEILING_SECONDS = 10  # for measuring it; a processor that is slow or busy may take longer for one
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations per second
TESTS = Path(__file__).resolve().parent.parent / "tests"


# ---- contestants


def our_train_step(objective, device, precision, compiled, graphed):
    """`step(batch)` as train.py and distill.py take it."""
    objective = objective.to(device).train()
    optimizers = build_optimizer(objective, 0.1)
    step = TrainStep(objective, optimizers, autocast_for(device, precision))
    if compiled:
        compile_blocks(objective)
    if not graphed:
        return lambda batch: step(batch, 1e-4)
    graph = GraphedStep(step)

    def graphed_step(batch):
        terms = graph(batch, 1e-4)
        if graph.warm_up < 0 and not graph.replay:
            raise RuntimeError("no CUDA graph could be had, so that this would measure plain steps")
        return terms

    return graphed_step


def hugging_face_model(model, device):
    """The model of transformers that has this one's shape and weights, on the device.

    Its attention is eager on a CPU, as in the version that the original ran with. On CUDA it is
    PyTorch's fused one, which users of transformers have today.
    """
    sys.path.insert(0, str(TESTS))
    from conftest import hf_twin

    with device:
        return hf_twin(model, attention="sdpa" if device.type == "cuda" else "eager").to(device)


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


def serve_steps(step, batches, steps, device, warm_up=1):
    """Makes this process a contestant whose round is so many steps, on each batch in turn.

    The warm-up is so many steps; on CUDA there are enough of them to capture a CUDA graph.
    """
    taken = 0

    def take(count):
        nonlocal taken
        for _ in range(count):
            step(batches[taken % len(batches)])
            taken += 1

    if device.type == "cuda":
        warm_up = max(warm_up, GRAPH_WARM_UP + 1)
    serve(lambda: take(steps), lambda: take(warm_up), device)


# ---- rates


def matmul_flops(device, dtype):
    """Floating-point operations per second of one square product: the ceiling of the figures."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    measure = _seconds_of_products_on_cuda if cuda else _seconds_of_product
    found, started = [], time.perf_counter()
    while len(found) < 10 and time.perf_counter() - started < CEILING_SECONDS:
        found.append(measure(a, b))
    if cuda:
        del a, b
        torch.cuda.empty_cache()  # the contestants need the memory
    return 2 * size**3 / min(found)


def _seconds_of_product(a, b):
    started = time.perf_counter()
    a @ b
    return time.perf_counter() - started


def _seconds_of_products_on_cuda(a, b, count=10):
    """Seconds of one product, of several that follow each other between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        a @ b
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def flops_per_token(config, length, training):
    """Matrix products and causal attention: a forward pass, in training a backward pass as well."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    mlp = (2 if isinstance(config, GPT2Config) else 3) * width * inner
    matrices = layers * (4 * width * width + mlp) + width * config.vocab_size
    return (2 * matrices + 2 * width * length * layers) * (3 if training else 1)


def data_sheet_flops(device):
    """What the maker of a GPU says that it does, in operations per second; None if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for chip, flops in DATA_SHEET.items() if chip in name), None)


def rate(result, tokens, flops, ceiling, data_sheet=None):
    """The finding of a contestant whose round is so many tokens of so many operations each.

    "utilisation" is the share of `ceiling`, operations per second, "mfu" that of `data_sheet`, if
    it is known. "peak_gb" is missing before the contestant has finished.
    """
    tokens_per_second = tokens / median(result)
    finding = {
        "tokens_per_second": tokens_per_second,
        "spread": [tokens / max(result["seconds"]), tokens / min(result["seconds"])],
        "utilisation": tokens_per_second * flops / ceiling,
    }
    if data_sheet:
        finding["mfu"] = tokens_per_second * flops / data_sheet
    return finding | ({"peak_gb": result["peak_gb"]} if "peak_gb" in result else {})


def show_rates(rates):
    """Prints a table of {variant: finding of `rate`, or error}.

    The ratio is to `huggingface` where it takes part, else to the first that did not fail.
    """
    good = {name: finding for name, finding in rates.items() if "error" not in finding}
    rows = [["variant", "tokens/s", "spread", "peak GiB", "ratio", "of products", "of data sheet"]]
    for name, finding in good.items():
        base = good.get("huggingface") or next(iter(good.values()))
        low, high = finding["spread"]
        rows.append(
            [
                name,
                f"{finding['tokens_per_second']:,.0f}",
                f"{low:,.0f}-{high:,.0f}",
                f"{finding['peak_gb']:.2f}",
                f"{finding['tokens_per_second'] / base['tokens_per_second']:.2f}",
                f"{finding['utilisation']:.0%}",
                f"{finding['mfu']:.0%}" if "mfu" in finding else "-",
            ]
        )
    print_table(rows)
    print_errors(rates)


def ratio(rates, name, other):
    """How many times as fast a variant is as another; None if one failed or did not take part."""
    speeds = [rates.get(key, {}).get("tokens_per_second") for key in (name, other)]
    return speeds[0] / speeds[1] if all(speeds) else None
