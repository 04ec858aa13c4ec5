"""Cross-entropy, perplexity and bits per byte of a token shard, and the temperature that suits it best."""

import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from corpus.text_files import sub_corpus
from data import TokenShard
from evaluation.scoring import BATCH_TOKENS, token_losses
from loss import BLOCK_ROWS
from training.io import UserError, warn

NEWTON_STEPS = 10
MAX_WORD_BYTES = 40  # on average; longer "words" are those of a language that is written without blanks


def shard_losses(model, shard, sequence_length):
    """-log p of every token of a shard but the very first, in nats: (tokens - 1,) float32.

    Each is predicted once, from the tokens before it in its chunk.
    """
    losses = [token_losses(model, *batch) for batch in _batches(shard, sequence_length)]
    return torch.cat([batch.flatten() for batch in losses])


def _batches(shard, sequence_length):
    """Yields inputs and targets, (B, T) each, that have every target of the shard once, in order.

    Raises `UserError` for a shard without a target.
    """
    num_targets = shard.num_tokens - 1
    if num_targets < 1:
        raise UserError(f"{shard.path} is too short to score: give more text")
    ragged = num_targets // sequence_length * sequence_length  # the start of the last, shorter chunk
    starts, rows = range(0, ragged, sequence_length), max(1, BATCH_TOKENS // sequence_length)
    batches = [(starts[i : i + rows], sequence_length) for i in range(0, len(starts), rows)]
    if ragged < num_targets:
        batches.append(([ragged], num_targets - ragged))
    for starts, length in tqdm(batches, desc="dev text", disable=None, leave=False):
        yield shard.chunks(starts, length)


def file_spans(shard):
    """[(file, first, end)] of the targets in each file of a shard that has any."""
    spans = [(file, max(file.start - 1, 0), file.stop - 1) for file in shard.files]
    return [(file, start, stop) for file, start, stop in spans if stop > start]


def corpus_scores(shard, losses, shares=None):
    """Scores of a shard from its `shard_losses`, and those of each file under "per_file".

    `shares`, {sub-corpus: share of the training text}, adds "weighted_cross_entropy": the mean over files
    with these weights.
    """
    scores = _text_scores(losses, shard)
    scores["per_file"] = {
        file.name: _text_scores(losses[start:stop], file) for file, start, stop in file_spans(shard)
    }
    if shares is not None:
        weights = {name: shares.get(sub_corpus(name), 0.0) for name in scores["per_file"]}
        scores["weighted_cross_entropy"] = sum(
            scores["per_file"][name]["cross_entropy"] * weight / sum(weights.values())
            for name, weight in weights.items()
        )
    return scores


def _text_scores(losses, text):
    """Scores per token, word and byte of a shard or a file of it; those that do not exist are None."""
    nats = losses.double().sum().item()
    if not math.isfinite(nats):
        raise UserError("the model's losses are not finite: use an earlier checkpoint of its run")

    def exp(value):
        return math.exp(value) if value < 700 else None  # beyond 700 it overflows

    return {
        "cross_entropy": nats / len(losses),
        "perplexity": exp(nats / len(losses)),
        "perplexity_per_word": exp(nats / text.words) if text.bytes < MAX_WORD_BYTES * text.words else None,
        "bits_per_byte": nats / math.log(2) / text.bytes if text.bytes else None,
    }


def training_shares(path, shard):
    """{sub-corpus: share of the tokens} of the training shard `path`, or of its folder.

    Raises `UserError` for a shard of another tokenizer, for a dev shard, and if no name is that of
    a file of `shard`.
    """
    training = TokenShard(Path(path) / "train.bin" if Path(path).is_dir() else path)
    if training.path.name == "dev.bin" or training.digest == shard.digest:
        raise UserError(f"--weight-by {path} is dev text: give a train.bin")
    if training.tokenizer != shard.tokenizer:
        raise UserError(f"{training.path} was made with another tokenizer than {shard.path}")
    shares = {sub_corpus(f.name): (f.stop - f.start) / training.num_tokens for f in training.files}
    if not sum(shares.get(sub_corpus(file.name), 0) for file, _, _ in file_spans(shard)):
        raise UserError(
            f"{path} and {shard.path} have no sub-corpus in common: name their files alike, "
            "or leave out --weight-by"
        )
    return shares


class TemperatureScaled(nn.Module):
    """A model with its logits divided by a temperature."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens):
        return self.model(tokens).float() / self.temperature


@torch.no_grad()
def fitted_temperature(model, shard, sequence_length):
    """The temperature at which the model's mean loss on a shard is smallest.

    With b = 1 / temperature the mean of logsumexp(b z) - b z_target is convex in b, and Newton's
    method finds its minimum. The derivatives are E[z] - z_target and the variance of z, under the
    model at b.
    """
    device, inverse = next(model.parameters()).device, 1.0
    for _ in range(NEWTON_STEPS):
        slope = curvature = 0.0
        for tokens, targets in _batches(shard, sequence_length):
            logits = model(tokens.to(device)).flatten(0, 1).float()  # (N, V)
            blocks = zip(logits.split(BLOCK_ROWS), targets.to(device).flatten().split(BLOCK_ROWS))
            for z, target in blocks:
                p = (inverse * z).softmax(-1)
                mean = (p * z).sum(-1)
                slope += (mean - z.gather(1, target[:, None])[:, 0]).sum().item()
                curvature += ((p * z * z).sum(-1) - mean**2).sum().item()
        step = slope / max(curvature, 1e-12)
        inverse = min(max(inverse - step, inverse / 2), inverse * 2)
        if abs(step) < 1e-4:
            return 1 / inverse
    warn(f"--temperature-scaled: no minimum after {NEWTON_STEPS} steps; {1 / inverse:.3g} is used")
    return 1 / inverse
