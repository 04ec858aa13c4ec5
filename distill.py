"""Distils an ensemble of frozen teachers into a student: training with another objective.

    python distill.py --teachers runs/gpt2-705m/best.pt runs/llama-360m/best.pt

    loss = alpha · CE + (1 - alpha) · T² · KL(teachers ‖ student)

The KL is summed over the positions of a sequence and averaged over sequences (--kl-reduction
sequence), because that is what produced the paper's numbers: the original's `batchmean` divides by
the batch alone. --kl-reduction token is the mean over tokens, the formula as one would write it.
"""

import dataclasses
import sys

import torch
from torch import nn

import model as models
from data import count_chunks, open_corpus
from loss import REDUCTIONS, distillation_loss, join_heads, matmul_dtype, plain_distillation_loss
from train import TrainConfig, fit_corpus
from training import distributed
from training.checkpoint import content_digest
from training.device import choose_compute, choose_device
from training.io import UserError, log, run_program
from training.logger import exit_code
from training.options import REQUIRED, option, parse
from training.teacher_cache import Layout, open_cache


class DistillationObjective(nn.Module):
    """Cross-entropy and KL to an ensemble of frozen teachers, as the paper writes it.

    `forward(batch)` works on whole logits and leaves the gradient to autograd: slower and larger
    than `FusedDistillationObjective`, and the place to change the formula.
    """

    compiled = False

    def __init__(self, model, teachers, config, cache=None):
        super().__init__()
        self.model = model
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.weights = config.teacher_weights or [1.0] * len(teachers)
        self.alpha, self.temperature = config.alpha, config.temperature
        self.kl_reduction, self.label_smoothing = config.kl_reduction, config.label_smoothing
        self.cache = cache

    def train(self, mode=True):
        """Puts the student in that mode; the teachers stay in eval mode, without dropout."""
        super().train(mode)
        self.teachers.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch):
        """The batch with the teachers' final hidden states, which is all that is read of them.

        K × (B, T, C_k), in the type that products read. From the cache, where all of them are
        there; else the whole batch is computed, always in the same shape, so that what the cache
        holds does not depend on what else it held.
        """
        if batch.teacher_states:
            return batch
        cache = None if batch.chunk_ids is None else self.cache  # None in a trial of the memory
        states = cache.read(batch.chunk_ids) if cache else None
        if states is None:
            states = [teacher.hidden_states(batch.tokens) for teacher in self.teachers]
            if cache:
                states = cache.write(batch.chunk_ids, states)
        device = batch.tokens.device
        states = tuple(s.to(device, matmul_dtype(s), non_blocking=True) for s in states)
        return dataclasses.replace(batch, teacher_states=states)

    def constants(self, batch):
        """The formula's constants for this batch; the counts are those of the whole step."""
        positions = batch.tokens.shape[1] if self.kl_reduction == "token" else 1
        return {
            "alpha": self.alpha,
            "temperature": self.temperature,
            "num_targets": batch.num_targets,
            "kl_denominator": batch.num_sequences * positions,
            "label_smoothing": self.label_smoothing,
        }

    def forward(self, batch):
        batch = self.prepare(batch)
        student_logits = self.model(batch.tokens).float()  # (B, T, V)
        with torch.no_grad():
            teacher_logits = [
                nn.functional.linear(hidden, teacher.head).float()  # (B, T, V)
                for hidden, teacher in zip(batch.teacher_states, self.teachers)
            ]
        return plain_distillation_loss(
            student_logits, teacher_logits, self.weights, batch.targets, **self.constants(batch)
        )


class FusedDistillationObjective(DistillationObjective):
    """The same loss, fused: no logits are kept, and all teachers are one matrix product."""

    joined_head = None

    def forward(self, batch):
        batch = self.prepare(batch)
        hidden = self.model.hidden_states(batch.tokens)  # (B, T, C)
        heads = [teacher.head for teacher in self.teachers]
        dtype = matmul_dtype(hidden)
        if self.joined_head is None or self.joined_head.dtype != dtype:
            with torch.no_grad():
                self.joined_head = join_heads(heads, self.weights, dtype)
        return distillation_loss(
            hidden,
            self.model.head,
            list(zip(batch.teacher_states, heads, self.weights)),
            batch.targets,
            joined_head=self.joined_head,
            compiled=self.compiled,
            **self.constants(batch),
        )


OBJECTIVES = {"fused": FusedDistillationObjective, "plain": DistillationObjective}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    teachers: list[str] = option(
        REQUIRED, "checkpoints of the teachers, of any architecture", may_change=True
    )
    teacher_weights: list[float] | None = option(
        None, "one weight for each teacher's logits; default: all equal"
    )
    alpha: float = option(0.5, "weight of the cross-entropy, from 0 to 1", minimum=0, maximum=1)
    temperature: float = option(2.0, "softens teachers and student alike", minimum=0.01, maximum=100)
    kl_reduction: str = option(
        "sequence",
        "the KL is averaged over sequences or over tokens; see above",
        choices=REDUCTIONS,
    )
    objective: str = option("fused", "plain: the formula in autograd, slower and larger", choices=OBJECTIVES)
    cache_teachers: str = option(
        "off",
        "run the teachers once per chunk and keep their states: off, gpu, host, a FILE, or auto "
        "(gpu or host where they fit, else off)",
        may_change=True,
    )


def load_teachers(config, corpus):
    """The teachers and what a checkpoint says of them: [{"name", "digest"}].

    Raises `UserError` if one has another tokenizer, another vocabulary or a shorter context.
    """
    teachers, records = [], []
    precision = choose_compute(config.device, config.precision).precision
    for path in config.teachers:
        teacher, checkpoint = models.load_compatible(path, corpus)
        positions = teacher.config.max_position_embeddings
        if positions < config.sequence_length:
            raise UserError(
                f"{path} reads {positions} tokens, fewer than "
                f"--sequence-length {config.sequence_length}: lower it"
            )
        teachers.append(teacher)
        name = checkpoint["model"]["name"]
        records.append({"name": name, "digest": content_digest(checkpoint["weights"])})
        if precision == "bf16":
            cast_linears_to_bf16(teacher)
    return teachers, records


def cast_linears_to_bf16(model):
    """Keeps the matrices and biases of a frozen model's layers in bfloat16.

    Autocast makes the same bits of them in every step. What is read in float32 remains so:
    embeddings, norms, and the head, which is rounded once it is center_head (`loss.join_heads`).
    """
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def open_teacher_cache(config, corpus, teachers, records):
    """The cache that --cache-teachers asks for, or None. `UserError` where it does not fit."""
    compute = choose_compute(config.device, config.precision)
    layout = Layout(
        count_chunks(corpus.train.num_tokens, config.sequence_length),
        config.sequence_length,
        tuple(teacher.config.hidden_size for teacher in teachers),
        torch.bfloat16 if compute.precision == "bf16" else torch.float32,
    )
    digests = [record["digest"] for record in records]
    made_from = {"teachers": digests, "shard": corpus.train.digest}
    return open_cache(config.cache_teachers, layout, made_from, compute.device, config.dry_run)


def check_cache(config):
    """What is wrong with --cache-teachers, or None."""
    if config.random_offset and config.cache_teachers != "off":
        return "--cache-teachers needs chunks that stay the same: leave out --random-offset"
    return None


def main(argv=None):
    config = parse(DistillConfig, __doc__, argv, models.preset_names(), check_cache)
    config = models.with_hyperparameters(config, out_prefix="distilled-")
    distributed.init_distributed(choose_device(config.device))
    models.check_weights(config.teacher_weights, len(config.teachers))
    corpus = open_corpus(config.data)
    teachers, records = load_teachers(config, corpus)
    student, name, init_digest = models.initial_model(config, corpus)
    positions = config.sequence_length if config.kl_reduction == "sequence" else 1
    effective = config.alpha / (config.alpha + (1 - config.alpha) * positions)
    log(f"alpha      {config.alpha} as given, {effective:.4g} per token ({config.kl_reduction})")
    distributed.check_same_on_all_ranks({"set of teachers": [record["digest"] for record in records]})
    cache = open_teacher_cache(config, corpus, teachers, records)
    objective = OBJECTIVES[config.objective](student, teachers, config, cache)
    return exit_code(fit_corpus(objective, config, corpus, name, init_digest, records))


if __name__ == "__main__":
    sys.exit(run_program(main))
