"""Fine-tunes checkpoints on tasks of classifying texts, such as those of (Super)GLUE and MSGS.

    python finetune.py runs/*/best.pt --tasks glue_filtered --seeds 3

A task is NAME.train.jsonl and NAME.valid.jsonl, in the fields of BabyLM's pipelines or with "text"
(or "text_a" and "text_b") and "label". For each checkpoint, task and seed a classification head on
the last token and the whole model are trained by the loop of train.py. As in the pipelines, the
evaluation that is best on valid is the one that is reported, on valid: compare models by it, and
take it for no estimate of what new text would show.

--settings names a table in tasks.py: that of the authors (default), or what the pipeline of 2023 or
2025 has by default; the options below change all tasks alike. Results are kept in OUT, one file
for each run, and a run whose result is there is not repeated: a command that was stopped continues.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tasks
from classifier import HEADS, as_classifier, class_logits, load_classifier
from data import Tokenizer
from harness import parallel
from harness.devices import choose_compute
from harness.files import UserError, locked, printable, run_program, say, write_json
from harness.options import option
from harness.record import commit, exit_code, machine
from harness.states import Provenance, is_finished
from harness.tables import aligned
from model import load_checkpoint
from report.compare import paired_t
from report.results import read_result
from report.tables import task_rows
from train import TrainConfig, fit

POOL_BATCHES = 32  # within which examples of like length come together
BATCH_TOKENS = 8192  # of an evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The options of one run: what train.py has, and what is to be learned."""

    task: str = option("", "name of the task")
    head: str = option("linear", "see classifier.py", choices=HEADS)
    chosen_by: str = option("f1", "which number on valid chooses best.pt")


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
        last = (batch.targets >= 0).long().argmax(1)  # (B,)
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
        size, batches = POOL_BATCHES * self.batch_size, []
        for start in range(0, len(shuffled), size):
            pool = sorted(shuffled[start : start + size], key=lambda i: len(self.examples.ids[i]))
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
        last = (batch.targets >= 0).long().argmax(1)
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

    folder: str
    out: Path
    settings: str
    changes: dict
    head: str
    dropout: float | None
    device: str
    precision: str
    deadline: float | None
    keep: bool
    verbose: bool


def settings_for(setup, base, task):
    """The task's `Settings`, as the options change them, for a model of so many positions."""
    found = dataclasses.replace(tasks.settings_of(task.name, setup.settings), **setup.changes)
    positions = base.model.config.max_position_embeddings
    return dataclasses.replace(found, max_length=min(found.max_length, positions))


def config_of(setup, base, task, settings, seed, num_batches):
    """The complete config of a run."""
    left = None if setup.deadline is None else (setup.deadline - time.monotonic()) / 60
    shared = ("learning_rate", "batch_size", "epochs", "schedule", "min_lr_ratio", "patience",
              "eval_every", "weight_decay", "clip", "chosen_by")  # fmt: skip
    return FinetuneConfig(
        **{name: getattr(settings, name) for name in shared},
        warmup_steps=round(settings.warmup * settings.epochs * num_batches),
        sequence_length=settings.max_length,
        model=base.checkpoint["model"]["name"],
        init=base.path,
        data=setup.folder,
        out=str(setup.out / base.name / task.name / f"seed-{seed}"),
        seed=seed,
        task=task.name,
        head=setup.head,
        dropout=setup.dropout,
        device=setup.device,
        precision=setup.precision,
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
        config.model, origin["model"]["architecture"], model.config, base.tokenizer,
        {"classes": list(task.classes), "task_digests": task.digests,
         "init_digest": origin["digest"]},
    )  # fmt: skip
    evaluate = evaluation(task, encoded[task.name], config.chosen_by)
    with contextlib.ExitStack() as stack:
        if not setup.verbose:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return fit(ClassificationObjective(model), config, stream, evaluate, provenance)


def result_of(setup, task, encoded, config):
    """What is kept of a run: the scores of its best.pt, and the classes that it predicts."""
    compute = choose_compute(config.device, config.precision)
    model, checkpoint = load_classifier(Path(config.out) / "best.pt")
    model.to(compute.device)
    found = {"scores": {}, "predictions": {}, "best_step": checkpoint["progress"]["best_step"]}
    for name in task.valid:
        predicted = predict(model, encoded[name], compute.autocast).argmax(1)
        found["scores"][name] = tasks.scores(predicted, encoded[name].labels, len(task.classes))
        found["predictions"][name] = " ".join(map(str, predicted.tolist()))
    return found | {
        "commit": commit(), "machine": machine(setup.device), "torch": torch.__version__,
        "precision": compute.precision,
    }  # fmt: skip


def run_task(setup, base, task, seeds):
    """The results of a task's seeds: what is not there is made. (results, signal or None).

    A list that is shorter than the seeds says that the time is over, or that a signal came.
    """
    settings = settings_for(setup, base, task)
    encoded, results = None, []
    for seed in seeds:
        path = setup.out / base.name / task.name / f"seed-{seed}.json"
        wanted = {
            "name": base.name, "task": task.name, "seed": seed, "head": setup.head,
            "settings": dataclasses.asdict(settings), "files": task.digests,
            "checkpoint": base.checkpoint["digest"], "dropout": setup.dropout,
        }  # fmt: skip
        if path.exists():
            result = read_result(path)
            if different := [key for key in wanted if result.get(key) != wanted[key]]:
                raise UserError(
                    f"{path} is of another run ({', '.join(different)} differ): choose another "
                    "--out, or move it away"
                )
            results.append(result)
            continue
        if setup.deadline is not None and time.monotonic() > setup.deadline:
            return results, None
        if encoded is None:
            encoded = encode_task(base, task, settings.max_length)
        num_batches = -(-len(task.train.texts) // settings.batch_size)
        config = config_of(setup, base, task, settings, seed, num_batches)
        start = time.monotonic()
        progress = run(setup, base, task, encoded, config)
        if not is_finished(progress, config.patience):
            return results, progress.get("stopped_by")
        result = wanted | result_of(setup, task, encoded, config)
        result |= {"seconds": round(time.monotonic() - start, 1), "steps": progress["step"]}
        write_json(path, result)
        clean(Path(config.out), setup.keep)
        results.append(result)
        say(f"{base.name}, seed {seed}: {shown_scores(task, result)}, {result['seconds']:.0f} s")
    return results, None


def encode_task(base, task, max_length):
    """{"train": EncodedExamples, name of a valid: EncodedExamples}; what is cut is told."""
    parts = {"train": task.train, **task.valid}
    encoded = {n: tasks.encode(part, base.tokenizer, max_length) for n, part in parts.items()}
    if cut := sum(part.cut for part in encoded.values()):
        texts = sum(len(part.ids) for part in encoded.values())
        say(
            f"{task.name}: {cut:,} of {texts:,} texts are longer than {max_length} tokens and lose "
            "their ends (--max-length)"
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
    """Removes the state of a finished run; best.pt and the log remain where that is asked for."""
    for path in folder.iterdir():
        if not (keep and path.name in ("best.pt", "log.jsonl")):
            path.unlink()
    if not keep:
        folder.rmdir()


# ---- all of them


def load_bases(paths):
    """A `Base` for each checkpoint, with a name of its own: its run's, or its file's."""
    bases = {}
    for path in map(Path, paths):
        kept = path.stem in ("best", "checkpoint", "previous")
        name = printable(path.resolve().parent.name if kept else path.stem)
        if name in bases:
            raise UserError(
                f"{path} and {bases[name].path} are both called {name}: fine-tune them apart, each "
                "into an --out of its own"
            )
        model, checkpoint = load_checkpoint(path)
        tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
        bases[name] = Base(name, str(path), model, checkpoint, tokenizer)
    return list(bases.values())


def described(found, chosen, settings, head):
    """The results as plain data, from {model: {task: results}}.

    "tasks" {name of a valid: {"metric", "texts", "majority", "msgs"}}; "models" {model: {name:
    {"mean", "deviation", "interval", "seeds"}}}, of the metric, all in [0, 1] or for Matthews'
    correlation [-1, 1]. The interval of 95 % is that of the mean over seeds (Student's t), or with
    one seed that over texts (bootstrap). "seeds" has every score of each.
    """
    about, models = {}, {model: {} for model in found}
    for task in chosen:
        for name, valid in task.valid.items():
            metric = tasks.metric_of(name)
            majority = tasks.majority_scores(task, name)[metric]
            about[name] = {"metric": metric, "texts": len(valid.texts), "majority": majority}
            about[name]["msgs"] = task.name.lower() in tasks.MSGS
            for model, by_task in found.items():
                results = by_task[task.name]
                values = [r["scores"][name][metric] for r in results]
                several = len(values) > 1
                labels, classes = torch.tensor(valid.labels), len(task.classes)
                predicted = torch.tensor([int(c) for c in results[0]["predictions"][name].split()])
                models[model][name] = {
                    "mean": statistics.fmean(values),
                    "deviation": statistics.stdev(values) if several else None,
                    "interval": paired_t(values)
                    or tasks.text_interval(predicted, labels, classes, metric),
                    "seeds": {r["seed"]: r["scores"][name] for r in results},
                }
    return {"settings": settings, "head": head, "tasks": about, "models": models}


def parse_arguments(argv):
    """The options of the command line; wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tasks", required=True, metavar="DIR", help="folder of tasks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these tasks of the folder")
    parser.add_argument(
        "--settings", choices=tasks.SETTINGS, default="authors",
        help="table of learning rates and so on; see above (default: authors)",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=HEADS, default="linear",
        help="linear, as the pipeline of 2023 and transformers have it, or the mlp of the pipeline "
        "of 2025 (default: linear)",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=float, metavar="P",
        help="in the model (default: a GPT-2's own, none in a LLaMA, as in its exported folder)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs (default: 1)")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first of them (default: 0)"
    )
    changes = parser.add_argument_group("in place of what the table says")
    for field in dataclasses.fields(tasks.Settings):
        if field.name in ("learning_rate", "batch_size", "epochs", "patience", "eval_every",
                          "max_length"):  # fmt: skip
            kind = float if field.type is float else int
            changes.add_argument("--" + field.name.replace("_", "-"), type=kind, metavar="N")
    parser.add_argument(
        "--out", default="runs/finetune", metavar="DIR",
        help="folder for results (default: runs/finetune)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    parser.add_argument(
        "--keep", action="store_true",
        help="keep each run's best.pt, for export_hf.py, and its log.jsonl",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="save and stop after so many minutes"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of matrix products (default: auto, bf16 where the chip multiplies it natively)",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show how each run trains")
    args = parser.parse_args(argv)
    least = {"seeds": 1, "first_seed": 0, "batch_size": 1, "epochs": 1, "patience": 0,
             "eval_every": 0, "max_length": 3, "learning_rate": 0, "stop_after": 0}  # fmt: skip
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error("--dropout must be at least 0 and below 1")
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and not value <= given < 1 << 31:
            parser.error(f"--{name.replace('_', '-')} must be a number from {value} on")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if parallel.is_launched():
        raise UserError("finetune.py trains in one process: start it without torchrun")
    chosen = tasks.read_tasks(Path(args.tasks), args.only)
    bases = load_bases(args.checkpoints)
    changes = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(tasks.Settings)}
    setup = Setup(
        args.tasks, Path(args.out), args.settings,
        {name: value for name, value in changes.items() if value is not None}, args.head,
        args.dropout, args.device, args.precision,
        None if args.stop_after is None else time.monotonic() + 60 * args.stop_after,
        args.keep, args.verbose,
    )  # fmt: skip
    seeds, found = range(args.first_seed, args.first_seed + args.seeds), {}
    with locked(setup.out):
        for base in bases:
            found[base.name] = {}
            for task in chosen:
                results, signal = run_task(setup, base, task, seeds)
                found[base.name][task.name] = results
                if len(results) < len(seeds):
                    say("stopped before the end: the same command continues")
                    return exit_code({"stopped_by": signal})
    data = described(found, chosen, args.settings, args.head)
    print("\n" + "\n".join(aligned(task_rows(data))))
    if args.json:
        write_json(args.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
