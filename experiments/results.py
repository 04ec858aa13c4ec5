"""What is kept of runs, read: a run's log, trials, and the `Study` in a folder of results."""

import json
import math
import statistics

from experiments.findings import Study
from training.io import UserError, aligned, markdown, write_text

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
        key: value for key, value in entry.items() if type(value) in (int, float) and abs(value) < math.inf
    }


def read_result(path):
    """The result in a file, a dict. Raises `UserError` where it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no result of this program: move it away") from error
    if not isinstance(result, dict) or not isinstance(result.get("dev", {}), dict):
        raise UserError(f"{path} is no result of this program: move it away")
    return result


def trial_lines(results, seeds, shards):
    """Writes tuning.md, and returns its table for the screen: the trials of a text, best first.

    `shards` are the digests of that text. Ensembles, which have no options, are among them.
    """
    found = [
        read_result(path) for seed in seeds for path in sorted((results / f"seed-{seed}").glob("*.json"))
    ]
    found = [trial for trial in found if trial.get("shards") == shards and "dev" in trial]
    rows = [["model", "seed", "dev CE", "plain", "epochs", "train CE", "minutes", "options"]]
    for trial in sorted(found, key=lambda trial: trial["dev"]["weighted_cross_entropy"]):
        options = " ".join(f"{key}={value}" for key, value in trial.get("options", {}).items())
        train = trial.get("train_cross_entropy")
        rows.append(
            [
                trial["name"],
                str(trial.get("seed", "-")),
                f"{trial['dev']['weighted_cross_entropy']:.4f}",
                f"{trial['dev']['cross_entropy']:.4f}",
                f"{trial.get('epochs', 0):.3g}",
                "-" if train is None else f"{train:.3f}",
                f"{trial.get('seconds', 0) / 60:.1f}",
                options,
            ]
        )
    write_text(results / "tuning.md", "\n".join(markdown(rows)) + "\n")
    return aligned(rows)


def study_fields(recipe):
    """The fields of the `Study` of a recipe that hold before anything is trained."""
    ensembles = recipe.ensembles()
    title = "ensemble" if len(ensembles) == 1 else "ensemble of {}"
    titles = {name: entry.title for name, entry in recipe.entries.items()}
    titles |= {
        name: title.format(", ".join(titles[member.name] for member in members))
        for name, (members, _) in ensembles.items()
    }
    students = [name for name, entry in recipe.entries.items() if entry.teachers]
    alone = [name for name in titles if name not in students and name != recipe.control]
    return {
        "name": recipe.name,
        "about": recipe.about,
        "text": "the second halves of the dev files, on which nothing was chosen",
        "models": {name: titles[name] for name in dict.fromkeys((*alone, recipe.control, *students))},
        "teachers": {name: list(recipe.entries[name].teachers) for name in students},
        "ensembles": {name: recipe.entries[name].taught_by for name in students},
        "control": recipe.control,
        "student": recipe.student,
        "least_seeds": recipe.least_seeds,
        "control_gain": recipe.control_gain,
    }


def seed_folders(folder):
    """The folders seed-N in a folder of results; what has been moved away has another name."""
    return [path for path in folder.glob("seed-*") if path.name[5:].isdecimal()]


def seed_of(folder):
    """The N of a folder seed-N."""
    return int(folder.name.removeprefix("seed-"))


def read_study(folder):
    """The `Study` of the reported results in the folder of an experiment.

    What was scored for tuning alone is no part of it, and neither is a model without a result.
    Raises `UserError` where there is nothing to report.
    """
    seeds = {}
    try:
        fields = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
        for path in seed_folders(folder):
            files = {name: path / f"{name}.json" for name in fields["models"]}
            results = {name: read_result(file) for name, file in files.items() if file.exists()}
            results = {name: result for name, result in results.items() if "report" in result}
            if results:
                seeds[seed_of(path)] = results
        there = {name for results in seeds.values() for name in results}
        fields["models"] = {n: title for n, title in fields["models"].items() if n in there}
        for role in ("control", "student"):
            fields[role] = fields[role] if fields[role] in there else None
        study = Study(**fields, seeds=dict(sorted(seeds.items())), folder=folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} holds no results of an experiment that can be read") from error
    if not seeds:
        raise UserError(f"{folder} holds no result yet that could be reported")
    return study
