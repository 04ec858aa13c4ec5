"""How cost grows: with tokens, vocabulary and teachers in the loss, with text in all the rest.

    python benchmarks/scaling.py

Each line is the best of several runs of the real thing on invented text, from small to large, and
the exponent p of seconds ~ size^p fitted to them: 1 is linear.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import make_toy_corpus  # noqa: E402
import tokenize_corpus  # noqa: E402
import train  # noqa: E402
from benchmarks.contest import describe  # noqa: E402
from data import Tokenizer, TokenShard  # noqa: E402
from evaluate import corpus_scores, sentence_scores  # noqa: E402
from loss import ensemble_kl  # noqa: E402
from model import build_model, choose_device  # noqa: E402


def exponent(sizes, seconds):
    """The slope of log seconds against log size."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def best_of(function, runs):
    """The least seconds of several calls: what the work itself takes."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def loss_seconds(device, tokens=1024, vocabulary=8000, teachers=2):
    """One forward and backward pass of the fused loss."""
    hidden = torch.randn(tokens, 256, device=device, requires_grad=True)
    head = torch.randn(vocabulary, 256, device=device, requires_grad=True)
    taught = [
        (torch.randn(tokens, 256, device=device), torch.randn(vocabulary, 256, device=device), 1.0)
        for _ in range(teachers)
    ]
    targets = torch.randint(vocabulary, (tokens,), device=device)
    autocast = train.autocast_for(device, train.choose_precision("auto", device))

    def once():
        with autocast:
            terms = ensemble_kl(
                hidden, head, taught, targets, alpha=0.5, temperature=2.0, num_targets=tokens,
                kl_denominator=tokens / 128,
            )  # fmt: skip
        terms["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    return best_of(once, 5)


def corpus_seconds(folder, words, device):
    """Seconds of tokenising, opening and scoring a toy corpus of so many words."""
    corpus, data = folder / f"corpus-{words}", folder / f"data-{words}"
    make_toy_corpus.main(["--out", str(corpus), "--words", str(words)])
    arguments = ["--train", str(corpus / "train"), "--dev", str(corpus / "train")]
    arguments += ["--out", str(data), "--vocab-size", "1000"]
    started = time.perf_counter()
    tokenize_corpus.main(arguments)
    seconds = {"tokenising": time.perf_counter() - started}
    seconds["opening a shard"] = best_of(lambda: TokenShard(data / "train.bin"), 5)
    shard = TokenShard(data / "dev.bin")
    model = build_model("llama-tiny", shard.vocabulary_size).to(device).eval()
    seconds["scoring text"] = best_of(lambda: corpus_scores(model, shard, 128), 1)
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    lines = (corpus / "train" / "stories.train").read_text(encoding="utf-8").split("\n")
    sentences = [line for line in lines if line][: words // 20]
    score = lambda: sentence_scores(model, tokenizer, sentences)  # noqa: E731
    seconds["scoring sentences"] = best_of(score, 1)
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--words", type=int, nargs="+", default=[50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    device = choose_device(args.device)
    summary = describe(device) | {"scaling": {}}
    rows = {
        f"loss: {key}": (sizes, [loss_seconds(device, **{key: size}) for size in sizes])
        for key, sizes in {
            "tokens": (1024, 2048, 4096, 8192),
            "vocabulary": (4000, 8000, 16_000, 32_000),
            "teachers": (1, 2, 4, 8),
        }.items()
    }
    # What the programs say is no part of the table.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        measured = [corpus_seconds(Path(folder), words, device) for words in args.words]
    rows |= {name: (args.words, [m[name] for m in measured]) for name in measured[0]}
    print(f"{'what':20} {'sizes':>32} {'seconds':>40} {'exponent':>9}")
    for name, (sizes, seconds) in rows.items():
        fitted = exponent(sizes, seconds)
        summary["scaling"][name] = {"sizes": sizes, "seconds": seconds, "exponent": fitted}
        cells = ", ".join(f"{s:,}" for s in sizes), ", ".join(f"{s:.4f}" for s in seconds)
        print(f"{name:20} {cells[0]:>32} {cells[1]:>40} {fitted:9.2f}")
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
