"""Scores checkpoints on a dev shard and on minimal pairs, side by side.

    python evaluate.py runs/*/best.pt --pairs blimp_filtered supplement_filtered --json scores.json
    python evaluate.py student.pt --ensemble gpt2.pt llama.pt      what the student was taught
    python evaluate.py student.pt --surprisals bits.tsv --text stimuli.txt       for psycholinguists
    python evaluate.py --compare student-*.npz --against control-*.npz     one of --losses a seed

Cross-entropy in nats per token, over the chunks that training cuts; perplexity per token and per
word, and bits per byte of the cleaned text, which do not depend on the tokenizer. A minimal pair is
right if the acceptable sentence has the higher log-probability; a tie counts half. All in float32:
ties are an artefact of fewer digits.

What precedes a sentence is a matter of --convention. `newline`, the default, is the context in
which sentences begin in training, and scores their first token too. The official BabyLM pipelines
do otherwise: 2023 puts </s> first (and reports the mean over fields), 2024 puts <s> and a blank
(the mean over files), 2025 puts nothing, so that the first token is not scored; `bos` is <s> alone,
as minicons has it with bos_token=True. <s> and </s> never occur in training here, so under 2023,
2024 and bos every sentence follows an untrained embedding. All but 2025 count 12 fields, as BLiMP's
tables do: 2025 counts `s-selection` as a thirteenth.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import TokenShard
from evaluation.scoring import CONVENTIONS, Ensemble, context_length, encoded, token_losses
from evaluation.statistics import comparison_table, read_losses, write_losses
from evaluation.surprisal import write_surprisals
from loss import BLOCK_ROWS
from model import check_weights, count_parameters, load_checkpoint
from tokenizer import Tokenizer
from training.device import choose_compute
from training.io import UserError, aligned, atomic_write, run_program, warn, write_json

BATCH_TOKENS = 8192
MAX_LINE_BYTES = 1 << 20  # of a file of pairs: no sentence that a model can read is as long
TEXT_SCORES = ("cross_entropy", "perplexity", "perplexity_per_word", "bits_per_byte")
NEWTON_STEPS = 10
SAME_FIELD = {"s-selection": "argument_structure"}  # 13 terms in the files, 12 in BLiMP's tables


# ---- dev text


def shard_losses(model, shard, sequence_length):
    """-log p of every token of a shard but the very first, in nats: (tokens - 1,) float32.

    Each is predicted once, from those before it in its chunk.
    """
    losses = [token_losses(model, *part) for part in _parts(shard, sequence_length)]
    return torch.cat([part.flatten() for part in losses])


def _parts(shard, sequence_length):
    """Yields inputs and targets, (B, T) each, that have every target of the shard once, in order.

    Raises `UserError` for a shard without a target.
    """
    num_targets = shard.num_tokens - 1
    if num_targets < 1:
        raise UserError(f"{shard.path} is too short to score: give more text")
    whole = num_targets // sequence_length * sequence_length
    rows = max(1, BATCH_TOKENS // sequence_length)
    steps = [(i, sequence_length) for i in range(0, whole, rows * sequence_length)]
    if whole < num_targets:
        steps.append((whole, num_targets - whole))
    for start, length in tqdm(steps, desc="dev text", disable=None, leave=False):
        stop = min(start + rows * length, whole) if length == sequence_length else num_targets
        yield shard.chunks(range(start, stop, length), length)


def file_spans(shard):
    """[(file, first, after the last)] of the targets in each file of a shard that has any."""
    spans = [(file, max(file.start - 1, 0), file.stop - 1) for file in shard.files]
    return [(file, start, stop) for file, start, stop in spans if stop > start]


def corpus_scores(shard, losses, shares=None):
    """Scores of a shard from its `shard_losses`, and of each of its files under "per_file".

    With `shares`, {name: share of the training text}, there is a "weighted_cross_entropy" as well:
    the mean over files weighted by them.
    """
    scores = _text_scores(losses, shard.words, shard.bytes)
    scores["per_file"] = {
        file.name: _text_scores(losses[start:stop], file.words, file.bytes)
        for file, start, stop in file_spans(shard)
    }
    if shares is not None:
        weights = {name: shares.get(name, 0.0) for name in scores["per_file"]}
        scores["weighted_cross_entropy"] = sum(
            scores["per_file"][name]["cross_entropy"] * weight / sum(weights.values())
            for name, weight in weights.items()
        )
    return scores


def _text_scores(losses, words, num_bytes):
    nats = losses.double().sum().item()
    if not math.isfinite(nats):
        raise UserError("the model's losses are not finite: use an earlier checkpoint of its run")

    def exp(value):  # None beyond all numbers: text without spaces has hardly any words
        return math.exp(value) if value < 700 else None

    return {
        "cross_entropy": nats / len(losses),
        "perplexity": exp(nats / len(losses)),
        "perplexity_per_word": exp(nats / words) if words else None,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
    }


def training_shares(path, shard):
    """{name: share of the tokens} of the files of the training shard `path`.

    Raises `UserError` unless it has a file of `shard`'s, by name.
    """
    training = TokenShard(path)
    shares = {f.name: (f.stop - f.start) / training.num_tokens for f in training.files}
    if not sum(shares.get(file.name, 0) for file, _, _ in file_spans(shard)):
        raise UserError(f"{path} has no file called as one of {shard.path}: leave out --weight-by")
    return shares


class Scaled(nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, tokens):
        return self.model(tokens).float() / self.temperature


@torch.no_grad()
def fitted_temperature(model, shard, sequence_length):
    """The temperature at which the model loses least on a shard.

    With b = 1 / temperature the mean of logsumexp(b z) - b z_target is convex in b, and Newton's
    method finds its minimum: its derivatives are E[z] - z_target and the variance of z, under the
    model at b. Every token counts alike.
    """
    device, inverse = next(model.parameters()).device, 1.0
    for _ in range(NEWTON_STEPS):
        slope = curvature = 0.0
        for tokens, targets in _parts(shard, sequence_length):
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
    warn(f"no temperature suits the model: it is still at {1 / inverse:.3g}")
    return 1 / inverse


# ---- minimal pairs


@dataclass(frozen=True, slots=True)
class Pair:
    good: str
    bad: str
    field: str


def read_pairs(folder, convention="newline"):
    """The pairs of each *.jsonl of a folder, {file stem: [Pair]}, in sorted order.

    Raises `UserError`, naming file and line, for anything but objects with `sentence_good` and
    `sentence_bad`. The field is `linguistics_term`, or the file's name where there is none.
    """
    paths = sorted(path for path in Path(folder).glob("*.jsonl") if path.is_file())
    if not paths:
        raise UserError(f"{folder} holds no *.jsonl: give a folder of BLiMP-style minimal pairs")
    pairs = {}
    for path in paths:
        pairs[path.stem] = []
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    pairs[path.stem].append(_pair(line, path, number, convention))
        if not pairs[path.stem]:
            raise UserError(f"{path} holds no pair")
    return pairs


def _pair(line, path, number, convention):
    """The pair that a line of JSON holds. `UserError`, naming file and line, if it holds none."""
    where = f"{path}, line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: {len(line)} bytes are no minimal pair: remove it")
    try:
        entry = json.loads(line)
        field = entry.get("linguistics_term", path.stem)
        field = field if convention == "2025" else SAME_FIELD.get(field, field)
        pair = Pair(entry["sentence_good"], entry["sentence_bad"], field)
        if all(s and s.encode() for s in (pair.good, pair.bad, pair.field)):
            return pair
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"{where}: expected a JSON object with sentence_good and sentence_bad, two strings that are not empty"
    )


def sentence_scores(model, tokenizer, sentences, convention="newline"):
    """log p of each sentence in that convention, in nats: list of N strings → (N,) float64.

    Sentences of one length share a batch, so that nothing is padded. Raises `UserError` for a
    sentence that is longer than the model's context.
    """
    ids = encoded(tokenizer, sentences, convention)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]), default=None)
    if longest is not None and len(ids[longest]) - 1 > context_length(model):
        raise UserError(
            f"a sentence of {len(ids[longest]) - 1} tokens is longer than the model's context of "
            f"{context_length(model)}: {sentences[longest][:60]!r}"
        )
    scores = torch.zeros(len(ids), dtype=torch.float64)
    with tqdm(total=len(ids), desc="minimal pairs", disable=None, leave=False) as bar:
        for batch in _batches_of_one_length(ids):
            tokens = torch.tensor([ids[i] for i in batch])
            losses = token_losses(model, tokens[:, :-1], tokens[:, 1:])
            scores[batch] = -losses.double().sum(1)
            bar.update(len(batch))
    return scores


def _batches_of_one_length(ids):
    """Yields lists of positions in `ids` whose entries have one length, the shortest first.

    An entry of a single token is left out: nothing follows it, and it has no context: log p is 0.
    """
    by_length = defaultdict(list)
    for i, sentence in enumerate(ids):
        by_length[len(sentence)].append(i)
    for length, members in sorted(by_length.items()):
        rows = max(1, BATCH_TOKENS // length)
        for i in range(0, len(members) if length > 1 else 0, rows):
            yield members[i : i + rows]


def pair_scores(model, tokenizer, pairs, convention="newline"):
    """log p of the good and the bad sentence of each of `read_pairs`' pairs, in order: (P, 2)."""
    members = [pair for file in pairs.values() for pair in file]
    sentences = [sentence for pair in members for sentence in (pair.good, pair.bad)]
    return sentence_scores(model, tokenizer, sentences, convention).view(-1, 2)


def accuracies(pairs, scores):
    """Accuracies in [0, 1] from `pair_scores`: per file, per field, their means, and tie rate."""
    ties = (scores[:, 0] == scores[:, 1]).double()
    correct = (scores[:, 0] > scores[:, 1]).double() + 0.5 * ties
    per_file, per_field = defaultdict(list), defaultdict(list)
    places = [(name, pair.field) for name, members in pairs.items() for pair in members]
    for (name, field), value in zip(places, correct.tolist()):
        per_file[name].append(value)
        per_field[field].append(value)
    per_file = {name: sum(v) / len(v) for name, v in per_file.items()}
    per_field = {name: sum(v) / len(v) for name, v in sorted(per_field.items())}
    return {
        "accuracy_over_files": sum(per_file.values()) / len(per_file),
        "accuracy_over_fields": sum(per_field.values()) / len(per_field),
        "tie_rate": ties.mean().item(),
        "per_file": per_file,
        "per_field": per_field,
    }


def write_pair_scores(path, described, pairs, scores):
    """Writes every score as an .npz, from which anyone can compute any accuracy again.

    `convention` and `checkpoint` (M,), both from `described`; `folder`, `paradigm` (the file's
    stem) and `field` (P,); log p in nats, `good` and `bad` (M, P). `scores` has one list for each
    of the M checkpoints, with (pairs, 2) scores for each folder.
    """
    places = [
        (folder, name, pair.field)
        for folder, files in pairs.items()
        for name, members in files.items()
        for pair in members
    ]
    folders, files, fields = map(np.array, zip(*places))
    joined = torch.stack([torch.cat(of_folders) for of_folders in scores]).numpy()  # (M, P, 2)
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            **described,
            folder=folders,
            paradigm=files,
            field=fields,
            good=joined[..., 0],
            bad=joined[..., 1],
        )


# ---- several models, one table


def report(results):
    """The lines of a table of the results, one model a row."""
    folders = list(results[0]["pairs"])
    heading = ["model", "parameters", "cross-entropy", "perplexity", "per word", "bits/byte"]
    weighted = any("weighted_cross_entropy" in r for r in results)
    heading += ["weighted"] if weighted else []
    columns = {"files": "accuracy_over_files", "fields": "accuracy_over_fields", "ties": "tie_rate"}
    rows = [heading + [f"{Path(f).name} {column}" for f in folders for column in columns]]
    for r in results:
        cells = [f"{r['model']} ({r['path']})", f"{r['parameters']:,}"]
        cells += ["-" if r[k] is None else f"{r[k]:.4g}" for k in TEXT_SCORES]
        cells += [f"{r['weighted_cross_entropy']:.4g}"] if weighted else []
        cells += [f"{r['pairs'][f][key]:.4f}" for f in folders for key in columns.values()]
        rows.append(cells)
    return aligned(rows)


def field_tables(results):
    """The lines of a table for each folder of pairs: accuracies by field, a model a column."""
    lines = []
    for folder in results[0]["pairs"]:
        rows = [[f"{Path(folder).name}, by field", *(r["model"] for r in results)]]
        for field in results[0]["pairs"][folder]["per_field"]:
            values = (r["pairs"][folder]["per_field"][field] for r in results)
            rows.append([field, *(f"{value:.4f}" for value in values)])
        lines += ["", *aligned(rows)]
    return lines


def load_all(paths, device):
    """[(model, checkpoint)] of the paths; `UserError` unless all share one tokenizer."""
    loaded = [load_checkpoint(path) for path in paths]
    for path, (model, checkpoint) in zip(paths, loaded):
        if checkpoint["tokenizer"]["identity"] != loaded[0][1]["tokenizer"]["identity"]:
            raise UserError(f"{path} has another tokenizer than {paths[0]}: compare them apart")
        model.to(device)
    return loaded


def scoring_options(args):
    """What was given of the options that say what to score and where to put it."""
    names = ("data", "weight_by", "temperature_scaled", "losses", "pairs", "pair_scores", "json")
    return [getattr(args, name) for name in names]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument(
        "--ensemble",
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="score these together, logits averaged, as one more row",
    )
    parser.add_argument(
        "--teacher-weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="one weight for each checkpoint of --ensemble (default: all equal)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of dev.bin (default: that of the first checkpoint's run, else data/babylm)",
    )
    parser.add_argument(
        "--weight-by",
        metavar="SHARD",
        help="a train.bin: also the mean over sub-corpora weighted by their tokens in it",
    )
    parser.add_argument(
        "--temperature-scaled",
        metavar="DIR",
        help="also score with the logits divided by the temperature that is best on DIR/dev.bin",
    )
    parser.add_argument(
        "--losses",
        metavar="FILE",
        help="write the loss of every chunk of the one model that is scored (npz), to compare",
    )
    parser.add_argument(
        "--surprisals",
        metavar="FILE",
        help="score nothing else: bits of each word and token of --text, tab-separated",
    )
    parser.add_argument("--text", metavar="FILE", help="text for --surprisals; each line stands for itself")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="score nothing: differences of what --losses wrote, a file for each seed ...",
    )
    parser.add_argument(
        "--against", nargs="+", metavar="FILE", help="... to these, in the order of the same seeds"
    )
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="DIR", help="folders of BLiMP-style *.jsonl"
    )
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="newline",
        help="what precedes a sentence of a minimal pair; see above (default: newline)",
    )
    parser.add_argument("--pair-scores", metavar="FILE", help="write every pair's two scores (npz)")
    parser.add_argument("--json", metavar="FILE", help="write the scores here")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="of matrix products; bf16 is several times as fast on a GPU, and near (default: fp32)",
    )
    args = parser.parse_args(argv)
    if (args.compare is None) != (args.against is None):
        parser.error("--compare and --against go together")
    if args.compare:
        if args.checkpoints or args.ensemble or args.surprisals or any(scoring_options(args)):
            parser.error("--compare scores nothing: give it and --against alone")
        return args
    if not args.checkpoints and not args.ensemble:
        parser.error("give at least one checkpoint")
    if (args.surprisals is None) != (args.text is None):
        parser.error("--surprisals and --text go together")
    if args.surprisals and len(args.checkpoints) + bool(args.ensemble) > 1:
        parser.error("--surprisals are those of one model: give one checkpoint, or one --ensemble")
    if args.surprisals and any(scoring_options(args)):
        parser.error("--surprisals scores nothing else: of the other options only --convention goes")
    if args.losses and len(args.checkpoints) + bool(args.ensemble) > 1:
        parser.error("--losses writes those of one model: give one checkpoint, or one --ensemble")
    if args.pair_scores and not args.pairs:
        parser.error("--pair-scores needs --pairs")
    if args.teacher_weights and not args.ensemble:
        parser.error("--teacher-weights needs --ensemble")
    return args


@dataclass(frozen=True)
class Entry:
    """A model to score: where it is from, its name, and the length of the chunks it reads."""

    path: str
    name: str
    model: nn.Module
    sequence_length: int


def entries_of(args, loaded):
    """An `Entry` for each checkpoint of the command line, the ensemble last.

    `loaded` is {path: (model, checkpoint)}.
    """
    lengths = {path: found["config"]["sequence_length"] for path, (_, found) in loaded.items()}
    entries = []
    for path in args.checkpoints:
        model, checkpoint = loaded[path]
        entries.append(Entry(path, checkpoint["model"]["name"], model, lengths[path]))
    if args.ensemble:
        members = [loaded[path][0] for path in args.ensemble]
        entries.append(
            Entry(
                " + ".join(args.ensemble),
                "ensemble",
                Ensemble(members, args.teacher_weights).eval(),
                min(lengths[path] for path in args.ensemble),
            )
        )
    return entries


def open_shard(args, tokenizer, first, own_data):
    """The dev shard to score, or None where there are pairs to score and no text asked for.

    `own_data` is the folder of data of the run of `first`, if its checkpoint says it. Raises
    `UserError` if the shard was asked for and is missing or of another tokenizer than `first`'s.
    """
    path = Path(args.data or "data/babylm") / "dev.bin"
    if args.data is None and isinstance(own_data, str):
        own = Path(own_data) / "dev.bin"
        if own.is_file() or not path.exists():
            path = own
        else:
            warn(f"{own}, the text of {first}'s run, is not here: {path} is scored")
    optional = args.data is None and bool(args.pairs)
    if optional and not path.exists():
        print(f"no {path}: minimal pairs only; --data DIR scores text", file=sys.stderr)
        return None
    if not path.exists() and args.data is None and isinstance(own_data, str):
        raise UserError(f"{path}, the text of {first}'s run, is not here: give --data DIR")
    shard = TokenShard(path)
    if shard.tokenizer == tokenizer.identity:
        return shard
    message = (
        f"{shard.path} was made with another tokenizer than {first}: encode the text with "
        "tokenize_corpus.py --tokenizer FILE, that of the checkpoint, which export_hf.py writes as "
        "tokenizer.model"
    )
    if not optional:
        raise UserError(message)
    warn(f"{message}; minimal pairs only")
    return None


@dataclass(frozen=True)
class DevText:
    """The text to score, and what was asked to be done with it."""

    shard: TokenShard
    shares: dict | None  # --weight-by
    fitted_on: TokenShard | None  # --temperature-scaled


def open_text(args, tokenizer, first, own_data):
    """The `DevText` of the command line, or None where only pairs are scored."""
    shard = open_shard(args, tokenizer, first, own_data)
    if shard is None:
        for option in ("weight_by", "temperature_scaled", "losses"):
            if getattr(args, option):
                raise UserError(f"--{option.replace('_', '-')} needs dev text: give --data DIR")
        return None
    shares = training_shares(args.weight_by, shard) if args.weight_by else None
    fitted_on = None
    if args.temperature_scaled:
        fitted_on = TokenShard(Path(args.temperature_scaled) / "dev.bin")
        if fitted_on.tokenizer != shard.tokenizer:
            raise UserError(f"{fitted_on.path} was made with another tokenizer than {shard.path}")
    return DevText(shard, shares, fitted_on)


def text_scores(entry, text, losses_path):
    """An entry's scores on the dev text; its losses go to `losses_path`, if that is not None."""
    losses, scaled = shard_losses(entry.model, text.shard, entry.sequence_length), None
    scores = corpus_scores(text.shard, losses, text.shares)
    if text.fitted_on is not None:
        temperature = fitted_temperature(entry.model, text.fitted_on, entry.sequence_length)
        model = Scaled(entry.model, temperature)
        scaled = shard_losses(model, text.shard, entry.sequence_length)
        scores["temperature_scaled"] = {
            "temperature": temperature,
            **corpus_scores(text.shard, scaled, text.shares),
        }
    if losses_path:
        files = [
            (file.name, stop, file.words / (file.stop - file.start))
            for file, _, stop in file_spans(text.shard)
        ]
        length, digest = entry.sequence_length, text.shard.digest
        write_losses(losses_path, digest, files, losses, length, scaled, text.shares)
    return scores


def compare_files(args):
    """Prints how the models of --compare differ from those of --against; returns exit code 0."""
    ones, others = ([read_losses(path) for path in paths] for paths in (args.compare, args.against))
    print("\n".join(aligned(comparison_table(ones, others))))
    print("nats per token, below 0 where the first is better; intervals of 95 %")
    print("train: sub-corpora weighted by their shares of the training text; plain: by their tokens")
    return 0


def main(argv=None):
    args = parse_arguments(argv)
    if args.compare:
        return compare_files(args)
    check_weights(args.teacher_weights, len(args.ensemble))
    pairs = {folder: read_pairs(folder, args.convention) for folder in args.pairs}
    paths = list(dict.fromkeys(args.checkpoints + args.ensemble))
    compute = choose_compute(args.device, args.precision)
    loaded = dict(zip(paths, load_all(paths, compute.device)))
    tokenizer = Tokenizer.of_checkpoint(loaded[paths[0]][1], paths[0])
    if args.surprisals:
        (entry,) = entries_of(args, loaded)
        with compute.autocast:
            write_surprisals(args.surprisals, args.text, entry.model, tokenizer, args.convention)
        return 0
    own_data = loaded[paths[0]][1]["config"].get("data")
    text = open_text(args, tokenizer, paths[0], own_data)
    results, scores = [], []
    for entry in entries_of(args, loaded):
        result = {"path": entry.path, "model": entry.name}
        result |= {"parameters": count_parameters(entry.model)}
        result |= dict.fromkeys(TEXT_SCORES) | {"per_file": {}}
        with compute.autocast:
            if text is not None:
                result |= text_scores(entry, text, args.losses)
            by_folder = {
                folder: pair_scores(entry.model, tokenizer, files, args.convention)
                for folder, files in pairs.items()
            }
        result["pairs"] = {f: accuracies(pairs[f], found) for f, found in by_folder.items()}
        results.append(result)
        scores.append(list(by_folder.values()))
    print("\n".join([*report(results), *field_tables(results)]))
    if args.json:
        how = {"convention": args.convention, "precision": compute.precision}
        write_json(args.json, how | {"checkpoints": results})
    if args.pair_scores:
        described = {"checkpoint": [r["path"] for r in results], "convention": args.convention}
        write_pair_scores(args.pair_scores, described, pairs, scores)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
