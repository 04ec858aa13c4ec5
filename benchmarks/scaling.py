"""How cost grows: with tokens, vocabulary and teachers in the loss, with text in all the rest.

    python -m benchmarks.scaling

Each line is the best of several calls of the real thing on invented text, from small to large, and
the exponent p of seconds ~ size^p fitted to them: 1 is linear.
"""

import contextlib
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import make_toy_corpus
import tokenize_corpus
from benchmarks.findings import Findings, benchmark_parser, print_table
from data import TokenShard
from evaluation.minimal_pairs import sentence_scores
from evaluation.perplexity import shard_losses
from loss import distillation_loss
from model import build_model
from tokenizer import Tokenizer
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

LOSS_SIZES = {
    "tokens": (1024, 2048, 4096, 8192),
    "vocabulary": (4000, 8000, 16_000, 32_000),
    "teachers": (1, 2, 4, 8),
}


def exponent(sizes, seconds):
    """The slope of log seconds against log size."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def best_of(function, calls):
    """The least seconds of several calls: what the work itself takes."""
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def loss_seconds(device, tokens=1024, vocabulary=8000, teachers=2):
    """Seconds of one forward and backward pass of the fused loss."""
    hidden = torch.randn(tokens, 256, device=device, requires_grad=True)
    head = torch.randn(vocabulary, 256, device=device, requires_grad=True)
    taught = [
        (torch.randn(tokens, 256, device=device), torch.randn(vocabulary, 256, device=device), 1.0)
        for _ in range(teachers)
    ]
    targets = torch.randint(vocabulary, (tokens,), device=device)
    autocast = autocast_for(device, choose_precision("auto", device))

    def once():
        with autocast:
            terms = distillation_loss(
                hidden,
                head,
                taught,
                targets,
                alpha=0.5,
                temperature=2.0,
                num_targets=tokens,
                kl_denominator=tokens / 128,
            )
        terms["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    return best_of(once, 5)


def corpus_seconds(folder, words, device):
    """Seconds of tokenising, opening and scoring a toy corpus of so many words, {what: seconds}."""
    text = folder / "text"
    make_toy_corpus.main(["--out", str(text), "--words", str(words)])
    arguments = ["--train", str(text / "train"), "--dev", str(text / "dev")]
    arguments += ["--out", str(folder), "--vocab-size", "1000"]
    seconds = {"tokenising": best_of(lambda: tokenize_corpus.main(arguments), 1)}
    seconds["opening a shard"] = best_of(lambda: TokenShard(folder / "train.bin"), 5)
    shard, tokenizer = TokenShard(folder / "dev.bin"), Tokenizer.load(folder / "tokenizer.model")
    model = build_model("llama-tiny", shard.vocabulary_size).to(device).eval()
    seconds["scoring text"] = best_of(lambda: shard_losses(model, shard, 128), 1)
    lines = (text / "train" / "stories.train").read_text(encoding="utf-8").split("\n")
    sentences = [line for line in lines if line][: words // 20]
    seconds["scoring sentences"] = best_of(lambda: sentence_scores(model, tokenizer, sentences), 1)
    return seconds


def measurements(words, device):
    """Yields a name, sizes and the seconds of each size for everything that is measured."""
    for name, sizes in LOSS_SIZES.items():
        yield f"loss: {name}", sizes, [loss_seconds(device, **{name: size}) for size in sizes]
    # What the programs say is no part of the table.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        measured = [corpus_seconds(Path(folder) / str(number), number, device) for number in words]
    for name in measured[0]:
        yield name, words, [seconds[name] for seconds in measured]


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--words",
        type=int,
        nargs="+",
        default=[50_000, 100_000, 200_000, 400_000],
        help="sizes of the toy corpora in words (default: 50000 100000 200000 400000)",
    )
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    findings = Findings(args, device)
    rows = [["what", "sizes", "seconds", "exponent"]]
    for name, sizes, seconds in measurements(args.words, device):
        fitted = exponent(sizes, seconds)
        findings.add(name, {"sizes": sizes, "seconds": seconds, "exponent": fitted})
        cells = ", ".join(f"{s:,}" for s in sizes), ", ".join(f"{s:.4f}" for s in seconds)
        rows.append([name, *cells, f"{fitted:.2f}"])
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
