"""Whole training steps (forward, loss, backward, clip, AdamW) of a preset, ours beside theirs.

    python -m benchmarks.train_step --models llama-16m llama-58m gpt2-97m

ours, ours_eager      train.py --compile and --no-compile
ours_graph            train.py --compile --cuda-graph, on CUDA alone
huggingface           the model of transformers, float32 and eager on a CPU, fp16 autocast with
                      loss scaling on CUDA: what the original ran
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
"""

import argparse
import sys

import torch

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
    serve_steps,
    show_rates,
)
from model import PRESETS, build_model
from train import CrossEntropyObjective
from training.device import choose_device, choose_precision
from training.io import run_program

GRAPHED = ("ours_graph",)
HUGGING_FACE = ("huggingface", "huggingface_compiled")
ON_A_CPU = ("ours", "ours_eager", *HUGGING_FACE)
ON_A_GPU = ("ours", "ours_eager", *GRAPHED, *HUGGING_FACE)
LENGTH = 128  # tokens in a sequence


def our_step(name, device, variant):
    """The step of train.py."""
    torch.manual_seed(0)
    with device:
        objective = CrossEntropyObjective(build_model(name))
    precision = choose_precision("auto", device)
    return our_train_step(objective, device, precision, variant != "ours_eager", variant in GRAPHED)


def their_step(name, device, compiled):
    """The step of transformers' Trainer."""
    with device:
        model = build_model(name)
    model = hugging_face_model(model, device).train()
    forward = torch.compile(model) if compiled else model
    return hugging_face_step(model, lambda ids: forward(ids, labels=ids).loss, compiled)


def be_contestant(args, device):
    """What a process does that this program has started for a variant."""
    name = args.models[0]
    if args.worker.startswith("ours"):
        step = our_step(name, device, args.worker)
    else:
        step = their_step(name, device, compiled=args.worker == "huggingface_compiled")
    serve_steps(step, random_batches(2, args.batch_size, LENGTH, VOCABULARY, device), args.steps, device)


def referee(args, device):
    """Lets the variants compete, model by model, and prints how they did."""
    on_a_gpu = device.type == "cuda"
    variants = args.variants or (ON_A_GPU if on_a_gpu else ON_A_CPU)
    options = ["--device", str(device), "--batch-size", str(args.batch_size)]
    options += ["--steps", str(args.steps)]
    precision = choose_precision("auto", device)
    ceiling = matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    findings = Findings(args, device)
    findings.add("setting", {"matmul_flops": ceiling})
    tokens = args.steps * args.batch_size * LENGTH
    for model in args.models:
        print(f"{model}, {args.batch_size} x {LENGTH} tokens", flush=True)
        base = [
            sys.executable,
            "-m",
            "benchmarks.train_step",
            *options,
            "--models",
            model,
            "--worker",
        ]
        commands = {f"{model} {variant}": [*base, variant] for variant in variants}
        flops = flops_per_token(PRESETS[model].config, LENGTH, True)

        def judge(_name, result, flops=flops):
            return rate(result, tokens, flops, ceiling, data_sheet_flops(device))

        rates = compete(findings, commands, args.rounds, device, judge)
        show_rates(dict(zip(variants, rates.values())))
    findings.close(args)


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=PRESETS,
        help="presets (default: gpt2-705m llama-360m llama-58m on CUDA, else llama-16m llama-58m gpt2-97m)",
    )
    parser.add_argument("--variants", nargs="+", choices=ON_A_GPU, help="contestants (default: all)")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="sequences of 128 tokens in a step (default: 16, on CUDA 128)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes (default: 5)")
    parser.add_argument("--steps", type=int, help="steps in a turn (default: 1, on CUDA 10)")
    parser.add_argument("--worker", choices=ON_A_GPU, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    on_a_gpu = device.type == "cuda"
    args.batch_size = args.batch_size or (128 if on_a_gpu else 16)
    args.steps = args.steps or (10 if on_a_gpu else 1)
    if not args.models:
        cpu, gpu = ("llama-16m", "llama-58m", "gpt2-97m"), ("gpt2-705m", "llama-360m", "llama-58m")
        args.models = gpu if on_a_gpu else cpu
    (be_contestant if args.worker else referee)(args, device)


if __name__ == "__main__":
    sys.exit(run_program(main))
