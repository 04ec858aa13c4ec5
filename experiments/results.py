"""Reads what an experiment keeps: the logs of its runs, its results, and the `Study` of a folder.

All of it is JSON that somebody may have edited or sent: each file is checked before it is used.
"""

import dataclasses
import json
import statistics

from experiments.findings import Study, cross_entropy_of
from training.io import UserError, aligned, markdown, printable, sha256, write_text

LAST_LINES = 10  # of a log, whose mean is the loss on training text
MAX_NUMBER = 1e15  # anything larger overflows in a sum or a picture

# ---- forms of JSON: a type; (form, form) for either; [form] for a list, [form, form] for a list of
# two; {key: form} for an object, where "key?" may be missing, str stands for any key and other keys
# may be there

TEXT_SCORES_FORM = {"cross_entropy": float, "weighted_cross_entropy?": float}
PAIR_SCORES = {
    "accuracy_over_files": float,
    "accuracy_over_fields": float,
    "per_file": {str: float},
    "per_field": {str: float},
}
REPORT = TEXT_SCORES_FORM | {
    "parameters": int,
    "per_file": {str: TEXT_SCORES_FORM},
    "temperature_scaled?": {"temperature": float},
    "pairs": {str: PAIR_SCORES},
}
TASK = {"metric": str, "texts": int, "majority": float, "msgs": bool}
FINETUNED_FORM = {
    "files": dict,
    "options": dict,
    "tasks": {str: TASK},
    "scores": {str: {"mean": float, "interval": [float, float]}},
}
SETTINGS_FORM = {"preset?": str, "options?": dict, "conditions?": dict}
SETTINGS_FORM["teachers?"] = [SETTINGS_FORM]
RESULT = SETTINGS_FORM | {
    "name": str,
    "members?": [SETTINGS_FORM],
    "shards?": dict,
    "scoring?": {"precision": str, "pairs": dict},
    "losses?": str,
    "dev?": TEXT_SCORES_FORM,
    "report?": REPORT,
    "teaching?": TEXT_SCORES_FORM,
    "samples?": {str: str},
    "seconds?": float,
    "epochs?": float,
    "steps?": float,
    "train_cross_entropy?": (float, None),
    "curve?": [[float, float]],
    "weights?": (str, [float], None),
    "taught_by?": [str],
    "finetuned?": FINETUNED_FORM,
}
STUDY = {
    "name": str,
    "about": str,
    "text": str,
    "models": {str: str},
    "teachers": {str: [str]},
    "ensembles": {str: str},
    "control": (str, None),
    "student": (str, None),
    "least_seeds?": int,
    "control_gain?": float,
}


def has_form(value, form):
    """True if a JSON value has a form; `float` is any finite number."""
    if isinstance(form, tuple):
        return any(has_form(value, alternative) for alternative in form)
    if isinstance(form, list):
        forms = form if len(form) > 1 else form * len(value if isinstance(value, list) else ())
        return isinstance(value, list) and len(value) == len(forms) and all(map(has_form, value, forms))
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(has_form(element, form[str]) for element in value.values())
        return all(
            has_form(value[name], element_form) if (name := key.rstrip("?")) in value else name != key
            for key, element_form in form.items()
        )
    if form in (int, float):
        return type(value) in (int, form) and abs(value) < MAX_NUMBER
    return value is None if form is None else type(value) is form


def damaged(path):
    """The error of a file that this program did not write."""
    return UserError(f"{path} is damaged, or not from this program: move it away")


def read_object(path, form=dict):
    """The JSON object in a file. Raises `UserError` unless it is one and has the form."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not has_form(value, form):
        raise damaged(path)
    return value


def is_file_name(text):
    """True if a text can name a file or folder, and is no option of a command."""
    is_short = 0 < len(text.encode("utf-8", "replace")) < 200
    return is_short and text == printable(text) and "/" not in text and text.strip(" ")[:1] not in ".-"


# ---- logs and results


def read_log(path):
    """A dict of what a run's log says about its training.

    "seconds", "epochs" and "steps" of the last training line; "curve": [(step, cross-entropy on
    validation text)]; "train_cross_entropy": the mean of the last `LAST_LINES` on training text, or
    None. Damaged lines are passed over. Without a training line nothing tells the length of an
    epoch, and the curve is empty.
    """
    log = {"seconds": 0.0, "epochs": 0.0, "steps": 0, "curve": []}
    tokens, losses = 0, []
    for line in path.read_bytes().split(b"\n"):
        entry = read_numbers(line)
        if {"step", "epoch", "tokens", "tokens_per_second"} <= entry.keys():
            if entry["tokens_per_second"] > 0:
                log["seconds"] += (entry["tokens"] - tokens) / entry["tokens_per_second"]
            tokens = entry["tokens"]
            log |= {"epochs": entry["epoch"], "steps": entry["step"]}
            if "cross_entropy" in entry:
                losses.append(entry["cross_entropy"])
        elif {"step", "dev_cross_entropy"} <= entry.keys():
            log["curve"].append((entry["step"], entry["dev_cross_entropy"]))
    if log["steps"] < 1:
        log["curve"], losses = [], []
    log["train_cross_entropy"] = statistics.fmean(losses[-LAST_LINES:]) if losses else None
    return log


def read_numbers(line):
    """{key: number} of the finite numbers in a line of JSON; empty if it is no JSON object."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(entry, dict):
        return {}
    return {key: value for key, value in entry.items() if has_form(value, float)}


def read_result(path):
    """The result in a file, a dict as `findings` describes it. Raises `UserError` if it is none."""
    result = read_object(path, RESULT)
    pairs = result.get("report", {}).get("pairs", {})
    tasks = result.get("finetuned", {"tasks": {}, "scores": {}})
    if (
        (result.get("curve") and (result.get("steps", 0) < 1 or "epochs" not in result))
        or not all(map(is_file_name, pairs))
        or not all(scores["per_file"] and scores["per_field"] for scores in pairs.values())
        or tasks["tasks"].keys() != tasks["scores"].keys()
    ):
        raise damaged(path)
    return result


def trial_lines(results, seeds, shards):
    """Writes tuning.md, and returns its table for the screen: the trials of a text, best first.

    `shards` are the digests of that text. Ensembles, which have no options, are among them.
    """
    paths = [path for seed in seeds for path in sorted((results / f"seed-{seed}").glob("*.json"))]
    trials = [trial for trial in map(read_result, paths) if trial.get("shards") == shards and "dev" in trial]
    rows = []
    for trial in sorted(trials, key=lambda trial: cross_entropy_of(trial, "dev")):
        train = trial.get("train_cross_entropy")
        cells = [
            f"{cross_entropy_of(trial, 'dev'):.4f}",
            f"{trial['dev']['cross_entropy']:.4f}",
            f"{trial.get('epochs', 0):.3g}",
            "-" if train is None else f"{train:.3f}",
            f"{trial.get('seconds', 0) / 60:.1f}",
            " ".join(f"{key}={value}" for key, value in trial.get("options", {}).items()),
        ]
        rows.append([trial["name"], str(trial.get("seed", "-")), *cells])
    heading = ["model", "seed", "validation CE", "plain", "epochs", "train CE", "minutes", "options"]
    write_text(results / "tuning.md", "\n".join(markdown([heading, *rows])) + "\n")
    return aligned([heading, *rows])


# ---- a folder of results


def study_fields(recipe):
    """The fields of a recipe's `Study` that are known before training: experiment.json."""
    ensembles = recipe.ensembles()
    title = "ensemble" if len(ensembles) == 1 else "ensemble of {}"
    titles = {name: spec.title for name, spec in recipe.specs.items()}
    titles |= {
        name: title.format(", ".join(titles[member.name] for member in members))
        for name, (members, _) in ensembles.items()
    }
    students = [name for name, spec in recipe.specs.items() if spec.teachers]
    alone = [name for name in titles if name not in students and name != recipe.control]
    return {
        "name": recipe.name,
        "about": recipe.about,
        "text": "the test text (the second halves of the dev files, on which nothing was chosen)",
        "models": {name: titles[name] for name in dict.fromkeys((*alone, recipe.control, *students))},
        "teachers": {name: list(recipe.specs[name].teachers) for name in students},
        "ensembles": {name: recipe.specs[name].teacher_or_ensemble for name in students},
        "control": recipe.control,
        "student": recipe.student,
        "least_seeds": recipe.least_seeds,
        "control_gain": recipe.control_gain,
    }


def seed_folders(folder):
    """{N: path} of the folders seed-N. Raises `UserError` for a second name of a seed, as seed-00."""
    folders = {}
    for path in folder.glob("seed-*"):
        if path.is_dir() and path.name[5:].isdecimal():
            seed = int(path.name[5:])
            if path.name != f"seed-{seed}":
                raise UserError(f"{path} is seed {seed}: call it seed-{seed}, or move it away")
            folders[seed] = path
    return dict(sorted(folders.items()))


def read_study(folder):
    """The `Study` of a folder's results on the reported text; models without results are left out.

    Raises `UserError` if there is nothing to report, or results do not belong together.
    """
    path = folder / "experiment.json"
    if not path.exists():
        raise UserError(f"{folder} is no folder of an experiment: it has no experiment.json")
    fields = read_object(path, STUDY)
    roles = {"control": fields["control"], "student": fields["student"]}
    names = {*fields["models"], *filter(None, roles.values())}
    if fields["teachers"].keys() != fields["ensembles"].keys() or not all(map(is_file_name, names)):
        raise damaged(path)
    seeds, facts = {}, {}
    for seed, seed_folder in seed_folders(folder).items():
        files = {name: seed_folder / f"{name}.json" for name in fields["models"]}
        results = {name: read_result(file) for name, file in files.items() if file.exists()}
        results = {name: result for name, result in results.items() if "report" in result}
        for name, result in results.items():
            if not has_losses(files[name], result):
                raise UserError(
                    f"the losses beside {files[name]} are gone or of another result: score it again"
                )
            check_facts(files[name], scored_on(result), facts)
        if results:
            seeds[seed] = results
    if not seeds:
        raise UserError(f"{folder} holds no result yet that could be reported")
    present = {name for results in seeds.values() for name in results}
    fields["models"] = {name: printable(title) for name, title in fields["models"].items() if name in present}
    fields |= {role: name if name in present else None for role, name in roles.items()}
    known = {field.name for field in dataclasses.fields(Study)} & fields.keys()
    return Study(**{key: fields[key] for key in known}, seeds=seeds, folder=folder)


def has_losses(path, result):
    """True if the losses beside the result in `path` are those that were written with it."""
    losses = path.with_suffix(".losses.npz")
    # Earlier versions kept no digest.
    return losses.exists() and result.get("losses") in (None, sha256(losses.read_bytes()))


def scored_on(result):
    """{fact: value or None if unknown} of what a result was scored on."""
    report, scoring = result["report"], result.get("scoring", {})
    facts = {
        "text": result.get("shards", {}).get("report"),
        "list of sub-corpora": sorted(report["per_file"]),
        "scoring precision": scoring.get("precision"),
    }
    for folder, scores in report["pairs"].items():
        facts[f"content of {folder}"] = scoring.get("pairs", {}).get(folder)
        facts[f"list of files in {folder}"] = sorted(scores["per_file"])
        facts[f"list of fields in {folder}"] = sorted(scores["per_field"])
    return facts


def check_facts(path, facts, known):
    """Adds a result's facts to `known`, {fact: (value, origin)}. Raises `UserError` for another value."""
    for fact, value in facts.items():
        if value is not None:
            first_value, origin = known.setdefault(fact, (value, path))
            if value != first_value:
                raise UserError(f"{path} has another {fact} than {origin}: move it away and score it again")
