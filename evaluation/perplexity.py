"""Cross-entropy, perplexity and bits per byte of a token shard, and the temperature that suits it best."""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from corpus.text_files import sub_corpus
from data import TokenShard
from evaluation.scoring import batch_size, logit_blocks, token_losses
from training.io import UserError, warn

NEWTON_STEPS = 10
FITTED_CHUNKS = 1000  # at most so many fit a temperature: it has one number to find
MAX_WORD_BYTES = 40  # on average; longer "words" are those of a language that is written without blanks


def shard_losses(model, shard, sequence_length, temperatures=(1.0,)):
    """-log p of every token of a shard but the very first, in nats: (K, tokens - 1) float32.

    Each is predicted once, from the tokens before it in its chunk, at K temperatures.
    """
    losses = [
        token_losses(model, *shard.chunks(starts, length), temperatures)
        for starts, length in _batches(model, shard, sequence_length)
    ]
    return torch.cat([batch.flatten(1) for batch in losses], dim=1)


def _batches(model, shard, sequence_length, every=1):
    """Yields starts and length of chunks, a batch at a time: each target once, in order.

    With `every` = n only each n-th chunk. Raises `UserError` for a shard without a target.
    """
    num_targets = shard.num_tokens - 1
    if num_targets < 1:
        raise UserError(f"{shard.path} is too short to score: give more text")
    ragged = num_targets // sequence_length * sequence_length  # the start of the last, shorter chunk
    starts, size = range(0, ragged, sequence_length * every), batch_size(model, sequence_length)
    batches = [(starts[i : i + size], sequence_length) for i in range(0, len(starts), size)]
    if ragged < num_targets:
        batches.append(([ragged], num_targets - ragged))
    yield from tqdm(batches, desc="dev text", disable=None, leave=False)


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


def fitted_temperature(model, shard, sequence_length):
    """The temperature at which the model's mean loss on a shard is smallest.

    Of more than a thousand chunks it takes evenly spread ones. With b = 1 / temperature the mean of
    logsumexp(b z) - b z_target is convex in b, and Newton's method finds its minimum. The derivatives
    are E[z] - z_target and the variance of z, under the model at b.
    """
    every, inverse = math.ceil(shard.num_tokens / sequence_length / FITTED_CHUNKS), 1.0
    for _ in range(NEWTON_STEPS):
        derivatives = []  # sums over blocks stay on the device until the pass is done
        for starts, length in _batches(model, shard, sequence_length, every):
            for z, target in logit_blocks(model, *shard.chunks(starts, length)):
                p = (inverse * z).softmax(-1)
                mean = (p * z).sum(-1)
                slope = mean - z.gather(1, target[:, None])[:, 0]
                derivatives.append(torch.stack([slope, (p * z * z).sum(-1) - mean**2]).sum(1))
        slope, curvature = torch.stack(derivatives).cpu().double().sum(0).tolist()
        step = slope / max(curvature, 1e-12)
        inverse = min(max(inverse - step, inverse / 2), inverse * 2)
        if abs(step) < 1e-3:  # the next one would be its square
            return 1 / inverse
    warn(f"--temperature-scaled: no minimum after {NEWTON_STEPS} steps; {1 / inverse:.3g} is used")
    return 1 / inverse
