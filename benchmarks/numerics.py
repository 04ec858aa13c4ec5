"""The relative error of the loss and of its gradients, each path against float64.

    python benchmarks/numerics.py

A whole distillation objective (student, two teachers, loss) on small models, the same weights and
tokens for all. Gradients: the norm of the difference of all parameters' over the norm of all.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks.contest import describe, random_batches  # noqa: E402
from cache import TeacherCache  # noqa: E402
from distill import DistillConfig, EnsembleObjective  # noqa: E402
from loss import plain_ensemble_kl  # noqa: E402
from model import build_model, choose_device  # noqa: E402

V, B, T = 4000, 8, 128


class Plain(nn.Module):
    """The objective of `EnsembleObjective`, from logits."""

    def __init__(self, objective):
        super().__init__()
        self.model, self.teachers = objective.model, objective.teachers

    def forward(self, batch):
        with torch.no_grad():
            teachers = [t(batch.tokens) for t in self.teachers]
        return plain_ensemble_kl(
            self.model(batch.tokens), teachers, [1.0, 1.0], batch.targets, alpha=0.5,
            temperature=2.0, num_targets=batch.num_targets, kl_denominator=batch.num_sequences,
        )  # fmt: skip


def outcome(objective, batch, autocast, micro_batch=B):
    """Loss and the student's gradients, both in float64."""
    objective.model.zero_grad()
    loss = 0.0
    for part in batch.split(micro_batch):
        with autocast:
            terms = objective(part)
        terms["loss"].backward()
        loss += terms["loss"].item()
    gradients = [p.grad.double().flatten() for p in objective.model.parameters()]
    return loss, torch.cat(gradients).cpu()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    device = choose_device(args.device)
    torch.manual_seed(0)
    student = build_model("llama-small-student", V)
    teachers = [build_model(name, V) for name in ("gpt2-small", "llama-small")]
    for teacher in teachers:  # sharper than at initialisation, as trained teachers are
        for parameter in teacher.parameters():
            parameter.data *= 2 if parameter.dim() == 2 else 1
    objective = EnsembleObjective(student, teachers, DistillConfig(teachers=[])).to(device).train()
    (batch,) = random_batches(1, B, T, V, device)
    reference = Plain(copy.deepcopy(objective)).double()  # teachers stay in eval mode
    exact_loss, exact = outcome(reference, batch, train.autocast_for(device, "fp32"))

    sizes = [t.config.hidden_size for t in teachers]
    summary = describe(device) | {"error": {}}
    print(f"{'path':28} {'loss':>9} {'gradients':>10}")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        autocast = train.autocast_for(device, precision)
        cached = EnsembleObjective(student, teachers, DistillConfig(teachers=[]))
        cached.cache = TeacherCache.in_memory(B, T, sizes, device, dtype)
        outcome(cached.to(device).train(), batch, autocast)  # fills it
        compiled = copy.deepcopy(objective)
        train.compile_blocks(compiled)
        for name, path, micro_batch in (
            ("plain", Plain(objective), B),
            ("fused", objective, B),
            ("fused, accumulated", objective, 3),
            ("fused, cached teachers", cached, B),
            ("fused, compiled", compiled, B),
        ):
            loss, gradients = outcome(path, batch, autocast, micro_batch)
            errors = {
                "loss": abs(loss - exact_loss) / exact_loss,
                "gradients": ((gradients - exact).norm() / exact.norm()).item(),
            }
            summary["error"][f"{precision}, {name}"] = errors
            print(f"{precision}, {name:22} {errors['loss']:9.1e} {errors['gradients']:10.1e}")
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
