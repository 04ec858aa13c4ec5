"""The relative error of the loss and of its gradients, each path against float64.

    python -m benchmarks.numerics

A whole distillation objective (student, two teachers, loss) on small models, with the same weights
and tokens for all paths. The error of the gradients is the norm of the difference of all of them
over the norm of all of them.
"""

import copy
import sys

import torch
import torch.nn.functional as F

from benchmarks.findings import Findings, benchmark_parser, print_table
from benchmarks.steps import random_batches
from distill import DistillationObjective, DistillConfig, FusedDistillationObjective
from loss import plain_distillation_loss
from model import build_model
from training.device import autocast_for, choose_device, compile_blocks
from training.io import run_program
from training.teacher_cache import Layout, TeacherCache

VOCABULARY, SEQUENCES, LENGTH = 4000, 8, 128


class ExactObjective(DistillationObjective):
    """The plain objective without its casts to float32: in float64 where its models are."""

    def forward(self, batch):
        batch = self.prepare(batch)
        taught = [F.linear(h, t.head) for h, t in zip(batch.teacher_states, self.teachers)]
        logits = self.model(batch.tokens)
        return plain_distillation_loss(logits, taught, self.weights, batch.targets, **self.constants(batch))


def outcome(objective, batch, autocast, micro_batch=SEQUENCES):
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


def small_models():
    """A student and two teachers, which are sharper than at initialisation, as if trained."""
    torch.manual_seed(0)
    student = build_model("llama-small-student", VOCABULARY)
    teachers = [build_model(name, VOCABULARY) for name in ("gpt2-small", "llama-small")]
    for teacher in teachers:
        for parameter in teacher.parameters():
            parameter.data *= 2 if parameter.dim() == 2 else 1
    return student, teachers


def paths(student, teachers, dtype, device):
    """Yields a name, an objective and a micro-batch size for each way to compute the objective."""

    def objective(make, cache=None):
        config = DistillConfig(teachers=[])
        return make(student, teachers, config, cache=cache).to(device).train()

    yield "plain", objective(DistillationObjective), SEQUENCES
    fused = objective(FusedDistillationObjective)
    yield "fused", fused, SEQUENCES
    yield "fused, accumulated", fused, 3
    sizes = tuple(teacher.config.hidden_size for teacher in teachers)
    cache = TeacherCache.in_memory(Layout(SEQUENCES, LENGTH, sizes, dtype), device)
    yield "fused, cached teachers", objective(FusedDistillationObjective, cache), SEQUENCES
    compiled = copy.deepcopy(fused)
    compile_blocks(compiled)
    yield "fused, compiled", compiled, SEQUENCES


def measure(device, findings):
    """Yields the name and the errors of each path, in fp32 and in bf16."""
    student, teachers = small_models()
    (batch,) = random_batches(1, SEQUENCES, LENGTH, VOCABULARY, device)
    objective = ExactObjective(student, teachers, DistillConfig(teachers=[])).to(device).train()
    exact = outcome(copy.deepcopy(objective).double(), batch, autocast_for(device, "fp32"))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        autocast = autocast_for(device, precision)
        for name, objective, micro_batch in paths(student, teachers, dtype, device):
            outcome(objective, batch, autocast, micro_batch)  # fills the cache, if it has one
            errors = errors_of(outcome(objective, batch, autocast, micro_batch), exact)
            findings.add(f"{precision}, {name}", errors)
            yield f"{precision}, {name}", errors


def errors_of(found, exact):
    """The relative errors of a loss and its gradients."""
    (loss, gradients), (exact_loss, exact_gradients) = found, exact
    difference = (gradients - exact_gradients).norm() / exact_gradients.norm()
    return {"loss": abs(loss - exact_loss) / exact_loss, "gradients": difference.item()}


def main(argv=None):
    args = benchmark_parser(__doc__).parse_args(argv)
    device = choose_device(args.device)
    findings = Findings(args, device)
    rows = [["path", "loss", "gradients"]]
    for name, errors in measure(device, findings):
        rows.append([name, *(f"{error:.1e}" for error in errors.values())])
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
