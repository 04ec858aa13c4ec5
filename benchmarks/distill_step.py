"""Whole distillation steps (teachers, loss, backward, clip, AdamW), ours beside Hugging Face's.

    python benchmarks/distill_step.py                      on the CPU or GPU that is there
    python benchmarks/distill_step.py --teachers paper     the paper's teachers: wants a GPU

huggingface           the original's formula on Hugging Face models as the original runs it: float32
                      and eager on a CPU, fp16 autocast with loss scaling on CUDA
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
ours                  distill.py --compile (the default on CUDA), teachers live
ours_eager            distill.py --no-compile (the default on a CPU)
ours_cached           distill.py --compile --cache-teachers, after the epoch that fills the cache
ours_graph, ours_cached_graph    the two with --cuda-graph, on CUDA alone
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks.contest import (  # noqa: E402
    contest,
    describe,
    flops_per_token,
    hugging_face_step,
    matmul_flops,
    random_batches,
    serve,
    show_rates,
)
from cache import TeacherCache  # noqa: E402
from distill import DistillConfig, EnsembleObjective  # noqa: E402
from gpt2 import GPT2, GPT2Config  # noqa: E402
from llama import Llama  # noqa: E402
from model import PRESETS, build_model, choose_device  # noqa: E402

VARIANTS = ("huggingface", "huggingface_compiled", "ours_eager", "ours", "ours_cached")
GRAPHED = ("ours_graph", "ours_cached_graph")
STUDENT = "llama-58m"
TEACHERS = {
    "small": (GPT2Config(16_000, 256, 1024, 8, 8), PRESETS["llama-16m"].config),
    "paper": (PRESETS["gpt2-705m"].config, PRESETS["llama-360m"].config),
    "tiny": (PRESETS["gpt2-tiny"].config, PRESETS["llama-tiny"].config),  # to try this program
}
BATCHES = 4  # different ones, taken in turn


def student_name(args):
    return "llama-tiny-student" if args.teachers == "tiny" else STUDENT


def build(config):

    return (GPT2 if isinstance(config, GPT2Config) else Llama)(config)


def our_step(args, device):
    """distill.py's objective in train.py's step."""
    cached = "cached" in args.worker
    torch.manual_seed(0)
    teachers = [build(config) for config in TEACHERS[args.teachers]]
    student = build_model(student_name(args))
    config = DistillConfig(teachers=[])
    precision = train.choose_precision(args.precision, device)
    cache = None
    if cached:
        sizes = [t.config.hidden_size for t in teachers]
        chunks = BATCHES * args.batch_size
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        cache = TeacherCache.in_memory(chunks, args.sequence_length, sizes, device, dtype)
    objective = EnsembleObjective(student, teachers, config, cache=cache).to(device).train()
    optimizer = train.build_optimizer(student, 0.1)
    kind = train.GraphedTrainStep if args.worker in GRAPHED else train.TrainStep
    step = kind(objective, optimizer, train.autocast_for(device, precision))
    if args.worker != "ours_eager":
        train.compile_blocks(objective)
    return lambda batch: step(batch, 1e-4)


def their_step(args, device, compiled):
    """The original's objective on Hugging Face's models, and its optimizer's successor."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import hf_twin

    torch.manual_seed(0)
    teachers = [hf_twin(build(c)).to(device) for c in TEACHERS[args.teachers]]
    student = build_model(student_name(args))
    model = hf_twin(student).to(device).train()
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


def work(args):
    """One contestant."""
    device = choose_device(args.device)
    if args.worker.startswith("ours"):
        step = our_step(args, device)
    else:
        step = their_step(args, device, compiled=args.worker == "huggingface_compiled")
    shape = (BATCHES, args.batch_size, args.sequence_length, 16_000)
    all_batches, count = random_batches(*shape, device), [0]

    def round():
        for _ in range(args.steps):
            step(all_batches[count[0] % BATCHES])
            count[0] += 1

    def warm_up():
        steps = BATCHES if "cached" in args.worker else 1
        for i in range(max(steps, train.GRAPH_WARM_UP + 1) if device.type == "cuda" else steps):
            step(all_batches[i % BATCHES])

    serve(round, warm_up, device)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--teachers", choices=TEACHERS, default="small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + GRAPHED)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="ours"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, help="steps a turn (default: 1, on CUDA 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--worker", choices=VARIANTS + GRAPHED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.steps = args.steps or (20 if cuda else 1)
    if args.worker:
        return work(args)
    options = ["--device", str(device), "--teachers", args.teachers, "--steps", str(args.steps)]
    options += ["--batch-size", str(args.batch_size), "--precision", args.precision]
    options += ["--sequence-length", str(args.sequence_length)]
    variants = args.variants or (VARIANTS + GRAPHED if cuda else VARIANTS)
    commands = {name: [sys.executable, __file__, "--worker", name, *options] for name in variants}
    summary = describe(device)
    results = contest(commands, args.rounds, device)

    name, length = student_name(args), args.sequence_length
    learning = flops_per_token(PRESETS[name].config, length, True)
    teaching = sum(flops_per_token(c, length, False) for c in TEACHERS[args.teachers])
    # Of cached teachers nothing remains but their heads' product.
    heads = sum(2 * c.hidden_size * c.vocab_size for c in TEACHERS[args.teachers])
    flops = {name: learning + (heads if "cached" in name else teaching) for name in variants}
    summary["precision"] = train.choose_precision(args.precision, device)
    dtype = torch.bfloat16 if summary["precision"] == "bf16" else torch.float32
    ceiling = matmul_flops(device, dtype)
    print(
        f"student {name}, teachers {args.teachers}, {args.batch_size} x {length} tokens, "
        f"ours in {summary['precision']}"
    )
    tokens = args.steps * args.batch_size * length
    summary |= {"teachers": args.teachers, "matmul_flops": ceiling}
    summary |= show_rates(results, tokens, flops, ceiling)
    for key, (ours, theirs) in {
        "ratio": ("ours", "huggingface"),
        "ratio_compiled": ("ours", "huggingface_compiled"),
        "ratio_cached": ("ours_cached", "huggingface"),
        "ratio_graph": ("ours_graph", "ours"),
        "ratio_cached_graph": ("ours_cached_graph", "ours_cached"),
    }.items():
        rates = [summary.get(name, {}).get("tokens_per_second") for name in (ours, theirs)]
        summary[key] = rates[0] / rates[1] if all(rates) else None
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
