"""The ways in which CUDA computes attention, timed, and the share of weights that dropout drops.

    python -m benchmarks.attention --device cuda

Shapes are (sequences, heads, positions, head size) of the paper's models in a training step. Each
back end of `scaled_dot_product_attention` computes forward and backward. cuDNN's is switched off in
training (`training/device.py`): in torch 2.11 some of its kernels round the dropout probability to
sixteenths, which "dropped" shows. On a CPU the one back end that is there is timed on less.
"""

import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.findings import Findings, benchmark_parser, print_table
from training.device import choose_device
from training.io import run_program

SHAPES = {
    "gpt2-705m": (128, 16, 128, 96),
    "llama-360m": (128, 8, 128, 128),
    "llama-58m": (32, 8, 128, 64),
}
BACK_ENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DROPOUT = 0.1


def seconds_of(compute, device, repeats):
    """Seconds of one call of `compute`, the fastest of five rounds of so many."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = []
    compute()
    for _ in range(5):
        wait()
        started = time.perf_counter()
        for _ in range(repeats):
            compute()
        wait()
        rounds.append((time.perf_counter() - started) / repeats)
    return min(rounds)


def dropped_share(shape, device, probability):
    """The share of the attention weights that is dropped, where `probability` is asked for.

    All scores are equal and all values one: an output is the number of kept weights, each of them
    1 / (positions x (1 - probability)).
    """
    q = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    y = F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=probability)
    return 1 - y[..., 0].float().mean().item() * (1 - probability)


def measured(shape, device, repeats):
    """The finding of a shape under the back ends that are allowed now."""
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    d_y = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def both_ways(dropout):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        torch.autograd.grad(y, (q, k, v), d_y)

    finding = {
        f"ms_dropout_{dropout:g}": 1000 * seconds_of(partial(both_ways, dropout), device, repeats)
        for dropout in (0.0, DROPOUT)
    }
    with torch.no_grad():
        return finding | {"dropped": dropped_share(shape, device, DROPOUT)}


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="calls a round (default: 1, on CUDA 20)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    on_cuda = device.type == "cuda"
    findings = Findings(args, device)
    rows = [["shape", "back end", "ms", f"ms, dropout {DROPOUT}", "dropped"]]
    for model, (sequences, *rest) in SHAPES.items():
        shape = (sequences if on_cuda else 2, *rest)
        for name, back_end in BACK_ENDS.items() if on_cuda else [("math", SDPBackend.MATH)]:
            try:
                with sdpa_kernel(back_end):
                    finding = measured(shape, device, args.repeats or (20 if on_cuda else 1))
            except RuntimeError as error:  # a back end that does not take the shape
                finding = {"error": str(error).partition("\n")[0]}
            findings.add(f"{model} {name}", finding)
            cells = [f"{v:.3f}" for v in finding.values()] if "error" not in finding else ["-"] * 3
            rows.append([f"{model} {shape}", name, *cells])
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
