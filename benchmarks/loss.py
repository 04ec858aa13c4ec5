"""Time the distillation loss alone, forward and backward: the plain formula beside the fused one.

    python -m benchmarks.loss

The hidden sizes are the paper's.

plain           loss.py's `plain_distillation_loss` on materialised logits
plain_compiled  the same under torch.compile
fused           `distillation_loss`, eager
fused_compiled  `distillation_loss` with its rows compiled: what --compile trains with

"own GiB" is the peak memory above inputs,
heads and the program itself. Speed and memory are relative to plain.
"""

import functools
import statistics
import sys

import torch
import torch.nn.functional as F

from benchmarks.measurement import Results, benchmark_parser
from benchmarks.workers import time_variants
from loss import Coefficients, distillation_loss, join_heads, plain_distillation_loss
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

VARIANTS = ("fused", "fused_compiled", "plain", "plain_compiled")
CPU_TOKENS, GPU_TOKENS = (1024, 2048, 4096, 8192, 16_384), (4096, 32_768)
STUDENT, TEACHERS, VOCABULARY = 512, (1536, 1024), 16_000  # hidden sizes; pieces
LENGTH = 128


def random_inputs(tokens, device):
    """Returns the student's hidden states and head, (hidden states, head, weight) by teacher, targets."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, device=device)

    hidden, head = normal(tokens, STUDENT), normal(VOCABULARY, STUDENT, scale=0.02)
    teachers = [(normal(tokens, C), normal(VOCABULARY, C, scale=0.02), 1.0) for C in TEACHERS]
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), head.requires_grad_(), teachers, targets


def loss_function(variant, hidden, head, teachers, targets, dtype):
    """Returns the variant as a function without arguments that computes the loss of these inputs."""
    teacher_states, heads, weights = zip(*teachers)
    coefficients = Coefficients(0.5, 2.0, num_targets=len(targets), kl_denominator=len(targets) / LENGTH)
    if variant.startswith("fused"):
        options = {"joined_head": join_heads(heads, weights, dtype), "compiled": variant == "fused_compiled"}
        return lambda: distillation_loss(hidden, head, teachers, targets, coefficients, **options)["loss"]

    def plain():
        teacher_logits = [F.linear(states, teacher) for states, teacher in zip(teacher_states, heads)]
        logits = F.linear(hidden, head)
        return plain_distillation_loss(logits, teacher_logits, weights, targets, coefficients)["loss"]

    return torch.compile(plain) if variant == "plain_compiled" else plain


def build_variant(args, device, tokens, variant):
    """Returns a round of a variant and its warm-up, as functions."""
    hidden, head, teachers, targets = random_inputs(tokens, device)
    autocast = autocast_for(device, args.precision)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    compute = loss_function(variant, hidden, head, teachers, targets, dtype)

    def forward_and_backward():
        for _ in range(args.calls):
            hidden.grad = head.grad = None
            with autocast:
                loss = compute()
            loss.backward()

    return forward_and_backward, forward_and_backward


def main(argv=None):
    parser = benchmark_parser(__doc__, VARIANTS, rounds=5)
    default = f"{' '.join(map(str, CPU_TOKENS))}, on CUDA {' '.join(map(str, GPU_TOKENS))}"
    parser.add_argument("--tokens", type=int, nargs="+", help=f"sizes (default: {default})")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.precision, args.calls = choose_precision(args.precision, device), 20 if cuda else 1
    results = Results(args, device)
    rows = [["variant", "tokens", "ms", "own GiB", "speed", "memory"]]

    def to_result(_variant, seconds):
        return {"ms": 1000 * statistics.median(seconds) / args.calls}

    for tokens in args.tokens or (GPU_TOKENS if cuda else CPU_TOKENS):
        build_one = functools.partial(build_variant, args, device, tokens)
        by_variant = time_variants(results, build_one, args.variants or VARIANTS, to_result, f"{tokens} ")
        for variant, result in by_variant.items():
            if "error" in result:
                continue
            speed = memory = "-"
            if "ms" in by_variant.get("plain", {}):
                speed = f"{by_variant['plain']['ms'] / result['ms']:.2f}"
                memory = f"{result['own_gb'] / by_variant['plain']['own_gb']:.0%}"
            row = [variant, f"{tokens:,}", f"{result['ms']:,.1f}", f"{result['own_gb']:.3f}", speed, memory]
            rows.append(row)
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
