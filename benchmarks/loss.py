"""The ensemble loss alone, forward and backward: the plain formula beside the fused one.

    python -m benchmarks.loss

The shapes are the paper's, for 1,024 to 16,384 tokens, and on CUDA for 4,096 and 32,768.

plain           loss.py's `plain_distillation_loss` on materialised logits
plain_compiled  the same under torch.compile
fused           `distillation_loss`, eager
fused_compiled  `distillation_loss` with its rows compiled: what --compile trains with

Products are in bf16 where the chip multiplies it natively. "own GiB" is the peak above what stood
before the loss was called: inputs, heads and the program itself. Speed and memory are relative to
plain.
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from benchmarks.contest import compete, median, serve
from benchmarks.findings import (
    Findings,
    benchmark_parser,
    print_errors,
    print_table,
)
from loss import distillation_loss, join_heads, plain_distillation_loss
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

VARIANTS = ("fused", "fused_compiled", "plain", "plain_compiled")
ON_A_CPU = [1024, 2048, 4096, 8192, 16_384]  # tokens
ON_A_GPU = [4096, 32_768]
STUDENT, TEACHERS, VOCABULARY = 512, (1536, 1024), 16_000  # hidden sizes; pieces
LENGTH = 128


def inputs(tokens, device):
    """The student's hidden states and head, (hidden states, head, weight) of each teacher, targets.

    All are random, the same for every contestant on the device.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, device=device)

    hidden, head = normal(tokens, STUDENT), normal(VOCABULARY, STUDENT, scale=0.02)
    teachers = [(normal(tokens, C), normal(VOCABULARY, C, scale=0.02), 1.0) for C in TEACHERS]
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), head.requires_grad_(), teachers, targets


def loss_function(variant, hidden, head, teachers, targets, dtype):
    """The variant's function, which returns the loss of these inputs, with products in `dtype`."""
    _, heads, weights = zip(*teachers)
    options = {
        "alpha": 0.5,
        "temperature": 2.0,
        "num_targets": len(targets),
        "kl_denominator": len(targets) / LENGTH,
    }

    def plain():
        taught = [F.linear(states, teacher_head) for states, teacher_head, _ in teachers]
        return plain_distillation_loss(F.linear(hidden, head), taught, weights, targets, **options)["loss"]

    joined = join_heads(heads, weights, dtype)

    def fused(compiled):
        return distillation_loss(
            hidden, head, teachers, targets, joined_head=joined, compiled=compiled, **options
        )["loss"]

    return {
        "plain": plain,
        "plain_compiled": torch.compile(plain),
        "fused": lambda: fused(False),
        "fused_compiled": lambda: fused(True),
    }[variant]


def be_contestant(args, device):
    """What a process does that this program has started for a variant and a number of tokens."""
    hidden, head, teachers, targets = inputs(args.tokens[0], device)
    precision = choose_precision("auto", device)
    autocast = autocast_for(device, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compute = loss_function(args.worker, hidden, head, teachers, targets, dtype)

    def forward_and_backward():
        for _ in range(args.repeats):
            hidden.grad = head.grad = None
            with autocast:
                loss = compute()
            loss.backward()

    serve(forward_and_backward, forward_and_backward, device)


def referee(args, device):
    """Lets the variants compete, size by size, and prints how they did."""
    repeats = 20 if device.type == "cuda" else 1
    findings = Findings(args, device)
    rows = [["variant", "tokens", "ms", "own GiB", "speed", "memory"]]

    def judge(_name, result):
        finding = {"ms": 1000 * median(result) / repeats}
        return finding | ({"own_gb": result["own_gb"]} if "own_gb" in result else {})

    for tokens in args.tokens or (ON_A_GPU if device.type == "cuda" else ON_A_CPU):
        base = [
            sys.executable,
            "-m",
            "benchmarks.loss",
            "--device",
            str(device),
            "--tokens",
            str(tokens),
        ]
        base += ["--repeats", str(repeats), "--worker"]
        commands = {f"{tokens} {variant}": [*base, variant] for variant in args.variants}
        sizes = compete(findings, commands, args.rounds, device, judge)
        plain = sizes.get(f"{tokens} plain", {})
        for variant, finding in zip(args.variants, sizes.values()):
            if "error" not in finding:
                rows.append([variant, f"{tokens:,}", *cells(finding, plain)])
    print_table(rows)
    print_errors(findings.found)
    findings.close(args)


def cells(finding, plain):
    """Milliseconds, own GiB, and both relative to the plain formula's, unless that failed."""
    speed = memory = "-"
    if "ms" in plain:
        speed = f"{plain['ms'] / finding['ms']:.2f}"
        memory = f"{finding['own_gb'] / plain['own_gb']:.0%}"
    return f"{finding['ms']:,.1f}", f"{finding['own_gb']:.3f}", speed, memory


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="sizes (default: 1024 2048 4096 8192 16384, on CUDA 4096 32768)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        help="contestants (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes (default: 5)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    (be_contestant if args.worker else referee)(args, choose_device(args.device))


if __name__ == "__main__":
    sys.exit(run_program(main))
