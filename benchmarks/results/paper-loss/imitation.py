"""Measures how closely students imitate the ensemble of their teachers, and what their heads could.

    PYTHONPATH=. python benchmarks/results/paper-loss/imitation.py --data data/babylm \\
        --teachers gpt2.pt llama.pt --students student.pt

First table: cross-entropy, and KL(ensemble || student) at temperatures 1 and 2, in nats per token, on
the same number of chunks of train.bin and of dev.bin. A student that imitates training text well and
validation text badly lacks data; one that is equally far from the ensemble on both lacks capacity or steps.

Second table: the ensemble's own logits, restricted to rank r. A student of hidden size r has logits of
rank r at most. "cut" projects the logits on their r principal directions of training text; "trained"
then improves the two factors with Adam on the KL at temperature 2. A student need not be a linear
function of the ensemble's logits: the table estimates what rank r costs, and bounds nothing.
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F

from data import open_corpus
from loss import ensemble_logits
from model import load_checkpoint
from training.io import aligned, run_program

BATCH = 16  # chunks
TRAINED_TEMPERATURE = 2.0


def divergence(logits, other, temperature):
    """KL(softmax(logits / tau) || softmax(other / tau)) of each position: 2 x (..., V) -> (...)."""
    log_p = F.log_softmax(logits / temperature, dim=-1)
    log_q = F.log_softmax(other / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def sample(shard, num_chunks, length, seed):
    """Tokens and targets (N, T) of random chunks, the same for the same seed."""
    available = (shard.num_tokens - 1) // length
    generator = np.random.default_rng(seed)
    chosen = generator.choice(available, min(num_chunks, available), replace=False)
    return shard.chunks(np.sort(chosen) * length, length)


def ensemble_of(teachers, weights):
    """A function from tokens (B, T) to the ensemble's logits (B, T, V)."""
    return lambda tokens: ensemble_logits([teacher(tokens).float() for teacher in teachers], weights)


def imitation(models, ensemble, tokens, targets):
    """{name: (cross-entropy, KL at temperature 1, KL at 2)}, nats per token, of {name: model}."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    for start in range(0, len(tokens), BATCH):
        batch, labels = tokens[start : start + BATCH], targets[start : start + BATCH].flatten()
        expected = ensemble(batch)
        for name, model in models.items():
            logits = model(batch).float()
            sums[name][0] += F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item()
            for column, temperature in ((1, 1.0), (2, 2.0)):
                sums[name][column] += divergence(expected, logits, temperature).sum().item()
    return {name: tuple((total / targets.numel()).tolist()) for name, total in sums.items()}


def centered_logits(ensemble, tokens):
    """The ensemble's logits (N, V) with mean 0 over the vocabulary, which changes no probability."""
    batches = [ensemble(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH)]
    logits = torch.cat(batches).flatten(0, 1)
    return logits - logits.mean(-1, keepdim=True)


def train_factors(train_logits, directions, steps):
    """Two factors (V, r) that minimise the KL to the logits, from the principal directions on."""
    down = directions.clone().requires_grad_()
    up = directions.clone().requires_grad_()
    optimizer = torch.optim.Adam([down, up], lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = train_logits[torch.randint(len(train_logits), (512,), generator=generator)]
        loss = divergence(rows, rows @ down @ up.T, TRAINED_TEMPERATURE).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return down.detach(), up.detach()


def rank_rows(train_logits, dev_logits, targets, ranks, steps):
    """Rows of the second table, one for each rank."""
    _, vectors = torch.linalg.eigh(train_logits.T @ train_logits)
    cross_entropy = F.cross_entropy(dev_logits, targets)
    for rank in ranks:
        directions = vectors[:, -rank:]
        cells = [str(rank)]
        for down, up in ((directions, directions), train_factors(train_logits, directions, steps)):
            logits = dev_logits @ down @ up.T
            lost = F.cross_entropy(logits, targets) - cross_entropy
            cells += [f"{divergence(dev_logits, logits, tau).mean():.4f}" for tau in (1.0, 2.0)]
            cells.append(f"{lost:+.4f}")
        yield cells


def main(argv=None):
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of train.bin and dev.bin")
    parser.add_argument("--teachers", nargs="+", required=True, help="checkpoints of the teachers")
    parser.add_argument("--teacher-weights", nargs="+", type=float, help="default: equal weights")
    parser.add_argument("--students", nargs="+", default=[], help="checkpoints of students")
    parser.add_argument("--chunks", type=int, default=400, help="chunks of each text (default: 400)")
    parser.add_argument("--rank-chunks", type=int, default=160, help="chunks for ranks (default: 160)")
    parser.add_argument("--ranks", nargs="*", type=int, default=[64, 96, 128, 192, 256])
    parser.add_argument("--steps", type=int, default=700, help="Adam steps for a rank (default: 700)")
    args = parser.parse_args(argv)
    corpus = open_corpus(args.data)
    loaded = {path: load_checkpoint(path) for path in (*args.teachers, *args.students)}
    models = {path: model for path, (model, _) in loaded.items()}
    length = loaded[args.teachers[0]][1]["config"]["sequence_length"]
    weights = args.teacher_weights or [1.0] * len(args.teachers)
    ensemble = ensemble_of([models[path] for path in args.teachers], weights)
    rows = [["text", "model", "CE", "KL, tau 1", "KL, tau 2"]]
    with torch.no_grad():
        for text, shard in (("training", corpus.train), ("validation", corpus.dev)):
            batch = sample(shard, args.chunks, length, seed=0)
            results = imitation({"ensemble": ensemble, **models}, ensemble, *batch)
            rows += [[text, name, *(f"{value:.4f}" for value in row)] for name, row in results.items()]
    print("\n".join(aligned(rows)), "\n", sep="", flush=True)
    with torch.no_grad():
        train_logits = centered_logits(ensemble, sample(corpus.train, args.rank_chunks, length, 1)[0])
        tokens, targets = sample(corpus.dev, args.rank_chunks, length, seed=1)
        dev_logits = centered_logits(ensemble, tokens)
    rows = [["rank", "cut: KL, tau 1", "tau 2", "CE lost", "trained: KL, tau 1", "tau 2", "CE lost"]]
    rows += rank_rows(train_logits, dev_logits, targets.flatten(), args.ranks, args.steps)
    print("\n".join(aligned(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
