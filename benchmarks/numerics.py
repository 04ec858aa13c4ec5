"""Measure the relative error of the loss and of its gradients in each code path, against float64.

    python -m benchmarks.numerics

All paths compute one distillation objective (student, two teachers, loss) on small models with the
same weights and tokens. The error of the gradients is |g - g64| / |g64|, over all parameters together.
"""

import copy
import sys

import torch
import torch.nn.functional as F

from benchmarks.measurement import Results, benchmark_parser
from benchmarks.steps import random_batches
from distill import DistillationObjective, DistillConfig, FusedDistillationObjective
from loss import plain_distillation_loss
from model import build_model
from training.device import autocast_for, choose_device, compile_blocks
from training.io import run_program
from training.teacher_cache import TeacherCache

VOCABULARY, SEQUENCES, LENGTH = 4000, 8, 128


class ExactObjective(DistillationObjective):
    """The plain objective without its casts to float32, so that float64 models compute in float64."""

    def forward(self, batch):
        teacher_logits = [F.linear(h, t.head) for h, t in zip(batch.teacher_states, self.teachers)]
        logits = self.model(batch.tokens)
        coefficients = self.coefficients(batch)
        return plain_distillation_loss(logits, teacher_logits, self.weights, batch.targets, coefficients)


def loss_and_gradients(objective, batch, autocast, micro_batch_size=SEQUENCES):
    """Returns the loss and all of the student's gradients in one vector, both in float64."""
    objective.model.zero_grad()
    loss = 0.0
    for micro_batch in batch.split(micro_batch_size):
        with autocast:
            terms = objective(objective.prepare(micro_batch))
        terms["loss"].backward()
        loss += terms["loss"].item()
    gradients = [p.grad.double().flatten() for p in objective.model.parameters()]
    return loss, torch.cat(gradients).cpu()


def main(argv=None):
    args = benchmark_parser(__doc__).parse_args(argv)
    device = choose_device(args.device)
    results, rows = Results(args, device), [["path", "loss", "gradients"]]
    torch.manual_seed(0)
    student = build_model("llama-small-student", VOCABULARY)
    teachers = [build_model(name, VOCABULARY) for name in ("gpt2-small", "llama-small")]
    for parameter in (p for teacher in teachers for p in teacher.parameters() if p.dim() == 2):
        parameter.data *= 2  # sharper predictions, as of trained teachers
    (batch,) = random_batches(1, SEQUENCES, LENGTH, VOCABULARY, device)
    shapes = [(SEQUENCES, LENGTH, teacher.config.hidden_size) for teacher in teachers]

    def build(make, cache=None):
        objective = make(student, teachers, DistillConfig(teachers=[]), cache=cache)
        return copy.deepcopy(objective).to(device).train()

    exact = build(ExactObjective).double()
    exact_loss, exact_gradients = loss_and_gradients(exact, batch, autocast_for(device, "fp32"))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        autocast = autocast_for(device, precision)
        cache = TeacherCache.in_memory(shapes, dtype, device)
        paths = {
            "plain": build(DistillationObjective),
            "fused": build(FusedDistillationObjective),
            "fused, accumulated": build(FusedDistillationObjective),
            "fused, cached teachers": build(FusedDistillationObjective, cache),
            "fused, compiled": build(FusedDistillationObjective),
        }
        compile_blocks(paths["fused, compiled"])
        for name, objective in paths.items():
            size = 3 if name == "fused, accumulated" else SEQUENCES
            for _ in range(2):  # the first time fills the cache
                loss, gradients = loss_and_gradients(objective, batch, autocast, size)
            loss_error = abs(loss - exact_loss) / exact_loss
            error = ((gradients - exact_gradients).norm() / exact_gradients.norm()).item()
            results.add(f"{precision}, {name}", {"loss": loss_error, "gradients": error})
            rows.append([f"{precision}, {name}", f"{loss_error:.1e}", f"{error:.1e}"])
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
