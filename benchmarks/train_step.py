"""Whole training steps (forward, loss, backward, clip, AdamW) of a preset, ours beside theirs.

    python benchmarks/train_step.py --models llama-16m llama-58m gpt2-97m

huggingface           the model of transformers, float32 and eager on a CPU, fp16 autocast with
                      loss scaling on CUDA: what the original ran
huggingface_compiled  the same with torch.compile, bf16 autocast and fused AdamW
ours_eager, ours      train.py --no-compile and --compile
ours_graph            train.py --compile --cuda-graph, on CUDA alone
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

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
from model import PRESETS, build_model, choose_device  # noqa: E402

VARIANTS = ("huggingface", "huggingface_compiled", "ours_eager", "ours")
GRAPHED = ("ours_graph",)


def our_step(name, device, variant):
    torch.manual_seed(0)
    model = build_model(name)
    objective = train.CrossEntropyObjective(model).to(device).train()
    precision = train.choose_precision("auto", device)
    optimizer = train.build_optimizer(model, 0.1)
    kind = train.GraphedTrainStep if variant in GRAPHED else train.TrainStep
    step = kind(objective, optimizer, train.autocast_for(device, precision))
    if variant != "ours_eager":
        train.compile_blocks(objective)
    return lambda batch: step(batch, 1e-4)


def their_step(name, device, compiled):
    from conftest import hf_twin

    model = hf_twin(build_model(name)).to(device).train()
    run = torch.compile(model) if compiled else model
    return hugging_face_step(model, lambda ids: run(ids, labels=ids).loss, compiled)


def work(args):
    device = choose_device(args.device)
    name = args.models[0]
    if args.worker.startswith("ours"):
        step = our_step(name, device, args.worker)
    else:
        step = their_step(name, device, compiled=args.worker == "huggingface_compiled")
    shape = (2, args.batch_size, 128, 16_000)
    batches = random_batches(*shape, device)

    def round():
        for i in range(args.steps):
            step(batches[i % 2])

    def warm_up():
        for _ in range(train.GRAPH_WARM_UP + 1 if device.type == "cuda" else 1):
            step(batches[0])

    serve(round, warm_up, device)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", choices=PRESETS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + GRAPHED)
    parser.add_argument("--batch-size", type=int, help="sequences of 128 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps a turn (default: 1, on CUDA 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--worker", choices=VARIANTS + GRAPHED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.worker:
        return work(args)
    cuda = device.type == "cuda"
    models = args.models or (("gpt2-705m", "llama-360m", "llama-58m") if cuda else
                             ("llama-16m", "llama-58m", "gpt2-97m"))  # fmt: skip
    batch_size = args.batch_size or (128 if cuda else 16)
    steps = args.steps or (10 if cuda else 1)
    variants = args.variants or (VARIANTS + GRAPHED if cuda else VARIANTS)
    summary = describe(device)
    for name in models:
        options = ["--device", str(device), "--models", name]
        options += ["--batch-size", str(batch_size), "--steps", str(steps)]
        results = contest(
            {v: [sys.executable, __file__, "--worker", v, *options] for v in variants},
            args.rounds,
            device,
        )
        print(f"{name}, {batch_size} x 128 tokens")
        ceiling = matmul_flops(device, torch.bfloat16)
        flops = dict.fromkeys(variants, flops_per_token(PRESETS[name].config, 128, True))
        summary[name] = show_rates(results, steps * batch_size * 128, flops, ceiling)
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
