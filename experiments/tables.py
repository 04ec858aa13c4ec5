"""The tables of a report: rows of strings, the first of them the heading."""

from evaluation.statistics import format_interval
from experiments.findings import (
    cross_entropy,
    judged,
    minus,
    pair_difference,
    pair_folders,
    spread,
)

# BLiMP (mean over files) that others measured at these sizes on ten million words, by preset and
# whether it was taught: re-runs by leahphw/babylm and the official baselines of BabyLM 2024.
PUBLISHED_BLIMP = {
    ("gpt2-705m", False): "65.7",
    ("llama-360m", False): "65.4",
    ("gpt2-97m", False): "67.0",
    ("llama-58m", False): "66.6",
    ("llama-58m", True): "67.6 to 69.8",
}


def result_rows(study):
    """Heading and rows of the main table: one row for each model, over all seeds."""
    folders = pair_folders(study)
    record = any(record_key(study, name) in PUBLISHED_BLIMP for name in study.models)
    heading = ["model", "parameters", "epochs", "seconds", "train CE", "dev CE", "plain"]
    heading += ["temperature"] * any_scaled(study)
    heading += [f"{f}, {kind} (%)" for f in folders for kind in ("files", "fields")]
    rows = [[*heading, *["BLiMP on record"] * record]]
    for name, title in study.models.items():
        runs = study.results(name)
        if not runs:
            continue
        row = [title, f"{runs[0]['report']['parameters']:,}"]
        row.append("-" if "epochs" not in runs[0] else f"{runs[0]['epochs']:.3g}")
        for key, digits in (("seconds", 0), ("train_cross_entropy", 3)):
            row.append(spread([r[key] for r in runs if r.get(key) is not None], digits))
        row.append(spread([cross_entropy(r) for r in runs], 3))
        row.append(spread([r["report"]["cross_entropy"] for r in runs], 3))
        if any_scaled(study):
            scaled = [r["report"].get("temperature_scaled") for r in runs]
            row.append(spread([s["temperature"] for s in scaled if s], 3))
        for folder in folders:
            for key in ("accuracy_over_files", "accuracy_over_fields"):
                row.append(spread([100 * r["report"]["pairs"][folder][key] for r in runs], 1))
        if record:
            row.append(PUBLISHED_BLIMP.get(record_key(study, name), "-"))
        rows.append(row)
    return rows


def any_scaled(study):
    """Whether some model was scored at a fitted temperature."""
    return any("temperature_scaled" in result["report"] for result in study.every_result())


def record_key(study, name):
    """What `PUBLISHED_BLIMP` knows a model by."""
    runs = study.results(name)
    return (runs[0].get("preset") if runs else None, bool(study.teachers.get(name)))


def comparison_rows(study):
    """Heading and rows: the study's comparisons in dev cross-entropy."""
    rows = [["difference", "dev CE", "over seeds", "over text", "by seed", "plain", "scaled"]]
    rows[0].append("verdict")
    for (one, other), found in study.comparisons.items():
        first, scaled = next(iter(found.values())), found.get("temperature-scaled")
        rows.append(
            [
                f"{study.models[one]} minus {study.models[other]}",
                minus(f"{first.mean:+.4f}"),
                minus(format_interval(first.over_seeds)),
                minus(format_interval(first.over_text)),
                " ".join(minus(f"{value:+.3f}") for value in first.per_seed),
                minus(f"{found['plain'].mean:+.4f}"),
                "-" if scaled is None else minus(f"{scaled.mean:+.4f}"),
                judged(study, one, other),
            ]
        )
    return rows


def pair_rows(study):
    """Heading and rows: the same in minimal pairs, in points, with intervals over their files."""
    folders = pair_folders(study)
    rows = [["difference (points)", *folders]]
    for one, other in study.comparisons if folders else ():
        cells = []
        for folder in folders:
            mean, bounds = pair_difference(study, one, other, folder)
            cells.append(minus(f"{mean:+.1f} {format_interval(bounds, 1)}"))
        rows.append([f"{study.models[one]} minus {study.models[other]}", *cells])
    return rows


def lead_rows(study):
    """Heading and rows: student - control = gap - lead, for each student and seed."""
    rows = [["student", "seed", "lead", "gap", "student - control"]]
    for name in study.students:
        teacher = study.ensembles[name]
        for seed, found in study.seeds.items():
            if not {name, teacher, study.control} <= found.keys():
                continue
            one, control = cross_entropy(found[name]), cross_entropy(found[study.control])
            taught_by = cross_entropy(found[teacher], "teaching")
            values = (control - taught_by, one - taught_by, one - control)
            rows.append([study.models[name], str(seed), *(minus(f"{value:+.3f}") for value in values)])
    return rows


def detail_rows(study, title, names, value, digits):
    """Heading and rows with a row for each name; `value(result, name)` is what is in it."""
    models = [name for name in study.models if study.results(name)]
    rows = [[title, *(study.models[name] for name in models)]]
    for name in names:
        cells = [spread([value(r, name) for r in study.results(m)], digits) for m in models]
        rows.append([name, *cells])
    return rows


def sub_corpus_rows(study):
    """Dev cross-entropy by sub-corpus."""
    first = study.every_result()[0]
    return detail_rows(
        study,
        "sub-corpus",
        first["report"]["per_file"],
        lambda result, name: result["report"]["per_file"][name]["cross_entropy"],
        digits=3,
    )


def field_rows(study, folder):
    """Accuracy by field of minimal pairs, in percent."""
    first = study.every_result()[0]
    return detail_rows(
        study,
        f"{folder} (%)",
        first["report"]["pairs"][folder]["per_field"],
        lambda result, name: 100 * result["report"]["pairs"][folder]["per_field"][name],
        digits=1,
    )
