"""Distils an ensemble of frozen teachers into a student: training with another objective.

    python distill.py --teachers runs/gpt2-705m/best.pt runs/llama-360m/best.pt

    loss = alpha · CE + (1 - alpha) · T² · KL(teachers ‖ student)

The KL is summed over the positions of a sequence and averaged over sequences (--kl-reduction
sequence), because that is what produced the paper's numbers: the original's `batchmean` divides by
the batch alone. --kl-reduction token is the mean over tokens, the formula as one would write it.
"""

import dataclasses
import math
import sys

import torch
from torch import nn

import model as models
from cache import TeacherCache, free_bytes
from data import count_chunks
from files import UserError, run
from loss import REDUCTIONS, ensemble_kl, join_heads, matmul_dtype
from train import (
    GIB,
    TrainConfig,
    choose_precision,
    exit_code,
    fit,
    initial_model,
    load_compatible,
    open_data,
    option,
    parse,
    with_recipe,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    teachers: list[str] = dataclasses.field(
        metadata={"help": "checkpoints of the teachers, of either architecture"}
    )
    teacher_weights: list[float] | None = option(None, "of their logits; default: all equal")
    alpha: float = option(0.5, "weight of the cross-entropy, from 0 to 1", minimum=0, maximum=1)
    temperature: float = option(2.0, "that softens teachers and student alike", above=0)
    kl_reduction: str = option(
        "sequence", "what the KL is a mean over; see above", choices=REDUCTIONS
    )
    cache_teachers: str = option(
        "off",
        "run the teachers once per chunk and keep their states: off, auto, gpu, host, or a FILE",
    )


class EnsembleObjective(nn.Module):
    """The ensemble objective of a student and its frozen teachers; `forward(batch)` is the loss."""

    compiled = False

    def __init__(self, model, teachers, config, teachers_identity=(), cache=None):
        super().__init__()
        self.model = model
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.weights = config.teacher_weights or [1.0] * len(teachers)
        self.alpha, self.temperature = config.alpha, config.temperature
        self.kl_reduction = config.kl_reduction
        self.teachers_identity = list(teachers_identity)
        self.cache = cache
        self.joined_head = None

    def train(self, mode=True):
        """Puts the student in that mode; the teachers stay in eval mode, without dropout."""
        super().train(mode)
        self.teachers.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch):
        """The batch with the teachers' final hidden states, which is all that is read of them."""
        return dataclasses.replace(batch, teacher_states=tuple(self.teacher_states(batch)))

    def forward(self, batch):
        if not batch.teacher_states:
            batch = self.prepare(batch)
        hidden = self.model.hidden_states(batch.tokens)
        heads = [t.head for t in self.teachers]
        dtype = matmul_dtype(hidden)
        if self.joined_head is None or self.joined_head.dtype != dtype:
            with torch.no_grad():
                self.joined_head = join_heads(heads, self.weights, dtype)
        per_token = self.kl_reduction == "token"
        return ensemble_kl(
            hidden,
            self.model.head,
            list(zip(batch.teacher_states, heads, self.weights)),
            batch.targets,
            alpha=self.alpha,
            temperature=self.temperature,
            num_targets=batch.num_targets,
            kl_denominator=batch.num_sequences * (batch.tokens.shape[1] if per_token else 1),
            joined_head=self.joined_head,
            compiled=self.compiled,
        )

    def teacher_states(self, batch):
        """The teachers' final hidden states, K × (B, T, C_k): from the cache where they are there.

        A batch of which any chunk is missing is computed whole, always in the same shape, so that
        what the cache holds does not depend on what else it held.
        """
        states = self.cache.read(batch.chunk_ids) if self.cache else None
        if states is not None:
            return [s.to(batch.tokens.device, non_blocking=True) for s in states]
        states = [t.hidden_states(batch.tokens) for t in self.teachers]
        if self.cache:
            self.cache.write(batch.chunk_ids, states)
        return states


def load_teachers(config, data):
    """The teachers and their identities [{"name", "digest"}].

    Raises `UserError` if one has another tokenizer, another vocabulary or a shorter context.
    """
    teachers, identities = [], []
    for path in config.teachers:
        teacher, checkpoint = load_compatible(path, config, data)
        if teacher.config.max_position_embeddings < config.sequence_length:
            raise UserError(
                f"{path} reads {teacher.config.max_position_embeddings} tokens, fewer than "
                f"--sequence-length {config.sequence_length}: lower it"
            )
        teachers.append(teacher)
        name = checkpoint["model"]["name"]
        identities.append({"name": name, "digest": models.content_digest(checkpoint["weights"])})
    return teachers, identities


def check_weights(config):
    """Raises `UserError` unless there is a weight for each teacher, or none at all."""
    weights = config.teacher_weights
    if weights is not None and len(weights) != len(config.teachers):
        raise UserError(
            f"--teacher-weights: {len(weights)} given for {len(config.teachers)} teachers"
        )
    if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UserError("--teacher-weights: none below 0, and at least one above")


def open_cache(config, data, teachers, identities):
    """The cache that --cache-teachers asks for, or None. `UserError` where it does not fit."""
    place, device = config.cache_teachers, models.choose_device(config.device)
    if place == "off":
        return None
    if place == "gpu" and device.type != "cuda":
        raise UserError(f"--cache-teachers gpu: training is on {device}; use host or a FILE")
    bf16 = choose_precision(config.precision, device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    sizes = [t.config.hidden_size for t in teachers]
    num_chunks = count_chunks(len(data.train.tokens), config.sequence_length)
    needed = num_chunks * config.sequence_length * sum(sizes) * dtype.itemsize
    candidates = [place]
    if place == "auto":  # what is left over is for training
        candidates = ["gpu", "host"] if device.type == "cuda" else ["host"]
    for place in candidates:
        free = free_bytes(place, device)
        if free is None or needed < (0.7 if config.cache_teachers == "auto" else 1) * free:
            break
    else:
        if config.cache_teachers != "auto":
            raise UserError(f"--cache-teachers {place}: {needed} bytes needed, {free} free")
        print(f"cache      none: {needed / GIB:.2f} GiB do not fit")
        return None
    room = "" if free is None else f", {free / GIB:.1f} GiB free"
    print(f"cache      {needed / GIB:.2f} GiB of the teachers' hidden states in {place}{room}")
    if config.dry_run:
        return None
    shape = (num_chunks, config.sequence_length, sizes)
    if place in ("gpu", "host"):
        return TeacherCache.in_memory(*shape, device if place == "gpu" else "cpu", dtype)
    made_from = {"teachers": [t["digest"] for t in identities], "shard": data.train.identity}
    return TeacherCache.in_file(place, *shape, dtype, made_from)


def check_cache(config):
    """What is wrong with --cache-teachers, or None."""
    if config.random_offset and config.cache_teachers != "off":
        return "--cache-teachers needs chunks that stay the same: leave out --random-offset"
    return None


def main(argv=None):
    config = parse(DistillConfig, __doc__, argv, check_cache)
    config = with_recipe(config, out_prefix="distilled-")
    check_weights(config)
    data = open_data(config)
    teachers, identities = load_teachers(config, data)
    student, origin = initial_model(config, data)
    positions = config.sequence_length if config.kl_reduction == "sequence" else 1
    effective = config.alpha / (config.alpha + (1 - config.alpha) * positions)
    print(f"alpha      {config.alpha} as given, {effective:.4g} per token ({config.kl_reduction})")
    cache = open_cache(config, data, teachers, identities)
    objective = EnsembleObjective(student, teachers, config, identities, cache)
    return exit_code(fit(objective, config, origin))


if __name__ == "__main__":
    sys.exit(run(main))
