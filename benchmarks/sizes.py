"""Derive what each preset takes on a GPU, without measuring: memory and hours.

    python -m benchmarks.sizes

Memory is the estimate below, for bf16 and compiled layers. Hours are the arithmetic of all steps of
the preset's recipe on ten million words, at 40 % of the data sheet's speed (165 TFLOP/s for a card of
24 GB, an RTX 4090, and 989 for one of 141 GB, an H200). The last rows are the paper's student with
its teachers, which run in every step, or once for each chunk (--cache-teachers).
"""

import argparse
import dataclasses
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measurement import print_table
from benchmarks.steps import flops_per_token
from model import PRESETS, build
from train import CrossEntropyObjective
from training.io import GIB, run_program

TOKENS = 13_700_000  # of ten million words, with 16,000 pieces
LENGTH = 128
DATA_SHEET_SHARE = 0.4
CARDS = {24: 165e12, 141: 989e12}  # {gigabytes: operations per second in bf16}
LEAST_PARAMETERS = 10_000_000  # smaller models are for a CPU
STUDENT, TEACHERS = "llama-58m", ("gpt2-705m", "llama-360m")
# Of what eager layers keep for the backward pass, AOTAutograd's partition of llama-58m, llama-360m
# and gpt2-705m keeps 0.71, 0.71 and 0.69: it recomputes what costs no matrix product.
COMPILED_SHARE = 0.7
LOSS_TOKENS = 4096  # tokens whose logits the loss has at a time, in eight bytes each
USABLE_SHARE = 0.9  # of free memory: the allocator cannot use the rest


@dataclasses.dataclass(frozen=True)
class Memory:
    """An estimate in bytes: what any step needs, and what each sequence adds."""

    fixed: int
    per_sequence: int

    def of(self, sequences):
        """Returns the bytes of a step with this micro-batch size."""
        return self.fixed + sequences * self.per_sequence

    def sequences(self, batch_size, free):
        """Returns the largest micro-batch size that divides the batch and fits; 0 if none does."""
        divisors = (n for n in range(batch_size, 0, -1) if batch_size % n == 0)
        return next((n for n in divisors if self.of(n) <= USABLE_SHARE * free), 0)


def activation_bytes(model, sequences, length):
    """Returns the bytes that a forward pass in bf16 keeps for the backward pass.

    The pass is traced with fake tensors, which have no memory. Weights do not count, but their
    copies in bfloat16 do.
    """
    mode, saved = FakeTensorMode(), {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    fakes = {name: mode.from_tensor(tensor.detach()) for name, tensor in tensors}
    for name, parameter in model.named_parameters():
        fakes[name].requires_grad_(parameter.requires_grad)
    own = {fake.untyped_storage()._cdata for fake in fakes.values()}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    training = model.training
    model.eval()  # a CPU has no FlashAttention with dropout, whose masks are few bytes anyway
    autocast = torch.autocast("cpu", torch.bfloat16)
    with mode, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.zeros(sequences, length, dtype=torch.int64)
        torch.func.functional_call(model, fakes, (tokens,))
    model.train(training)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


def estimate(objective, length):
    """Returns the `Memory` of a step in bf16 with compiled layers, for sequences of `length` tokens.

    It counts weights, gradients and two moments in float32, frozen models as they are, activations
    as FlashAttention keeps them, and the loss.
    """
    one, two = (activation_bytes(objective.model, n, length) for n in (1, 2))
    state = sum(16 * p.numel() if p.requires_grad else p.nbytes for p in objective.parameters())
    loss = 8 * LOSS_TOKENS * len(objective.model.head)
    return Memory(state + max(2 * one - two, 0) + loss, round(COMPILED_SHARE * (two - one)))


def training_flops(name):
    """The FLOPs of all steps of a preset's recipe on ten million words."""
    preset = PRESETS[name]
    return flops_per_token(preset.config, LENGTH, training=True) * TOKENS * preset.hyperparameters.epochs


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    sizes, runs = {}, []  # runs: a label, the preset that is trained, its memory and FLOPs
    for name, preset in PRESETS.items():
        model = build(preset.config)
        sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes[name] >= LEAST_PARAMETERS:
            memory = estimate(CrossEntropyObjective(model), LENGTH)
            runs.append((name, name, memory, training_flops(name)))
    teaching = TOKENS * sum(flops_per_token(PRESETS[t].config, LENGTH, training=False) for t in TEACHERS)
    memory = next(memory for name, _, memory, _ in runs if name == STUDENT)
    memory = dataclasses.replace(memory, fixed=memory.fixed + sum(2 * sizes[t] for t in TEACHERS))  # in bf16
    epochs = PRESETS[STUDENT].hyperparameters.epochs
    for label, times in (("teachers in each step", epochs), ("cached", 1)):
        flops = training_flops(STUDENT) + times * teaching
        runs.append((f"{STUDENT} distilled, {label}", STUDENT, memory, flops))
    heading = ["preset", "GiB of state", "GiB with its whole batch"]
    rows = [heading + [f"{text}, {size} GB" for size in CARDS for text in ("micro-batch", "hours")]]
    for label, name, memory, flops in runs:
        batch_size = PRESETS[name].hyperparameters.batch_size
        row = [label, f"{16 * sizes[name] / GIB:.1f}", f"{memory.of(batch_size) / GIB:.1f} ({batch_size})"]
        for size, speed in CARDS.items():
            sequences = memory.sequences(batch_size, size * 10**9)
            row += [str(sequences or "none"), f"{flops / (DATA_SHEET_SHARE * speed) / 3600:.2f}"]
        rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
