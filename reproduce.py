"""An experiment in one command: teachers, the students they teach, a control that learns alone.

    python reproduce.py --recipe demo                                 minutes, on an invented corpus
    python reproduce.py --recipe small --train DIR --dev DIR --pairs blimp_filtered
    python reproduce.py --recipe paper --train DIR --dev DIR          the paper's sizes: wants a GPU
    python reproduce.py --recipe mine.json ...                        a table of your own: recipes/
    python reproduce.py --report runs/small                           the report of what is there

Every stage is a command of this project, printed before it runs, and all of it resumes: the same
command continues where it was stopped. The dev text is cut in two: the first halves of its files
choose (best.pt, and whatever a person chooses), the second halves are only reported. Ends with
OUT/report.md, report.html, report.json, and the table on the screen.
"""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

import distill
import evaluate
import experiment
import make_toy_corpus
import tokenize_corpus
import train
from data import Tokenizer, TokenShard
from generate import written
from harness.checkpoint import content_digest, read_checkpoint
from harness.devices import choose_compute, choose_device
from harness.files import UserError, locked, run_program, write_json, write_text
from harness.record import commit, machine
from harness.tables import aligned
from model import load_checkpoint
from report.pages import write_report
from report.results import described_study, read_log, read_study, study_of, trial_lines
from report.study import Study

BLOCK_LINES = 50  # a sample of a corpus is made of runs of lines, so that sentences keep company
PROMPTS = ("Once upon a time", "The children", "I think that")
SAMPLE_TOKENS = 40
GUESSED_SHARE = 0.3  # before anything was measured


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
        arguments += ("--stop-after", max((deadline - time.monotonic()) / 60, 0))
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


def halves(text):
    """The two halves of a text, by words, cut between lines."""
    lines = text.split("\n")
    words = [len(line.split()) for line in lines]
    seen, middle = 0, 0
    while 2 * seen < sum(words):
        seen += words[middle]
        middle += 1
    return "\n".join(lines[:middle]), "\n".join(lines[middle:])


def write_dev_halves(folder, targets, words=None, train_folder=None):
    """Writes the first halves of a folder's files into one of `targets`, the second into the other.

    With `words`, each half is a sample of about so many, whose files have the shares that they have
    of the text in `train_folder`, as far as they last.
    """
    shares = {}
    if words is not None:
        paths = tokenize_corpus.text_files(train_folder)
        counts = {p.stem: len(tokenize_corpus.read_text(p).split()) for p in paths}
        shares = {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}
    for path in tokenize_corpus.text_files(folder):
        for target, half in zip(targets, halves(tokenize_corpus.read_text(path))):
            if words is not None:
                there = max(len(half.split()), 1)
                half = sample_lines(half, min(1.0, words * shares.get(path.stem, 0) / there))
            write_text(target / path.name, half)


def prepare_data(recipe, args, out):
    """The folder of shards, made once; `UserError` if it was made from something else.

    dev.bin in it is of the first halves of the dev files, report/dev.bin of the second.
    """
    data, corpus = out / "data", out / "corpus"
    made_from = {"recipe": recipe.name, "train": args.train, "dev": args.dev, "words": recipe.words}
    made_from |= {"vocabulary_size": recipe.vocabulary_size, "dev_words": recipe.dev_words}
    done = data / "made.json"
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) != made_from:
        raise UserError(f"{out} was made from other text: choose another --out")
    if not done.exists():
        with locked(data):
            make_shards(recipe, args, data, corpus)
            write_json(done, made_from)
    return data


def make_shards(recipe, args, data, corpus):
    """Writes the text into the folder `corpus`, as far as it is made or sampled, and its shards."""
    shutil.rmtree(corpus, ignore_errors=True)  # what an attempt left that failed half-way
    train_folder, dev_folder = args.train, args.dev
    if recipe.corpus == "toy":
        stage(make_toy_corpus, "--out", corpus, "--words", recipe.words)
        train_folder, dev_folder = corpus / "train", corpus / "dev"
    elif recipe.words:
        train_folder = corpus / "train"
        sample_corpus(args.train, train_folder, recipe.words)
    parts = [corpus / "dev-A", corpus / "dev-B"]
    write_dev_halves(dev_folder, parts, recipe.dev_words, train_folder)
    stage(
        tokenize_corpus, "--train", train_folder, "--dev", parts[0], "--out", data,
        "--vocab-size", recipe.vocabulary_size,
    )  # fmt: skip
    stage(
        tokenize_corpus, "--tokenizer", data / "tokenizer.model", "--dev", parts[1],
        "--out", data / "report",
    )  # fmt: skip


# ---- the models of one seed


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all seeds share."""

    recipe: experiment.Experiment
    data: Path  # folder of shards
    pairs: list[str]  # folders of minimal pairs
    out: Path
    results: Path
    device: str
    deadline: float | None  # a time of time.monotonic after which training stops
    tuning: bool  # the second halves of the dev text stay unread

    @functools.cached_property
    def shards(self):
        """{shard: digest}: what a result was measured on."""
        found = {"train": "train.bin", "dev": "dev.bin", "report": "report/dev.bin"}
        return {name: TokenShard(self.data / path).digest for name, path in found.items()}


def run_seed(setup, seed):
    """Trains and scores the models of one seed, but for those whose results are there.

    Returns {name: result} as report/study.py describes it. Raises `Stopped` if a stage ends early.
    """
    recipe = setup.recipe
    members = {name: [entry] for name, entry in recipe.entries.items()}
    for name, teachers in recipe.ensembles().items():
        members[name] = [recipe.entries[teacher] for teacher in teachers]
    return {name: run_model(setup, name, entries, seed) for name, entries in members.items()}


def run_model(setup, name, entries, seed):
    """The result of one model, or of the ensemble of several, from its file or made now."""
    parts = [described(setup, entry, seed) for entry in entries]
    wanted = parts[0] if len(parts) == 1 else {"name": name, "members": parts}
    path = setup.results / f"seed-{seed}" / f"{name}.json"
    result = known_result(path, wanted, setup)
    if result is None:
        for entry in entries:
            train_model(setup, entry, seed)
        if setup.deadline is not None and time.monotonic() > setup.deadline:
            raise Stopped(0)
        result = wanted | score(setup, entries, seed, path)
        if len(entries) == 1:
            result |= read_log(folder_of(setup, entries[0], seed) / "log.jsonl")
        write_json(path, result)
    return result


def folder_of(setup, entry, seed):
    """The folder of a model's run."""
    return setup.out / f"seed-{seed}" / entry.name


def described(setup, entry, seed):
    """What a result is the result of: unless all of this is the same, it is another's."""
    teachers = [described(setup, setup.recipe.entries[t], seed) for t in entry.teachers]
    return {
        "name": entry.name, "preset": entry.preset, "options": entry.options,
        "seed": seed + entry.seed_offset, "teachers": teachers, "shards": setup.shards,
        "scored": setup.recipe.scored,
    }  # fmt: skip


def known_result(path, wanted, setup):
    """The result in a file, or None where there is none that says all that is asked for.

    Raises `UserError` if it is another model's.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: result[key] for key in wanted}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no result of this program: move it away") from error
    if kept != wanted:
        different = [key for key in wanted if kept[key] != wanted[key]]
        raise UserError(
            f"{path} is the result of another recipe or text ({', '.join(different)} differ): "
            "choose another --out, or --results"
        )
    if setup.tuning:
        return result
    complete = "report" in result and set(result["report"]["pairs"]) >= {
        Path(folder).name for folder in setup.pairs
    }
    return result if complete else None


def train_model(setup, entry, seed):
    """Trains a model, after its teachers, or does nothing where it is trained."""
    options = [*entry.arguments(), "--data", setup.data, "--seed", seed + entry.seed_offset]
    options += ["--device", setup.device]
    program = train
    if entry.teachers:
        teachers = [setup.recipe.entries[name] for name in entry.teachers]
        for teacher in teachers:
            train_model(setup, teacher, seed)
        program = distill
        options += ["--teachers", *(folder_of(setup, t, seed) / "best.pt" for t in teachers)]
    training_stage(program, folder_of(setup, entry, seed), setup.deadline, *options)


def score(setup, entries, seed, path):
    """Scores a model, or several as an ensemble: "dev" and, unless it is for tuning, "report".

    Beside `path`, the losses of each chunk and the scores of each pair are kept as .npz.
    """
    checkpoints = [folder_of(setup, e, seed) / setup.recipe.scored for e in entries]
    if len(entries) > 1:  # what the students were taught
        checkpoints = [folder_of(setup, e, seed) / "best.pt" for e in entries]
    which = ["--ensemble", *checkpoints] if len(entries) > 1 else checkpoints
    common = [*which, "--weight-by", setup.data / "train.bin", "--device", setup.device]
    found = {"commit": commit(), "machine": machine(setup.device)}
    found["dev"] = evaluated(path, *common, "--data", setup.data)
    if setup.tuning:
        return found
    kept = path.with_suffix("")
    options = ["--data", setup.data / "report", "--temperature-scaled", setup.data]
    options += ["--losses", f"{kept}.losses.npz"]
    if setup.pairs:
        options += ["--pairs", *setup.pairs, "--pair-scores", f"{kept}.pairs.npz"]
    found["report"] = evaluated(path, *common, *options)
    by_name = {Path(folder).name: value for folder, value in found["report"]["pairs"].items()}
    found["report"]["pairs"] = by_name
    if len(entries) == 1:
        found["samples"] = samples(checkpoints[0], setup.device)
    return found


def evaluated(path, *arguments):
    """The entry that evaluate.py writes for one model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".scores")
    stage(evaluate, *arguments, "--json", scratch)
    (entry,) = json.loads(scratch.read_text(encoding="utf-8"))["checkpoints"]
    scratch.unlink()
    del entry["path"]
    return entry


def samples(path, device):
    """{prompt: how the model goes on}, drawn with the same seed for every model."""
    model, checkpoint = load_checkpoint(path)
    model.to(choose_device(device))
    tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
    return {
        prompt: written(model, tokenizer, prompt, SAMPLE_TOKENS).removeprefix(prompt)
        for prompt in PROMPTS
    }


# ---- the plan


def print_plan(setup, seeds):
    """Prints what each model will take, before anything is trained."""
    shard = TokenShard(setup.data / "train.bin")
    costs = experiment.costs(setup.recipe, len(shard.tokens), shard.words)
    speed, how = known_speed(setup, costs, seeds)
    rows = [["model", "parameters", "epochs", "tokens", "FLOPs", "minutes", "disk", "memory"]]
    for name, cost in costs.items():
        rows.append(
            [name, f"{cost.parameters:,}", f"{cost.epochs:.3g}", f"{cost.tokens:,}",
             f"{cost.flops:.1e}", f"{cost.flops / speed / 60:.1f}", f"{cost.disk / 1e9:.2f} GB",
             f"{cost.memory / 1e9:.2f} GB"]
        )  # fmt: skip
    print("\n".join(aligned(rows)))
    hours = sum(cost.flops for cost in costs.values()) / speed / 3600 * len(seeds)
    print(f"{len(seeds)} seeds: {hours:.2g} hours of training at {speed / 1e9:.3g} GFLOP/s, {how}")


def known_speed(setup, costs, seeds):
    """FLOP/s of the models that are trained, and a text that says so; else a guess."""
    flops = seconds = 0
    for seed in seeds:
        for name, entry in setup.recipe.entries.items():
            log = folder_of(setup, entry, seed) / "log.jsonl"
            if log.exists() and (found := read_log(log))["steps"]:
                share = found["epochs"] / costs[name].epochs
                flops, seconds = flops + share * costs[name].flops, seconds + found["seconds"]
    if seconds:
        return flops / seconds, "as measured here so far"
    return matmul_speed(setup.device) * GUESSED_SHARE, (
        f"a guess: {GUESSED_SHARE:.0%} of what a product of two matrices of 1024 x 1024 reaches"
    )


def matmul_speed(device):
    """FLOP/s of one product of two matrices of 1024 x 1024 in the precision of training."""
    compute = choose_compute(device)
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    a = torch.ones(1024, 1024, dtype=dtype, device=compute.device)
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (a @ a).sum().item()
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)


# ---- the command


def parse_arguments(argv):
    """The options of the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"the models to train, and their options: {', '.join(experiment.recipe_names())}, or "
        "a JSON file like those in recipes/",
    )  # fmt: skip
    what.add_argument(
        "--report", nargs="+", metavar="DIR",
        help="train nothing: write the report of these folders, of an experiment or of runs",
    )  # fmt: skip
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
        "--results", metavar="DIR",
        help="folder for the results and the report alone, which are small (default: that of "
        "--out); a model whose result is there is not trained again",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="how often to train all models, each time with another seed (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first of them (default: 0)"
    )
    parser.add_argument(
        "--words", type=int, metavar="N",
        help="words of training text to sample (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", metavar="NAME",
        help="only these models of the recipe, and those that teach them",
    )  # fmt: skip
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="MODEL.OPTION=A,B",
        help="for each value, one more model like that one",
    )  # fmt: skip
    parser.add_argument(
        "--tune", action="store_true",
        help="score on the first halves of the dev text alone, and write no report",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="prepare the text, print the plan and stop"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.first_seed < 0 or (args.words is not None and args.words < 1):
        parser.error("--seeds and --words must be at least 1, --first-seed at least 0")
    return args, parser


def check_text(recipe, args, parser):
    """Wrong usage ends the program: a recipe needs text, or makes its own."""
    if recipe.corpus == "toy" and (args.train or args.dev or args.pairs):
        parser.error(
            f"--recipe {args.recipe} makes its own text and pairs: leave out --train, --dev, "
            "--pairs"
        )
    if recipe.corpus is None and not (args.train and args.dev):
        parser.error(f"--recipe {args.recipe} needs --train DIR and --dev DIR")


def main(argv=None):
    """Trains, scores and reports as the command line asks; returns the exit code."""
    args, parser = parse_arguments(argv)
    command = "python reproduce.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.report:
        return report_folders(args, command)
    recipe = experiment.read_experiment(args.recipe, args.vary)
    check_text(recipe, args, parser)
    if args.words:
        recipe = dataclasses.replace(recipe, words=args.words)
    out = Path(args.out or f"runs/{recipe.name}")
    deadline = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    for folder in args.pairs:
        evaluate.read_pairs(folder)  # a mistake in them is to be known before hours of training
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    try:
        data = prepare_data(recipe, args, out)
        pairs = [str(out / "corpus" / "pairs")] if recipe.corpus == "toy" else args.pairs
        if args.models:
            recipe = recipe.only(args.models)
        results = Path(args.results or out)
        setup = Setup(recipe, data, pairs, out, results, args.device, deadline, args.tune)
        print_plan(setup, seeds)
        if args.dry_run:
            return 0
        found = {seed: run_seed(setup, seed) for seed in seeds}
    except Stopped as stopped:
        print("stopped before the end: the same command continues")
        return stopped.code
    if args.tune:
        print("\n" + "\n".join(trial_lines(results, seeds)))
        return 0
    study = study_of(recipe, found, results)
    write_json(results / "experiment.json", described_study(study))
    print("\n" + "\n".join(write_report(study, results, command=command, device=args.device)))
    return 0


# ---- what came out


def report_folders(args, command):
    """Writes the report of each experiment's folder, or one of all runs' folders; the exit code."""
    folders = [Path(folder) for folder in args.report]
    experiments = [folder for folder in folders if (folder / "experiment.json").exists()]
    for folder in experiments:
        lines = write_report(read_study(folder), folder, command=command, device=args.device)
        print("\n" + "\n".join(lines))
    runs = [folder for folder in folders if (folder / "best.pt").exists()]
    if not runs and not experiments:
        raise UserError(f"{folders[0]} is neither the folder of an experiment nor of a run")
    if runs:
        study = study_of_runs(runs, args)
        print("\n" + "\n".join(write_report(study, study.folder, command=command,
                                             device=args.device)))  # fmt: skip
    return 0


def study_of_runs(folders, args):
    """The `Study` of runs that train.py and distill.py made: their best.pt, scored on their data.

    A model that has teachers is a student, and the control is the model of its shape that has none
    and taught nobody.
    """
    out = Path(args.out or "runs/report")
    results, digests, checkpoints = {}, {}, {}
    for folder in folders:
        checkpoint = read_checkpoint(folder / "best.pt")
        name = folder.name
        checkpoints[name] = checkpoint
        digests[content_digest(checkpoint["weights"])] = name
        path = out / "seed-0" / f"{name}.json"
        pairs = ["--pairs", *args.pairs] if args.pairs else []
        found = {"name": name, "preset": checkpoint["model"]["name"]}
        found |= read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else {}
        data = Path(checkpoint["config"]["data"])
        losses = path.with_suffix(".losses.npz")
        found["report"] = evaluated(
            path, folder / "best.pt", "--data", data, "--weight-by", data / "train.bin",
            "--losses", losses, *pairs, "--device", args.device,
        )  # fmt: skip
        found["samples"] = samples(folder / "best.pt", args.device)
        write_json(path, found)
        results[name] = found
    teachers = {
        name: tuple(digests[t["digest"]] for t in found["teachers"] if t["digest"] in digests)
        for name, found in checkpoints.items()
        if found.get("teachers")
    }
    teachers = {name: taught_by for name, taught_by in teachers.items() if taught_by}
    student = next(iter(teachers), None)
    shape = checkpoints[student]["model"]["shape"] if student else None
    teaching = {t for taught_by in teachers.values() for t in taught_by}
    control = next(
        (n for n, c in checkpoints.items()
         if n not in teachers and n not in teaching and c["model"]["shape"] == shape), None,
    )  # fmt: skip
    order = [n for n in results if n not in teachers] + list(teachers)
    models = {name: name for name in order}
    about = "best.pt of each run, on the dev text that chose it."
    study = Study("runs", about, models, teachers, control, student, {0: results}, out)
    write_json(out / "experiment.json", described_study(study))
    return study


if __name__ == "__main__":
    sys.exit(run_program(main))
