"""The ensemble loss alone, forward and backward: the plain formula, the fused one, Liger's.

    python benchmarks/loss.py                      the paper's shapes, 1,024 to 16,384 tokens

plain           loss.py's `plain_ensemble_kl` on materialised logits
plain_compiled  the same under torch.compile
fused           `ensemble_kl`, eager
fused_compiled  `ensemble_kl` with its rows compiled: what --compile trains with
liger           Liger's chunked distillation loss (JSD with beta 0, which is this KL; one teacher,
                as it has no ensemble) where the package is installed, on CUDA alone

Products in bf16 where the chip multiplies it natively. "own GiB" is the peak above what stood
before the loss was called: inputs, heads and the program itself.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks.contest import contest, describe, median, serve  # noqa: E402
from loss import ensemble_kl, join_heads, plain_ensemble_kl  # noqa: E402
from model import choose_device  # noqa: E402

VARIANTS = ("plain", "plain_compiled", "fused", "fused_compiled", "liger")
STUDENT, TEACHERS, VOCABULARY = 512, (1536, 1024), 16_000
POSITIONS = 128


def inputs(tokens, device):
    """Student's hidden states and head, the teachers', and targets."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, device=device)

    student = normal(tokens, STUDENT).requires_grad_(), normal(VOCABULARY, STUDENT, scale=0.02)
    teachers = [(normal(tokens, C), normal(VOCABULARY, C, scale=0.02), 1.0) for C in TEACHERS]
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
    return student[0], student[1].requires_grad_(), teachers, targets


def work(args):
    device = choose_device(args.device)
    hidden, head, teachers, targets = inputs(args.tokens[0], device)
    precision = train.choose_precision("auto", device)
    autocast = train.autocast_for(device, precision)
    options = {
        "alpha": 0.5, "temperature": 2.0, "num_targets": len(targets),
        "kl_denominator": len(targets) / POSITIONS,
    }  # fmt: skip
    heads = [h for _, h, _ in teachers]
    weights = [w for _, _, w in teachers]

    def plain():
        logits = torch.nn.functional.linear(hidden, head)
        teacher_logits = [torch.nn.functional.linear(h, w) for h, w, _ in teachers]
        return plain_ensemble_kl(logits, teacher_logits, weights, targets, **options)["loss"]

    def liger():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(beta=0.0, temperature=2.0)
        return loss(hidden, head, teachers[0][0], heads[0], targets)

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    joined = join_heads(heads, weights, dtype)

    def fused(compiled):
        return ensemble_kl(
            hidden, head, teachers, targets, joined_head=joined, compiled=compiled, **options
        )["loss"]

    compute = {
        "plain": plain,
        "plain_compiled": torch.compile(plain),
        "fused": lambda: fused(False),
        "fused_compiled": lambda: fused(True),
        "liger": liger,
    }[args.worker]

    def round():
        for _ in range(args.repeats):
            hidden.grad = head.grad = None
            with autocast:
                loss = compute()
            loss.backward()

    serve(round, round, device)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: by powers of two")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    sizes = args.tokens or [1024 << i for i in range(7 if cuda else 5)]
    variants = args.variants or (VARIANTS if cuda else VARIANTS[:-1])
    repeats = 20 if cuda else 1
    summary = describe(device) | {"tokens": {}}
    print(f"{'tokens':>7} {'variant':15} {'ms':>9} {'own GiB':>8} {'speed':>6} {'memory':>7}")
    for tokens in sizes:
        base = [sys.executable, __file__, "--device", str(device), "--tokens", str(tokens)]
        base += ["--repeats", str(repeats)]
        results = contest({v: [*base, "--worker", v] for v in variants}, args.rounds, device)
        summary["tokens"][tokens] = {}
        for name, result in results.items():
            if "error" in result:
                print(f"{tokens:7,} {name:15} {result['error'][:80]}")
                continue
            milliseconds = 1000 * median(result) / repeats
            entry = {"ms": milliseconds, "own_gb": result["own_gb"]}
            summary["tokens"][tokens][name] = entry
            plain = summary["tokens"][tokens].get("plain")
            speed = f"{plain['ms'] / milliseconds:.2f}" if plain else "-"
            memory = f"{entry['own_gb'] / plain['own_gb']:.0%}" if plain else "-"
            print(
                f"{tokens:7,} {name:15} {milliseconds:9.1f} {entry['own_gb']:8.3f} "
                f"{speed:>6} {memory:>7}"
            )
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
