"""Token losses of a model, several models as one, and the prefix of a sentence by scoring convention."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from loss import BLOCK_ROWS, ensemble_logits, matmul_dtype
from training.io import UserError, warn

BATCH_TOKENS = 8192  # of a forward pass
CPU_BATCH_TOKENS = 512  # a sixth faster: a CPU's caches keep a layer's output for the next one


class Ensemble(nn.Module):
    """The weighted mean of the logits of several models of one tokenizer, (B, T) → (B, T, V).

    V is the smallest of their vocabularies: a model may have rows that its tokenizer has no piece for.
    """

    def __init__(self, members, weights=None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = weights or [1.0] * len(members)
        self.max_position_embeddings = min(m.config.max_position_embeddings for m in members)
        self.vocabulary_size = min(m.config.vocab_size for m in members)

    def forward(self, tokens):
        logits = [m(tokens)[..., : self.vocabulary_size].float() for m in self.members]
        return ensemble_logits(logits, self.weights)


def context_length(model):
    """The length, in tokens, of the longest input that `model` reads."""
    return getattr(model, "config", model).max_position_embeddings


def batch_size(model, length):
    """The number of sequences of `length` tokens in a forward pass."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return max(1, (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS) // length)


class OneDnnProducts(TorchFunctionMode):
    """In this context oneDNN multiplies the float32 of linear layers on a CPU, without a gradient.

    torch itself calls MKL, which reaches half of AVX-512 on an AMD EPYC: 113 of 250 GFLOP/s a core.
    """

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        is_linear = function is F.linear and not kwargs and args[0].device.type == "cpu"
        if is_linear and matmul_dtype(args[0]) == torch.float32:
            x, weight, *bias = args
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias[0] if bias else None, "none", [], "")
        return function(*args, **(kwargs or {}))


def fast_products():
    """`OneDnnProducts` on a chip with AVX-512, else a context that changes nothing."""
    has_kernels = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return OneDnnProducts() if has_kernels else contextlib.nullcontext()


@torch.no_grad()
def logit_blocks(model, tokens, targets):
    """Yields float32 logits (n, V) and their targets (n,) of (B, T) tokens, in blocks of rows."""
    device = next(model.parameters()).device
    with fast_products():
        logits = model(tokens.to(device)).flatten(0, 1)  # (N, V)
    # A block fits a CPU's cache, and takes a quarter of a GiB for each array of a GPU.
    size = BLOCK_ROWS if device.type == "cpu" else max(1, (1 << 26) // logits.shape[-1])
    for z, target in zip(logits.split(size), targets.to(device).flatten().split(size)):
        yield z.float(), target


def token_losses(model, tokens, targets, temperatures=(1.0,)):
    """-log p(target) in nats at K temperatures: (B, T), (B, T) → (K, B, T) float32 on the CPU."""
    losses = []
    for z, target in logit_blocks(model, tokens, targets):
        scaled = (z if tau == 1 else z / tau for tau in temperatures)
        losses.append(torch.stack([F.cross_entropy(logits, target, reduction="none") for logits in scaled]))
    return torch.cat(losses, dim=1).view(-1, *targets.shape).cpu()


class ScoringConvention(NamedTuple):
    """The context in which a sentence is scored."""

    prefix: str | None  # not scored: a newline, or the special token bos or eos
    leading_space: bool = False  # scored, as a part of the sentence


CONVENTIONS = {  # "newline" is the context of training; the years are those of BabyLM's pipelines
    "newline": ScoringConvention("\n"),
    "2023": ScoringConvention("eos"),
    "2024": ScoringConvention("bos", leading_space=True),
    "2025": ScoringConvention(None),
    "bos": ScoringConvention("bos"),  # minicons with bos_token=True
}


def scored_text(sentence, convention, tokenizer):
    """The text whose tokens are scored: the sentence, after a space if the convention has one.

    So it is in the pipelines for a tokenizer that puts one before each text, such as Llama 2's.
    """
    prefix, leading_space = CONVENTIONS[convention]
    return " " + sentence if leading_space or (tokenizer.adds_space and prefix != "\n") else sentence


def prefix_ids(tokenizer, convention):
    """The ids that precede a sentence in a convention.

    Raises `UserError` if the tokenizer lacks what the convention puts before a sentence.
    """
    prefix, leading_space = CONVENTIONS[convention]
    if leading_space and not tokenizer.begins_with_space(tokenizer.encode(" a")[0]):
        raise UserError(f"--convention {convention}: the tokenizer drops a leading space: choose another")
    if prefix is None:
        return []
    if prefix == "\n":
        ids = tokenizer.encode("\n") if keeps_newlines(tokenizer) else [None]
    else:
        ids = [tokenizer.bos_id if prefix == "bos" else tokenizer.eos_id]
    if ids == [None]:
        raise UserError(f"--convention {convention}: the tokenizer has no {prefix!r}: choose another")
    return ids


def keeps_newlines(tokenizer):
    """False for a tokenizer that drops newlines, as SentencePiece's default rules do."""
    return tokenizer.decode(tokenizer.encode("\n")) == "\n"


def choose_convention(tokenizer, convention):
    """`convention`, or for a tokenizer that drops newlines "2023" instead of "newline", with a warning.

    Raises `UserError` for a convention that the tokenizer cannot follow.
    """
    if convention == "newline" and not keeps_newlines(tokenizer):
        warn("the tokenizer drops newlines: sentences are scored after </s>, as with --convention 2023")
        convention = "2023"
    prefix_ids(tokenizer, convention)
    return convention
