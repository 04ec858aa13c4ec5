"""Time whole distillation steps (teachers, loss, backward, clip, AdamW), ours beside Hugging Face's.

    python -m benchmarks.distill_step                      on the GPU, or the CPU if there is none
    python -m benchmarks.distill_step --teachers paper     the paper's teachers: needs a GPU

ours                  distill.py --compile (the default on CUDA), teachers run in each step
ours_eager            distill.py --no-compile (the default on a CPU)
ours_cached           distill.py --compile --cache-teachers, after the epoch that fills the cache
ours_graph, ours_cached_graph    ours and ours_cached with --cuda-graph, on CUDA only
ours_plain            the paper's formula on materialised logits, eager, in the same precision
huggingface           the original's formula on Hugging Face models as the original runs it: float32
                      and eager on a CPU, fp16 autocast with loss scaling on CUDA
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
"""

import functools
import sys

import torch

from benchmarks import steps
from benchmarks.measurement import Results, benchmark_parser
from benchmarks.reference import hugging_face_model, original_loss, original_step
from distill import DistillationObjective, DistillConfig, FusedDistillationObjective, cast_linears_to_bf16
from gpt2 import GPT2Config
from model import PRESETS, build
from training.device import choose_device, choose_precision
from training.io import run_program
from training.teacher_cache import TeacherCache

# On a CPU all workers are in memory at once: with the plain objective they would take 29 GiB.
CPU_VARIANTS = ("ours", "ours_eager", "ours_cached", "huggingface", "huggingface_compiled")
GPU_VARIANTS = (*CPU_VARIANTS, "ours_plain", "ours_graph", "ours_cached_graph")
TEACHERS = {
    "small": (GPT2Config(steps.VOCABULARY, 256, 1024, 8, 8), PRESETS["llama-16m"].config),
    "paper": (PRESETS["gpt2-705m"].config, PRESETS["llama-360m"].config),
}
STUDENT = "llama-58m"
RATIOS = {
    "ratio": ("ours", "huggingface"),
    "ratio_compiled": ("ours", "huggingface_compiled"),
    "ratio_cached": ("ours_cached", "huggingface"),
    "ratio_graph": ("ours_graph", "ours"),
    "ratio_cached_graph": ("ours_cached_graph", "ours_cached"),
    "ratio_plain": ("ours_eager", "ours_plain"),
}
BATCHES = 4  # different ones, taken in turn


def our_step(args, device, variant, student, teachers):
    """Returns the step of a variant of ours: distill.py's objective in train.py's step."""
    bf16, cache = args.precision == "bf16", None
    if bf16:
        for teacher in teachers:
            cast_linears_to_bf16(teacher)
    if "cached" in variant:
        chunks = BATCHES * args.batch_size
        shapes = [(chunks, args.sequence_length, teacher.config.hidden_size) for teacher in teachers]
        cache = TeacherCache.in_memory(shapes, torch.bfloat16 if bf16 else torch.float32, device)
    make_objective = DistillationObjective if variant == "ours_plain" else FusedDistillationObjective
    objective = make_objective(student, teachers, DistillConfig(teachers=[]), cache=cache)
    compiled = variant not in ("ours_eager", "ours_plain")
    return steps.our_train_step(objective, device, args.precision, compiled, graphed="graph" in variant)


def build_variant(args, device, variant):
    """Returns a round of a variant and its warm-up, as functions. All variants have the same weights."""
    torch.manual_seed(0)
    with device:
        teachers = [build(config) for config in TEACHERS[args.teachers]]
        student = build(PRESETS[STUDENT].config)
    if variant.startswith("ours"):
        step = our_step(args, device, variant, student, teachers)
    else:
        model, *teachers = (hugging_face_model(m, device=device) for m in (student, *teachers))
        compiled = variant == "huggingface_compiled"
        student = torch.compile(model.train()) if compiled else model.train()
        teachers = list(map(torch.compile, teachers)) if compiled else teachers
        step = original_step(model, lambda ids: original_loss(student, teachers, ids), compiled)
    batches = steps.random_batches(BATCHES, args.batch_size, args.sequence_length, steps.VOCABULARY, device)
    warm_up_steps = BATCHES if "cached" in variant else 1  # fills the cache
    return steps.round_and_warm_up(step, batches, args.steps, device, warm_up_steps)


def flops_of(variant, args):
    """Returns the operations per token of a variant's step."""
    teachers, length = TEACHERS[args.teachers], args.sequence_length
    student = steps.flops_per_token(PRESETS[STUDENT].config, length, training=True)
    if "cached" in variant:  # only the product of the teachers' heads remains
        return student + sum(2 * config.hidden_size * config.vocab_size for config in teachers)
    return student + sum(steps.flops_per_token(config, length, training=False) for config in teachers)


def main(argv=None):
    parser = benchmark_parser(__doc__, GPU_VARIANTS, rounds=5)
    add = parser.add_argument
    add("--teachers", choices=TEACHERS, default="small", help="size of the teachers (default: small)")
    add("--batch-size", type=int, default=32, help="sequences in a step (default: 32)")
    add("--sequence-length", type=int, default=128, help="tokens in a sequence (default: 128)")
    add("--steps", type=int, help="steps in a round (default: 1, on CUDA 20)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.steps = args.steps or (20 if cuda else 1)
    args.precision = choose_precision(args.precision, device)
    results = Results(args, device)
    size = f"{args.batch_size} x {args.sequence_length} tokens, ours in {args.precision}"
    print(f"student {STUDENT}, teachers {args.teachers}, {size}", flush=True)
    variants = args.variants or (GPU_VARIANTS if cuda else CPU_VARIANTS)
    flops = {variant: flops_of(variant, args) for variant in variants}
    tokens = args.steps * args.batch_size * args.sequence_length
    rates = steps.time_steps(results, functools.partial(build_variant, args, device), flops, tokens)
    speeds = {name: result.get("tokens_per_second") for name, result in rates.items()}
    ratios = {}
    for key, (name, base) in RATIOS.items():
        if speeds.get(name) and speeds.get(base):
            ratios[key] = speeds[name] / speeds[base]
    results.add("ratios", ratios)
    results.finish()


if __name__ == "__main__":
    sys.exit(run_program(main))
