"""The paper in one command: two teachers, the student they teach, its twin that learns alone.

    python reproduce.py --recipe demo                                 minutes, on an invented corpus
    python reproduce.py --recipe small --train DIR --dev DIR --pairs blimp_filtered
    python reproduce.py --recipe paper --train DIR --dev DIR          the paper's sizes: wants a GPU

Every stage is a command of this project, printed before it runs, and all of it resumes: the same
command continues where it was stopped. Ends with OUT/report.md and the same table on the screen.
"""

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path

import distill
import evaluate
import make_toy_corpus
import tokenize_corpus
import train
from harness.checkpoint import read_checkpoint
from harness.files import UserError, run_program, write_json, write_text
from report import write_report

BLOCK_LINES = 50  # a sample of a corpus is made of runs of lines, so that sentences keep company


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train on what; a preset's own recipe holds unless an option here says otherwise."""

    teachers: tuple[str, str]  # presets: a GPT-2, a LLaMA
    student: str  # preset of the student and of its twin
    vocabulary_size: int
    words: int | None = None  # to train on a sample; None takes all there is
    teacher_options: tuple[str, ...] = ()  # options for train.py
    options: tuple[str, ...] = ()  # more of them, for teachers, student and twin alike


PAPER = ("gpt2-705m", "llama-360m")
RECIPES = {
    "demo": Experiment(
        ("gpt2-tiny", "llama-tiny"), "llama-tiny-student", 1000, words=60_000,
        options=("--eval-sequences", "256", "--log-every", "50"),
    ),
    "small": Experiment(
        ("gpt2-small", "llama-small"), "llama-small-student", 4000, words=1_000_000,
        options=("--log-every", "50"),
    ),
    "paper": Experiment(PAPER, "llama-58m", 16_000, options=("--eval-sequences", "8192")),
    # The original repository's later files: fewer epochs of the teachers, chunks that move.
    "repository": Experiment(
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
    """Trains in the folder `out`, or continues there; nothing is repeated where it is finished.

    `deadline` is a time of `time.monotonic`, or None. Raises `Stopped` if the training is not
    finished by then, or was interrupted.
    """
    if deadline is not None:
        minutes = (deadline - time.monotonic()) / 60
        if minutes <= 0:
            raise Stopped(0)
        arguments += ("--stop-after", minutes)
    stage(program, *arguments, "--out", out)
    progress = read_checkpoint(out / "checkpoint.pt")["progress"]
    if progress["step"] < progress["steps"]:
        raise Stopped(0)


# ---- data


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
    """Writes a sample of each file of a folder, all in one proportion, with about `words` words."""
    texts = {
        path.name: tokenize_corpus.read_text(path) for path in tokenize_corpus.text_files(folder)
    }
    fraction = min(1.0, words / max(sum(len(text.split()) for text in texts.values()), 1))
    for name, text in texts.items():
        write_text(target / name, sample_lines(text, fraction))


def prepare_data(experiment, args, out):
    """The folder of shards, made once; `UserError` if it was made from something else."""
    data, corpus = out / "data", out / "corpus"
    made_from = {key: getattr(args, key) for key in ("recipe", "train", "dev", "words")}
    done = data / "made.json"
    if done.exists():
        if json.loads(done.read_text(encoding="utf-8")) != made_from:
            raise UserError(f"{out} was made from other text: choose another --out")
        return data
    train_folder, dev_folder = corpus / "train", corpus / "dev"
    shutil.rmtree(corpus, ignore_errors=True)  # what an attempt left that failed half-way
    if args.recipe == "demo":
        stage(make_toy_corpus, "--out", corpus, "--words", args.words)
    elif args.words:
        sample_corpus(args.train, train_folder, args.words)
        sample_corpus(args.dev, dev_folder, max(args.words // 10, 1))
    else:
        train_folder, dev_folder = args.train, args.dev
    stage(
        tokenize_corpus, "--train", train_folder, "--dev", dev_folder, "--out", data,
        "--vocab-size", experiment.vocabulary_size,
    )  # fmt: skip
    write_json(done, made_from)
    return data


# ---- the models of one seed

TEACHERS = ("gpt2-teacher", "llama-teacher")
TRAINED = (*TEACHERS, "control", "student")  # each role is a folder; evaluate.py gets this order


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all seeds share."""

    experiment: Experiment
    data: Path  # folder of shards
    pairs: list[str]  # folders of minimal pairs
    device: str
    deadline: float | None  # a time of time.monotonic after which training stops


def run_seed(setup, seed, out):
    """Trains and scores the models of one seed in the folder `out`.

    Returns {role: result} as report.py describes it. Raises `Stopped` if a stage ends early.
    """
    train_models(setup, seed, out)
    results = dict(zip([*TRAINED, "ensemble"], score_models(setup, out)))
    for role in TRAINED:
        results[role] |= read_log(out / role / "log.jsonl")
    return results


def train_models(setup, seed, out):
    """Trains the teachers, the control and the student in folders of `out` named by their role."""
    experiment, deadline = setup.experiment, setup.deadline
    common = ("--data", setup.data, "--seed", seed, *experiment.options, "--device", setup.device)
    for role, preset in zip(TEACHERS, experiment.teachers):
        options = ("--model", preset, *common, *experiment.teacher_options)
        training_stage(train, out / role, deadline, *options)
    options = ("--model", experiment.student, *common)
    training_stage(train, out / "control", deadline, *options)
    teachers = [out / role / "best.pt" for role in TEACHERS]
    training_stage(distill, out / "student", deadline, "--teachers", *teachers, *options)


def score_models(setup, out):
    """evaluate.py's entries for the models of a seed, in the order of `TRAINED`, then the ensemble.

    They are kept in scores.json, and computed again if a model is newer or the pairs are others.
    """
    path = out / "scores.json"
    checkpoints = [out / role / "best.pt" for role in TRAINED]
    newest = max(checkpoint.stat().st_mtime for checkpoint in checkpoints)
    fresh = path.exists() and path.stat().st_mtime >= newest
    if not fresh or set(read_scores(path)[0]["pairs"]) != set(setup.pairs):
        pairs = ("--pairs", *setup.pairs) if setup.pairs else ()
        stage(
            evaluate, *checkpoints, "--ensemble", *checkpoints[: len(TEACHERS)],
            "--data", setup.data, *pairs, "--json", path, "--device", setup.device,
        )  # fmt: skip
    return read_scores(path)


def read_scores(path):
    """The entries of evaluate.py's JSON, in the order of its arguments, the ensemble last."""
    return json.loads(path.read_text(encoding="utf-8"))["checkpoints"]


def read_log(path):
    """What a run's log says of its training: {"seconds", "epochs", "steps", "curve"}.

    "epochs" and "steps" are those of the last training line, and the curve is a list of
    (step, dev cross-entropy in nats per token). Damaged lines are passed over; the curve is empty
    where no training line is left, for then nothing tells the length of an epoch.
    """
    found = {"seconds": 0.0, "epochs": 0.0, "steps": 0, "curve": []}
    tokens = 0
    for line in path.read_bytes().split(b"\n"):
        entry = read_numbers(line)
        if {"step", "epoch", "tokens", "tokens_per_second"} <= entry.keys():
            if entry["tokens_per_second"] > 0:
                found["seconds"] += (entry["tokens"] - tokens) / entry["tokens_per_second"]
            tokens = entry["tokens"]
            found |= {"epochs": entry["epoch"], "steps": entry["step"]}
        elif {"step", "dev_cross_entropy"} <= entry.keys():
            found["curve"].append((entry["step"], entry["dev_cross_entropy"]))
    return found if found["steps"] else found | {"curve": []}


def read_numbers(line):
    """The finite numbers of a line of JSON, {key: number}: none where it is no JSON object."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(entry, dict):
        return {}
    return {
        key: value
        for key, value in entry.items()
        if type(value) in (int, float) and abs(value) < math.inf
    }


# ---- the command


def parse_arguments(argv):
    """The options of the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, required=True, help="the models to train, and their options"
    )
    parser.add_argument(
        "--train", metavar="DIR", help="folder of training text, as for tokenize_corpus.py"
    )
    parser.add_argument("--dev", metavar="DIR", help="folder of dev text")
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="DIR", help="folders of minimal pairs to score"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for all that is made (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="how often to train all models, each time with another seed (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--words", type=int, metavar="N",
        help="words of training text to sample (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
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
    return args


def main(argv=None):
    """Trains, scores and reports as the command line asks; returns the exit code."""
    args = parse_arguments(argv)
    experiment = RECIPES[args.recipe]
    args.words = args.words or experiment.words
    out = Path(args.out or f"runs/{args.recipe}")
    deadline = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    for folder in args.pairs:
        evaluate.read_pairs(folder)  # a mistake in them is to be known before hours of training
    try:
        data = prepare_data(experiment, args, out)
        pairs = [str(out / "corpus" / "pairs")] if args.recipe == "demo" else args.pairs
        setup = Setup(experiment, data, pairs, args.device, deadline)
        seeds = [run_seed(setup, seed, out / f"seed-{seed}") for seed in range(args.seeds)]
    except Stopped as stopped:
        print("stopped before the end: the same command continues")
        return stopped.code
    command = "python reproduce.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    lines = write_report(seeds, out, recipe=args.recipe, command=command, device=args.device)
    print("\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
