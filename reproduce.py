"""An experiment in one command: teachers, their students, and a control that learns without teachers.

    python reproduce.py --recipe demo                                 minutes, on an invented corpus
    python reproduce.py --recipe small --train DIR --dev DIR --pairs blimp_filtered
    python reproduce.py --recipe paper --train DIR --dev DIR          the paper's sizes: needs a GPU
    python reproduce.py --recipe small ... --finetune glue_filtered   and (Super)GLUE or MSGS
    python reproduce.py --recipe mine.json ...                        a recipe of your own
    python reproduce.py --report runs/small                           the report of finished models

Every stage is a command of this project, printed before it runs. A command that was stopped
continues when it is given again. The dev text is cut in two: the first halves of its files are the
validation text, on which best.pt and options are chosen; the second halves are the test text, which is
only reported. Writes OUT/report.md, report.html, report.json, and prints the main table.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

import distill
import evaluate
import finetune
import make_toy_corpus
import tokenize_corpus
import train
from corpus.text_files import sub_corpora
from data import TokenShard, open_corpus
from evaluation.minimal_pairs import pairs_digest, read_pairs
from evaluation.perplexity import FITTED_CHUNKS, training_shares
from evaluation.scoring import context_length
from experiments import recipes
from experiments.jobs import INCOMPLETE, Job, run_jobs
from experiments.pages import write_report
from experiments.results import (
    check_facts,
    has_losses,
    read_log,
    read_object,
    read_result,
    read_study,
    scored_on,
    seed_folders,
    study_fields,
    trial_lines,
)
from experiments.sampling import sample_corpus, write_dev_halves
from finetuning.tasks import read_tasks
from generate import complete
from model import check_context, check_weights, load_checkpoint
from tokenizer import Tokenizer
from training.checkpoint import content_digest, read_checkpoint
from training.device import choose_compute, choose_device, should_capture
from training.io import UserError, aligned, locked, log, run_program, sha256, write_json
from training.logger import commit, machine
from training.options import SAVE, SPEED, STOP, defaults, option, parse
from training.resume import differences, is_finished

PROMPTS = ("Once upon a time", "The children", "I think that")
SAMPLE_TOKENS = 40
FITTING_PASSES = 3  # that the temperature takes as a rule
DISK_BYTES = 40  # per parameter of a run: two full checkpoints, best.pt, a checkpoint that is being written


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """The options of the command line."""

    recipe: str | None = option(
        None, f"the experiment: {', '.join(recipes.recipe_names())}, or your own JSON file", exclusive=True
    )
    report: list[str] | None = option(
        None, "train nothing: write the report of these experiments' folders", exclusive=True
    )
    train: str | None = option(None, "folder of training text, as for tokenize_corpus.py")
    dev: str | None = option(None, "folder of dev text")
    data: str | None = option(
        None, "instead of --train and --dev: OUT/data of an experiment or of its --dry-run"
    )
    words: int | None = option(None, "words of training text to sample (default: the recipe's)", minimum=1)
    models: list[str] | None = option(None, "only these models of the recipe, and their teachers")
    vary: list[str] | None = option(None, "MODEL.OPTION=A,B: for each value, add MODEL with that value")
    seeds: int = option(1, "train all models with this many seeds", minimum=1, maximum=1000)
    first_seed: int = option(0, "the first seed", minimum=0, maximum=(1 << 31) - 1)
    pairs: list[str] | None = option(None, "folders of minimal pairs to score", group=SAVE)
    finetune: str | None = option(None, "folder of tasks: fine-tune each model on them", group=SAVE)
    tune: bool = option(False, "score only on the validation text, write no report", group=SAVE)
    out: str | None = option(None, "folder of all output (default: runs/RECIPE)", group=SAVE)
    results: str | None = option(
        None, "another folder for results and report; models with a result there are not trained", group=SAVE
    )
    device: str = option("auto", "auto, cuda, mps or cpu", group=SPEED)
    jobs: int = option(
        1,
        "train and score this many models in parallel, each with its share of the CPU's threads",
        group=SPEED,
        minimum=1,
    )
    stop_after: float | None = option(
        None, "save and stop after this many minutes (default: never)", group=STOP, minimum=0
    )
    dry_run: bool = option(False, "make the token shards in OUT/data, print the plan, and stop", group=STOP)
    list_recipes: bool = option(False, "print the recipes and what each is for", group=STOP, alias="--list")


def check_options(config):
    """Returns an error message for options that do not go together, or None."""
    if config.list_recipes:
        return None
    if not config.recipe:
        changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
        if not config.report:
            return "give --recipe or --report; --list prints the recipes"
        if changed - {"report", "out", "device"}:
            return "--report trains nothing: only --out goes with it"
        return None
    recipe, text = recipes.read_experiment(config.recipe, config.vary or ()), (config.train, config.dev)
    if recipe.corpus == "toy" and any((*text, config.data, config.pairs, config.finetune)):
        return (
            f"--recipe {config.recipe} makes its own text, pairs and task: leave out --train, --dev, "
            "--data, --pairs, --finetune"
        )
    if config.data and (any(text) or config.words):
        return "--data is text that is ready: leave out --train, --dev, --words"
    if all(text) and Path(config.train).resolve() == Path(config.dev).resolve():
        return "--train and --dev are one folder: text that was trained on cannot be reported"
    if recipe.corpus is None and not config.data and not all(text):
        return f"--recipe {config.recipe} needs --train DIR and --dev DIR, or --data DIR"
    pairs = [Path(folder).name for folder in config.pairs or ()]
    if len(set(pairs)) < len(pairs):
        return "--pairs: two folders have one name"
    return None


# ---- stages


class Stopped(Exception):
    """A stage was stopped, by a signal or by --stop-after, and its work is saved."""

    def __init__(self, code):
        super().__init__()
        self.code = code


def run_stage(program, *arguments):
    """Prints and runs a command of this project; raises `Stopped` if it ends early."""
    arguments = [str(argument) for argument in arguments]
    print(f"\n$ python {program.__name__}.py {shlex.join(arguments)}", flush=True)
    torch.cuda.empty_cache()  # else what torch keeps of the stage before is not free for a teacher cache
    if code := program.main(arguments):
        raise Stopped(code)


def run_for_scores(program, *arguments):
    """Runs a program that scores, and returns its JSON; raises `Stopped` if it ends early."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        run_stage(program, *arguments, "--json", path)
        if not path.exists():
            raise Stopped(0)
        return json.loads(path.read_text(encoding="utf-8"))


# ---- text


def folder_digests(folder, saved):
    """{file name: digest} of a folder of text; {file name: size} if an old version saved sizes."""
    if folder is None:
        return None
    has_sizes = isinstance(saved, dict) and all(type(value) is int for value in saved.values())
    paths = sub_corpora(folder).values()
    return {path.name: path.stat().st_size if has_sizes else sha256(path.read_bytes()) for path in paths}


def shard_settings(recipe, config, saved):
    """All that determines the shards; `saved` is what an earlier command wrote of it."""
    options = ("corpus", "words", "dev_words", "tokenizer", "vocabulary_size", "clean")
    state = {key: folder_digests(getattr(config, key), saved.get(key)) for key in ("train", "dev")}
    return state | {key: getattr(recipe, key) for key in options}


def prepare_data(recipe, config, out):
    """Returns the folder OUT/data of token shards, which the first call makes.

    dev.bin in it is the validation text, report/dev.bin the test text. Nothing is ever deleted:
    OUT/corpus and OUT/data must be empty at first, and an attempt that was stopped writes the same
    files again. Raises `UserError` for other files there, or if the shards are of other text.
    """
    data, corpus = out / "data", out / "corpus"
    unfinished, finished = data / "unfinished.json", data / "made.json"
    is_new = not unfinished.exists() and not finished.exists()
    if is_new:
        for folder in (data, corpus):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} holds files that are not from this command: choose another --out")
    with locked(data):
        if is_new:
            write_json(unfinished, shard_settings(recipe, config, {}))
        path = finished if finished.exists() else unfinished
        saved = read_object(path)
        current = shard_settings(recipe, config, saved)
        if changed := [key for key in current if saved.get(key) != current[key]]:
            raise UserError(
                f"{data} was made from other text ({', '.join(changed)} differ): choose another --out"
            )
        if path == unfinished:
            make_shards(recipe, config, data, corpus)
            os.replace(unfinished, finished)
    return data


def make_shards(recipe, config, data, corpus):
    """Writes the toy, sampled and halved text into `corpus`, and the shards into `data`."""
    train_folder, dev_folder = config.train, config.dev
    if recipe.corpus == "toy":
        words = ["--words", recipe.words] if recipe.words else []
        run_stage(make_toy_corpus, "--out", corpus, *words)
        train_folder, dev_folder = corpus / "train", corpus / "dev"
    elif recipe.words:
        train_folder = corpus / "train"
        sample_corpus(config.train, train_folder, recipe.words)
    validation, test = corpus / "dev-A", corpus / "dev-B"
    write_dev_halves(dev_folder, [validation, test], recipe.dev_words, train_folder)
    options = ["--dev", validation, "--out", data, "--clean", recipe.clean]
    options += ["--vocab-size", recipe.vocabulary_size]
    options += ["--kind", recipe.tokenizer] if recipe.tokenizer else []
    run_stage(tokenize_corpus, "--train", train_folder, *options)
    options = ["--dev", test, "--out", data / "report", "--clean", recipe.clean]
    run_stage(tokenize_corpus, "--tokenizer", data / "tokenizer.model", *options)


def given_data(recipe, folder):
    """Returns the folder of --data. Raises `UserError` unless it fits the recipe."""
    corpus, test = open_corpus(folder), Path(folder) / "report" / "dev.bin"
    if TokenShard(test).tokenizer != corpus.tokenizer.identity:
        raise UserError(f"{test} is of another tokenizer than {folder}/dev.bin")
    if corpus.tokenizer.vocabulary_size != recipe.vocabulary_size:
        raise UserError(
            f"{folder} has {corpus.tokenizer.vocabulary_size} pieces in its vocabulary, the recipe "
            f"{recipe.vocabulary_size}: make the data with --recipe {recipe.name} --dry-run"
        )
    return corpus.folder


# ---- what the models of all seeds share


@dataclasses.dataclass(frozen=True)
class ExperimentContext:
    """The recipe, the folders, the device and the time limit of an experiment."""

    recipe: recipes.Experiment
    data: Path  # folder of shards
    pairs: list[str]  # folders of minimal pairs
    tasks: str | None  # folder of tasks to fine-tune on
    out: Path
    results: Path
    device: str
    deadline: float | None  # a time of time.monotonic() after which training stops
    tuning: bool  # score only on the validation text

    @functools.cached_property
    def shards(self):
        """{"train", "dev", "report": digest of the shard}."""
        paths = {"train": "train.bin", "dev": "dev.bin", "report": "report/dev.bin"}
        return {name: TokenShard(self.data / path).digest for name, path in paths.items()}

    @functools.cached_property
    def scoring(self):
        """{"precision", "pairs": {folder's name: digest}}: what scores depend on besides the text."""
        precision = choose_compute(self.device, self.recipe.precision).precision
        digests = {Path(folder).name: pairs_digest(read_pairs(folder)) for folder in self.pairs}
        return {"precision": precision, "pairs": digests}

    @functools.cached_property
    def finetuning(self):
        """The files of the tasks and the options of finetune.py, on which fine-tuned scores depend."""
        options = self.recipe.finetune
        tasks = read_tasks(Path(self.tasks), options.get("only"))
        return {"files": {task.name: task.digests for task in tasks}, "options": options}

    @functools.cached_property
    def finished(self):
        """The folders of finished runs, which `train_model` adds and does not open again."""
        return set()

    def folder(self, spec, seed):
        """The folder of a model's run."""
        return self.out / f"seed-{seed}" / spec.name

    def result_path(self, name, seed):
        """The file of a result."""
        return self.results / f"seed-{seed}" / f"{name}.json"

    def check_time(self):
        """Raises `Stopped` after the time of --stop-after."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Stopped(0)

    def time_options(self):
        """The option --stop-after for the next stage."""
        if self.deadline is None:
            return []
        return ["--stop-after", max((self.deadline - time.monotonic()) / 60, 0)]


# ---- is it the same result?


def settings_of(context, spec, seed):
    """{setting: value} of all that determines a model's result, besides the text."""
    teachers = [context.recipe.specs[name] for name in spec.teachers]
    return {
        "preset": spec.preset,
        "conditions": spec.conditions(),
        "teachers": [settings_of(context, teacher, seed) for teacher in teachers],
        "seed": seed + spec.seed_offset,
        "scored": context.recipe.scored,
        "options": spec.options,
    }


def result_settings(context, name, specs, weights, seed):
    """All that determines the result of a model, or of the ensemble of several."""
    settings = {"name": name, "shards": context.shards, "seed": seed}
    members = [settings_of(context, spec, seed) for spec in specs]
    return settings | (members[0] if len(specs) == 1 else {"members": members, "weights": weights})


def comparable_settings(saved, current):
    """The settings of a saved result, with the keys of the current ones, for `differences`.

    A condition that it lacks had its default, or is among the result's options, if an older version
    did not count it as a condition. If the current precision is "auto", any saved one is the same.
    """
    settings = {key: saved.get(key) for key in current if key != "options"}
    if "conditions" in current:
        options = defaults(distill.DistillConfig) | saved.get("options", {})
        conditions = {key: options.get(key) for key in current["conditions"]} | saved.get("conditions", {})
        if current["conditions"]["precision"] == "auto":
            conditions["precision"] = "auto"
        settings["conditions"] = conditions
    for key in ("teachers", "members"):
        if isinstance(settings.get(key), list) and len(settings[key]) == len(current[key]):
            settings[key] = [comparable_settings(*pair) for pair in zip(settings[key], current[key])]
    return settings


def check_result(path, result, settings):
    """Raises `UserError` if `result`, from the file `path`, is of another model."""
    if changed := differences(comparable_settings(result, settings), comparable_settings(settings, settings)):
        raise UserError(
            f"{path} is another model's result ({'; '.join(changed)}): choose another --out or "
            "--results, or move it away"
        )


def check_results(context):
    """Raises `UserError` if the report would be of two recipes, texts, or sets of minimal pairs."""
    path = context.results / "experiment.json"
    name = read_object(path, {"name": str})["name"] if path.exists() else context.recipe.name
    if name != context.recipe.name:
        raise UserError(
            f"{path} is of recipe {name}, not {context.recipe.name}: choose another --results or --out"
        )
    for seed in seed_folders(context.results):
        for name, (specs, weights) in context.recipe.all_scored().items():
            path = context.result_path(name, seed)
            if path.exists() and "report" in (result := read_result(path)):
                check_result(path, result, result_settings(context, name, specs, weights, seed))
                check_scoring(context, path, result)


def check_scoring(context, path, result):
    """Raises `UserError` if a result was scored in another precision or on other minimal pairs."""
    current = {"scoring precision": context.scoring["precision"]}
    current |= {f"content of {folder}": digest for folder, digest in context.scoring["pairs"].items()}
    check_facts(path, scored_on(result), {fact: (value, "this command") for fact, value in current.items()})


def is_done(context, path, settings):
    """True if a file holds a result with all scores that are asked for.

    Raises `UserError` if it is another model's.
    """
    if not path.exists():
        return False
    result = read_result(path)
    check_result(path, result, settings)
    if context.tuning:
        return "dev" in result
    if "report" not in result:
        log(f"{path} lacks scores on the test text: made again")
        return False
    check_scoring(context, path, result)
    asked, scored = context.scoring["pairs"].keys(), result["report"]["pairs"].keys()
    missing = sorted(asked - scored) + ([] if has_losses(path, result) else ["losses"])
    if missing and (lost := sorted(scored - asked)):
        raise UserError(f"{path} would lose its scores in {', '.join(lost)}: add these to --pairs")
    if missing:
        log(f"{path} lacks {', '.join(missing)}: made again")
    return not missing


# ---- the models of one seed


def run_seed(context, seed):
    """Trains and scores the models of one seed that have no result yet.

    Each result is a file in the folder of results, as `experiments.findings` describes it. Raises
    `Stopped` if a stage ends early.
    """
    for name in context.recipe.all_scored():
        run_model(context, name, seed)


def run_model(context, name, seed):
    """Trains and scores a model or an ensemble of one seed, unless it has a result. Raises `Stopped`."""
    specs, weights = context.recipe.all_scored()[name]
    path = context.result_path(name, seed)
    settings = result_settings(context, name, specs, weights, seed)
    if not is_done(context, path, settings):
        make_result(context, specs, weights, seed, path, settings)
    if lacks_finetuning(context, name, seed):
        finetune_model(context, specs[0], seed, path)


def run_in_parallel(context, seeds, limit):
    """Trains and scores the models of all seeds, `limit` at a time; returns the exit code.

    A model waits for its teachers, an ensemble for its members.
    """
    jobs, scored = [], context.recipe.all_scored()
    sources = {
        name: {spec.name for spec in specs} if len(specs) > 1 else set(specs[0].teachers)
        for name, (specs, _) in scored.items()
    }
    for seed in seeds:
        missing = set()
        for name, (specs, weights) in scored.items():
            settings = result_settings(context, name, specs, weights, seed)
            is_scored = is_done(context, context.result_path(name, seed), settings)
            if not is_scored or lacks_finetuning(context, name, seed):
                missing.add(name)
        needed, added = set(), missing  # `needed`: all sources of the missing ones, and their sources
        while added := set().union(*(sources[name] for name in added)) - needed:
            needed |= added
        for name in [name for name in scored if name in missing | needed]:
            needs = frozenset(f"{source}, seed {seed}" for source in sources[name] & (missing | needed))
            path = context.out / f"seed-{seed}" / f"{name}.log"
            arguments = context, name, seed, name in needed
            jobs.append(Job(f"{name}, seed {seed}", needs, model_job, arguments, path))
    return run_jobs(jobs, limit)


def model_job(context, name, seed, is_needed):
    """`run_model` as a job; one that is needed is trained even if it has a result. Returns an exit code."""
    # The jobs of its teachers and members have ended. Two jobs must not open one run at a time.
    specs, _ = context.recipe.all_scored()[name]
    sources = context.recipe.only([spec.name for spec in specs]).specs
    context.finished.update(context.folder(spec, seed) for key, spec in sources.items() if key != name)
    try:
        run_model(context, name, seed)
        if is_needed:
            train_model(context, context.recipe.specs[name], seed)
    except Stopped as stopped:
        return stopped.code or INCOMPLETE
    return 0


def make_result(context, specs, weights, seed, path, settings):
    """Trains the models that are not trained yet, scores them, and writes the result."""
    if len(specs) == 1:
        check_precision(context, specs[0], seed)
        settings["conditions"]["precision"] = training_precision(context, specs[0], seed)
    for spec in specs:
        train_model(context, spec, seed)
    context.check_time()
    result = settings | score(context, specs, weights, seed, path)
    if len(specs) == 1:
        out = context.folder(specs[0], seed)
        best = read_checkpoint(out / "best.pt")
        result |= {"weights": content_digest(best["weights"]), **read_log(out / "log.jsonl")}
        result["taught_by"] = [teacher["digest"] for teacher in best["teachers"]]
    earlier = read_result(path) if path.exists() else {}
    if "finetuned" in earlier and earlier.get("weights") == result["weights"]:
        result["finetuned"] = earlier["finetuned"]
    write_json(path, result)


def training_precision(context, spec, seed):
    """The precision of a model's training: that of its options, of its run, or of the machine."""
    precision, checkpoint = spec.config.precision, context.folder(spec, seed) / "checkpoint.pt"
    if precision == "auto" and checkpoint.exists():
        precision = read_checkpoint(checkpoint)["config"].get("precision", precision)
    return choose_compute(context.device, precision).precision


def check_precision(context, spec, seed):
    """Raises `UserError` if another machine chose another precision for a model of this seed."""
    if spec.config.precision != "auto":
        return
    here = training_precision(context, spec, seed)
    for path in sorted((context.results / f"seed-{seed}").glob("*.json")):
        result = read_result(path)
        precision = result.get("conditions", {}).get("precision", "auto")
        if precision not in ("auto", here) and "precision" not in result.get("options", {}):
            raise UserError(
                f"{path} was trained in {precision}, and {spec.name} would be trained in {here} "
                "here. Models of one seed are compared and need the same: give "
                f'"precision": "{precision}" in the options of the recipe, or move the seed away'
            )


def train_model(context, spec, seed):
    """Trains a model, after its teachers; does nothing if it is trained. Raises `Stopped`."""
    out, recipe = context.folder(spec, seed), context.recipe
    if out in context.finished:
        return
    steps = None
    if recipe.whole_epochs:
        steps = spec.whole_steps(TokenShard(context.data / "train.bin").num_tokens)
    options = [*spec.arguments(steps), "--data", context.data, "--seed", seed + spec.seed_offset]
    options += ["--device", context.device]
    if spec.config.precision == "auto":
        options += ["--precision", training_precision(context, spec, seed)]
    teachers = [recipe.specs[name] for name in spec.teachers]
    for teacher in teachers:
        train_model(context, teacher, seed)
    if teachers:
        options += ["--teachers", *(context.folder(teacher, seed) / "best.pt" for teacher in teachers)]
    context.check_time()
    run_stage(distill if teachers else train, *options, *context.time_options(), "--out", out)
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    if not is_finished(checkpoint["progress"], checkpoint["config"].get("patience", 0)):
        raise Stopped(0)
    context.finished.add(out)


def score(context, specs, weights, seed, path):
    """Scores a model, or several as an ensemble: "dev" and, unless it is for tuning, "report".

    Writes the losses of each chunk and the scores of each pair beside `path`, as .npz.
    """
    best = [context.folder(spec, seed) / "best.pt" for spec in specs]
    scored = [context.folder(specs[0], seed) / context.recipe.scored]
    if len(specs) > 1:  # the ensemble that taught the students
        scored = ["--ensemble", *best, *(("--teacher-weights", *weights) if weights else ())]
    options = ["--weight-by", context.data / "train.bin", "--device", context.device]
    options += ["--precision", context.scoring["precision"]]
    result = {"commit": commit(), "machine": machine(context.device), "torch": torch.__version__}
    result["dev"], _ = run_evaluation(*scored, *options, "--data", context.data)
    if context.tuning:
        return result
    test, losses = context.data / "report", path.with_suffix(".losses.npz")
    more = ["--data", test, "--temperature-scaled", context.data, "--losses", losses]
    if context.pairs:
        more += ["--pairs", *context.pairs, "--pair-scores", path.with_suffix(".pairs.npz")]
    path.parent.mkdir(parents=True, exist_ok=True)
    result["report"], origin = run_evaluation(*scored, *options, *more)
    result |= {"scoring": context.scoring, "losses": origin["losses"]}
    if origin["text"] != context.shards["report"] or origin["pairs"] != context.scoring["pairs"]:
        raise UserError(f"{test} or --pairs changed while {path} was made: give the command again")
    if len(specs) == 1:
        result["samples"] = samples(scored[0], context.device)
        if specs[0].name in context.recipe.teaching and scored != best:
            result["teaching"], _ = run_evaluation(*best, *options, "--data", test)
    return result


def run_evaluation(*arguments):
    """Runs evaluate.py on one model; returns its entry in the JSON, and the digests of the scored data."""
    scores = run_for_scores(evaluate, *arguments)
    (entry,), digests = scores["checkpoints"], scores["digests"]
    del entry["path"]
    for table in (entry, digests):
        table["pairs"] = {Path(folder).name: value for folder, value in table["pairs"].items()}
    return entry, digests


def samples(path, device):
    """{prompt: continuation}, drawn with the same seed for every model."""
    model, checkpoint = load_checkpoint(path)
    model.to(choose_device(device))
    tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
    return {
        prompt: complete(model, tokenizer, prompt, SAMPLE_TOKENS).removeprefix(prompt) for prompt in PROMPTS
    }


def lacks_finetuning(context, name, seed):
    """True if a model with a result has no fine-tuned scores, and should."""
    if context.tasks is None or context.tuning or name not in context.recipe.specs:
        return False
    finetuned = read_result(context.result_path(name, seed)).get("finetuned", {})
    return {key: finetuned.get(key) for key in context.finetuning} != context.finetuning


def finetune_model(context, spec, seed, path):
    """Adds the scores of finetune.py to a model's result."""
    result, conditions = read_result(path), context.finetuning
    train_model(context, spec, seed)  # again, if its checkpoint was deleted
    context.check_time()
    checkpoint = context.folder(spec, seed) / context.recipe.scored
    # Each checkpoint and set of options has its own folder: finetune.py refuses another's runs.
    digest = content_digest([conditions, read_checkpoint(checkpoint)["digest"]])
    options = recipes.arguments_of(conditions["options"])
    options += ["--tasks", context.tasks, "--device", context.device]
    options += ["--first-seed", seed * int(conditions["options"].get("seeds") or 1)]
    options += ["--out", context.out / f"seed-{seed}" / f"finetuned-{digest[:8]}"]
    scores = run_for_scores(finetune, checkpoint, *options, *context.time_options())
    (of_model,) = scores.pop("models").values()
    write_json(path, result | {"finetuned": conditions | scores | {"scores": of_model}})


# ---- the plan


def check_models(context, seeds):
    """Raises `UserError` now for a model that train.py or distill.py would refuse later.

    Each run is planned as with --dry-run, with a model on the meta device.
    """
    corpus = open_corpus(context.data)
    for name, spec in context.recipe.specs.items():
        if all(context.result_path(name, seed).exists() for seed in seeds):
            continue
        out, data = str(context.folder(spec, seeds[0])), str(context.data)
        config = dataclasses.replace(spec.config, data=data, out=out, device=context.device, dry_run=True)
        size, length = corpus.tokenizer.vocabulary_size, config.sequence_length
        model = spec.network(size)
        teachers = {teacher: context.recipe.specs[teacher].network(size) for teacher in spec.teachers}
        try:
            for network_name, network in ({name: model} | teachers).items():
                check_context(network, length, network_name)
            compute = choose_compute(context.device, config.precision)
            should_capture(config, compute, [], flops=0)  # may raise
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train.fit_corpus(train.CrossEntropyObjective(model), config, corpus, name)
                if teachers:
                    check_weights(config.teacher_weights, len(teachers))
                    distill.open_teacher_cache(config, corpus, list(teachers.values()), [])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def check_scored_data(context):
    """Returns the tokens that a model is run on when it is scored.

    Raises `UserError` for text or pairs that evaluate.py would refuse after the training.
    """
    corpus, test = open_corpus(context.data), TokenShard(context.data / "report" / "dev.bin")
    for shard in (corpus.dev, test):
        training_shares(context.data, shard)  # every model is scored with these
    fitted = FITTING_PASSES * min(corpus.dev.num_tokens, FITTED_CHUNKS * 128)
    tokens = corpus.dev.num_tokens + test.num_tokens + fitted
    size = corpus.tokenizer.vocabulary_size
    positions = min(context_length(spec.network(size)) for spec in context.recipe.specs.values())
    for folder in context.pairs:
        pairs = [pair for file_pairs in read_pairs(folder).values() for pair in file_pairs]
        sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
        for sentence, ids in zip(sentences, corpus.tokenizer.encode(sentences)):
            tokens += len(ids)
            if len(ids) > positions:
                raise UserError(
                    f"{folder}: a sentence of {len(ids)} tokens is longer than the context of a model, "
                    f"{positions}: {sentence[:60]!r}"
                )
    return tokens


def print_costs(context, seeds, scored_tokens):
    """Prints what each model costs, and the time left, if models were trained on this machine before."""
    shard = TokenShard(context.data / "train.bin")
    rows = [["model", "parameters", "epochs", "tokens", "FLOPs", "left to train", "disk"]]
    flops_left = flops_measured = seconds = disk = 0
    costs = recipes.costs(context.recipe, shard.num_tokens, shard.words)
    for name, cost in costs.items():
        paths = [context.result_path(name, seed) for seed in seeds]
        results = [read_result(path) for path in paths if path.exists()]
        runs_left, size = len(seeds) - len(results), DISK_BYTES * cost.parameters
        flops_left += cost.flops * runs_left
        disk += size * len(seeds)
        for result in results:
            if result.get("seconds") and result.get("machine") == machine(context.device):
                flops_measured, seconds = flops_measured + cost.flops, seconds + result["seconds"]
        cells = f"{cost.parameters:,}", f"{cost.epochs:.3g}", f"{cost.tokens:,}", f"{cost.flops:.1e}"
        rows.append([name, *cells, f"{runs_left} of {len(seeds)}", f"{size / 1e9:.2f} GB"])
    print("\n".join(aligned(rows)))
    hours = flops_left * seconds / flops_measured / 3600 if seconds else None
    time_left = "" if hours is None else f", {hours:.2g} hours at the speed measured here"
    free = shutil.disk_usage(context.data).free
    minutes = recipes.card_minutes(context.recipe, costs, scored_tokens)
    parts = ", ".join(f"{part} {value:.1f}" for part, value in minutes.items())
    print(f"minutes a seed on an H200, by arithmetic: {sum(minutes.values()):.1f} ({parts})")
    print(
        f"seeds {seeds[0]} to {seeds[-1]}: {flops_left:.1e} FLOPs of training left{time_left}; scoring and "
        f"fine-tuning come on top\ndisk {disk / 1e9:.2f} GB in all, {free / 1e9:.0f} GB free"
    )


# ---- the command


def report_folders(config, command):
    """Writes the report of each folder; returns the exit code."""
    if config.out and len(config.report) > 1:
        raise UserError("--out: several folders have a report each: leave it out")
    for folder in map(Path, config.report):
        print("\n" + "\n".join(write_report(read_study(folder), Path(config.out or folder), command)))
    return 0


def open_context(config, recipe, out):
    """The `ExperimentContext` of a command; prepares its text. Raises `Stopped` or `UserError`."""
    for folder in config.pairs or ():
        read_pairs(folder)  # an error in pairs or tasks shows before training
    if config.finetune:
        read_tasks(Path(config.finetune), recipe.finetune.get("only"))
    deadline = None if config.stop_after is None else time.monotonic() + 60 * config.stop_after
    data = given_data(recipe, config.data) if config.data else prepare_data(recipe, config, out)
    pairs, tasks = config.pairs or [], config.finetune
    if recipe.corpus == "toy":
        pairs, tasks = [str(out / "corpus" / "pairs")], str(out / "corpus" / "tasks")
        tasks = tasks if Path(tasks).is_dir() else None  # an earlier version wrote no tasks
    return ExperimentContext(
        recipe=recipe,
        data=data,
        pairs=pairs,
        tasks=tasks,
        out=out,
        results=Path(config.results or out),
        device=config.device,
        deadline=deadline,
        tuning=config.tune,
    )


def main(argv=None):
    """Trains, scores and reports as the command line asks; returns the exit code."""
    config = parse(ReproduceConfig, __doc__, argv, check=check_options)
    command = "python reproduce.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    if config.list_recipes:
        names = recipes.recipe_names()
        for name in names:
            print(f"{name:{max(map(len, names))}}  {recipes.read_experiment(name).about}")
        return 0
    if config.report:
        return report_folders(config, command)
    recipe = recipes.read_experiment(config.recipe, config.vary or ())
    recipe = dataclasses.replace(recipe, words=config.words or recipe.words)
    chosen = recipe.only(config.models) if config.models else recipe
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    context, out = None, Path(config.out or f"runs/{recipe.name}")
    # Compiled layers stay with the experiment: a machine that continues it does not compile again.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(out.absolute() / "compiled"))
    try:
        context = open_context(config, recipe, out)
        if not config.tune:
            check_results(context)
        context = dataclasses.replace(context, recipe=chosen)
        check_models(context, seeds)
        print_costs(context, seeds, check_scored_data(context))
        if config.dry_run:
            return 0
        if not config.tune:
            write_json(context.results / "experiment.json", study_fields(recipe))
        if config.jobs > 1:
            if code := run_in_parallel(context, seeds, config.jobs):
                raise Stopped(0 if code == INCOMPLETE else code)
        else:
            for seed in seeds:
                run_seed(context, seed)
    except Stopped as stopped:
        if context and config.tune:
            trial_lines(context.results, seeds, context.shards)
        print("stopped before the end: the same command continues")
        return stopped.code
    if config.tune:
        print("\n" + "\n".join(trial_lines(context.results, seeds, context.shards)))
    else:
        print("\n" + "\n".join(write_report(read_study(context.results), context.results, command)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
