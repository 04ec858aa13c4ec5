"""Scoring minimal pairs: batches of one length, beside one sentence at a time, beside padding.

    python -m benchmarks.evaluation --pairs blimp_filtered --tokenizer data/babylm/tokenizer.model

Without --pairs, the toy corpus's own are scored. The model's weights are as initialised: they do
not change what it costs. Sentences are drawn evenly from all files; every way must give the same
scores.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

import make_toy_corpus
from benchmarks.findings import Findings, benchmark_parser, print_table
from data import Tokenizer
from evaluation.minimal_pairs import read_pairs, sentence_scores
from model import PRESETS, build_model
from tokenize_corpus import read_folder, train_tokenizer
from training.device import choose_device
from training.io import run_program

PADDED_BATCH = 64  # sentences


def one_at_a_time(model, tokenizer, sentences):
    """The sentences' scores, each in a batch of its own."""
    return torch.cat([sentence_scores(model, tokenizer, [s]) for s in sentences])


@torch.no_grad()
def padded(model, tokenizer, sentences, longest):
    """The sentences' scores, in batches in the order given, padded to the longest of all."""
    device = next(model.parameters()).device
    prefix, scores = tokenizer.encode("\n"), []
    for i in range(0, len(sentences), PADDED_BATCH):
        ids = [prefix + s for s in tokenizer.encode(sentences[i : i + PADDED_BATCH])]
        targets = torch.tensor([s[1:] + [-100] * (longest + 1 - len(s)) for s in ids])
        tokens = torch.tensor([s[:-1] + [0] * (longest + 1 - len(s)) for s in ids])
        logits = model(tokens.to(device)).float().transpose(1, 2)  # (B, V, T)
        losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu()
        scores.append(-losses.double().sum(1))
    return torch.cat(scores)


def pairs_and_tokenizer(args):
    """The pairs of each file, and the tokenizer: those of the arguments, or the toy corpus's."""
    if args.pairs:
        return read_pairs(args.pairs), Tokenizer.load(args.tokenizer)
    # What the program says is no part of the table.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        make_toy_corpus.main(["--out", folder, "--words", "20000"])
        sources = read_folder(Path(folder) / "train").values()
        texts = (block for source in sources for block in source.blocks())
        return read_pairs(Path(folder) / "pairs"), Tokenizer(train_tokenizer(texts, 1000))


def take_turns(ways, rounds):
    """{name: median seconds} and {name: scores} of {name: function that returns scores}."""
    seconds, scores = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, scores


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", choices=PRESETS, default="llama-16m", help="preset (default: llama-16m)")
    parser.add_argument("--pairs", metavar="DIR", help="folder of minimal pairs, *.jsonl")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model that --pairs needs")
    parser.add_argument(
        "--sentences", type=int, default=2000, help="least number of sentences (default: 2000)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns that each way takes (default: 3)")
    args = parser.parse_args(argv)
    if bool(args.pairs) != bool(args.tokenizer):
        parser.error("--pairs and --tokenizer go together")
    return args


def compare(ways, rounds, findings):
    """Times {name: function that returns scores}, `by length` among them, and prints a table."""
    seconds, scores = take_turns(ways, rounds)
    rows = [["way", "seconds", "times", "largest difference in nats"]]
    for name in ways:
        times = seconds[name] / seconds["by length"]
        difference = (scores[name] - scores["by length"]).abs().max().item()
        findings.add(name, {"seconds": seconds[name], "ratio": times, "difference": difference})
        rows.append([name, f"{seconds[name]:.2f}", f"{times:.2f}", f"{difference:.1e}"])
    print_table(rows)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    findings = Findings(args, device)
    files, tokenizer = pairs_and_tokenizer(args)
    sentences = [text for pair in chain(*files.values()) for text in (pair.good, pair.bad)]
    sentences = sentences[:: max(1, len(sentences) // args.sentences)]
    lengths = [len(ids) for ids in tokenizer.encode(sentences)]
    model = build_model(args.model, tokenizer.vocabulary_size).to(device).eval()
    findings.add("setting", {"model": args.model, "sentences": len(sentences)})
    print(
        f"{args.model}, {len(sentences)} sentences of {statistics.mean(lengths):.1f} tokens, "
        f"at most {max(lengths)}",
        flush=True,
    )
    ways = {
        "by length": lambda: sentence_scores(model, tokenizer, sentences),
        "one at a time": lambda: one_at_a_time(model, tokenizer, sentences),
        "padded to the longest": lambda: padded(model, tokenizer, sentences, max(lengths)),
    }
    compare(ways, args.rounds, findings)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
