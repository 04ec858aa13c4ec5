"""The paper in one command: two teachers, the student they teach, its twin that learns alone.

    python reproduce.py --recipe demo                                 minutes, on an invented corpus
    python reproduce.py --recipe small --train DIR --dev DIR --pairs blimp_filtered
    python reproduce.py --recipe paper --train DIR --dev DIR          the paper's sizes: wants a GPU

Every stage is a command of this project, printed before it runs, and all of it resumes: the same
command continues where it was stopped. Ends with OUT/report.md and the same table on the screen.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

import distill
import evaluate
import make_toy_corpus
import tokenize_corpus
import train
from files import UserError, run, write_json, write_text
from model import read_checkpoint

BLOCK_LINES = 50  # a sample of a corpus is made of runs of lines, so that sentences keep company


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to train on what; a preset's own recipe holds unless an option here says otherwise."""

    teachers: tuple[str, str]
    student: str
    vocabulary_size: int
    words: int | None = None  # of the sample to train on; None: all there is
    teacher_options: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of teachers, student and twin alike


PAPER = ("gpt2-705m", "llama-360m")
RECIPES = {
    "demo": Recipe(
        ("gpt2-tiny", "llama-tiny"), "llama-tiny-student", 1000, words=60_000,
        options=("--eval-sequences", "256", "--log-every", "50"),
    ),
    "small": Recipe(
        ("gpt2-small", "llama-small"), "llama-small-student", 4000, words=1_000_000,
        options=("--log-every", "50"),
    ),
    "paper": Recipe(PAPER, "llama-58m", 16_000, options=("--eval-sequences", "8192")),
    # The original repository's later files: fewer epochs of the teachers, chunks that move.
    "repository": Recipe(
        PAPER, "llama-58m", 16_000,
        teacher_options=("--batch-size", "128", "--epochs", "4", "--warmup-steps", "300"),
        options=("--eval-sequences", "8192", "--random-offset"),
    ),
}  # fmt: skip


# ---- stages


class Stopped(Exception):
    """A stage ended early, by its exit code or by --stop-after; what it has done is kept."""

    def __init__(self, code):
        super().__init__()
        self.code = code


def stage(program, *arguments):
    """Runs a program of this project as its command line would; `Stopped` if it ends early."""
    arguments = [str(a) for a in arguments]
    print(f"\n$ python {program.__name__}.py {shlex.join(arguments)}", flush=True)
    code = program.main(arguments)
    if code:
        raise Stopped(code)


def training_stage(program, out, deadline, *arguments):
    """A stage that trains; not repeated where it is finished."""
    if deadline is not None:
        minutes = (deadline - time.monotonic()) / 60
        if minutes <= 0:
            raise Stopped(0)
        arguments += ("--stop-after", minutes)
    stage(program, *arguments, "--out", out)
    progress = read_checkpoint(out / "checkpoint.pt")["progress"]
    if progress["step"] < progress["steps"]:
        raise Stopped(0)


def sample_lines(text, fraction):
    """About `fraction` of a text's lines: runs of lines, evenly spread over it."""
    lines = text.split("\n")
    blocks = [lines[i : i + BLOCK_LINES] for i in range(0, len(lines), BLOCK_LINES)]
    kept = [
        block
        for i, block in enumerate(blocks)
        if math.floor((i + 1) * fraction) > math.floor(i * fraction)
    ]
    return "\n".join(line for block in kept or blocks[:1] for line in block)


def sample_corpus(folder, target, words):
    """Writes a sample of each file of a folder, all in one proportion, of about `words` words."""
    texts = {
        path.name: tokenize_corpus.read_text(path) for path in tokenize_corpus.text_files(folder)
    }
    fraction = min(1.0, words / max(sum(len(text.split()) for text in texts.values()), 1))
    for name, text in texts.items():
        write_text(target / name, sample_lines(text, fraction))


def prepare_data(recipe, args, out):
    """The folder of shards, made once; `UserError` if it was made from something else."""
    data, corpus = out / "data", out / "corpus"
    made_from = {key: getattr(args, key) for key in ("recipe", "train", "dev", "words")}
    done = data / "made.json"
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8")) != made_from:
            raise UserError(f"{out} was made from other text: choose another --out")
        return data
    train_folder, dev_folder = corpus / "train", corpus / "dev"
    shutil.rmtree(corpus, ignore_errors=True)  # of an attempt that failed half-way
    if args.recipe == "demo":
        stage(make_toy_corpus, "--out", corpus, "--words", args.words)
    elif args.words:
        sample_corpus(args.train, train_folder, args.words)
        sample_corpus(args.dev, dev_folder, max(args.words // 10, 1))
    else:
        train_folder, dev_folder = args.train, args.dev
    stage(
        tokenize_corpus, "--train", train_folder, "--dev", dev_folder, "--out", data,
        "--vocab-size", recipe.vocabulary_size,
    )  # fmt: skip
    write_json(done, made_from)
    return data


def run_seed(recipe, args, seed, data, pairs, out, deadline):
    """Trains the four models of one seed and scores them: evaluate.py's results, by role."""
    common = ("--data", data, "--seed", seed, *recipe.options, "--device", args.device)
    folders = {role: out / role for role in ("gpt2-teacher", "llama-teacher", "control", "student")}
    for role, preset in zip(("gpt2-teacher", "llama-teacher"), recipe.teachers):
        options = (*common, *recipe.teacher_options)
        training_stage(train, folders[role], deadline, "--model", preset, *options)
    options = ("--model", recipe.student, *common)
    training_stage(train, folders["control"], deadline, *options)
    teachers = [folders[role] / "best.pt" for role in ("gpt2-teacher", "llama-teacher")]
    training_stage(distill, folders["student"], deadline, "--teachers", *teachers, *options)
    scores, checkpoints = out / "scores.json", [folder / "best.pt" for folder in folders.values()]
    newest = max(path.stat().st_mtime for path in checkpoints)
    fresh = scores.exists() and scores.stat().st_mtime >= newest
    if not fresh or set(read_scores(scores)[0]["pairs"]) != set(pairs):
        pair_options = ("--pairs", *pairs) if pairs else ()
        stage(
            evaluate, *checkpoints, "--ensemble", *teachers, "--data", data, *pair_options,
            "--json", scores, "--device", args.device,
        )  # fmt: skip
    entries = read_scores(scores)
    results = dict(zip([*folders, "ensemble"], entries))
    for role, folder in folders.items():
        results[role] |= read_log(folder / "log.jsonl")
    return results


def read_scores(path):
    """The entries of evaluate.py's JSON, in the order of its arguments, the ensemble last."""
    return json.loads(path.read_text(encoding="utf-8"))["checkpoints"]


def read_log(path):
    """Of a run's log: its epochs, seconds of training, and curve [(step, dev cross-entropy)]."""
    seconds, tokens, epoch, curve = 0.0, 0, 0.0, []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "tokens_per_second" in entry:
            seconds += (entry["tokens"] - tokens) / entry["tokens_per_second"]
            tokens, epoch = entry["tokens"], entry["epoch"]
        elif "dev_cross_entropy" in entry:
            curve.append((entry["step"], entry["dev_cross_entropy"]))
    return {"seconds": seconds, "curve": curve, "epochs": epoch}


# ---- the report

ROLES = {
    "gpt2-teacher": "GPT-2 teacher",
    "llama-teacher": "LLaMA teacher",
    "ensemble": "ensemble of both",
    "control": "control (alone)",
    "student": "student (distilled)",
}


def spread(values, digits):
    """The mean of the values, with their standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def result_rows(seeds):
    """Heading and rows of the table: each a model's role, over all seeds."""
    folders = list(seeds[0]["student"]["pairs"])
    heading = ["model", "parameters", "dev cross-entropy", "dev perplexity"]
    heading += [f"{Path(f).name}, {kind} (%)" for f in folders for kind in ("files", "fields")]
    rows = [[*heading, "seconds"]]
    for role, title in ROLES.items():
        runs = [seed[role] for seed in seeds]
        row = [title, f"{runs[0]['parameters']:,}"]
        row.append(spread([r["cross_entropy"] for r in runs], 3))
        row.append(spread([r["perplexity"] for r in runs], 2))
        for folder in folders:
            for key in ("accuracy_over_files", "accuracy_over_fields"):
                row.append(spread([100 * r["pairs"][folder][key] for r in runs], 1))
        row.append(spread([r["seconds"] for r in runs], 0) if "seconds" in runs[0] else "-")
        rows.append(row)
    return rows


def findings(seeds):
    """Sentences that say whether the paper's effect appeared, from the numbers alone."""
    measures = {"dev cross-entropy": lambda r: -r["cross_entropy"]}
    for folder in seeds[0]["student"]["pairs"]:
        name = f"minimal pairs of {Path(folder).name} (mean over files)"
        measures[name] = lambda r, f=folder: r["pairs"][f]["accuracy_over_files"]
    lines = []
    for name, value in measures.items():
        for other in ("control", "gpt2-teacher", "llama-teacher", "ensemble"):
            won = sum(value(s["student"]) > value(s[other]) for s in seeds)
            lines.append(
                f"- {name}: the student beats the {ROLES[other]} in {won} of {len(seeds)} seeds"
            )
        led = sum(value(s["ensemble"]) > value(s["control"]) for s in seeds)
        lines.append(f"- {name}: the ensemble beats the control in {led} of {len(seeds)} seeds")
    return lines


def text_chart(curves, width=64, height=16):
    """Curves {title: [(step, value)]} drawn with the first letter of each title."""
    points = [point for curve in curves.values() for point in curve]
    steps = max(step for step, _ in points)
    low, high = min(v for _, v in points), max(v for _, v in points)
    grid = [[" "] * width for _ in range(height)]
    for title, curve in curves.items():
        for step, value in curve:
            row = round((high - value) / ((high - low) or 1) * (height - 1))
            grid[row][round(step / steps * (width - 1))] = title[0]
    lines = [f"{high:8.3f} |" + "".join(grid[0])]
    lines += [" " * 8 + " |" + "".join(row) for row in grid[1:-1]]
    lines += [f"{low:8.3f} |" + "".join(grid[-1])]
    lines += [" " * 9 + f"0 {'steps':^{width - 10}} {steps:>6}"]
    return [line.rstrip() for line in lines]


def draw_curves(curves, path):
    """Draws dev cross-entropy against steps into a PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for title, curve in curves.items():
        axes.plot(*zip(*curve), marker="o", markersize=3, label=title)
    axes.set(xlabel="step", ylabel="dev cross-entropy (nats per token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def write_report(args, seeds, out):
    """OUT/report.md, and what of it goes to the screen: the table and the findings."""
    rows = result_rows(seeds)
    curves = {ROLES[r]: seeds[0][r]["curve"] for r in ROLES if "curve" in seeds[0][r]}
    if draw_curves(curves, out / "curves.png"):
        picture = ["![dev cross-entropy against steps, first seed](curves.png)"]
    else:
        picture = ["```", *text_chart(curves), *curves, "```"]
    epochs = [f"{ROLES[r]} {v['epochs']:g}" for r, v in seeds[0].items() if "epochs" in v]
    lines = [
        f"# Recipe {args.recipe}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        "",
        f"`{args.command}`, commit {train.commit()}, {datetime.date.today()}, "
        f"{machine(args.device)}, torch {torch.__version__}.",
        "",
        *markdown(rows),
        "",
        "Cross-entropy (nats per token) and perplexity are of the whole dev shard, at the best dev",
        "cross-entropy seen in training. The ensemble is the mean of the teachers' logits.",
        f"Seconds: training alone. Epochs: {', '.join(epochs)}.",
        "",
        *findings(seeds),
        "",
        *picture,
        "",
    ]
    per_file = seeds[0]["student"]["per_file"]
    if len(per_file) > 1:
        roles = [ROLES[r] for r in ROLES]
        table = [["dev cross-entropy by sub-corpus", *roles]]
        for name in per_file:
            values = [[s[r]["per_file"][name]["cross_entropy"] for s in seeds] for r in ROLES]
            table.append([name, *(spread(v, 3) for v in values)])
        lines += [*markdown(table), ""]
    for folder in seeds[0]["student"]["pairs"]:
        table = [[f"{Path(folder).name}, by field (%)", *ROLES.values()]]
        for field in seeds[0]["student"]["pairs"][folder]["per_field"]:
            values = [
                [100 * s[r]["pairs"][folder]["per_field"][field] for s in seeds] for r in ROLES
            ]
            table.append([field, *(spread(v, 1) for v in values)])
        lines += [*markdown(table), ""]
    write_text(out / "report.md", "\n".join(lines))
    return [*evaluate.table(rows), "", *findings(seeds), f"\nwritten: {out / 'report.md'}"]


def markdown(rows):
    """Rows of strings as a Markdown table."""
    heading, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [heading, "|" + "---|" * len(rows[0]), *body]


def machine(device):
    """What the numbers were measured on: the GPU's name, or the number of CPU cores."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    flags = "/proc/cpuinfo"
    bf16 = os.path.exists(flags) and "avx512_bf16" in Path(flags).read_text()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}{', avx512_bf16' if bf16 else ''})"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--train", metavar="DIR", help="training text, as for tokenize_corpus.py")
    parser.add_argument("--dev", metavar="DIR", help="dev text")
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="DIR", help="minimal pairs to score"
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/ and the recipe's name")
    parser.add_argument("--seeds", type=int, default=1, help="runs of all (default: 1)")
    parser.add_argument("--words", type=int, help="words to train on; default: the recipe's")
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="save and stop then")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.recipe != "demo" and not (args.train and args.dev):
        parser.error(f"--recipe {args.recipe} needs --train DIR and --dev DIR")
    if args.recipe == "demo" and (args.train or args.dev or args.pairs):
        parser.error(
            "--recipe demo makes its own text and pairs: leave out --train, --dev, --pairs"
        )
    if args.seeds < 1 or (args.words is not None and args.words < 1):
        parser.error("--seeds and --words must be at least 1")
    recipe = RECIPES[args.recipe]
    args.command = "python reproduce.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    args.words = args.words or recipe.words
    out = Path(args.out or f"runs/{args.recipe}")
    deadline = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    for folder in args.pairs:
        evaluate.read_pairs(folder)  # a mistake in them is to be known before hours of training
    try:
        data = prepare_data(recipe, args, out)
        pairs = [out / "corpus" / "pairs"] if args.recipe == "demo" else args.pairs
        seeds = [
            run_seed(recipe, args, seed, data, [*map(str, pairs)], out / f"seed-{seed}", deadline)
            for seed in range(args.seeds)
        ]
    except Stopped as stopped:
        print("stopped before the end: the same command continues")
        return stopped.code
    print("\n" + "\n".join(write_report(args, seeds, out)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
