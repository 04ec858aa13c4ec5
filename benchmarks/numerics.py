"""Measure the relative error of the loss and of its gradients in each code path, against float64.

    python -m benchmarks.numerics

All paths compute one distillation objective (student, two teachers, loss) on small models with the
same weights and tokens. The error of the gradients is |g - g64| / |g64|, over all parameters together.
"""

import copy
import sys

import torch
import torch.nn.functional as F

from benchmarks.measurement import Results, benchmark_parser, print_table
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


def small_models():
    """Returns a student and two teachers, whose doubled matrices make their predictions sharper."""
    torch.manual_seed(0)
    student = build_model("llama-small-student", VOCABULARY)
    teachers = [build_model(name, VOCABULARY) for name in ("gpt2-small", "llama-small")]
    for teacher in teachers:
        for parameter in teacher.parameters():
            parameter.data *= 2 if parameter.dim() == 2 else 1
    return student, teachers


def measure(device, results):
    """Adds the errors of each path in fp32 and in bf16 to the results."""
    student, teachers = small_models()
    (batch,) = random_batches(1, SEQUENCES, LENGTH, VOCABULARY, device)
    shapes = [(SEQUENCES, LENGTH, teacher.config.hidden_size) for teacher in teachers]

    def objective(make, cache=None):
        config = DistillConfig(teachers=[])
        return make(student, teachers, config, cache=cache).to(device).train()

    exact = copy.deepcopy(objective(ExactObjective)).double()
    exact_loss, exact_gradients = loss_and_gradients(exact, batch, autocast_for(device, "fp32"))

    def add(name, objective, autocast, micro_batch_size=SEQUENCES):
        loss_and_gradients(objective, batch, autocast, micro_batch_size)  # fills the cache, if it has one
        loss, gradients = loss_and_gradients(objective, batch, autocast, micro_batch_size)
        error = ((gradients - exact_gradients).norm() / exact_gradients.norm()).item()
        results.add(name, {"loss": abs(loss - exact_loss) / exact_loss, "gradients": error})

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        autocast = autocast_for(device, precision)
        add(f"{precision}, plain", objective(DistillationObjective), autocast)
        fused = objective(FusedDistillationObjective)
        add(f"{precision}, fused", fused, autocast)
        add(f"{precision}, fused, accumulated", fused, autocast, micro_batch_size=3)
        cache = TeacherCache.in_memory(shapes, dtype, device)
        cached = objective(FusedDistillationObjective, cache)
        add(f"{precision}, fused, cached teachers", cached, autocast)
        compiled = copy.deepcopy(fused)
        compile_blocks(compiled)
        add(f"{precision}, fused, compiled", compiled, autocast)


def main(argv=None):
    args = benchmark_parser(__doc__).parse_args(argv)
    device = choose_device(args.device)
    results = Results(args, device)
    measure(device, results)
    rows = [["path", "loss", "gradients"]]
    for name, errors in results.values.items():
        if name != "machine":
            rows.append([name, f"{errors['loss']:.1e}", f"{errors['gradients']:.1e}"])
    print_table(rows)
    results.finish()


if __name__ == "__main__":
    sys.exit(run_program(main))
