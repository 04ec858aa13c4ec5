"""What questions to a model share: its losses token by token, and what precedes a sentence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from loss import BLOCK_ROWS, ensemble_logits
from tokenizer import BOS, EOS


class Ensemble(nn.Module):
    """Several models as one: the weighted mean of their logits, (B, T) → (B, T, V)."""

    def __init__(self, members, weights=None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = weights or [1.0] * len(members)
        lengths = [m.config.max_position_embeddings for m in members]
        self.max_position_embeddings = min(lengths)

    def forward(self, tokens):
        return ensemble_logits([m(tokens).float() for m in self.members], self.weights)


def context_length(model):
    """The longest input, in tokens, that `model` reads."""
    return getattr(model, "config", model).max_position_embeddings


@torch.no_grad()
def token_losses(model, tokens, targets):
    """-log p(target) in nats: (B, T), (B, T) → (B, T) float32 on the CPU."""
    device = next(model.parameters()).device
    logits = model(tokens.to(device)).flatten(0, 1)  # (N, V)
    size = BLOCK_ROWS if device.type == "cpu" else len(logits)  # what a processor's cache holds
    blocks = zip(logits.split(size), targets.to(device).flatten().split(size))
    losses = [F.cross_entropy(z.float(), t, reduction="none") for z, t in blocks]
    return torch.cat(losses).view(targets.shape).cpu()


@dataclass(frozen=True)
class Convention:
    """What precedes a sentence: text, a token's id or nothing; perhaps a blank, which is scored."""

    prefix: str | int | None
    blank: str = ""


CONVENTIONS = {
    "newline": Convention("\n"),
    "2023": Convention(EOS),
    "2024": Convention(BOS, blank=" "),
    "2025": Convention(None),
    "bos": Convention(BOS),
}


def encoded(tokenizer, sentences, convention):
    """The ids of each sentence, after what the convention puts before it."""
    how = CONVENTIONS[convention]
    if isinstance(how.prefix, str):
        prefix = tokenizer.encode(how.prefix)
    else:
        prefix = [] if how.prefix is None else [how.prefix]
    return [prefix + ids for ids in tokenizer.encode([how.blank + s for s in sentences])]
