"""What is kept of runs, read: a run's log, trials, and the `Study` in a folder of results."""

import dataclasses
import json
import math
import statistics

from harness.files import UserError, write_text
from harness.tables import aligned, markdown
from report.study import Study

LOGGED_POINTS, LAST_LINES = 150, 10


def read_log(path):
    """What a run's log says of its training, a dict.

    "seconds", "epochs" and "steps" of the last training line; "curve": [(step, dev cross-entropy in
    nats per token)]; "training": [(step, cross-entropy, KL or None)], at most `LOGGED_POINTS`;
    "train_cross_entropy": the mean of the last `LAST_LINES` of it. Damaged lines are passed over;
    the lists are empty where no training line is left, for then nothing tells the length of an
    epoch.
    """
    found = {"seconds": 0.0, "epochs": 0.0, "steps": 0, "curve": []}
    tokens, training = 0, []
    for line in path.read_bytes().split(b"\n"):
        entry = read_numbers(line)
        if {"step", "epoch", "tokens", "tokens_per_second"} <= entry.keys():
            if entry["tokens_per_second"] > 0:
                found["seconds"] += (entry["tokens"] - tokens) / entry["tokens_per_second"]
            tokens = entry["tokens"]
            found |= {"epochs": entry["epoch"], "steps": entry["step"]}
            if "cross_entropy" in entry:
                training.append((entry["step"], entry["cross_entropy"], entry.get("kl")))
        elif {"step", "dev_cross_entropy"} <= entry.keys():
            found["curve"].append((entry["step"], entry["dev_cross_entropy"]))
    if not found["steps"]:
        found["curve"] = []
    last = [cross_entropy for _, cross_entropy, _ in training[-LAST_LINES:]]
    found["train_cross_entropy"] = statistics.fmean(last) if last else None
    found["training"] = training[:: 1 + len(training) // LOGGED_POINTS]
    return found


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


def trial_lines(results, seeds):
    """Writes tuning.md, and returns its table for the screen: all trials, the best one first."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for seed in seeds
        for path in sorted((results / f"seed-{seed}").glob("*.json"))
    ]
    rows = [["model", "seed", "dev CE", "plain", "epochs", "train CE", "minutes", "options"]]
    for trial in sorted(found, key=lambda trial: trial["dev"]["weighted_cross_entropy"]):
        options = " ".join(f"{key}={value}" for key, value in trial.get("options", {}).items())
        train = trial.get("train_cross_entropy")
        rows.append(
            [trial["name"], str(trial.get("seed", "-")),
             f"{trial['dev']['weighted_cross_entropy']:.4f}",
             f"{trial['dev']['cross_entropy']:.4f}", f"{trial.get('epochs', 0):.3g}",
             "-" if train is None else f"{train:.3f}", f"{trial.get('seconds', 0) / 60:.1f}",
             options]
        )  # fmt: skip
    write_text(results / "tuning.md", "\n".join(markdown(rows)) + "\n")
    return aligned(rows)


def study_of(recipe, found, results):
    """The `Study` of results {seed: {name: result}}."""
    ensembles = recipe.ensembles()
    title = "ensemble" if len(ensembles) == 1 else "ensemble of {}"
    titles = {name: entry.title for name, entry in recipe.entries.items()}
    titles |= {
        name: title.format(", ".join(titles[member] for member in members))
        for name, members in ensembles.items()
    }
    taught = {name: entry.teachers for name, entry in recipe.entries.items() if entry.teachers}
    alone = [name for name in titles if name not in taught]
    order = [name for name in alone if name != recipe.control] + [recipe.control, *taught]
    models = {name: titles[name] for name in order if name in titles}
    return Study(
        recipe.name, recipe.about, models, taught,
        recipe.control if recipe.control in models else None,
        recipe.student if recipe.student in models else None, found, results,
    )  # fmt: skip


def described_study(study):
    """What --report needs beside the results of the models."""
    return {
        key: value
        for key, value in dataclasses.asdict(study).items()
        if key not in ("seeds", "folder")
    }


def read_study(folder):
    """The `Study` in the folder of an experiment, with all results that are there."""
    try:
        fields = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
        seeds = {}
        for path in folder.glob("seed-*"):
            results = {
                name: json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
                for name in fields["models"]
                if (path / f"{name}.json").exists()
            }
            if results:
                seeds[int(path.name.removeprefix("seed-"))] = results
        return Study(**fields, seeds=dict(sorted(seeds.items())), folder=folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} holds no results of an experiment that can be read") from error
