"""Time the scoring of minimal pairs: batches of one length, one sentence at a time, and padded batches.

    python -m benchmarks.evaluation --model llama-16m

The pairs are the toy corpus's. The model is not trained, which does not change the time. All three
ways must give the same scores.
"""

import contextlib
import sys
import tempfile
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

import make_toy_corpus
import tokenize_corpus
from benchmarks.measurement import Results, benchmark_parser
from evaluation.minimal_pairs import read_pairs, sentence_scores
from model import PRESETS, build_model
from tokenizer import Tokenizer
from training.device import choose_device
from training.io import run_program

SENTENCES, PADDED_BATCH = 2000, 64
CALLS = 2


def toy_sentences():
    """Returns sentences of the toy corpus's pairs, evenly from all files, and a tokenizer of its text."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        make_toy_corpus.main(["--out", folder, "--words", "20000"])
        texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder, "train").iterdir())]
        tokenizer = Tokenizer.read(tokenize_corpus.train_tokenizer(texts, 1000))
        pairs = [pair for file_pairs in read_pairs(Path(folder, "pairs")).values() for pair in file_pairs]
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    return sentences[:: max(1, len(sentences) // SENTENCES)], tokenizer


@torch.no_grad()
def padded_scores(model, tokenizer, sentences, longest):
    """Returns the sentences' scores, computed in the given order and padded to the longest of all."""
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


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", choices=PRESETS, default="llama-16m", help="preset (default: llama-16m)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    results = Results(args, device)
    sentences, tokenizer = toy_sentences()
    longest = max(map(len, tokenizer.encode(sentences)))
    model = build_model(args.model, tokenizer.vocabulary_size).to(device).eval()
    print(f"{args.model}, {len(sentences)} sentences of at most {longest} tokens", flush=True)
    ways = {
        "by length": lambda: sentence_scores(model, tokenizer, sentences),
        "one at a time": lambda: torch.cat([sentence_scores(model, tokenizer, [s]) for s in sentences]),
        "padded to the longest": lambda: padded_scores(model, tokenizer, sentences, longest),
    }
    rows, scores, seconds = [["way", "seconds", "times", "largest difference in nats"]], {}, {}
    for name, way in ways.items():
        seconds[name] = min(timeit.repeat(way, number=1, repeat=CALLS))
        scores[name] = way()
        ratio = seconds[name] / seconds["by length"]
        difference = (scores[name] - scores["by length"]).abs().max().item()
        results.add(name, {"seconds": seconds[name], "ratio": ratio, "difference": difference})
        rows.append([name, f"{seconds[name]:.2f}", f"{ratio:.2f}", f"{difference:.1e}"])
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
