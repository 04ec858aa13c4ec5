"""Whole distillation steps (teachers, loss, backward, clip, AdamW), ours beside Hugging Face's.

    python -m benchmarks.distill_step                      on the CPU or GPU that is there
    python -m benchmarks.distill_step --teachers paper     the paper's teachers: wants a GPU

ours                  distill.py --compile (the default on CUDA), teachers live
ours_eager            distill.py --no-compile (the default on a CPU)
ours_cached           distill.py --compile --cache-teachers, after the epoch that fills the cache
ours_graph, ours_cached_graph    ours and ours_cached with --cuda-graph, on CUDA alone
ours_plain            the paper's formula on whole logits, eager, in the same precision
huggingface           the original's formula on Hugging Face models as the original runs it: float32
                      and eager on a CPU, fp16 autocast with loss scaling on CUDA
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contest import compete
from benchmarks.findings import Findings, benchmark_parser
from benchmarks.steps import (
    VOCABULARY,
    data_sheet_flops,
    flops_per_token,
    hugging_face_model,
    hugging_face_step,
    matmul_flops,
    our_train_step,
    random_batches,
    rate,
    ratio,
    serve_steps,
    show_rates,
)
from distill import (
    DistillationObjective,
    DistillConfig,
    FusedDistillationObjective,
    cast_linears_to_bf16,
)
from gpt2 import GPT2Config
from model import PRESETS, build
from training.device import choose_device, choose_precision
from training.io import run_program
from training.teacher_cache import Layout, TeacherCache

GRAPHED = ("ours_graph", "ours_cached_graph")
HUGGING_FACE = ("huggingface", "huggingface_compiled")
# On a CPU all contestants are in memory at once: the plain objective with them would take 29 GiB.
ON_A_CPU = ("ours", "ours_eager", "ours_cached", *HUGGING_FACE)
ON_A_GPU = ("ours", "ours_eager", "ours_cached", "ours_plain", *GRAPHED, *HUGGING_FACE)
UNCOMPILED = ("ours_eager", "ours_plain")
TEACHERS = {
    "small": (GPT2Config(VOCABULARY, 256, 1024, 8, 8), PRESETS["llama-16m"].config),
    "paper": (PRESETS["gpt2-705m"].config, PRESETS["llama-360m"].config),
    "tiny": (PRESETS["gpt2-tiny"].config, PRESETS["llama-tiny"].config),  # to try this program
}
STUDENTS = {"small": "llama-58m", "paper": "llama-58m", "tiny": "llama-tiny-student"}
RATIOS = {
    "ratio": ("ours", "huggingface"),
    "ratio_compiled": ("ours", "huggingface_compiled"),
    "ratio_cached": ("ours_cached", "huggingface"),
    "ratio_graph": ("ours_graph", "ours"),
    "ratio_cached_graph": ("ours_cached_graph", "ours_cached"),
    "ratio_plain": ("ours_eager", "ours_plain"),
}
BATCHES = 4  # different ones, taken in turn


def models_of(args, device):
    """Student and teachers, the same weights for every contestant on the device."""
    torch.manual_seed(0)
    with device:
        teachers = [build(config) for config in TEACHERS[args.teachers]]
        return build(PRESETS[STUDENTS[args.teachers]].config), teachers


def our_step(args, device):
    """distill.py's objective in train.py's step."""
    student, teachers = models_of(args, device)
    precision = choose_precision(args.precision, device)
    for teacher in teachers if precision == "bf16" else ():
        cast_linears_to_bf16(teacher)
    cache = None
    if "cached" in args.worker:
        sizes = tuple(teacher.config.hidden_size for teacher in teachers)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layout = Layout(BATCHES * args.batch_size, args.sequence_length, sizes, dtype)
        cache = TeacherCache.in_memory(layout, device)
    make_objective = DistillationObjective if args.worker == "ours_plain" else FusedDistillationObjective
    objective = make_objective(student, teachers, DistillConfig(teachers=[]), cache=cache)
    return our_train_step(objective, device, precision, args.worker not in UNCOMPILED, args.worker in GRAPHED)


def their_step(args, device, compiled):
    """The original's objective on Hugging Face's models, and its optimizer's successor."""
    student, teachers = models_of(args, device)
    teachers = [hugging_face_model(teacher, device) for teacher in teachers]
    model = hugging_face_model(student, device).train()
    student = torch.compile(model) if compiled else model
    if compiled:
        teachers = [torch.compile(teacher) for teacher in teachers]

    def objective(ids):
        outcome = student(ids, labels=ids)
        with torch.no_grad():
            teacher = torch.stack([t(ids).logits for t in teachers]).mean(dim=0)
        kl = nn.KLDivLoss(reduction="batchmean")(
            F.log_softmax(outcome.logits / 2, dim=-1), F.softmax(teacher / 2, dim=-1)
        )
        return 0.5 * outcome.loss + 0.5 * 4 * kl

    return hugging_face_step(model, objective, compiled)


def be_contestant(args, device):
    """What a process does that this program has started for a variant."""
    if args.worker.startswith("ours"):
        step = our_step(args, device)
    else:
        step = their_step(args, device, compiled=args.worker == "huggingface_compiled")
    batches = random_batches(BATCHES, args.batch_size, args.sequence_length, VOCABULARY, device)
    warm_up = BATCHES if "cached" in args.worker else 1  # fills the cache
    serve_steps(step, batches, args.steps, device, warm_up)


def flops_of(variant, args):
    """Operations per token of a variant's step."""
    teachers, length = TEACHERS[args.teachers], args.sequence_length
    learning = flops_per_token(PRESETS[STUDENTS[args.teachers]].config, length, True)
    if "cached" in variant:  # what remains of the teachers is the product of their heads
        return learning + sum(2 * c.hidden_size * c.vocab_size for c in teachers)
    return learning + sum(flops_per_token(config, length, False) for config in teachers)


def referee(args, device):
    """Lets the variants compete and prints how they did."""
    variants = args.variants or (ON_A_GPU if device.type == "cuda" else ON_A_CPU)
    options = ["--device", str(device), "--teachers", args.teachers, "--steps", str(args.steps)]
    options += ["--batch-size", str(args.batch_size), "--precision", args.precision]
    options += ["--sequence-length", str(args.sequence_length)]
    commands = {
        name: [sys.executable, "-m", "benchmarks.distill_step", "--worker", name, *options]
        for name in variants
    }
    precision = choose_precision(args.precision, device)
    ceiling = matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    findings = Findings(args, device)
    print(
        f"student {STUDENTS[args.teachers]}, teachers {args.teachers}, "
        f"{args.batch_size} x {args.sequence_length} tokens, ours in {precision}",
        flush=True,
    )
    findings.add("setting", {"teachers": args.teachers, "matmul_flops": ceiling})
    tokens = args.steps * args.batch_size * args.sequence_length

    def judge(name, result):
        return rate(result, tokens, flops_of(name, args), ceiling, data_sheet_flops(device))

    rates = compete(findings, commands, args.rounds, device, judge)
    show_rates(rates)
    findings.add("ratios", {key: ratio(rates, *pair) for key, pair in RATIOS.items()})
    findings.close(args)


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--teachers",
        choices=TEACHERS,
        default="small",
        help="size of the teachers (default: small)",
    )
    parser.add_argument("--variants", nargs="+", choices=ON_A_GPU, help="contestants (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences in a step (default: 32)")
    parser.add_argument(
        "--sequence-length", type=int, default=128, help="tokens in a sequence (default: 128)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="precision of our variants (default: auto, bf16 where the chip multiplies it)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes (default: 5)")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 1, on CUDA 20)")
    parser.add_argument("--worker", choices=ON_A_GPU, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    args.steps = args.steps or (20 if device.type == "cuda" else 1)
    (be_contestant if args.worker else referee)(args, device)


if __name__ == "__main__":
    sys.exit(run_program(main))
