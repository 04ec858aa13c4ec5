"""Measure how time grows with size: the loss with tokens, vocabulary and teachers, the rest with text.

    python -m benchmarks.scaling

A row has the fastest of several calls for each size, and the exponent p of seconds ~ size^p fitted to
them. p = 1 is linear. The text is that of the toy corpus.
"""

import contextlib
import math
import statistics
import sys
import tempfile
from pathlib import Path
from timeit import repeat, timeit

import torch

import make_toy_corpus
import tokenize_corpus
from benchmarks.measurement import Results, benchmark_parser
from benchmarks.workers import synchronize
from data import TokenShard
from evaluation.minimal_pairs import sentence_scores
from evaluation.perplexity import shard_losses
from loss import Coefficients, distillation_loss
from model import build_model
from tokenizer import Tokenizer
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

LOSS_SIZES = {
    "tokens": (1024, 2048, 4096, 8192),
    "vocabulary": (4000, 8000, 16_000, 32_000),
    "teachers": (1, 2, 4, 8),
}
WORDS = (50_000, 100_000, 200_000, 400_000)  # of toy corpora


def loss_seconds(device, tokens=1024, vocabulary=8000, teachers=2):
    """Returns the seconds of one forward and backward pass of the fused loss."""

    def random(rows, **options):
        return torch.randn(rows, 256, device=device, **options)

    hidden, head = random(tokens, requires_grad=True), random(vocabulary, requires_grad=True)
    teacher_outputs = [(random(tokens), random(vocabulary), 1.0) for _ in range(teachers)]
    targets = torch.randint(vocabulary, (tokens,), device=device)
    coefficients = Coefficients(alpha=0.5, tau=2.0, num_targets=tokens, kl_denominator=tokens / 128)
    autocast = autocast_for(device, choose_precision("auto", device))

    def compute():
        with autocast:
            terms = distillation_loss(hidden, head, teacher_outputs, targets, coefficients)
        terms["loss"].backward()
        synchronize(device)

    compute()
    return min(repeat(compute, number=1, repeat=5))


def corpus_seconds(folder, words, device):
    """Returns {step: seconds} of tokenising, opening and scoring a toy corpus of `words` words."""
    text = folder / "text"
    make_toy_corpus.main(["--out", str(text), "--words", str(words)])
    arguments = ["--train", str(text / "train"), "--dev", str(text / "dev")]
    arguments += ["--out", str(folder), "--vocab-size", "1000"]
    seconds = {"tokenising": timeit(lambda: tokenize_corpus.main(arguments), number=1)}
    seconds["opening a shard"] = min(repeat(lambda: TokenShard(folder / "train.bin"), number=1, repeat=5))
    shard, tokenizer = TokenShard(folder / "dev.bin"), Tokenizer.load(folder / "tokenizer.model")
    model = build_model("llama-tiny", shard.vocabulary_size).to(device).eval()
    seconds["scoring text"] = timeit(lambda: shard_losses(model, shard, 128), number=1)
    lines = (text / "train" / "stories.train").read_text(encoding="utf-8").split("\n")
    sentences = [line for line in lines if line][: words // 20]
    seconds["scoring sentences"] = timeit(lambda: sentence_scores(model, tokenizer, sentences), number=1)
    return seconds


def main(argv=None):
    args = benchmark_parser(__doc__).parse_args(argv)
    device = choose_device(args.device)
    results = Results(args, device)
    rows = [["measured", "sizes", "seconds", "exponent"]]

    def add(name, sizes, seconds):
        logarithms = (list(map(math.log, values)) for values in (sizes, seconds))
        slope = statistics.linear_regression(*logarithms).slope
        results.add(name, {"sizes": sizes, "seconds": seconds, "exponent": slope})
        cells = ", ".join(f"{n:,}" for n in sizes), ", ".join(f"{s:.4f}" for s in seconds)
        rows.append([name, *cells, f"{slope:.2f}"])

    for name, sizes in LOSS_SIZES.items():
        add(f"loss: {name}", sizes, [loss_seconds(device, **{name: size}) for size in sizes])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        corpora = [corpus_seconds(Path(folder) / str(words), words, device) for words in WORDS]
    for name in corpora[0]:
        add(name, WORDS, [seconds[name] for seconds in corpora])
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
