"""Scoring minimal pairs: batches of one length, beside one sentence at a time, beside padding.

    python benchmarks/evaluation.py --pairs blimp_filtered --tokenizer data/babylm/tokenizer.model

Without --pairs, on the toy corpus's own. The model's weights are as initialised: they do not change
what it costs. Sentences are drawn evenly from all files; every way must give the same scores.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_toy_corpus  # noqa: E402
from benchmarks.contest import describe  # noqa: E402
from data import Tokenizer  # noqa: E402
from evaluate import read_pairs, sentence_scores  # noqa: E402
from model import PRESETS, build_model, choose_device  # noqa: E402
from tokenize_corpus import read_folder, train_tokenizer  # noqa: E402

PADDED_BATCH = 64  # sentences


def one_at_a_time(model, tokenizer, sentences):
    return torch.cat([sentence_scores(model, tokenizer, [s]) for s in sentences])


@torch.no_grad()
def padded(model, tokenizer, sentences, longest):
    """Batches in the order given, each padded to the longest sentence of all."""
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", choices=PRESETS, default="llama-16m")
    parser.add_argument("--pairs", metavar="DIR", help="folder of *.jsonl")
    parser.add_argument("--tokenizer", metavar="FILE", help="for --pairs")
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if bool(args.pairs) != bool(args.tokenizer):
        parser.error("--pairs and --tokenizer go together")
    device = choose_device(args.device)
    if args.pairs:
        files, tokenizer = read_pairs(args.pairs), Tokenizer.load(args.tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            make_toy_corpus.main(["--out", folder, "--words", "20000"])
            files = read_pairs(Path(folder) / "pairs")
            texts = list(read_folder(Path(folder) / "train").values())
            tokenizer = Tokenizer(train_tokenizer(texts, 1000))
    sentences = [s for pairs in files.values() for pair in pairs for s in (pair.good, pair.bad)]
    sentences = sentences[:: max(1, len(sentences) // args.sentences)]
    lengths = [len(ids) for ids in tokenizer.encode(sentences)]
    model = build_model(args.model, tokenizer.vocabulary_size).to(device).eval()

    ways = {
        "by length": lambda: sentence_scores(model, tokenizer, sentences),
        "one at a time": lambda: one_at_a_time(model, tokenizer, sentences),
        "padded to the longest": lambda: padded(model, tokenizer, sentences, max(lengths)),
    }
    seconds, scores = {name: [] for name in ways}, {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - started)
    summary = describe(device) | {"model": args.model, "sentences": len(sentences)}
    mean = sum(lengths) / len(lengths)
    print(f"{args.model}, {len(sentences)} sentences of {mean:.1f} tokens, at most {max(lengths)}")
    ours = sorted(seconds["by length"])[args.rounds // 2]
    for name in ways:
        middle = sorted(seconds[name])[args.rounds // 2]
        difference = (scores[name] - scores["by length"]).abs().max().item()
        summary[name] = {"seconds": middle, "ratio": middle / ours, "difference": difference}
        print(
            f"{name:22} {middle:8.2f} s   {middle / ours:5.2f} times   "
            f"largest difference {difference:.1e} nats"
        )
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
