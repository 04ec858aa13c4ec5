"""Fine-tunes checkpoints on text classification tasks, such as those of (Super)GLUE and MSGS.

    python finetune.py runs/*/best.pt --tasks glue_filtered --seeds 3

A task is NAME.train.jsonl and NAME.valid.jsonl, in the fields of BabyLM's pipelines or with "text"
(or "text_a" and "text_b") and "label". For each checkpoint, task and seed, the loop of train.py trains
a classification head on the last token together with the whole model. As in the pipelines, the
evaluation that is best on valid is the one that is reported, on valid: compare models by it, it is not
a held-out estimate. F1 is that of the second of two classes: 1 of 0 and 1, or GLUE's own 1.

--settings names a table of finetuning/tasks.py: that of the authors, or the defaults of the pipeline of
2023 or 2025. OUT keeps one result file for each run. A run that has its result is not repeated, and a
command that was stopped continues.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.statistics import t_interval
from finetuning import tasks
from finetuning.classifier import HEADS, as_classifier, class_logits, load_classifier
from finetuning.tables import task_rows
from finetuning.tasks import SETTINGS
from model import load_checkpoint
from tokenizer import Tokenizer
from train import Objective, TrainConfig, fit
from training import distributed
from training.checkpoint import checkpoint_names
from training.device import Compute, choose_compute
from training.io import UserError, aligned, locked, log, run_program, warn, write_json
from training.logger import commit, exit_code, machine
from training.options import RECIPE, REQUIRED, SAVE, SPEED, STOP, Parser, option, parse
from training.resume import CHECKPOINT_NAMES, Provenance, differences, is_finished

OPTIONS = ("learning_rate", "batch_size", "epochs", "patience", "eval_every", "max_length")
POOL_BATCHES = 32  # batches whose examples are sorted by length together
EVAL_TOKENS = 8192  # tokens of a batch of an evaluation
LEGEND = (
    "in percent, on valid; in brackets a 95 % interval: of the mean over seeds, or with one seed over texts\n"
    "majority: always predicts the class that is most frequent in the train file"
)


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """The options of the command line."""

    checkpoints: list[str] = option(REQUIRED, "language models to fine-tune", positional=True)
    tasks: str = option(REQUIRED, "folder of tasks")
    only: list[str] | None = option(None, "only these tasks; give the checkpoints before it")
    seeds: int = option(1, "runs of each task", minimum=1, maximum=1000)
    first_seed: int = option(0, "seed of the first run of each task", minimum=0, maximum=1 << 31)
    settings: str = option("authors", "table of settings, see above", RECIPE, choices=SETTINGS)
    learning_rate: float | None = option(None, "override the table: peak learning rate", RECIPE, minimum=0)
    batch_size: int | None = option(None, "override the table: examples in a step", RECIPE, minimum=1)
    epochs: int | None = option(None, "override the table: passes over train", RECIPE, minimum=1)
    max_length: int | None = option(None, "override the table: tokens of an example", RECIPE, minimum=3)
    head: str = option("linear", "mlp: that of 2025's pipeline, no export", RECIPE, choices=HEADS)
    dropout: float | None = option(
        None, "dropout (default: none in a LLaMA, a GPT-2's own)", RECIPE, minimum=0, maximum=0.999
    )
    eval_every: int | None = option(
        None, "override the table: steps between evaluations; 0: after each epoch", SAVE, minimum=0
    )
    out: str = option("runs/finetune", "folder of results", SAVE)
    json: str | None = option(None, "write the table to this file", SAVE)
    predictions: str | None = option(
        None,
        "folder results/MODEL/main of BabyLM's pipelines: write the predictions of one checkpoint and seed "
        "into it, as they do",
        SAVE,
    )
    keep: bool = option(False, "keep each run's best.pt, for export_hf.py; give it from the beginning", SAVE)
    micro_batch_size: int | None = option(
        None, "examples in a forward and backward pass, to save memory (default: all)", SPEED, minimum=1
    )
    device: str = option("auto", "auto, cuda, mps or cpu", SPEED)
    precision: str = option(
        "auto", "auto: bf16 where the hardware has it", SPEED, choices=("auto", "fp32", "bf16")
    )
    patience: int | None = option(
        None, "override the table: evaluations without improvement, then stop; 0: never", STOP, minimum=0
    )
    stop_after: float | None = option(None, "save and stop after this many minutes", STOP, minimum=0)
    verbose: bool = option(False, "show how each run trains", STOP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The options of one run: those of train.py, and the task."""

    task: str = option("", "name of the task")
    head: str = option("linear", "kind of head, see finetuning/classifier.py", choices=HEADS)
    chosen_by: str = option("f1", "score on valid that chooses best.pt")
    eval_only_every: bool = option(False, "skip the evaluation at the end of each epoch")
    least_gain: float = option(0.0, "smallest improvement that resets the patience", may_change=True)


# ---- objective, stream and evaluation, which `fit` is given


class ClassificationObjective(Objective):
    """-log p(class), the mean over the step's examples."""

    def forward(self, batch):
        last = tasks.last_positions(batch.targets)  # (B,)
        classes = batch.targets.gather(1, last[:, None])[:, 0]
        logits = class_logits(self.model, batch.tokens, last)  # (B, classes)
        loss = F.cross_entropy(logits, classes, reduction="sum") / batch.num_targets
        return {"loss": loss, "cross_entropy": loss}


class ExampleStream:
    """`stream(step)` is a batch of examples of similar length; an epoch has each example once.

    One batch of an epoch may be short; `num_chunks` counts it as full.
    """

    def __init__(self, examples, batch_size, seed):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.num_batches = -(-len(examples.ids) // batch_size)  # of an epoch
        self.num_chunks = self.num_batches * batch_size
        self.num_tokens, self.words = examples.num_tokens, examples.words
        self.epoch, self.batches = None, None

    def __call__(self, step):
        epoch, index = divmod(step, self.num_batches)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.order(epoch)
        return self.examples.batch(self.batches[index])

    def order(self, epoch):
        """Returns the batches of an epoch, lists of indices: a function of seed and epoch."""
        count, size = len(self.examples.ids), self.batch_size
        generator = random.Random(f"{self.seed} {epoch}")
        shuffled = generator.sample(range(count), count)
        in_full_batches = count // size * size
        batches = [shuffled[in_full_batches:]] if in_full_batches < count else []
        # A short file has pools of a quarter: in one pool, all epochs would have the same batches.
        pool_size = size * max(1, min(POOL_BATCHES, self.num_batches // 4))
        for start in range(0, in_full_batches, pool_size):
            pool = shuffled[start : min(start + pool_size, in_full_batches)]
            pool.sort(key=lambda i: len(self.examples.ids[i]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        generator.shuffle(batches)
        return batches


@torch.no_grad()
def predict(model, examples, autocast):
    """Returns the logits (N, classes) of examples, in their order, on the CPU."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    lengths = [len(ids) for ids in examples.ids]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(order):
        rows = max(1, EVAL_TOKENS // lengths[order[start]])
        batch = examples.batch(order[start : start + rows])
        last = tasks.last_positions(batch.targets)
        with autocast:
            batches.append(class_logits(model, batch.tokens.to(device), last.to(device)).cpu())
        start += rows
    model.train(training)
    logits = torch.cat(batches)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def evaluation(task, examples, chosen_by):
    """Returns `evaluate(model, autocast)`, which scores a model on the task's own valid file."""
    metric = tasks.metric_of(task.name) if chosen_by == "metric" else chosen_by

    def evaluate(model, autocast):
        logits = predict(model, examples, autocast)
        scores = task.scores(task.name, logits.argmax(1))
        loss = F.cross_entropy(logits, examples.labels).item()
        return {"dev_cross_entropy": loss, "score": scores.get(metric, scores["accuracy"]), **scores}

    return evaluate


# ---- one run


@dataclasses.dataclass(frozen=True, eq=False)
class BaseCheckpoint:
    """A checkpoint to start from. `name` stands in tables and is its folder of results."""

    name: str
    path: str
    model: nn.Module
    checkpoint: dict
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class FinetuneRun:
    """One run: a checkpoint, a task and a seed, with the options of the command.

    `path` is the file of its result, `folder` that of its checkpoints and log.
    """

    base: BaseCheckpoint
    task: tasks.Task
    seed: int
    options: FinetuneOptions
    compute: Compute

    @property
    def path(self):
        return Path(self.options.out) / self.base.name / self.task.name / f"seed-{self.seed}.json"

    @property
    def folder(self):
        return self.path.with_suffix("")

    @property
    def settings(self):
        """The task's `Settings` as the options change them, no longer than the model's context."""
        settings = tasks.settings_of(self.task.name, self.options.settings)
        changes = {name: getattr(self.options, name) for name in OPTIONS}
        settings = dataclasses.replace(settings, **{n: v for n, v in changes.items() if v is not None})
        positions = self.base.model.config.max_position_embeddings
        return dataclasses.replace(settings, max_length=min(settings.max_length, positions))

    @property
    def f1_class(self):
        """{"f1_of": the positive class} where earlier versions took the F1 of the other one, else {}."""
        classes = self.task.classes
        return {"f1_of": classes[0]} if len(classes) == 2 and self.task.positive == 0 else {}

    @property
    def fingerprint(self):
        """What identifies the run, as its result keeps it: another value is another run."""
        task = self.task
        return self.f1_class | {
            "name": self.base.name,
            "task": task.name,
            "seed": self.seed,
            "head": self.options.head,
            "dropout": self.options.dropout,
            "settings": dataclasses.asdict(self.settings),
            "precision": self.compute.precision,
            "files": task.digests,
            "classes": list(task.classes),
            "checkpoint": self.base.checkpoint["digest"],
        }

    def config(self, deadline):
        """Returns the complete config for `fit`, which stops at `deadline` (`time.monotonic`) or None."""
        settings, options = dataclasses.asdict(self.settings), self.options
        max_length, warmup = settings.pop("max_length"), settings.pop("warmup")
        num_batches = -(-len(self.task.train.texts) // settings["batch_size"])
        return FinetuneConfig(
            **settings,
            eval_only_every=settings["eval_every"] > 0,
            warmup_steps=round(warmup * settings["epochs"] * num_batches),
            sequence_length=max_length,
            model=self.base.checkpoint["model"]["name"],
            init=self.base.path,
            data=options.tasks,
            out=str(self.folder),
            seed=self.seed,
            task=self.task.name,
            head=options.head,
            dropout=options.dropout,
            micro_batch_size=options.micro_batch_size,
            device=options.device,
            precision=self.compute.precision,
            compile=False,  # batches have many lengths
            cuda_graph=False,
            stop_after=None if deadline is None else max(deadline - time.monotonic(), 0) / 60,
        )


def make_result(run, deadline):
    """Trains a run and writes its result. Returns it, or None if the run was stopped, and the signal."""
    config, examples = run.config(deadline), encode_task(run.base, run.task, run.settings.max_length)
    is_new, start = not run.folder.exists(), time.monotonic()
    try:
        progress = train(run, config, examples)
    except UserError as error:
        raise UserError(f"{run.base.name}, {run.task.name}, seed {run.seed}: {error}") from error
    if not is_finished(progress, config.patience):
        return None, progress.get("stopped_by")
    result = run.fingerprint | score_best(run, examples)
    result |= {"steps": progress["step"], "kept": run.options.keep}
    result |= {"commit": commit(), "machine": machine(run.options.device), "torch": torch.__version__}
    if is_new:  # else its clock began in an earlier command
        result["seconds"] = round(time.monotonic() - start, 1)
    write_json(run.path, result)
    remove_checkpoints(run.folder, run.options.keep)
    for name, scores in result["scores"].items():
        metric = tasks.metric_of(name)
        majority = tasks.majority_scores(run.task, name)[metric]
        score = f"{100 * scores[metric]:.1f} {metric} (majority {100 * majority:.1f})"
        log(f"{run.base.name}, seed {run.seed}: {name} {score}")
    return result, progress.get("stopped_by")


def train(run, config, examples):
    """Trains, and returns the progress of `fit`, which prints only with --verbose."""
    torch.manual_seed(config.seed)
    base = run.base.checkpoint
    model = as_classifier(run.base.model, len(run.task.classes), config.head, config.dropout)
    conditions = {
        "classes": list(run.task.classes),
        "form": list(run.task.template),
        "task_digests": run.task.digests,
        "init_digest": base["digest"],
        **run.f1_class,
    }
    architecture = base["model"]["architecture"]
    provenance = Provenance(config.model, architecture, model.config, run.base.tokenizer, conditions)
    stream = ExampleStream(examples["train"], config.batch_size, config.seed)
    evaluate = evaluation(run.task, examples[run.task.name], config.chosen_by)
    output = sys.stdout if run.options.verbose else io.StringIO()
    with contextlib.redirect_stdout(output):
        return fit(ClassificationObjective(model), config, stream, evaluate, provenance)


def score_best(run, examples):
    """Returns scores and predictions of a run's best.pt, {name of a valid file: ...} each.

    Predictions are the indices of classes in the order of the lines, as text.
    """
    model, checkpoint = load_classifier(run.folder / "best.pt")
    model.to(run.compute.device)
    result = {"scores": {}, "predictions": {}, "best_step": checkpoint["progress"]["best_step"]}
    for name in run.task.valid:
        predictions = predict(model, examples[name], run.compute.autocast).argmax(1)
        result["scores"][name] = run.task.scores(name, predictions)
        result["predictions"][name] = " ".join(map(str, predictions.tolist()))
    return result


@functools.lru_cache(maxsize=1)  # the seeds of a task share it
def encode_task(base, task, max_length):
    """Returns {"train" or the name of a valid file: EncodedExamples}; says how many texts are cut."""
    files = {"train": task.train, **task.valid}
    encoded = {name: tasks.encode_examples(part, base.tokenizer, max_length) for name, part in files.items()}
    if num_cut := sum(part.num_cut for part in encoded.values()):
        texts = sum(len(part.ids) for part in encoded.values())
        positions = base.model.config.max_position_embeddings
        log(
            f"{task.name}: {num_cut:,} of {texts:,} texts are longer than {max_length} tokens and lose "
            f"their ends (--max-length; the model reads {positions})"
        )
    return encoded


def earlier_result(run):
    """Returns the result that an earlier command wrote for a run, or None.

    Its scores are computed again from its predictions. Raises `UserError` if it is of another run, or
    if --keep misses its best.pt.
    """
    if not run.path.exists():
        return None
    try:
        result = json.loads(run.path.read_text(encoding="utf-8"))
        changes = differences({key: result.get(key) for key in run.fingerprint}, run.fingerprint)
        if changes:
            raise UserError(
                f"{run.path} is of another run ({', '.join(changes)}): choose another --out, or move it away"
            )
        result["scores"] = {
            name: run.task.scores(name, predicted_classes(result, name)) for name in run.task.valid
        }
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{run.path} is no result of this program: move it away") from error
    if run.options.keep and not (run.folder / "best.pt").exists():
        raise UserError(f"--keep: {run.path} was made without it: move it away to repeat the run")
    remove_checkpoints(run.folder, keep=result.get("kept", True))  # which a kill may have prevented
    return result


def predicted_classes(result, name):
    """Returns the predictions (N,) of a result for a valid file."""
    return torch.tensor([int(index) for index in result["predictions"][name].split()])


def remove_checkpoints(folder, keep):
    """Removes the checkpoints of a finished run; without `keep` its best.pt and log.jsonl too.

    log.jsonl marks the folder of a run, and is removed last. What else lies there remains.
    """
    if not (folder / "log.jsonl").exists():
        return
    for name in CHECKPOINT_NAMES if keep else (*CHECKPOINT_NAMES, "best.pt", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


# ---- all runs


def load_bases(paths):
    """Returns a `BaseCheckpoint` with a name of its own for each path."""
    bases = []
    for path, name in zip(paths, checkpoint_names(paths)):
        model, checkpoint = load_checkpoint(path)
        tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
        bases.append(BaseCheckpoint(name, str(path), model, checkpoint, tokenizer))
    return bases


def summarize(results, bases, chosen, options):
    """Returns the results, {run: result}, as plain data.

    "tasks" is {name of a valid file: {"metric", "texts", "majority", "classes", "msgs"}}, and "positive",
    the class of an F1; "models" {model: {name: {"mean", "deviation", "interval", "seeds"}}}, all of the
    metric, from 0 to 1, or for Matthews' correlation from -1. The 95 % interval is that of the mean over
    seeds (Student's t), or with one seed that over texts (bootstrap). "seeds" has every score of each.
    """
    about, models = {}, {base.name: {} for base in bases}
    valid_files = [(task, name) for task in chosen for name in task.valid]
    for task, name in valid_files:
        metric = tasks.metric_of(name)
        about[name] = {
            "metric": metric,
            "texts": len(task.valid[name].texts),
            "majority": tasks.majority_scores(task, name)[metric],
            "classes": task.classes,
            "msgs": task.name.lower() in tasks.MSGS,
        }
        if metric == "f1":
            about[name]["positive"] = task.classes[task.positive]
        for base in bases:
            finished = [r for run, r in results.items() if r and run.base is base and run.task is task]
            if not finished:
                continue
            values = [result["scores"][name][metric] for result in finished]
            interval = t_interval(values, -1 if metric == "mcc" else 0, 1)
            if interval is None:
                table = task.confusion(name, predicted_classes(finished[0], name))
                interval = tasks.bootstrap_interval(table, metric, task.positive)
            models[base.name][name] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "interval": interval,
                "seeds": {result["seed"]: result["scores"][name] for result in finished},
            }
    return {"settings": options.settings, "head": options.head, "tasks": about, "models": models}


def write_predictions(results, out):
    """Writes the predictions of {run: result} as BabyLM's pipelines of 2025 and 2026 do.

    The files are OUT/finetune/TASK/predictions.json. Classes that are numbers are written as numbers.
    """
    for run, result in results.items():
        classes = [int(name) if name.isdecimal() else name for name in run.task.classes]
        for name in run.task.valid:
            chosen = [classes[i] for i in predicted_classes(result, name).tolist()]
            predictions = [{"id": f"{name}_{i}", "pred": pred} for i, pred in enumerate(chosen)]
            write_json(Path(out, "finetune", name, "predictions.json"), {name: {"predictions": predictions}})


def parse_arguments(argv, parser_class=Parser):
    """Returns the `FinetuneOptions` of a command line; wrong usage exits with code 2.

    With `options.Strict` as `parser_class` it raises `UserError` instead.
    """
    return parse(FinetuneOptions, __doc__, argv, parser_class=parser_class)


def main(argv=None):
    options = parse_arguments(argv)
    if distributed.is_torchrun():
        raise UserError("finetune.py trains in one process: start it without torchrun")
    if options.json and Path(options.json).is_dir():
        raise UserError(f"--json {options.json} is a folder: give the name of a file")
    if options.predictions and (len(options.checkpoints), options.seeds) != (1, 1):
        raise UserError("--predictions takes one checkpoint and one seed (--first-seed): a task has one file")
    chosen = tasks.read_tasks(Path(options.tasks), options.only)
    if unread := tasks.unread_files(Path(options.tasks)):
        warn(f"{options.tasks}: not read: {', '.join(unread)}")
    for task in chosen:
        if task.unused_fields:
            warn(f"{task.name}: these fields are not part of the text: {', '.join(task.unused_fields)}")
    bases = load_bases(options.checkpoints)
    compute = choose_compute(options.device, options.precision)
    deadline = None if options.stop_after is None else time.monotonic() + 60 * options.stop_after
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [FinetuneRun(*run, options, compute) for run in itertools.product(bases, chosen, seeds)]
    signal = None
    with locked(options.out):
        results = {run: earlier_result(run) for run in runs}  # wrong ones are known before any training
        missing = [run for run in runs if results[run] is None]
        for run in missing:
            # The first run trains even when the time is over, so that each command gets further.
            if run is not missing[0] and deadline is not None and time.monotonic() > deadline:
                break
            results[run], signal = make_result(run, deadline)
            if signal or results[run] is None:
                break
    done = sum(result is not None for result in results.values())
    summary = summarize(results, bases, chosen, options)
    if done:
        print("\n" + "\n".join([*aligned(task_rows(summary)), LEGEND]))
    if done < len(runs):
        log(f"stopped after {done} of {len(runs)} runs: the same command continues")
    else:
        if options.json:
            write_json(options.json, summary)
        if options.predictions:
            write_predictions(results, options.predictions)
    return exit_code({"stopped_by": signal})


if __name__ == "__main__":
    sys.exit(run_program(main))
