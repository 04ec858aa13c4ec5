"""An experiment in one command: teachers, the students they teach, a control that learns alone.

    python reproduce.py --recipe demo                                 minutes, on an invented corpus
    python reproduce.py --recipe small --train DIR --dev DIR --pairs blimp_filtered
    python reproduce.py --recipe paper --train DIR --dev DIR          the paper's sizes: wants a GPU
    python reproduce.py --recipe small ... --finetune glue_filtered   and (Super)GLUE or MSGS
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
import os
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

import distill
import evaluate
import finetune
import make_toy_corpus
import tokenize_corpus
import train
from data import TokenShard, open_corpus
from experiments import recipes
from experiments.pages import write_report
from experiments.results import (
    read_log,
    read_result,
    read_study,
    seed_folders,
    seed_of,
    study_fields,
    trial_lines,
)
from experiments.sampling import folder_state, sample_corpus, write_dev_halves
from finetuning.tasks import read_tasks
from generate import written
from model import load_checkpoint
from tokenizer import Tokenizer
from training.checkpoint import content_digest, read_checkpoint
from training.device import choose_compute, choose_device
from training.io import UserError, aligned, locked, log, run_program, warn, write_json
from training.logger import commit, machine
from training.options import defaults
from training.resume import is_finished

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
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    if not is_finished(checkpoint["progress"], checkpoint["config"].get("patience", 0)):
        raise Stopped(0)


# ---- data


def prepare_data(recipe, args, out):
    """The folder of shards, made once; `UserError` if it was made from something else.

    dev.bin in it is of the first halves of the dev files, report/dev.bin of the second.
    """
    data, corpus = out / "data", out / "corpus"
    made_from = {"train": folder_state(args.train), "dev": folder_state(args.dev)}
    for key in ("corpus", "words", "dev_words", "vocabulary_size", "clean"):
        made_from[key] = getattr(recipe, key)
    done = data / "made.json"
    with locked(data):
        if not done.exists():
            make_shards(recipe, args, data, corpus)
            write_json(done, made_from)
    before = json.loads(done.read_text(encoding="utf-8"))
    different = [key for key in made_from if before.get(key) != made_from[key]]
    if different:
        raise UserError(
            f"{out} was made from other text ({', '.join(different)} differ): choose another --out"
        )
    return data


def given_data(recipe, folder):
    """The folder of --data, with what `prepare_data` makes. `UserError` if it lacks something."""
    corpus, report = open_corpus(folder), Path(folder) / "report" / "dev.bin"
    if TokenShard(report).tokenizer != corpus.tokenizer.identity:
        raise UserError(f"{report} is of another tokenizer than {folder}/dev.bin")
    if corpus.tokenizer.vocabulary_size != recipe.vocabulary_size:
        raise UserError(
            f"{folder} has {corpus.tokenizer.vocabulary_size} pieces and the recipe asks for "
            f"{recipe.vocabulary_size}: make it with --recipe {recipe.name} --dry-run"
        )
    return corpus.folder


def make_shards(recipe, args, data, corpus):
    """Writes the text into the folder `corpus`, as far as it is made or sampled, and its shards."""
    shutil.rmtree(corpus, ignore_errors=True)  # what an attempt left that failed half-way
    train_folder, dev_folder = args.train, args.dev
    if recipe.corpus == "toy":
        words = ["--words", recipe.words] if recipe.words else []
        stage(make_toy_corpus, "--out", corpus, *words)
        train_folder, dev_folder = corpus / "train", corpus / "dev"
    elif recipe.words:
        train_folder = corpus / "train"
        sample_corpus(args.train, train_folder, recipe.words)
    parts = [corpus / "dev-A", corpus / "dev-B"]
    write_dev_halves(dev_folder, parts, recipe.dev_words, train_folder)
    stage(
        tokenize_corpus,
        "--train",
        train_folder,
        "--dev",
        parts[0],
        "--out",
        data,
        "--vocab-size",
        recipe.vocabulary_size,
        "--clean",
        recipe.clean,
    )
    stage(
        tokenize_corpus,
        "--tokenizer",
        data / "tokenizer.model",
        "--dev",
        parts[1],
        "--out",
        data / "report",
        "--clean",
        recipe.clean,
    )


# ---- the models of one seed


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all seeds share."""

    recipe: recipes.Experiment
    data: Path  # folder of shards
    pairs: list[str]  # folders of minimal pairs
    tasks: str | None  # folder of tasks to fine-tune on
    out: Path
    results: Path
    device: str
    deadline: float | None  # a time of time.monotonic after which training stops
    tuning: bool  # nothing is scored on the second halves of the dev text
    trained: set = dataclasses.field(default_factory=set)  # folders of runs known to be finished

    @functools.cached_property
    def shards(self):
        """{shard: digest}: what a result was measured on."""
        found = {"train": "train.bin", "dev": "dev.bin", "report": "report/dev.bin"}
        return {name: TokenShard(self.data / path).digest for name, path in found.items()}

    @functools.cached_property
    def finetuning(self):
        """What fine-tuning depends on besides the model: the tasks' files and the options."""
        options = self.recipe.finetune
        read = read_tasks(Path(self.tasks), options.get("only"))
        return {"files": {task.name: task.digests for task in read}, "options": options}


def run_seed(setup, seed):
    """Trains and scores the models of one seed, but for those whose results are there.

    Each result is kept in a file of the folder of results, as report/study.py describes it. Raises
    `Stopped` if a stage ends early.
    """
    for name, entries, weights in setup.recipe.all_scored():
        run_model(setup, name, entries, weights, seed)


def run_model(setup, name, entries, weights, seed):
    """Makes the result of one model, or of the ensemble of several, where it is not there."""
    path = setup.results / f"seed-{seed}" / f"{name}.json"
    wanted = wanted_of(setup, name, entries, weights, seed)
    if not is_done(path, wanted, setup):
        make_result(setup, entries, weights, seed, path, wanted)
    if setup.tasks and len(entries) == 1 and not setup.tuning:
        finetune_model(setup, entries[0], seed, path)


def wanted_of(setup, name, entries, weights, seed):
    """What the result of a model, or of an ensemble, is the result of."""
    wanted = {"name": name, "shards": setup.shards, "seed": seed}
    if len(entries) == 1:
        return wanted | described(setup, entries[0], seed)
    return wanted | {"members": [described(setup, e, seed) for e in entries], "weights": weights}


def check_study(folder, name):
    """Raises `UserError` where a folder has the report of another recipe than the one named."""
    study = folder / "experiment.json"
    there = json.loads(study.read_text(encoding="utf-8"))["name"] if study.exists() else name
    if there != name:
        raise UserError(f"{study} is of recipe {there}, not {name}: choose another --results or --out")


def check_results(setup):
    """Raises `UserError` where the report would be of two recipes, or of two texts."""
    check_study(setup.results, setup.recipe.name)
    for folder in seed_folders(setup.results):
        for name, entries, weights in setup.recipe.all_scored():
            path = folder / f"{name}.json"
            if path.exists() and "report" in (result := read_result(path)):
                wanted = wanted_of(setup, name, entries, weights, seed_of(folder))
                check_result(path, result, wanted)


def make_result(setup, entries, weights, seed, path, wanted):
    """Trains what is not trained, scores it, and writes the result."""
    if len(entries) == 1:
        check_precision(setup, entries[0], seed, path.parent)
        wanted["conditions"]["precision"] = precision_of(setup, entries[0], seed)
    for entry in entries:
        train_model(setup, entry, seed)
    check_time(setup)
    scores = score(setup, entries, weights, seed, path)
    if len(entries) == 1:
        out = folder_of(setup, entries[0], seed)
        best = read_checkpoint(out / "best.pt")
        scores |= {"weights": content_digest(best["weights"]), **read_log(out / "log.jsonl")}
        scores["taught_by"] = [teacher["digest"] for teacher in best["teachers"]]
    before = read_result(path) if path.exists() else {}
    if "finetuned" in before and before.get("weights") == scores["weights"]:
        scores["finetuned"] = before["finetuned"]
    write_json(path, wanted | scores)


def precision_of(setup, entry, seed):
    """The precision in which a model is trained: what its options log, or its run, or the machine.

    A run that was begun keeps its own on another machine. (Of those before 2026-11-28 some log
    "auto".)
    """
    asked, state = entry.config().precision, folder_of(setup, entry, seed) / "checkpoint.pt"
    if asked == "auto" and state.exists():
        asked = read_checkpoint(state)["config"].get("precision", asked)
    return choose_compute(setup.device, asked).precision


def check_precision(setup, entry, seed, folder):
    """Raises `UserError` where another machine chose another precision for a result of the seed.

    A seed's models are compared. What the options of a recipe say is not a machine's choice.
    """
    here = precision_of(setup, entry, seed)
    for path in folder.glob("*.json") if entry.config().precision == "auto" else ():
        there = read_result(path)
        chosen = there.get("conditions", {}).get("precision", "auto")
        if chosen not in ("auto", here) and "precision" not in there["options"]:
            raise UserError(
                f"{path} was trained in {chosen}, and {entry.name} would be trained in {here} "
                "here: a seed's models are compared, so that they need the same: say "
                f'"precision": "{chosen}" in the options of the recipe, or move the seed away'
            )


def finetune_model(setup, entry, seed, path):
    """Adds to a model's result what finetune.py finds on the tasks, unless it is there."""
    result, how = read_result(path), setup.finetuning
    if {key: result.get("finetuned", {}).get(key) for key in how} == how:
        return
    train_model(setup, entry, seed)  # its checkpoint is needed, which may be gone
    check_time(setup)
    checkpoint = folder_of(setup, entry, seed) / setup.recipe.scored
    # What was tried before with other options, or of another checkpoint, is not in the way.
    made_from = content_digest([how, read_checkpoint(checkpoint)["digest"]])
    scratch = path.with_suffix(".tasks")
    scratch.unlink(missing_ok=True)
    first_seed = seed * int(how["options"].get("seeds") or 1)
    options = recipes.arguments_of(how["options"])
    options += ["--tasks", setup.tasks, "--first-seed", first_seed, "--device", setup.device]
    options += ["--out", setup.out / f"seed-{seed}" / f"finetuned-{made_from[:8]}"]
    if setup.deadline is not None:
        options += ["--stop-after", max((setup.deadline - time.monotonic()) / 60, 0)]
    stage(finetune, checkpoint, *options, "--json", scratch)
    if not scratch.exists():
        raise Stopped(0)
    found = json.loads(scratch.read_text(encoding="utf-8"))
    scratch.unlink()
    (scores,) = found.pop("models").values()
    write_json(path, result | {"finetuned": how | found | {"scores": scores}})


def check_time(setup):
    """Raises `Stopped` where the time of --stop-after is over."""
    if setup.deadline is not None and time.monotonic() > setup.deadline:
        raise Stopped(0)


def folder_of(setup, entry, seed):
    """The folder of a model's run."""
    return setup.out / f"seed-{seed}" / entry.name


def described(setup, entry, seed):
    """What a result is the result of: unless all of this is the same, it is another's."""
    teachers = [described(setup, setup.recipe.entries[t], seed) for t in entry.teachers]
    return {
        "preset": entry.preset,
        "conditions": entry.conditions(),
        "teachers": teachers,
        "seed": seed + entry.seed_offset,
        "scored": setup.recipe.scored,
        "options": entry.options,
    }


def is_done(path, wanted, setup):
    """Whether a file holds the result, and all scores that are asked for.

    Raises `UserError` if it is another model's.
    """
    if not path.exists():
        return False
    result = read_result(path)
    check_result(path, result, wanted)
    if setup.tuning:
        return True
    if "report" not in result:
        log(f"{path} lacks scores on the reported dev text: made again")
        return False
    asked, there = {Path(folder).name for folder in setup.pairs}, result["report"]["pairs"].keys()
    if asked <= there:
        return True
    if lost := sorted(there - asked):
        raise UserError(f"{path} would lose its scores in {', '.join(lost)}: add these to --pairs")
    log(f"{path} lacks {', '.join(sorted(asked - there))}: made again")
    return False


def check_result(path, result, wanted):
    """Raises `UserError` where a file holds another model's result."""
    if different := list(differences(result, wanted)):
        raise UserError(
            f"{path} is another model's result: {'; '.join(different)}; choose another --out or "
            "--results, or move it away"
        )


def differences(there, wanted, at="", options=None):
    """Texts that say what of `wanted` is otherwise in a result. Options are told by conditions.

    A condition that the result does not have is an option that counts since then: it is in the
    result's `options`, or had its default. One that no longer exists must have been off. Precision
    that is left to the machine can be any.
    """
    later = {}
    if at.endswith("conditions."):
        later = defaults(distill.DistillConfig) | options
        for key in sorted(there.keys() - wanted.keys()):
            if there[key]:
                yield f"{at}{key} is {there[key]} there, and no option here"
    for key, value in wanted.items():
        if key == "options" or (key == "precision" and value == "auto"):
            continue
        found = there.get(key, later.get(key))
        if isinstance(value, dict) and isinstance(found, dict):
            yield from differences(found, value, f"{at}{key}.", there.get("options", {}))
        elif key in ("teachers", "members") and isinstance(found, list) and len(found) == len(value):
            for i, (one, other) in enumerate(zip(found, value)):
                yield from differences(one, other, f"{at}{key} {i + 1}: ")
        elif found != json.loads(json.dumps(value)):
            yield f"{at}{key} is {found} there and {value} here"


def train_model(setup, entry, seed):
    """Trains a model, after its teachers, or does nothing where it is trained."""
    out = folder_of(setup, entry, seed)
    if out in setup.trained:
        return
    steps = None
    if setup.recipe.whole_epochs:
        steps = entry.whole_steps(TokenShard(setup.data / "train.bin").num_tokens)
    options = [*entry.arguments(steps), "--data", setup.data, "--seed", seed + entry.seed_offset]
    options += ["--device", setup.device]
    if entry.config().precision == "auto":
        options += ["--precision", precision_of(setup, entry, seed)]
    program = train
    if entry.teachers:
        teachers = [setup.recipe.entries[name] for name in entry.teachers]
        for teacher in teachers:
            train_model(setup, teacher, seed)
        program = distill
        options += ["--teachers", *(folder_of(setup, t, seed) / "best.pt" for t in teachers)]
    check_time(setup)
    training_stage(program, out, setup.deadline, *options)
    setup.trained.add(out)


def score(setup, entries, weights, seed, path):
    """Scores a model, or several as an ensemble: "dev" and, unless it is for tuning, "report".

    Beside `path`, the losses of each chunk and the scores of each pair are kept as .npz.
    """
    best = [folder_of(setup, entry, seed) / "best.pt" for entry in entries]
    if len(entries) > 1:  # as it taught
        which = ["--ensemble", *best, *(("--teacher-weights", *weights) if weights else ())]
    else:
        which = [folder_of(setup, entries[0], seed) / setup.recipe.scored]
    common = ["--weight-by", setup.data / "train.bin", "--device", setup.device]
    common += ["--precision", setup.recipe.precision]
    found = {"commit": commit(), "machine": machine(setup.device), "torch": torch.__version__}
    found["dev"] = evaluated(path, *which, *common, "--data", setup.data)
    if setup.tuning:
        return found
    kept, report = path.with_suffix(""), setup.data / "report"
    options = ["--data", report, "--temperature-scaled", setup.data]
    options += ["--losses", f"{kept}.losses.npz"]
    if setup.pairs:
        options += ["--pairs", *setup.pairs, "--pair-scores", f"{kept}.pairs.npz"]
    found["report"] = evaluated(path, *which, *common, *options)
    if len(entries) == 1:
        found["samples"] = samples(which[0], setup.device)
        if entries[0].name in setup.recipe.teaching and which != best:
            found["teaching"] = evaluated(path, *best, *common, "--data", report)
    return found


def evaluated(path, *arguments):
    """The entry that evaluate.py writes for one model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.scores")  # another process may score the same
    stage(evaluate, *arguments, "--json", scratch)
    (entry,) = json.loads(scratch.read_text(encoding="utf-8"))["checkpoints"]
    scratch.unlink()
    del entry["path"]
    entry["pairs"] = {Path(folder).name: found for folder, found in entry["pairs"].items()}
    return entry


def samples(path, device):
    """{prompt: how the model goes on}, drawn with the same seed for every model."""
    model, checkpoint = load_checkpoint(path)
    model.to(choose_device(device))
    tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
    return {
        prompt: written(model, tokenizer, prompt, SAMPLE_TOKENS).removeprefix(prompt) for prompt in PROMPTS
    }


# ---- the plan


def print_plan(setup, seeds):
    """Prints what each model will take, before anything is trained."""
    shard = TokenShard(setup.data / "train.bin")
    costs = recipes.costs(setup.recipe, shard.num_tokens, shard.words)
    speeds, how = known_speeds(setup, costs, seeds)
    left = {
        name: sum(cost.flops * (1 - progress_of(setup, name, seed)[0]) for seed in seeds) / speeds[name]
        for name, cost in costs.items()
    }  # seconds
    rows = [["model", "parameters", "epochs", "tokens", "FLOPs", "minutes left", "disk", "memory"]]
    for name, cost in costs.items():
        rows.append(
            [
                name,
                f"{cost.parameters:,}",
                f"{cost.epochs:.3g}",
                f"{cost.tokens:,}",
                f"{cost.flops:.1e}",
                f"{left[name] / 60:.1f}",
                f"{cost.disk / 1e9:.2f} GB",
                f"{cost.memory / 1e9:.2f} GB",
            ]
        )
    print("\n".join(aligned(rows)))
    disk = sum(cost.disk for cost in costs.values()) * len(seeds) / 1e9
    free = shutil.disk_usage(setup.data).free / 1e9
    print(
        f"seeds {seeds[0]} to {seeds[-1]}: {sum(left.values()) / 3600:.2g} hours of training left, "
        f"{how}; scoring and fine-tuning come on top\ndisk {disk:.2f} GB in all, {free:.0f} GB free"
    )
    if disk > free:
        warn("the disk is too small for all of it")


def progress_of(setup, name, seed):
    """(share of the training that is done, seconds it took), from a model's result or log."""
    path = setup.results / f"seed-{seed}" / f"{name}.json"
    log = folder_of(setup, setup.recipe.entries[name], seed) / "log.jsonl"
    if path.exists():
        return 1.0, read_result(path).get("seconds", 0.0)
    if not log.exists():
        return 0.0, 0.0
    found = read_log(log)
    config = setup.recipe.entries[name].config()
    steps = config.steps or config.epochs * found["steps"] / max(found["epochs"], 1e-9)
    return min(found["steps"] / max(steps, 1), 1.0), found["seconds"]


def known_speeds(setup, costs, seeds):
    """{name: FLOP/s}, and a text that says how it is known: measured here, or guessed."""
    measured = {}
    for name, cost in costs.items():
        done = [progress_of(setup, name, seed) for seed in seeds]
        if seconds := sum(taken for _, taken in done):
            measured[name] = cost.flops * sum(share for share, _ in done) / seconds
    if measured:
        mean = statistics.fmean(measured.values())
        return {name: measured.get(name, mean) for name in costs}, "at the speed measured so far"
    guess = matmul_speed(setup.device) * GUESSED_SHARE
    return dict.fromkeys(costs, guess), (
        f"at a guess of {guess / 1e9:.3g} GFLOP/s, {GUESSED_SHARE:.0%} of a matrix product's"
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
        "--recipe",
        metavar="NAME|FILE",
        help=f"the models to train, and their options: {', '.join(recipes.recipe_names())}, or "
        "a JSON file like those in recipes/",
    )
    what.add_argument(
        "--report",
        nargs="+",
        metavar="DIR",
        help="train nothing: write the report of these folders, of an experiment or of runs",
    )
    parser.add_argument("--train", metavar="DIR", help="folder of training text, as for tokenize_corpus.py")
    parser.add_argument("--dev", metavar="DIR", help="folder of dev text")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="instead of --train and --dev: OUT/data of a command like this one, which --dry-run "
        "stops as soon as it is made; it is small enough to be taken to another machine",
    )
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="DIR", help="folders of minimal pairs to score"
    )
    parser.add_argument(
        "--finetune",
        metavar="DIR",
        help="folder of tasks, as for finetune.py, on which each model is fine-tuned",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for all that is made (default: runs/RECIPE)")
    parser.add_argument(
        "--results",
        metavar="DIR",
        help="folder for the results and the report alone, which are small (default: that of "
        "--out); a model whose result is there is not trained again",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="how often to train all models, each time with another seed (default: 1)",
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first of them (default: 0)"
    )
    parser.add_argument(
        "--words",
        type=int,
        metavar="N",
        help="words of training text to sample (default: the recipe's)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="only these models of the recipe, and those that teach them",
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="MODEL.OPTION=A,B",
        help="for each value, one more model like that one",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="score on the first halves of the dev text alone, and write no report",
    )
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
    parser.add_argument("--dry-run", action="store_true", help="prepare the text, print the plan and stop")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    training = (args.train, args.dev, args.data, args.results, args.words, args.models, args.vary)
    training += (args.finetune,)
    if args.report and any((*training, args.tune, args.dry_run, args.seeds > 1, args.first_seed)):
        parser.error("--report trains nothing: only --out, --pairs and --device go with it")
    if len({Path(folder).name for folder in args.pairs}) < len(args.pairs):
        parser.error("--pairs: two folders have one name")
    if args.seeds < 1 or args.first_seed < 0 or (args.words is not None and args.words < 1):
        parser.error("--seeds and --words must be at least 1, --first-seed at least 0")
    return args, parser


def check_text(recipe, args, parser):
    """Wrong usage ends the program: a recipe needs text, or makes its own."""
    given = (args.train, args.dev, args.data, args.pairs, args.finetune)
    if recipe.corpus == "toy" and any(given):
        parser.error(
            f"--recipe {args.recipe} makes its own text, pairs and task: leave out --train, --dev, "
            "--data, --pairs, --finetune"
        )
    if args.data and (args.train or args.dev or args.words):
        parser.error("--data is text that is ready: leave out --train, --dev, --words")
    if args.train and args.dev and Path(args.train).resolve() == Path(args.dev).resolve():
        parser.error("--train and --dev are one folder: what is trained on cannot be reported")
    if recipe.corpus is None and not args.data and not (args.train and args.dev):
        parser.error(f"--recipe {args.recipe} needs --train DIR and --dev DIR, or --data DIR")


def main(argv=None):
    """Trains, scores and reports as the command line asks; returns the exit code."""
    args, parser = parse_arguments(argv)
    command = "python reproduce.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if args.report:
        return report_folders(args, command)
    recipe = recipes.read_experiment(args.recipe, args.vary)
    check_text(recipe, args, parser)
    if args.words:
        recipe = dataclasses.replace(recipe, words=args.words)
    chosen = recipe.only(args.models) if args.models else recipe
    out = Path(args.out or f"runs/{recipe.name}")
    deadline = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    for folder in args.pairs:
        evaluate.read_pairs(folder)  # a mistake in them is to be known before hours of training
    if args.finetune:
        read_tasks(Path(args.finetune), recipe.finetune.get("only"))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    setup = None
    try:
        data = given_data(recipe, args.data) if args.data else prepare_data(recipe, args, out)
        pairs, tasks = args.pairs, args.finetune
        if recipe.corpus == "toy":
            pairs, tasks = [str(out / "corpus" / "pairs")], out / "corpus" / "tasks"
            tasks = str(tasks) if tasks.is_dir() else None  # an older version made none
        results = Path(args.results or out)
        setup = Setup(chosen, data, pairs, tasks, out, results, args.device, deadline, args.tune)
        if not args.tune:
            check_results(dataclasses.replace(setup, recipe=recipe))
        print_plan(setup, seeds)
        if args.dry_run:
            return 0
        if not args.tune:
            write_json(results / "experiment.json", study_fields(recipe))
        for seed in seeds:
            run_seed(setup, seed)
    except Stopped as stopped:
        if setup and args.tune:
            trial_lines(results, seeds, setup.shards)
        print("stopped before the end: the same command continues")
        return stopped.code
    if args.tune:
        print("\n" + "\n".join(trial_lines(results, seeds, setup.shards)))
    else:
        print("\n" + "\n".join(write_report(read_study(results), results, command)))
    return 0


# ---- reports of what is there


def report_folders(args, command):
    """Writes the report of each experiment's folder, or one of all runs' folders; the exit code."""
    folders = [Path(folder) for folder in args.report]
    experiments = [folder for folder in folders if (folder / "experiment.json").exists()]
    runs = [folder for folder in folders if (folder / "best.pt").exists()]
    for folder in folders:
        if folder not in experiments and folder not in runs:
            log(
                f"{folder} is neither the folder of an experiment nor of a run, for it has no "
                "experiment.json and no best.pt: left out"
            )
    if not runs and not experiments:
        raise UserError("--report: no folder of an experiment or of a run")
    if args.pairs and not runs:
        raise UserError("--pairs: only runs are scored, and an experiment has its scores")
    for folder in experiments:  # several have a report each, and --out is for that of the runs
        out = Path(args.out) if args.out and len(folders) == 1 else folder
        print("\n" + "\n".join(write_report(read_study(folder), out, command)))
    if runs:
        out = Path(args.out or "runs/report")
        score_runs(runs, args, out)
        print("\n" + "\n".join(write_report(read_study(out), out, command)))
    return 0


def score_runs(folders, args, out):
    """Scores runs that train.py and distill.py made, and writes their results into `out`.

    A model that has teachers is a student, and the control is one of its shape that has none and
    taught nobody. Runs of one folder name and different seeds, or in the folders seed-N of an
    experiment, are one model. Raises `UserError` where their dev text differs, two are the same
    model and seed, or `out` has other results.
    """
    found = {}
    for folder in folders:
        checkpoint = read_checkpoint(folder / "best.pt")
        seed = checkpoint["config"].get("seed", 0)
        if folder.parent in seed_folders(folder.parent.parent):
            seed = seed_of(folder.parent)  # that of an experiment, to which a model's own may add
        key = (seed, folder.name)
        if key in found:
            raise UserError(f"{folder} and {found[key][0]} are of one name and seed: rename one")
        found[key] = (folder, checkpoint)
    dev_texts = {checkpoint["config"].get("dev_shard") for _, checkpoint in found.values()}
    if len(dev_texts) > 1:
        raise UserError("--report: these runs have different dev text: report them apart")
    fields = run_fields(found)
    check_study(out, fields["name"])
    for path in (f / f"{name}.json" for f in seed_folders(out) for name in fields["models"]):
        seed, name = seed_of(path.parent), path.stem
        if path.exists() and (seed, name) not in found and name not in fields["ensembles"].values():
            raise UserError(f"{path} is of a run that is not given: remove {out}, or choose another --out")
    write_json(out / "experiment.json", fields)
    for (seed, name), (folder, checkpoint) in found.items():
        result = {"name": name, "preset": checkpoint["model"]["name"], "seed": seed}
        log = folder / "log.jsonl"
        result |= score_run(args, out, [folder], seed, name) | (read_log(log) if log.exists() else {})
        result["weights"] = content_digest(checkpoint["weights"])
        result["taught_by"] = [teacher["digest"] for teacher in checkpoint["teachers"]]
        result["samples"] = samples(folder / "best.pt", args.device)
        write_json(out / f"seed-{seed}" / f"{name}.json", result)
    for student, teacher in fields["ensembles"].items():
        members = fields["teachers"][student]
        for seed in {seed for seed, name in found if name == student}:
            if len(members) > 1 and all((seed, member) in found for member in members):
                parts = [found[seed, member][0] for member in members]
                weights = found[seed, student][1]["config"].get("teacher_weights")
                result = {"name": teacher} | score_run(args, out, parts, seed, teacher, weights)
                write_json(out / f"seed-{seed}" / f"{teacher}.json", result)


def score_run(args, out, folders, seed, name, weights=None):
    """Scores the best.pt of a run, or of several as an ensemble, on the data of the first."""
    data = Path(read_checkpoint(folders[0] / "best.pt")["config"]["data"])
    checkpoints = [folder / "best.pt" for folder in folders]
    path = out / f"seed-{seed}" / f"{name}.json"
    options = ["--data", data, "--weight-by", data / "train.bin", "--device", args.device]
    options += ["--losses", path.with_suffix(".losses.npz")]
    options += ["--pairs", *args.pairs] if args.pairs else []
    which = ["--ensemble", *checkpoints] if len(folders) > 1 else checkpoints
    options += ["--teacher-weights", *weights] if weights else []
    where = {"commit": commit(), "machine": machine(args.device), "torch": torch.__version__}
    return where | {"report": evaluated(path, *which, *options)}


def run_fields(found):
    """The fields of the `Study` of runs, from {(seed, name): (folder, checkpoint)}."""
    digests = {content_digest(c["weights"]): name for (_, name), (_, c) in found.items()}
    checkpoints = {name: checkpoint for (_, name), (_, checkpoint) in found.items()}
    teachers = {
        name: [digests.get(teacher["digest"], teacher["name"]) for teacher in c["teachers"]]
        for name, c in checkpoints.items()
        if c["teachers"]
    }
    student = next(iter(teachers), None)
    teaching = {teacher for taught_by in teachers.values() for teacher in taught_by}

    def shape(name):  # dropout is a matter of training
        return checkpoints[name]["model"]["shape"] | {"dropout": 0}

    alone = [name for name in checkpoints if name not in teachers]
    controls = [n for n in alone if student and n not in teaching and shape(n) == shape(student)]
    ensembles = {
        name: recipes.ensemble_name(taught_by, checkpoints[name]["config"].get("teacher_weights"))
        for name, taught_by in teachers.items()
    }
    titles = {name: name for name in alone}
    titles |= {
        name: f"ensemble of {', '.join(teachers[student])}"
        for student, name in ensembles.items()
        if len(teachers[student]) > 1
    }
    return {
        "name": "of runs",
        "about": "",
        "text": "the dev text that training read, which also chose each best.pt",
        "models": titles | {name: name for name in teachers},
        "teachers": teachers,
        "ensembles": ensembles,
        "control": controls[0] if controls else None,
        "student": student,
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
