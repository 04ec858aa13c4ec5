"""Distils an ensemble of frozen teachers into a student: training with another objective.

    python distill.py --teachers runs/gpt2-705m/best.pt runs/llama-360m/best.pt

    loss = alpha · CE + (1 - alpha) · tau² · KL(teachers ‖ student)

--kl-reduction sequence sums the KL over the positions of a sequence and averages over sequences, as
the paper's code does: its `batchmean` divides only by the batch size. --kl-reduction token averages
over tokens, as the formula is usually written.
"""

import dataclasses
import functools
import sys

import torch
import torch.nn.functional as F
from torch import nn

import model as models
from data import count_chunks, open_corpus
from loss import (
    REDUCTIONS,
    Coefficients,
    distillation_loss,
    join_heads,
    matmul_dtype,
    plain_distillation_loss,
)
from train import Objective, TrainConfig, fit_corpus
from training import distributed
from training.checkpoint import content_digest
from training.device import choose_compute, choose_device
from training.io import log, run_program
from training.logger import exit_code
from training.options import DISTILL, REQUIRED, option, parse
from training.teacher_cache import open_cache


class DistillationObjective(Objective):
    """Cross-entropy and KL to an ensemble of frozen teachers, as the paper writes it.

    `forward` computes all logits and leaves the gradient to autograd. It is slower and takes more
    memory than `FusedDistillationObjective`, and it is the place to change the formula.
    """

    def __init__(self, model, teachers, config, cache=None):
        super().__init__(model)
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.weights = config.teacher_weights or [1.0] * len(teachers)
        self.alpha, self.tau, self.kl_reduction = config.alpha, config.temperature, config.kl_reduction
        self.cache = cache

    def train(self, mode=True):
        """Sets the student's mode; the teachers stay in eval mode, without dropout."""
        super().train(mode)
        self.teachers.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch):
        """The batch with the teachers' final hidden states, K × (B, T, C_k), in the dtype of products.

        They come from the cache if it has all of them. If one is missing, all are computed: a
        smaller batch could round differently, and then the cache would depend on the order in
        which it was filled.
        """
        # --micro-batch-size auto tries a step without chunk ids, and so without the cache.
        cache = None if batch.chunk_ids is None else self.cache
        states = cache.read(batch.chunk_ids) if cache else None
        if states is None:
            states = [teacher.hidden_states(batch.tokens) for teacher in self.teachers]
            if cache:
                states = cache.write(batch.chunk_ids, states)
        device = batch.tokens.device
        states = tuple(s.to(device, matmul_dtype(s), non_blocking=True) for s in states)
        return dataclasses.replace(batch, teacher_states=states)

    def coefficients(self, batch):
        """The loss's coefficients for a step; the counts are those of the whole step."""
        kl_denominator = batch.num_sequences
        if self.kl_reduction == "token":
            kl_denominator *= batch.tokens.shape[1]
        return Coefficients(self.alpha, self.tau, batch.num_targets, kl_denominator)

    @torch.no_grad()
    def teacher_logits(self, batch):
        """The logits of each teacher, K × (B, T, V), of a prepared batch."""
        pairs = zip(batch.teacher_states, self.teachers)
        return [F.linear(hidden, teacher.head).float() for hidden, teacher in pairs]

    def forward(self, batch):
        return plain_distillation_loss(
            self.model(batch.tokens).float(),  # (B, T, V)
            self.teacher_logits(batch),
            self.weights,
            batch.targets,
            self.coefficients(batch),
        )


class FusedDistillationObjective(DistillationObjective):
    """The same loss, fused: no logits are kept, and all teachers are one matrix product."""

    joined_head = None  # of all teachers, made in the first step

    def forward(self, batch):
        hidden = self.model.hidden_states(batch.tokens)  # (B, T, C)
        heads, dtype = [teacher.head for teacher in self.teachers], matmul_dtype(hidden)
        if self.joined_head is None or self.joined_head.dtype != dtype:
            with torch.no_grad():
                self.joined_head = join_heads(heads, self.weights, dtype)
        return distillation_loss(
            hidden,
            self.model.head,
            list(zip(batch.teacher_states, heads, self.weights)),
            batch.targets,
            self.coefficients(batch),
            joined_head=self.joined_head,
            compiled=self.compiled,
        )


OBJECTIVES = {"fused": FusedDistillationObjective, "plain": DistillationObjective}
distillation = functools.partial(option, group=DISTILL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    teachers: list[str] = distillation(
        REQUIRED, "checkpoints of the teachers, of any architecture", may_change=True
    )
    teacher_weights: list[float] | None = distillation(
        None, "one weight per teacher in the mean of the logits (default: all equal)", metavar="WEIGHT"
    )
    alpha: float = distillation(0.5, "weight of the cross-entropy in the loss", minimum=0, maximum=1)
    temperature: float = distillation(
        2.0, "softmax temperature of teachers and student, tau", minimum=0.01, maximum=100
    )
    kl_reduction: str = distillation(
        "sequence", "divide the summed KL by sequences (the paper) or by tokens", choices=REDUCTIONS
    )
    objective: str = distillation(
        "fused", "plain: the same loss by autograd, slower and with more memory", choices=OBJECTIVES
    )
    cache_teachers: str = distillation(
        "off",
        "run the teachers once per sequence and keep their hidden states: off, gpu, host, a FILE, or "
        "auto (gpu or host if they fit, else off)",
        metavar="PLACE",
        may_change=True,
    )


def load_teachers(config, corpus):
    """The teachers, and their records for the checkpoint: [{"name", "digest"}].

    Raises `UserError` if one has another tokenizer, another vocabulary or a shorter context.
    """
    teachers, records = [], []
    precision = choose_compute(config.device, config.precision).precision
    for path in config.teachers:
        teacher, checkpoint = models.load_compatible(path, corpus)
        models.check_context(teacher, config.sequence_length, path)
        digest = content_digest(checkpoint["weights"])
        records.append({"name": checkpoint["model"]["name"], "digest": digest})
        if precision == "bf16":
            cast_linears_to_bf16(teacher)
        teachers.append(teacher)
    return teachers, records


def cast_linears_to_bf16(model):
    """Casts the linear layers of a frozen model's blocks to bfloat16, once instead of every step.

    The result is bitwise that of autocast. Embeddings, norms and the head stay in float32: the head
    is rounded only after `loss.center_head`.
    """
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def open_teacher_cache(config, corpus, teachers, records):
    """The cache of --cache-teachers, or None. Raises `UserError` as `open_cache` does."""
    compute = choose_compute(config.device, config.precision)
    chunks = count_chunks(corpus.train.num_tokens, config.sequence_length)
    digests = [record["digest"] for record in records]
    return open_cache(
        config.cache_teachers,
        [(chunks, config.sequence_length, teacher.config.hidden_size) for teacher in teachers],
        torch.bfloat16 if compute.precision == "bf16" else torch.float32,
        {"teachers": digests, "shard": corpus.train.digest},
        compute.device,
        config.dry_run,
    )


def check_cache(config):
    """An error message for a --cache-teachers that cannot be used, or None."""
    if config.random_offset and config.cache_teachers != "off":
        return "--cache-teachers needs chunks that stay the same: leave out --random-offset"
    return None


def main(argv=None):
    config = parse(DistillConfig, __doc__, argv, models.preset_table, check_cache)
    config = models.with_hyperparameters(config, out_prefix="distilled-")
    models.check_weights(config.teacher_weights, len(config.teachers))
    distributed.init_distributed(choose_device(config.device))
    corpus = open_corpus(config.data)
    teachers, records = load_teachers(config, corpus)
    student, name, init_digest = models.initial_model(config, corpus)
    summed_positions = config.sequence_length if config.kl_reduction == "sequence" else 1
    effective = config.alpha / (config.alpha + (1 - config.alpha) * summed_positions)
    log(f"alpha      {config.alpha} as given, {effective:.4g} per token ({config.kl_reduction})")
    distributed.check_same_on_all_ranks({"set of teachers": [record["digest"] for record in records]})
    cache = open_teacher_cache(config, corpus, teachers, records)
    objective = OBJECTIVES[config.objective](student, teachers, config, cache)
    return exit_code(fit_corpus(objective, config, corpus, name, init_digest, records))


if __name__ == "__main__":
    sys.exit(run_program(main))
