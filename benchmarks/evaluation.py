"""Time the scoring of minimal pairs: ours, two simpler ways, and what a user would pick instead.

    python -m benchmarks.evaluation --model llama-16m

The pairs are the toy corpus's. The model had one step of training, which does not change the time.
minicons and lm-eval (`pip install ".[scoring]"`) read the folder that export_hf.py writes. They and
the padded way get as many sentences at a time. Loading is not in the time. All ways must give the
same scores, after <s>, which is the prefix of both programs.
"""

import contextlib
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measurement import Results, benchmark_parser
from benchmarks.official import ours
from evaluation.minimal_pairs import read_pairs, sentence_scores
from model import PRESETS, load_checkpoint
from tokenizer import Tokenizer
from training.device import choose_device
from training.io import run_program

SENTENCES, PADDED_BATCH, CONVENTION = 2000, 64, "bos"
ROUNDS = 2


def make_checkpoint(work, preset):
    """Makes the toy corpus and a model of it in the folder `work`. Returns the path of the model."""
    ours("make_toy_corpus --out WORK/toy --words 20000", work)
    corpus = "--train WORK/toy/train --dev WORK/toy/dev --out WORK/data --vocab-size 1000"
    ours(f"tokenize_corpus {corpus}", work)
    options = "--steps 1 --batch-size 1 --data WORK/data --out WORK/run --device cpu"
    ours(f"train --model {preset} {options}", work)
    return work / "run" / "best.pt"


def toy_sentences(folder):
    """Returns sentences of the pairs in a folder, evenly from all files."""
    pairs = [pair for file_pairs in read_pairs(folder).values() for pair in file_pairs]
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    return sentences[:: max(1, len(sentences) // SENTENCES)]


def batches(sentences):
    """Returns the sentences in their order, as lists of `PADDED_BATCH`."""
    return [sentences[i : i + PADDED_BATCH] for i in range(0, len(sentences), PADDED_BATCH)]


@torch.no_grad()
def padded_scores(model, tokenizer, sentences, longest):
    """Returns the sentences' scores, computed in the given order and padded to the longest of all."""
    device = next(model.parameters()).device
    scores = []
    for batch in batches(sentences):
        ids = [[tokenizer.bos_id, *s] for s in tokenizer.encode(batch)]
        targets = torch.tensor([s[1:] + [-100] * (longest + 1 - len(s)) for s in ids])
        tokens = torch.tensor([s[:-1] + [0] * (longest + 1 - len(s)) for s in ids])
        logits = model(tokens.to(device)).float().transpose(1, 2)  # (B, V, T)
        losses = F.cross_entropy(logits, targets.to(device), reduction="none").cpu()
        scores.append(-losses.double().sum(1))
    return torch.cat(scores)


# ---- what a user would pick instead: functions that return the sentences' scores


def minicons_way(folder, device, sentences):
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(str(folder), str(device))

    def score():
        scores = []
        for batch in batches(sentences):
            scores += scorer.sequence_score(batch, reduction=lambda x: x.sum().item(), bos_token=True)
        return torch.tensor(scores, dtype=torch.float64)

    return score


def lm_eval_way(folder, device, sentences):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(folder), device=str(device), dtype="float32", batch_size=PADDED_BATCH)
    requests = [Instance("loglikelihood", {}, ("", sentence), i) for i, sentence in enumerate(sentences)]

    def score():
        results = model.loglikelihood(requests, disable_tqdm=True)
        return torch.tensor([log_p for log_p, _ in results], dtype=torch.float64)

    return score


OTHERS = {"minicons": minicons_way, "lm_eval": lm_eval_way}  # by the name of the module


def prepare(preset, device):
    """Returns {name: function that returns the sentences' scores}, ours first, and a description."""
    installed = [name for name in OTHERS if importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        work = Path(folder)
        path = make_checkpoint(work, preset)
        model, checkpoint = load_checkpoint(path)
        model, tokenizer = model.to(device), Tokenizer.of_checkpoint(checkpoint, path)
        sentences = toy_sentences(work / "toy" / "pairs")
        if installed:
            ours("export_hf WORK/run/best.pt --out WORK/model", work)
        others = {name: OTHERS[name](work / "model", device, sentences) for name in installed}
    longest = max(map(len, tokenizer.encode(sentences)))

    def scores_of(some):
        return sentence_scores(model, tokenizer, some, CONVENTION)

    ways = {
        "by length": lambda: scores_of(sentences),
        "one at a time": lambda: torch.cat([scores_of([sentence]) for sentence in sentences]),
        "padded to the longest": lambda: padded_scores(model, tokenizer, sentences, longest),
    }
    return ways | others, f"{preset}, {len(sentences)} sentences of at most {longest} tokens"


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", choices=PRESETS, default="llama-16m", help="preset (default: llama-16m)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    results = Results(args, device)
    ways, description = prepare(args.model, device)
    print(description, flush=True)
    scores, seconds = {}, {name: math.inf for name in ways}
    for name in [*ways] * ROUNDS:
        start = time.perf_counter()
        scores[name] = ways[name]()
        seconds[name] = min(seconds[name], time.perf_counter() - start)
    rows = [["way", "seconds", "times", "largest difference in nats"]]
    for name in ways:
        ratio = seconds[name] / seconds["by length"]
        difference = (scores[name] - scores["by length"]).abs().max().item()
        results.add(name, {"seconds": seconds[name], "ratio": ratio, "difference": difference})
        rows.append([name, f"{seconds[name]:.2f}", f"{ratio:.2f}", f"{difference:.1e}"])
    rows += [[name, "not installed", "-", "-"] for name in OTHERS if name not in ways]
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
