"""Token losses of a model, several models as one, and the prefix of a sentence by scoring convention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from loss import BLOCK_ROWS, ensemble_logits
from tokenizer import BOS, EOS

BATCH_TOKENS = 8192  # of a forward pass


class Ensemble(nn.Module):
    """The weighted mean of the logits of several models, (B, T) → (B, T, V)."""

    def __init__(self, members, weights=None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = weights or [1.0] * len(members)
        self.max_position_embeddings = min(m.config.max_position_embeddings for m in members)

    def forward(self, tokens):
        return ensemble_logits([m(tokens).float() for m in self.members], self.weights)


def context_length(model):
    """The length, in tokens, of the longest input that `model` reads."""
    return getattr(model, "config", model).max_position_embeddings


@torch.no_grad()
def token_losses(model, tokens, targets):
    """-log p(target) in nats: (B, T), (B, T) → (B, T) float32 on the CPU."""
    device = next(model.parameters()).device
    logits = model(tokens.to(device)).flatten(0, 1)  # (N, V)
    size = BLOCK_ROWS if device.type == "cpu" else len(logits)  # such a block fits a CPU's cache
    blocks = zip(logits.split(size), targets.to(device).flatten().split(size))
    losses = [F.cross_entropy(z.float(), t, reduction="none") for z, t in blocks]
    return torch.cat(losses).view(targets.shape).cpu()


@dataclass(frozen=True)
class ScoringConvention:
    """The context in which a sentence is scored.

    `prefix` precedes the sentence and is not scored: text, the id of a special token, or None. A
    leading space belongs to the sentence and is scored with it.
    """

    prefix: str | int | None
    leading_space: bool = False


CONVENTIONS = {  # "newline" is the context of training; the years are those of BabyLM's pipelines
    "newline": ScoringConvention("\n"),
    "2023": ScoringConvention(EOS),
    "2024": ScoringConvention(BOS, leading_space=True),
    "2025": ScoringConvention(None),
    "bos": ScoringConvention(BOS),  # minicons with bos_token=True
}


def scored_text(sentence, convention):
    """The text whose tokens are scored: the sentence, after a space if the convention has one."""
    return " " + sentence if CONVENTIONS[convention].leading_space else sentence


def prefix_ids(tokenizer, convention):
    """The ids that precede a sentence in a convention."""
    prefix = CONVENTIONS[convention].prefix
    if isinstance(prefix, str):
        return tokenizer.encode(prefix)
    return [] if prefix is None else [prefix]
