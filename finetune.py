"""Fine-tunes checkpoints on tasks of classifying texts, such as those of (Super)GLUE and MSGS.

    python finetune.py runs/*/best.pt --tasks glue_filtered --seeds 3

A task is NAME.train.jsonl and NAME.valid.jsonl, in the fields of BabyLM's pipelines or with "text"
(or "text_a" and "text_b") and "label". For each checkpoint, task and seed a classification head on
the last token and the whole model are trained by the loop of train.py. As in the pipelines, the
evaluation that is best on valid is the one that is reported, on valid: compare models by it, and
take it for no estimate of what new text would show. F1 is that of the second of two classes, 1 of 0
and 1; the authors and the pipeline of 2023 choose by it wherever there are two.

--settings names a table in tasks.py: that of the authors (default), or what the pipeline of 2023 or
2025 has by default; the options below change all tasks alike. Results are kept in OUT, one file
for each run, and a run whose result is there is not repeated: a command that was stopped continues.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.statistics import t_interval
from experiments.results import read_result
from finetuning import tasks
from finetuning.classifier import HEADS, as_classifier, class_logits, load_classifier
from finetuning.tables import task_rows
from model import load_checkpoint
from tokenizer import Tokenizer
from train import TrainConfig, fit
from training import distributed
from training.device import Compute, choose_compute
from training.io import UserError, aligned, locked, log, printable, run_program, write_json
from training.logger import commit, exit_code, machine
from training.options import option
from training.resume import Provenance, is_finished

OPTIONS = ("learning_rate", "batch_size", "epochs", "patience", "eval_every", "max_length")
SETTINGS_FIELDS = {field.name: field for field in dataclasses.fields(tasks.Settings)}
POOL_BATCHES = 32  # within which examples of like length come together
BATCH_TOKENS = 8192  # of an evaluation
LEGEND = (
    "in percent, on valid; in brackets an interval of 95 %, of the mean over seeds or, with one "
    "seed, over texts\nmajority: always the class that is most frequent in the train file"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The options of one run: what train.py has, and what is to be learned."""

    task: str = option("", "name of the task")
    head: str = option("linear", "see classifier.py", choices=HEADS)
    chosen_by: str = option("f1", "which number on valid chooses best.pt")
    eval_only_every: bool = option(False, "skip the evaluation at the end of each epoch")
    least_gain: float = option(0.0, "smallest improvement that resets the patience", may_change=True)


# ---- what `fit` is given: objective, stream, evaluation


class ClassificationObjective(nn.Module):
    """-log p(class), the mean over the step's examples."""

    compiled = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def prepare(self, batch):
        """Nothing more is needed."""
        return batch

    def forward(self, batch):
        last = tasks.last_places(batch.targets)  # (B,)
        classes = batch.targets.gather(1, last[:, None])[:, 0]
        logits = class_logits(self.model, batch.tokens, last)  # (B, classes)
        loss = F.cross_entropy(logits, classes, reduction="sum") / batch.num_targets
        return {"loss": loss, "cross_entropy": loss}


class ExampleStream:
    """`stream(step)`: a batch of examples of like length, each once an epoch.

    An epoch's last batch may be short, so that one may be; `num_chunks` counts it as whole.
    """

    def __init__(self, examples, batch_size, seed):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.num_batches = -(-len(examples.ids) // batch_size)  # of an epoch
        self.num_chunks = self.num_batches * batch_size
        self.num_tokens, self.words = examples.num_tokens, examples.words
        self.epoch, self.batches = None, None

    def __call__(self, step):
        epoch, place = divmod(step, self.num_batches)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.order(epoch)
        return self.examples.batch(self.batches[place])

    def order(self, epoch):
        """The batches of an epoch, lists of examples' numbers: a function of seed and epoch."""
        generator = random.Random(f"{self.seed} {epoch}")
        shuffled = generator.sample(range(len(self.examples.ids)), len(self.examples.ids))
        whole = len(shuffled) // self.batch_size * self.batch_size
        batches = [shuffled[whole:]] if whole < len(shuffled) else []
        # Of a short file, pools of a quarter: with all of it in one, batches would stay the same.
        size = self.batch_size * max(1, min(POOL_BATCHES, self.num_batches // 4))
        for start in range(0, whole, size):
            pool = shuffled[start : min(start + size, whole)]
            pool.sort(key=lambda i: len(self.examples.ids[i]))
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        generator.shuffle(batches)
        return batches


@torch.no_grad()
def predict(model, examples, autocast):
    """Logits (N, classes) of examples, in their order, on the CPU."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    lengths = [len(ids) for ids in examples.ids]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    parts, start = [], 0
    while start < len(order):
        rows = max(1, BATCH_TOKENS // lengths[order[start]])
        batch = examples.batch(order[start : start + rows])
        last = tasks.last_places(batch.targets)
        with autocast:
            parts.append(class_logits(model, batch.tokens.to(device), last.to(device)).cpu())
        start += rows
    model.train(training)
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def evaluation(task, examples, chosen_by):
    """`evaluate(model, autocast)` on the task's own valid examples."""
    metric = tasks.metric_of(task.name) if chosen_by == "metric" else chosen_by

    def evaluate(model, autocast):
        logits = predict(model, examples, autocast)
        found = tasks.scores(logits.argmax(1), examples.labels, len(task.classes))
        loss = F.cross_entropy(logits, examples.labels).item()
        return {"dev_cross_entropy": loss, "score": found.get(metric, found["accuracy"]), **found}

    return evaluate


# ---- one run


@dataclasses.dataclass(frozen=True)
class Base:
    """A checkpoint to start from."""

    name: str  # in tables, and of its folder of results
    path: str
    model: nn.Module
    checkpoint: dict
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share. `deadline` is a time of `time.monotonic`, or None."""

    args: argparse.Namespace
    compute: Compute
    deadline: float | None

    def path(self, base, task, seed):
        """The file of a result; the folder of its run is beside it."""
        return Path(self.args.out) / base.name / task.name / f"seed-{seed}.json"

    @property
    def changes(self):
        """{name of a setting: value} of those that were given as options."""
        given = {name: getattr(self.args, name) for name in OPTIONS}
        return {name: value for name, value in given.items() if value is not None}


def settings_for(setup, base, task):
    """The task's `Settings`, as the options change them, for a model of so many positions."""
    found = tasks.settings_of(task.name, setup.args.settings)
    found = dataclasses.replace(found, **setup.changes)
    positions = base.model.config.max_position_embeddings
    return dataclasses.replace(found, max_length=min(found.max_length, positions))


def config_of(setup, base, task, settings, seed):
    """The complete config of a run."""
    left = None if setup.deadline is None else (setup.deadline - time.monotonic()) / 60
    num_batches = -(-len(task.train.texts) // settings.batch_size)
    shared = (
        "learning_rate",
        "batch_size",
        "epochs",
        "schedule",
        "min_lr_ratio",
        "patience",
        "eval_every",
        "weight_decay",
        "clip",
        "least_gain",
        "chosen_by",
    )
    return FinetuneConfig(
        **{name: getattr(settings, name) for name in shared},
        eval_only_every=settings.eval_every > 0,
        warmup_steps=round(settings.warmup * settings.epochs * num_batches),
        sequence_length=settings.max_length,
        model=base.checkpoint["model"]["name"],
        init=base.path,
        data=setup.args.tasks,
        out=str(setup.path(base, task, seed).with_suffix("")),
        seed=seed,
        task=task.name,
        head=setup.args.head,
        dropout=setup.args.dropout,
        micro_batch_size=setup.args.micro_batch_size,
        device=setup.args.device,
        precision=setup.compute.precision,
        compile=False,  # batches are of many lengths
        cuda_graph=False,
        stop_after=None if left is None else max(left, 0),
    )


def run(setup, base, task, encoded, config):
    """Trains, and returns `fit`'s progress. What it prints is hidden unless that is asked for."""
    torch.manual_seed(config.seed)
    model = as_classifier(base.model, len(task.classes), config.head, config.dropout)
    stream = ExampleStream(encoded["train"], config.batch_size, config.seed)
    origin = base.checkpoint
    provenance = Provenance(
        config.model,
        origin["model"]["architecture"],
        model.config,
        base.tokenizer,
        {
            "classes": list(task.classes),
            "form": list(task.form),
            "task_digests": task.digests,
            "init_digest": origin["digest"],
        },
    )
    evaluate = evaluation(task, encoded[task.name], config.chosen_by)
    with contextlib.ExitStack() as stack:
        if not setup.args.verbose:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return fit(ClassificationObjective(model), config, stream, evaluate, provenance)


def result_of(setup, task, encoded, config):
    """What is kept of a run: the scores of its best.pt, and the classes that it predicts.

    "predictions" are the numbers of classes in "classes", in the order of the lines.
    """
    model, checkpoint = load_classifier(Path(config.out) / "best.pt")
    model.to(setup.compute.device)
    found = {"scores": {}, "predictions": {}, "best_step": checkpoint["progress"]["best_step"]}
    for name in task.valid:
        predicted = predict(model, encoded[name], setup.compute.autocast).argmax(1)
        found["scores"][name] = tasks.scores(predicted, encoded[name].labels, len(task.classes))
        found["predictions"][name] = " ".join(map(str, predicted.tolist()))
    found["classes"] = list(task.classes)
    where = {"commit": commit(), "machine": machine(setup.args.device), "torch": torch.__version__}
    return found | where


def run_task(setup, base, task, seeds):
    """Makes those results of a task's seeds that are not there; the signal that came, or None.

    Returns early where the time is over. Raises `UserError` where a run fails.
    """
    settings, encoded = settings_for(setup, base, task), None
    for seed in seeds:
        path = setup.path(base, task, seed)
        if path.exists():
            continue
        if setup.deadline is not None and time.monotonic() > setup.deadline:
            return None
        if encoded is None:
            encoded = encode_task(base, task, settings.max_length)
        config = config_of(setup, base, task, settings, seed)
        new, start = not Path(config.out).exists(), time.monotonic()
        try:
            progress = run(setup, base, task, encoded, config)
        except UserError as error:
            raise UserError(f"{base.name}, {task.name}, seed {seed}: {error}") from error
        stopped_by = progress.get("stopped_by")
        if not is_finished(progress, config.patience):
            return stopped_by
        result = wanted(setup, base, task, seed) | result_of(setup, task, encoded, config)
        result["steps"] = progress["step"]
        if new:  # else its clock began in an earlier command
            result["seconds"] = round(time.monotonic() - start, 1)
        write_json(path, result)
        clean(Path(config.out), setup.args.keep)
        log(f"{base.name}, seed {seed}: {shown_scores(task, result)}")
        if stopped_by:
            return stopped_by
    return None


def wanted(setup, base, task, seed):
    """What a result is the result of: unless all of this is the same, it is another's."""
    return {
        "name": base.name,
        "task": task.name,
        "seed": seed,
        "head": setup.args.head,
        "dropout": setup.args.dropout,
        "settings": dataclasses.asdict(settings_for(setup, base, task)),
        "precision": setup.compute.precision,
        "files": task.digests,
        "checkpoint": base.checkpoint["digest"],
    }


def results_there(setup, bases, chosen, seeds):
    """{model: {task: the results that are there}}. Raises `UserError` if one is of another run."""
    found = {base.name: {task.name: [] for task in chosen} for base in bases}
    for base, task, seed in itertools.product(bases, chosen, seeds):
        path = setup.path(base, task, seed)
        if path.exists():
            known = wanted(setup, base, task, seed)
            result = earlier_result(path, known, task, setup.args.keep)
            found[base.name][task.name].append(result)
    return found


def earlier_result(path, wanted, task, keep):
    """The result in a file. `UserError` if it is of another run, or a kept best.pt is not there."""
    result, folder = read_result(path), path.with_suffix("")
    if different := list(differences(result, wanted)):
        raise UserError(
            f"{path} is the result of another run: {', '.join(different)}; choose another --out, "
            "or move it away"
        )
    try:
        for name, valid in task.valid.items():
            predicted = [int(number) for number in result["predictions"][name].split()]
            right = sum(a == b for a, b in zip(predicted, valid.labels, strict=True))
            if right != round(result["scores"][name]["accuracy"] * len(predicted)):
                raise ValueError("scores and predictions differ")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no result of this program: move it away") from error
    if keep and not (folder / "best.pt").exists():
        raise UserError(
            f"--keep: {path} was made without it, and there is no best.pt: move it away, and the "
            "run is repeated"
        )
    if folder.exists():  # a kill came before it was clean
        clean(folder, keep=True)
    return result


def differences(there, wanted, at=""):
    """Texts that say what of `wanted` is otherwise in a result."""
    for key, value in wanted.items():
        found = there.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            yield from differences(found, value, f"{at}{key} ")
        elif found != value:
            digest = isinstance(value, str) and len(value) == 64
            yield f"{at}{key}" if digest else f"{at}{key} ({found} there, {value} now)"


def encode_task(base, task, max_length):
    """{"train": EncodedExamples, name of a valid: EncodedExamples}; what is cut is told."""
    parts = {"train": task.train, **task.valid}
    encoded = {n: tasks.encode(part, base.tokenizer, max_length) for n, part in parts.items()}
    if cut := sum(part.cut for part in encoded.values()):
        texts = sum(len(part.ids) for part in encoded.values())
        positions = base.model.config.max_position_embeddings
        log(
            f"{task.name}: {cut:,} of {texts:,} texts are longer than {max_length} tokens and lose "
            f"their ends (--max-length; the model reads {positions})"
        )
    return encoded


def shown_scores(task, result):
    """Each score of a result beside that of the majority class."""
    parts = []
    for name, found in result["scores"].items():
        metric = tasks.metric_of(name)
        majority = 100 * tasks.majority_scores(task, name)[metric]
        parts.append(f"{name} {100 * found[metric]:.1f} {metric} (majority {majority:.1f})")
    return ", ".join(parts)


def clean(folder, keep):
    """Removes the state of a finished run; with `keep`, best.pt and the log remain."""
    for path in folder.iterdir():
        if not (keep and path.name in ("best.pt", "log.jsonl")):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


# ---- all of them


def load_bases(paths):
    """A `Base` for each checkpoint, with a name of its own."""
    bases = []
    for path, name in zip(paths, names_of(paths)):
        model, checkpoint = load_checkpoint(path)
        tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
        bases.append(Base(name, str(path), model, checkpoint, tokenizer))
    return bases


def names_of(paths):
    """A name for each checkpoint: its run's folder, or its file, with as many folders as it takes.

    Raises `UserError` for a path that is given twice.
    """
    whole = [Path(path).resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("a checkpoint is given twice: give each once")
    several = len({path.parent for path in whole}) < len(whole)  # in one folder
    kept = ("best", "checkpoint", "previous")
    parts = [
        path.parent.parts if path.stem in kept and not several else path.with_suffix("").parts
        for path in whole
    ]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [printable("-".join(part[-depth:])).replace("/", "root") for part in parts]


def described(found, chosen, settings, head):
    """The results as plain data, from {model: {task: results}}.

    "tasks" is {name of a valid: {"metric", "texts", "majority", "classes", "msgs"}}, "models"
    {model: {name: {"mean", "deviation", "interval", "seeds"}}}: of the metric, from 0 to 1, or for
    Matthews' correlation from -1. The interval of 95 % is that of the mean over seeds (Student's
    t), or with one seed that over texts (bootstrap). "seeds" has every score of each.
    """
    about, models = {}, {model: {} for model in found}
    for task in chosen:
        for name, valid in task.valid.items():
            metric = tasks.metric_of(name)
            majority = tasks.majority_scores(task, name)[metric]
            about[name] = {
                "metric": metric,
                "texts": len(valid.texts),
                "majority": majority,
                "classes": task.classes,
                "msgs": task.name.lower() in tasks.MSGS,
            }
            for model, by_task in found.items():
                results = by_task[task.name]
                if not results:
                    continue
                values = [r["scores"][name][metric] for r in results]
                several = len(values) > 1
                labels, classes = torch.tensor(valid.labels), len(task.classes)
                predicted = torch.tensor([int(c) for c in results[0]["predictions"][name].split()])
                models[model][name] = {
                    "mean": statistics.fmean(values),
                    "deviation": statistics.stdev(values) if several else None,
                    "interval": t_interval(values, -1 if metric == "mcc" else 0, 1)
                    or tasks.text_interval(predicted, labels, classes, metric),
                    "seeds": {r["seed"]: r["scores"][name] for r in results},
                }
    return {"settings": settings, "head": head, "tasks": about, "models": models}


def argument_parser(parser_class=argparse.ArgumentParser):
    """The parser of the command line."""
    parser = parser_class(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tasks", required=True, metavar="DIR", help="folder of tasks")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="only these tasks of the folder; give the checkpoints before it",
    )
    parser.add_argument(
        "--settings",
        choices=tasks.SETTINGS,
        default="authors",
        help="table of learning rates and so on; see above (default: authors)",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="linear",
        help="linear, as the pipeline of 2023 and transformers have it, or the mlp of the pipeline "
        "of 2025, which cannot be exported (default: linear)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        metavar="P",
        help="in the model (default: a GPT-2's own, none in a LLaMA, as in its exported folder)",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each task (default: 1)")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first of them (default: 0)"
    )
    changes = parser.add_argument_group("in place of what the table says")
    for name in OPTIONS:
        field = SETTINGS_FIELDS[name]
        flag, help = "--" + name.replace("_", "-"), field.metadata["help"]
        changes.add_argument(flag, type=field.type, metavar="N", help=help)
    parser.add_argument(
        "--out",
        default="runs/finetune",
        metavar="DIR",
        help="folder for results (default: runs/finetune)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep each run's best.pt, for export_hf.py, and log.jsonl; give it from the beginning",
    )
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of matrix products (default: auto, bf16 where the chip multiplies it natively)",
    )
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="examples at a time, where memory is small (default: the whole batch)",
    )
    parser.add_argument("--verbose", action="store_true", help="show how each run trains")
    return parser


def parse_arguments(argv, parser_class=argparse.ArgumentParser):
    """The options of the command line; wrong usage ends the program with exit code 2.

    `parser_class` may be `options.Strict`, which raises `UserError` instead.
    """
    parser, fields = argument_parser(parser_class), SETTINGS_FIELDS
    args = parser.parse_args(argv)
    least = {"seeds": 1, "first_seed": 0, "stop_after": 0, "micro_batch_size": 1}
    least |= {name: fields[name].metadata["minimum"] for name in OPTIONS}
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error("--dropout must be at least 0 and below 1")
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and not value <= given < 1 << 31:
            parser.error(f"--{name.replace('_', '-')} must be a number from {value} on")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if distributed.is_torchrun():
        raise UserError("finetune.py trains in one process: start it without torchrun")
    chosen = tasks.read_tasks(Path(args.tasks), args.only)
    bases = load_bases(args.checkpoints)
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder: give the name of a file")
    deadline = None if args.stop_after is None else time.monotonic() + 60 * args.stop_after
    setup = Setup(args, choose_compute(args.device, args.precision), deadline)
    seeds, signal = range(args.first_seed, args.first_seed + args.seeds), None
    with locked(args.out):
        results_there(setup, bases, chosen, seeds)  # of another run: to be known before hours
        for base, task in itertools.product(bases, chosen):
            if signal := run_task(setup, base, task, seeds):
                break
        found = results_there(setup, bases, chosen, seeds)
    done = sum(len(results) for by_task in found.values() for results in by_task.values())
    whole = len(bases) * len(chosen) * len(seeds)
    data = described(found, chosen, args.settings, args.head)
    if done:
        print("\n" + "\n".join([*aligned(task_rows(data)), LEGEND]))
    if done < whole:
        log(f"stopped after {done} of {whole} runs: the same command continues")
    elif args.json:
        write_json(args.json, data)
    return exit_code({"stopped_by": signal})


if __name__ == "__main__":
    sys.exit(run_program(main))
