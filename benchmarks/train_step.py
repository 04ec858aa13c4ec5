"""Time whole training steps (forward, loss, backward, clip, AdamW) of presets, ours beside Hugging Face's.

    python -m benchmarks.train_step --models llama-16m llama-58m gpt2-97m

ours, ours_eager      train.py --compile and --no-compile
ours_graph            train.py --compile --cuda-graph, on CUDA only
huggingface           the model of transformers, float32 and eager on a CPU, fp16 autocast with
                      loss scaling on CUDA: what the original ran
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
"""

import functools
import sys

import torch

from benchmarks import steps
from benchmarks.measurement import Results, benchmark_parser
from benchmarks.reference import hugging_face_model, original_step
from model import PRESETS, build_model
from train import CrossEntropyObjective
from training.device import choose_device, choose_precision
from training.io import run_program

CPU_VARIANTS = ("ours", "ours_eager", "huggingface", "huggingface_compiled")
GPU_VARIANTS = (*CPU_VARIANTS, "ours_graph")
CPU_MODELS, GPU_MODELS = ("llama-16m", "llama-58m", "gpt2-97m"), ("gpt2-705m", "llama-360m", "llama-58m")
LENGTH = 128  # tokens in a sequence


def build_variant(args, device, name, variant):
    """Returns a round of a variant and its warm-up, as functions, for the preset `name`."""
    torch.manual_seed(0)
    with device:
        model = build_model(name)
    compiled = variant not in ("ours_eager", "huggingface")
    if variant.startswith("ours"):
        objective, graphed = CrossEntropyObjective(model), variant == "ours_graph"
        step = steps.our_train_step(objective, device, args.precision, compiled, graphed)
    else:
        model = hugging_face_model(model, device=device).train()
        forward = torch.compile(model) if compiled else model
        step = original_step(model, lambda ids: forward(ids, labels=ids).loss, compiled)
    batches = steps.random_batches(2, args.batch_size, LENGTH, steps.VOCABULARY, device)
    return steps.round_and_warm_up(step, batches, args.steps, device)


def main(argv=None):
    parser = benchmark_parser(__doc__, GPU_VARIANTS, rounds=5)
    add = parser.add_argument
    default = f"{' '.join(CPU_MODELS)}, on CUDA {' '.join(GPU_MODELS)}"
    add("--models", nargs="+", choices=PRESETS, help=f"presets (default: {default})")
    add("--batch-size", type=int, help="sequences of 128 tokens in a step (default: 16, on CUDA 128)")
    add("--steps", type=int, help="steps in a round (default: 1, on CUDA 10)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.batch_size = args.batch_size or (128 if cuda else 16)
    args.steps = args.steps or (10 if cuda else 1)
    args.precision = choose_precision(args.precision, device)
    variants = args.variants or (GPU_VARIANTS if cuda else CPU_VARIANTS)
    results = Results(args, device)
    for name in args.models or (GPU_MODELS if cuda else CPU_MODELS):
        print(f"{name}, {args.batch_size} x {LENGTH} tokens, ours in {args.precision}", flush=True)
        flops = dict.fromkeys(variants, steps.flops_per_token(PRESETS[name].config, LENGTH, training=True))
        build_one = functools.partial(build_variant, args, device, name)
        steps.time_steps(results, build_one, flops, args.steps * args.batch_size * LENGTH, prefix=f"{name} ")
    results.finish()


if __name__ == "__main__":
    sys.exit(run_program(main))
