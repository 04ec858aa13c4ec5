"""Minimal pairs as BLiMP, EWoK and COMPS have them: reading, scoring, accuracies, predictions.

A pair is right if the acceptable sentence has the higher log-probability; a tie counts half. EWoK's
sentences begin with a context that both share, COMPS's end with a property that both share. As in
BabyLM's pipeline of 2025, only what follows the context, and only the property, is scored.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluation.scoring import batch_size, context_length, prefix_ids, scored_text, token_losses
from training.io import UserError, atomic_write, sha256, warn, write_json

MERGED_FIELDS = {"s-selection": "argument_structure"}  # 13 terms in BLiMP's files, 12 in its tables
# {stem of a file of COMPS: the pipeline's name of the group}; any other file is of the last group.
COMPS_GROUPS = {"comps_base": "base", "comps_wugs": "wugs", "comps_wugs_dist-before": "wugs_dist_before"}
LAST_COMPS_GROUP = "wugs_dist_in_between"


class Pair(NamedTuple):
    """Two sentences. `contexts` are their beginnings that are not scored.

    In the pipeline `task` is the name of the task, `group` that of what is averaged.
    """

    good: str
    bad: str
    field: str
    task: str = "blimp"
    group: str = ""
    contexts: tuple = ("", "")


def _texts(entry, *names):
    """The values of some fields of a line. Raises ValueError for one that is no text, or empty."""
    values = [entry[name] for name in names]
    if not all(isinstance(value, str) and value.encode() for value in values):
        raise ValueError
    return values


def _blimp_pair(entry, stem, convention):
    entry = {"linguistics_term": stem} | entry
    good, bad, field = _texts(entry, "sentence_good", "sentence_bad", "linguistics_term")
    if convention != "2025":  # the pipeline of 2025 counts 13 fields
        field = MERGED_FIELDS.get(field, field)
    group = str(entry.get("UID", stem)) if "field" in entry else stem
    return Pair(good, bad, field, "blimp", group)


def _ewok_pair(entry, _stem, _convention):
    context, good, bad, domain = _texts(entry, "Context1", "Target1", "Target2", "Domain")
    return Pair(f"{context} {good}", f"{context} {bad}", domain, "ewok", domain, (context, context))


def _comps_pair(entry, stem, _convention):
    good, bad, phrase = _texts(entry, "prefix_acceptable", "prefix_unacceptable", "property_phrase")
    group, contexts = COMPS_GROUPS.get(stem, LAST_COMPS_GROUP), (f"{good} ", f"{bad} ")
    return Pair(f"{good} {phrase}", f"{bad} {phrase}", group, "comps", group, contexts)


FORMS = {"sentence_good": _blimp_pair, "Target1": _ewok_pair, "property_phrase": _comps_pair}


def read_pairs(folder, convention="newline"):
    """{file stem: [Pair]} of the *.jsonl of a folder, in sorted order.

    The field is `linguistics_term`, or the stem in a file without any; EWoK's `Domain`, COMPS's file.
    Raises `UserError`, naming file and line, for a line of none of the `FORMS`, and for a *.jsonl
    that is no file. Warns of everything else in the folder, because it is not read.
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
        no_term = [n for n, pair in by_line.items() if pair.field == path.stem and pair.task == "blimp"]
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
    """The SHA-256 of pairs as `read_pairs` returns them; of BLiMP's, sentences and field alone."""
    fields = {f: [p if any(p.contexts) else p[:3] for p in members] for f, members in pairs.items()}
    return sha256(json.dumps(fields).encode())


def _pair(line, path, number, convention):
    try:
        entry = json.loads(line)
        make_pair = next((make for key, make in FORMS.items() if key in entry), _blimp_pair)
        return make_pair(entry, path.stem, convention)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: expected a JSON object with sentence_good and sentence_bad, or the "
            "fields of EWoK or COMPS: strings that are not empty"
        ) from error


def sentence_scores(model, tokenizer, sentences, convention="newline", contexts=None):
    """log p of each sentence in a convention, in nats: list of N strings → (N,) float64.

    `contexts` are beginnings of the sentences, whose tokens are not scored; a token that has any
    character behind the context is. Sentences of one length share a batch, so that none is padded. A
    single token without a prefix has log p 0. Raises `UserError` for a sentence that is longer than
    the model's context.
    """
    prefix = prefix_ids(tokenizer, convention)
    texts = [scored_text(sentence, convention, tokenizer) for sentence in sentences]
    encoded = [prefix + ids for ids in tokenizer.encode(texts)]
    unscored = [0] * len(texts)  # tokens of contexts
    for i, context in enumerate(contexts or ()):
        if context:
            stop = len(scored_text(context, convention, tokenizer))
            within = sum(end <= stop for _, end in tokenizer.tokens(texts[i]).offsets)
            unscored[i] = max(0, len(prefix) + within - 1)
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
            rows = batch_size(model, length)
            for i in range(0, len(members) if length > 1 else 0, rows):
                batch = members[i : i + rows]
                tokens = torch.tensor([encoded[j] for j in batch])
                (losses,) = token_losses(model, tokens[:, :-1], tokens[:, 1:])
                is_scored = torch.arange(length - 1) >= torch.tensor([[unscored[j]] for j in batch])
                scores[batch] = -(losses * is_scored).double().sum(1)
                bar.update(len(batch))
    return scores


def pair_scores(model, tokenizer, pairs, convention="newline"):
    """log p of the good and the bad sentence of each pair of `read_pairs`, in order: (P, 2)."""
    members = [pair for of_file in pairs.values() for pair in of_file]
    sentences = [text for pair in members for text in (pair.good, pair.bad)]
    contexts = [context for pair in members for context in pair.contexts]
    return sentence_scores(model, tokenizer, sentences, convention, contexts).view(-1, 2)


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


def write_predictions(out, pairs, scores):
    """Writes the sentences that a model prefers as BabyLM's pipelines of 2025 and 2026 do.

    `pairs` is {folder: what `read_pairs` returns}, with one of `scores` each. `out` is the pipeline's
    folder results/MODEL/REVISION; the files are OUT/zero_shot/causal/TASK/FOLDER/predictions.json. A tie
    is the acceptable sentence. Raises `UserError` for a folder with two tasks, or two of one name.
    """
    contents = {}
    for (folder, files), log_p in zip(pairs.items(), scores):
        groups, tasks = defaultdict(list), {pair.task for members in files.values() for pair in members}
        path = Path(out, "zero_shot", "causal", *tasks, Path(folder).absolute().stem, "predictions.json")
        if len(tasks) > 1 or path in contents:
            raise UserError(
                f"--predictions: {folder} has two tasks, or the name of another folder: rename it"
            )
        members = [pair for of_file in files.values() for pair in of_file]
        for pair, (good, bad) in zip(members, log_p.tolist()):
            sentence, context = (pair.bad, pair.contexts[1]) if bad > good else (pair.good, pair.contexts[0])
            chosen = sentence if pair.task == "comps" else sentence[len(context) :]
            predictions = groups[pair.group]
            predictions.append({"id": f"{pair.group}_{len(predictions)}", "pred": chosen})
        contents[path] = {group: {"predictions": predictions} for group, predictions in groups.items()}
    for path, content in contents.items():
        write_json(path, content)


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
