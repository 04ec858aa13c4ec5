"""Minimal pairs as BLiMP has them: reading, scoring, accuracies.

A pair is right if the acceptable sentence has the higher log-probability; a tie counts half.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluation.scoring import BATCH_TOKENS, context_length, prefix_ids, scored_text, token_losses
from training.io import UserError, atomic_write, sha256, warn

MERGED_FIELDS = {"s-selection": "argument_structure"}  # 13 terms in BLiMP's files, 12 in its tables


class Pair(NamedTuple):
    good: str
    bad: str
    field: str


def read_pairs(folder, convention="newline"):
    """{file stem: [Pair]} of the *.jsonl of a folder, in sorted order.

    The field is `linguistics_term`, or the stem in a file without any. Raises `UserError`, naming
    file and line, for a line that is no object with `sentence_good` and `sentence_bad`, and for a
    *.jsonl that is no file. Warns of everything else in the folder, because it is not read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder: give one of BLiMP-style minimal pairs")
    pairs, others = {}, []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix != ".jsonl":
            others.append(path.name)
            continue
        if not path.is_file():
            raise UserError(f"{path} is no file, or a link to none: mend or remove it")
        lines = enumerate(path.read_bytes().split(b"\n"), 1)
        by_line = {number: _pair(line, path, number, convention) for number, line in lines if line.strip()}
        no_term = [number for number, pair in by_line.items() if pair.field == path.stem]
        if 0 < len(no_term) < len(by_line):
            raise UserError(f"{path}, line {no_term[0]} has no linguistics_term, unlike other lines")
        pairs[path.stem] = [*by_line.values()]
    if empty := [name for name, of_file in pairs.items() if not of_file]:
        raise UserError(f"{folder}/{empty[0]}.jsonl holds no pair: remove it")
    if not pairs:
        raise UserError(f"{folder} holds no *.jsonl: give a folder of BLiMP-style minimal pairs")
    if others:
        warn(f"{folder}: not read, because minimal pairs are in *.jsonl: {', '.join(others[:5])}")
    return pairs


def pairs_digest(pairs):
    """The SHA-256 of pairs as `read_pairs` returns them."""
    return sha256(json.dumps(pairs).encode())


def _pair(line, path, number, convention):
    try:
        entry = json.loads(line)
        field = entry.get("linguistics_term", path.stem)
        if convention != "2025":  # the pipeline of 2025 counts 13 fields
            field = MERGED_FIELDS.get(field, field)
        sentences = entry["sentence_good"], entry["sentence_bad"]
        if all(text and text.encode() for text in sentences) and isinstance(field, str) and field:
            return Pair(*sentences, field)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"{path}, line {number}: expected a JSON object with sentence_good and sentence_bad, "
        "two strings that are not empty"
    )


def sentence_scores(model, tokenizer, sentences, convention="newline"):
    """log p of each sentence in a convention, in nats: list of N strings → (N,) float64.

    Sentences of one length share a batch, so that none is padded. A single token without a prefix
    has log p 0. Raises `UserError` for a sentence that is longer than the model's context.
    """
    prefix = prefix_ids(tokenizer, convention)
    texts = [scored_text(sentence, convention, tokenizer) for sentence in sentences]
    encoded = [prefix + ids for ids in tokenizer.encode(texts)]
    by_length = defaultdict(list)
    for i, ids in enumerate(encoded):
        by_length[len(ids)].append(i)
        if len(ids) - 1 > context_length(model):
            raise UserError(
                f"a sentence of {len(ids) - 1} tokens is longer than the model's context of "
                f"{context_length(model)}: {sentences[i][:60]!r}"
            )
    scores = torch.zeros(len(encoded), dtype=torch.float64)
    with tqdm(total=len(encoded), desc="minimal pairs", disable=None, leave=False) as bar:
        for length, members in sorted(by_length.items()):
            rows = max(1, BATCH_TOKENS // length)
            for i in range(0, len(members) if length > 1 else 0, rows):
                batch = members[i : i + rows]
                tokens = torch.tensor([encoded[j] for j in batch])
                scores[batch] = -token_losses(model, tokens[:, :-1], tokens[:, 1:]).double().sum(1)
                bar.update(len(batch))
    return scores


def pair_scores(model, tokenizer, pairs, convention="newline"):
    """log p of the good and the bad sentence of each pair of `read_pairs`, in order: (P, 2)."""
    sentences = [text for members in pairs.values() for pair in members for text in (pair.good, pair.bad)]
    return sentence_scores(model, tokenizer, sentences, convention).view(-1, 2)


def accuracies(pairs, scores):
    """Accuracies in [0, 1] from `pair_scores`: per file, per field, the means of both, and tie rate."""
    ties = (scores[:, 0] == scores[:, 1]).double()
    correct = iter(((scores[:, 0] > scores[:, 1]).double() + 0.5 * ties).tolist())
    per_file, per_field = defaultdict(list), defaultdict(list)
    for name, members in pairs.items():
        for pair in members:
            value = next(correct)
            per_file[name].append(value)
            per_field[pair.field].append(value)
    per_file = {name: sum(values) / len(values) for name, values in per_file.items()}
    per_field = {name: sum(values) / len(values) for name, values in sorted(per_field.items())}
    return {
        "accuracy_over_files": sum(per_file.values()) / len(per_file),
        "accuracy_over_fields": sum(per_field.values()) / len(per_field),
        "tie_rate": ties.mean().item(),
        "per_file": per_file,
        "per_field": per_field,
    }


def write_pair_scores(path, paths, convention, pairs, scores):
    """Writes the scores of M checkpoints on P pairs as an .npz, to compute any accuracy from.

    Its arrays: `checkpoint` (M,), their `paths`; `convention`; `folder`, `paradigm` (the file's
    stem) and `field` (P,); log p in nats, `good` and `bad` (M, P). `scores` has one list per
    checkpoint, with (pairs, 2) scores per folder.
    """
    pair_columns = [
        (folder, name, pair.field)
        for folder, files in pairs.items()
        for name, members in files.items()
        for pair in members
    ]
    arrays = dict(zip(("folder", "paradigm", "field"), map(np.array, zip(*pair_columns))))
    log_p = torch.stack([torch.cat(by_folder) for by_folder in scores]).numpy()  # (M, P, 2)
    arrays |= {"checkpoint": paths, "convention": convention, "good": log_p[..., 0], "bad": log_p[..., 1]}
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
