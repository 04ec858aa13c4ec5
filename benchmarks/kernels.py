"""Counts the kernels that the compiler makes of a layer and of the loss's rows, from its code.

    python -m benchmarks.kernels                     for the CPU or GPU that is there
    python -m benchmarks.kernels --precision fp32

A row is a graph: a layer in training, forward and backward, the same layer of a frozen teacher
(`distill.cast_linears_to_bf16`), and the rows of the loss. "fused" are the kernels that the compiler
wrote, "casts" those among them that only change a type, "products" the matrix products, "others"
the calls of torch's own kernels: attention, random numbers. Nothing is timed.
"""

import dataclasses
import re
import sys

import torch
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

from benchmarks.findings import Findings, benchmark_parser, print_table
from distill import cast_linears_to_bf16
from loss import Constants, _rows
from model import PRESETS, build
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

MODELS = ("gpt2-97m", "llama-58m")
BATCH_SIZE, LENGTH, VOCABULARY = 2, 128, 16_000
KERNELS = {
    "fused": r"\b(?:triton|cpp)_\w*fused\w*(?:\.run)?\(",
    "casts": r"\b(?:triton|cpp)_\w*fused_+to_copy_\d+(?:\.run)?\(",
    "products": r"extern_kernels\.\w*mm\w*\(|\bmkl\w*\._?\w*linear\w*\(",
    "others": r"torch\.ops\.(?:aten|mkldnn|inductor)\.\w+(?:\.\w+)?\(",
}


def one_layer(name, device):
    """A model of a preset with a single layer, and an input (B, T, C) of that layer."""
    torch._dynamo.reset()
    shape = PRESETS[name].config
    model = build(dataclasses.replace(shape, num_hidden_layers=1)).to(device)
    size = BATCH_SIZE, LENGTH, shape.hidden_size
    return model, torch.randn(size, device=device, requires_grad=True)


def layer_of(model):
    """The compiled function of a hidden state that is the model's layer."""
    block = model.blocks[0]
    tables = (model.cos[:LENGTH], model.sin[:LENGTH]) if hasattr(model, "cos") else ()
    block.compile(dynamic=False)
    return lambda x: block(x, *tables)


def counts(code):
    """{kind: number of kernels} that a compiled graph's code launches."""
    calls = code[code.index("def call(") :]
    return {kind: len(re.findall(pattern, calls)) for kind, pattern in KERNELS.items()}


def graphs_of(device, autocast, precision):
    """Yields each graph's name and code."""
    for name in MODELS:
        model, x = one_layer(name, device)
        layer = layer_of(model.train())

        def learn(layer=layer, x=x):
            with autocast:
                y = layer(x)
            y.sum().backward()

        _, codes = run_and_get_code(learn)
        for part, code in zip(("forward", "backward"), codes, strict=True):
            yield f"{name}, training, {part}", code
        model, x = one_layer(name, device)
        if precision == "bf16":
            cast_linears_to_bf16(model)
        layer = layer_of(model.eval().requires_grad_(False))
        with torch.no_grad(), autocast:
            _, codes = run_and_get_code(layer, x.detach())
        yield f"{name}, frozen", codes[0]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    logits, teacher = (torch.randn(64, VOCABULARY, device=device, dtype=dtype) for _ in range(2))
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    for temperature in (1.0, 2.0):
        torch._dynamo.reset()
        rows = torch.compile(_rows, dynamic=False)
        constants = Constants(0.5, temperature, 2, 64, 64)
        _, codes = run_and_get_code(rows, logits, targets, teacher, None, constants, True)
        yield f"rows of the loss, T = {temperature:g}", codes[0]


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="precision of the products (default: auto, bf16 where the chip multiplies it)",
    )
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    findings = Findings(args, device)
    rows = [[f"graph ({precision})", *KERNELS]]
    with fresh_inductor_cache():  # a graph that is found in the cache shows no code
        for name, code in graphs_of(device, autocast_for(device, precision), precision):
            found = counts(code)
            findings.add(name, found)
            rows.append([name, *map(str, found.values())])
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
