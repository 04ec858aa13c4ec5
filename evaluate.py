"""Scores checkpoints on a dev shard and on minimal pairs, side by side.

    python evaluate.py runs/*/best.pt --pairs blimp_filtered supplement_filtered --json scores.json
    python evaluate.py student.pt --ensemble gpt2.pt llama.pt      a student beside its teachers
    python evaluate.py student.pt --surprisals bits.tsv --text stimuli.txt       for psycholinguists
    python evaluate.py --compare student-*.npz --against baseline-*.npz     one --losses file per seed

Cross-entropy is in nats per token, over the chunks of training. Bits per byte and perplexity per
word, of the cleaned text, do not depend on the tokenizer. A language that is written without blanks
has no perplexity per word. A minimal pair is right if the acceptable sentence has the higher
log-probability; a tie counts half. Matrix products are in float32 by default: with fewer digits,
more pairs would tie.

--convention chooses the prefix of a sentence. `newline`, the default, is the context in which
sentences begin in training. The official BabyLM pipelines use other prefixes: 2023 has </s> (and
reports the mean over fields), 2024 has <s> and scores a blank before the sentence (the mean over
files), 2025 has none, so that the first token is not scored. `bos` is <s> alone, as in minicons
with bos_token=True. <s> and </s> never occur in training here: under 2023, 2024 and bos every
sentence follows an untrained embedding. 2025 counts `s-selection` as a field of its own; the others
count 12 fields, as BLiMP's tables do.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from data import TokenShard
from evaluation.minimal_pairs import (
    accuracies,
    pair_scores,
    pairs_digest,
    read_pairs,
    write_pair_scores,
    write_predictions,
)
from evaluation.perplexity import (
    corpus_scores,
    file_spans,
    fitted_temperature,
    shard_losses,
    training_shares,
)
from evaluation.scoring import CONVENTIONS, Ensemble, choose_convention
from evaluation.statistics import comparison_table, read_losses, write_losses
from evaluation.surprisal import write_surprisals
from model import check_weights, count_parameters, load_checkpoint
from tokenizer import Tokenizer
from training.device import choose_compute
from training.io import UserError, aligned, run_program, sha256, warn, write_json
from training.options import Parser

TEXT_SCORES = ("cross_entropy", "bits_per_byte", "perplexity", "perplexity_per_word")


# ---- command line


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models, one row each").add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="for example runs/llama-58m/best.pt")
    add("--ensemble", nargs="+", default=[], metavar="CHECKPOINT", help="add a row: the mean of their logits")
    add("--teacher-weights", nargs="+", type=float, metavar="X", help="weights in that mean (default: equal)")
    add = parser.add_argument_group("text and minimal pairs").add_argument
    add("--data", metavar="DIR", help="folder of dev.bin (default: that of the first run, else data/babylm)")
    add(
        "--weight-by", metavar="FILE", help="also the mean over sub-corpora by their shares of this train.bin"
    )
    add("--temperature-scaled", metavar="DIR", help="also the scores at the best temperature on DIR/dev.bin")
    pairs_help = "folders of *.jsonl in the form of BLiMP, EWoK or COMPS"
    add("--pairs", nargs="+", default=[], metavar="DIR", help=pairs_help)
    prefix_help = "prefix of each sentence or line, see above (default: newline)"
    add("--convention", choices=CONVENTIONS, default="newline", help=prefix_help)
    add = parser.add_argument_group("files to write").add_argument
    add("--json", metavar="FILE", help="all scores")
    add("--losses", metavar="FILE", help="the losses of one model by chunk (npz), for --compare")
    add("--pair-scores", metavar="FILE", help="both log-probabilities of each minimal pair (npz)")
    predictions_help = "choices on --pairs as BabyLM's pipelines of 2025 and 2026 write them into this folder"
    add("--predictions", metavar="results/MODEL/REVISION", help=predictions_help)
    add = parser.add_argument_group("other tasks, instead of scores").add_argument
    add("--surprisals", metavar="FILE", help="write a table with the bits of each word and token of --text")
    add("--text", metavar="FILE", help="text for --surprisals; each line is scored alone")
    add("--bow-correction", action="store_true", help="also bits corrected for the blank after each word")
    add("--compare", nargs="+", metavar="FILE", help="compare one model, by its --losses files, one per seed")
    add("--against", nargs="+", metavar="FILE", help="with another model, seeds in the same order")
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    precision_help = "of matrix products; bf16 is faster on a GPU, scores differ slightly (default: fp32)"
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help=precision_help)
    args = parser.parse_args(argv)
    for message, is_wrong in usage_errors(args).items():
        if is_wrong:
            parser.error(message)
    return args


def usage_errors(args):
    """{message: True if it applies} for options that do not go together."""
    outputs = (args.losses, args.pair_scores, args.json, args.predictions)
    scoring = any((args.data, args.weight_by, args.temperature_scaled, args.pairs, *outputs))
    num_models = len(args.checkpoints) + bool(args.ensemble)
    one_model = args.surprisals or args.losses or args.predictions
    return {
        "--compare and --against go together": (args.compare is None) != (args.against is None),
        "--surprisals and --text go together": (args.surprisals is None) != (args.text is None),
        "--compare goes with --against alone": args.compare and (num_models or scoring or args.surprisals),
        "--surprisals excludes options of scoring, but for --convention": args.surprisals and scoring,
        "give at least one checkpoint": not num_models and not args.compare,
        "--surprisals, --losses and --predictions take one checkpoint, or one --ensemble": num_models > 1
        and one_model,
        "--predictions needs --pairs and --convention 2025, which is that of 2026 too": args.predictions
        and not (args.pairs and args.convention == "2025"),
        "--bow-correction needs --surprisals": args.bow_correction and not args.surprisals,
        "--pair-scores needs --pairs": args.pair_scores and not args.pairs,
        "--teacher-weights needs --ensemble": args.teacher_weights and not args.ensemble,
    }


def check_outputs(args):
    """Raises `UserError` for a file that cannot be written, or that another option reads or writes."""
    inputs = [*args.checkpoints, *args.ensemble, args.text, args.weight_by]
    taken = {Path(path).resolve() for path in inputs if path}
    for name in ("json", "losses", "pair_scores", "surprisals"):
        if not (value := getattr(args, name)):
            continue
        path, option = Path(value).resolve(), f"--{name.replace('_', '-')} {value}"
        folder = next(parent for parent in path.parents if parent.exists())
        if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"{option} is a folder, or in one that cannot be written: give another file")
        if path in taken:
            raise UserError(f"{option} is a file of another option: give another file")
        taken.add(path)


# ---- models and text


class ScoredModel(NamedTuple):
    """A model to score."""

    path: str
    name: str
    model: nn.Module
    sequence_length: int  # of its training; of an ensemble the shortest
    digest: str | None = None  # of the checkpoint


def load_models(args, device):
    """(ScoredModels, the ensemble last; their tokenizer; the config of the first checkpoint).

    Raises `UserError` unless all have the same tokenizer.
    """
    loaded = {path: load_checkpoint(path) for path in dict.fromkeys(args.checkpoints + args.ensemble)}
    first, (_, first_checkpoint) = next(iter(loaded.items()))
    scored = {}
    for path, (model, checkpoint) in loaded.items():
        if checkpoint["tokenizer"]["identity"] != first_checkpoint["tokenizer"]["identity"]:
            raise UserError(f"{path} has another tokenizer than {first}: score them separately")
        name, length = checkpoint["model"]["name"], checkpoint["config"]["sequence_length"]
        scored[path] = ScoredModel(path, name, model.to(device), length, checkpoint["digest"])
    models = [scored[path] for path in args.checkpoints]
    if args.ensemble:
        members = [scored[path] for path in args.ensemble]
        ensemble = Ensemble([member.model for member in members], args.teacher_weights).eval()
        length = min(member.sequence_length for member in members)
        models.append(ScoredModel(" + ".join(args.ensemble), "ensemble", ensemble, length))
    return models, Tokenizer.of_checkpoint(first_checkpoint, first), first_checkpoint["config"]


def open_dev_text(args, tokenizer, config):
    """The dev shard of --data, else of the first checkpoint's run, else of data/babylm.

    If it is missing or of another tokenizer, raises `UserError` if an option needs it; otherwise
    warns and returns None.
    """
    path = Path(str(args.data or config.get("data") or "data/babylm")) / "dev.bin"
    try:
        shard = TokenShard(path)
        if shard.tokenizer != tokenizer.identity:
            raise UserError(
                f"{path} was made with another tokenizer than the checkpoint: encode the text with "
                "tokenize_corpus.py --tokenizer FILE; export_hf.py writes that of a checkpoint"
            )
    except UserError as error:
        if not args.pairs or any((args.data, args.weight_by, args.temperature_scaled, args.losses)):
            raise UserError(f"{error}; --data DIR names the text to score") from error
        warn(f"{error}; only minimal pairs are scored")
        return None
    return shard


# ---- scores


def text_scores(scored, shard, args, precision):
    """The scores of a model on the dev shard, as the options ask; writes --losses."""
    shares = training_shares(args.weight_by, shard) if args.weight_by else None
    fitted_on = TokenShard(Path(args.temperature_scaled) / "dev.bin") if args.temperature_scaled else None
    if fitted_on and fitted_on.tokenizer != shard.tokenizer:
        raise UserError(f"{fitted_on.path} was made with another tokenizer than {shard.path}")
    length, temperatures = scored.sequence_length, [1.0]
    if fitted_on:
        temperatures.append(fitted_temperature(scored.model, fitted_on, length))
    losses, *scaled = shard_losses(scored.model, shard, length, temperatures)
    scores = corpus_scores(shard, losses, shares)
    if fitted_on:
        scores["temperature_scaled"] = {"temperature": temperatures[1], "fitted_on": fitted_on.digest}
        scores["temperature_scaled"] |= corpus_scores(shard, *scaled, shares)
    if args.losses:
        files = [  # without words, blocks of the bootstrap are counted in tokens
            (file.name, stop, (file.words or stop - start) / (stop - start))
            for file, start, stop in file_spans(shard)
        ]
        scaled_losses = scaled[0] if scaled else None
        write_losses(args.losses, shard.digest, files, losses, length, scaled_losses, shares, precision)
    return scores


def format_table(results):
    """The lines of a table of the results, one row per model."""
    folders = list(results[0]["pairs"])
    weighted = ["weighted_cross_entropy"] if "weighted_cross_entropy" in results[0] else []
    columns = {"files": "accuracy_over_files", "fields": "accuracy_over_fields", "ties": "tie_rate"}
    heading = ["model", "parameters", "cross-entropy", "bits/byte", "perplexity", "per word"]
    heading += ["weighted" for _ in weighted]
    rows = [heading + [f"{Path(folder).name} {column}" for folder in folders for column in columns]]
    for r in results:
        cells = [f"{r['model']} ({r['path']})", f"{r['parameters']:,}"]
        cells += ["-" if r[key] is None else f"{r[key]:.4g}" for key in (*TEXT_SCORES, *weighted)]
        cells += [f"{r['pairs'][f][key]:.4f}" for f in folders for key in columns.values()]
        rows.append(cells)
    return aligned(rows)


def format_fields(results):
    """The lines of a table per folder of pairs: accuracies by field, one column per model."""
    lines = []
    for folder in results[0]["pairs"]:
        rows = [[f"{Path(folder).name}, by field", *(r["model"] for r in results)]]
        for field in results[0]["pairs"][folder]["per_field"]:
            rows.append([field, *(f"{r['pairs'][folder]['per_field'][field]:.4f}" for r in results)])
        lines += ["", *aligned(rows)]
    return lines


# ---- the three programs


def score(args, compute):
    """Scores models on text and minimal pairs; prints tables and writes files."""
    pairs = {folder: read_pairs(folder, args.convention) for folder in args.pairs}
    models, tokenizer, config = load_models(args, compute.device)
    convention = choose_convention(tokenizer, args.convention) if pairs else args.convention
    shard = open_dev_text(args, tokenizer, config)
    results, log_p = [], []
    for scored in models:
        result = {"path": scored.path, "digest": scored.digest, "model": scored.name}
        result["parameters"] = count_parameters(scored.model)
        result |= {**dict.fromkeys(TEXT_SCORES), "per_file": {}}
        with compute.autocast:
            if shard is not None:
                result |= text_scores(scored, shard, args, compute.precision)
            by_folder = [pair_scores(scored.model, tokenizer, p, convention) for p in pairs.values()]
        result["pairs"] = {f: accuracies(files, s) for (f, files), s in zip(pairs.items(), by_folder)}
        results.append(result)
        log_p.append(by_folder)
    print("\n".join([*format_table(results), *format_fields(results)]))
    if args.json:
        digests = {
            "text": shard and shard.digest,
            "pairs": {folder: pairs_digest(files) for folder, files in pairs.items()},
            "losses": args.losses and sha256(Path(args.losses).read_bytes()),
        }
        settings = {"convention": convention, "precision": compute.precision, "digests": digests}
        write_json(args.json, settings | {"checkpoints": results})
    if args.predictions:
        write_predictions(args.predictions, pairs, log_p[0])
    if args.pair_scores:
        write_pair_scores(args.pair_scores, [r["path"] for r in results], convention, pairs, log_p)


def print_comparison(paths, baseline_paths):
    """Prints how a model differs from another, from files of losses, one per seed for each."""
    losses, baseline = ([read_losses(path) for path in side] for side in (paths, baseline_paths))
    seeds = {tuple(sha256(Path(path).read_bytes()) for path in pair) for pair in zip(paths, baseline_paths)}
    if len(seeds) < min(len(paths), len(baseline_paths)):
        raise UserError("--compare and --against have the same two files twice: give each seed once")
    print("\n".join(aligned(comparison_table(losses, baseline))))
    print("nats per token, below 0 if the first model is better; 95 % intervals")
    print("train: sub-corpora weighted by their shares of the training text; plain: by their tokens")


def main(argv=None):
    args = parse_arguments(argv)
    if args.compare:
        return print_comparison(args.compare, args.against)
    check_outputs(args)
    check_weights(args.teacher_weights, len(args.ensemble))
    compute = choose_compute(args.device, args.precision)
    if not args.surprisals:
        return score(args, compute)
    (scored,), tokenizer, _ = load_models(args, compute.device)
    convention = choose_convention(tokenizer, args.convention)
    with compute.autocast:
        write_surprisals(args.surprisals, args.text, scored.model, tokenizer, convention, args.bow_correction)


if __name__ == "__main__":
    sys.exit(run_program(main))
