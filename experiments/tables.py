"""The tables of a report: rows of strings, the first of them the heading."""

import statistics

from evaluation.statistics import format_interval
from experiments.findings import (
    cross_entropy_of,
    outperforms,
    pair_difference,
    pair_folders,
    verdict_of,
)

CONCLUSIONS = {True: "shown", False: "not shown", None: "UNDECIDED (seeds or models are missing)"}


def with_minus(text):
    """The text with a minus sign in place of each hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def mean_and_deviation(values, digits):
    """The mean, with the standard deviation of several values; "-" without values."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def versus(study, name, baseline):
    """The name of a difference."""
    return f"{study.models[name]} minus {study.models[baseline]}"


def conclusion_rows(study):
    """Heading and rows: the verdict on each student, and on the claims about the study's own."""
    rows = [["conclusion", "test CE", "verdict"]]
    shown = outperforms(study, study.student, [study.control])
    for name in sorted(study.students, key=lambda name: name != study.student):
        if difference := study.difference(name, study.control):
            # The rules test the study's own student; only if it is shown do the others confirm it.
            exploratory = "" if name == study.student or shown else ", exploratory"
            answer = verdict_of(study, name, study.control) + exploratory
            gain = with_minus(f"{difference.mean:+.3f}")
            rows.append([versus(study, name, study.control), gain, answer])
    if study.student not in study.models:
        return rows
    teachers = study.teachers[study.student]
    claims = [
        (name, f"{study.models[name]} is better than each of its teachers", teachers)
        for name in study.students
        if study.teachers[name] == teachers
    ]
    if study.single_teacher_students and len(teachers) > 1:
        names = ", ".join(study.models.get(name, name) for name in study.single_teacher_students)
        claim = f"an ensemble teaches more than one teacher: better than {names}"
        claims.append((study.student, claim, study.single_teacher_students))
    for name, claim, baselines in claims:
        rows.append([claim, "", CONCLUSIONS[outperforms(study, name, baselines)]])
    return rows


def result_rows(study):
    """Heading and rows of the main table: one row for each model, over all seeds."""
    folders = pair_folders(study)
    heading = ["model", "parameters", "epochs", "seconds", "train CE", "test CE", "plain", "temperature"]
    rows = [heading + [f"{folder} (%)" for folder in folders]]
    for name, title in study.models.items():
        runs = study.results(name)
        row = [title, f"{runs[0]['report']['parameters']:,}"]
        row.append("-" if "epochs" not in runs[0] else f"{runs[0]['epochs']:.3g}")
        for key, digits in (("seconds", 0), ("train_cross_entropy", 3)):
            row.append(mean_and_deviation([r[key] for r in runs if r.get(key) is not None], digits))
        row.append(mean_and_deviation([cross_entropy_of(r) for r in runs], 3))
        reports = [run["report"] for run in runs]
        row.append(mean_and_deviation([report["cross_entropy"] for report in reports], 3))
        scaled = [report["temperature_scaled"] for report in reports if "temperature_scaled" in report]
        row.append(mean_and_deviation([scores["temperature"] for scores in scaled], 3))
        for folder in folders:
            accuracies = [100 * report["pairs"][folder]["accuracy_over_files"] for report in reports]
            row.append(mean_and_deviation(accuracies, 1))
        rows.append(row)
    return rows


def difference_rows(study):
    """Heading and rows: all compared pairs in cross-entropy."""
    rows = [["difference", "test CE", "over seeds", "over text", "by seed", "plain", "scaled", "verdict"]]
    for (name, baseline), variants in study.comparisons.items():
        main, scaled = study.difference(name, baseline), variants.get("temperature-scaled")
        cells = [
            f"{main.mean:+.4f}",
            format_interval(main.over_seeds),
            format_interval(main.over_text),
            " ".join(f"{value:+.3f}" for value in main.per_seed),
            f"{variants['plain'].mean:+.4f}",
        ]
        rows.append([versus(study, name, baseline), *map(with_minus, cells)])
        rows[-1].append("-" if scaled is None else with_minus(f"{scaled.mean:+.4f}"))
        rows[-1].append(verdict_of(study, name, baseline))
    return rows


def pair_difference_rows(study):
    """Heading and rows: the same in minimal pairs, in points, with intervals over their files."""
    folders = pair_folders(study)
    rows = [["difference (points)", *folders]]
    for name, baseline in study.comparisons if folders else ():
        cells = []
        for folder in folders:
            mean, bounds = pair_difference(study, name, baseline, folder)
            cells.append(with_minus(f"{mean:+.1f} {format_interval(bounds, 1)}"))
        rows.append([versus(study, name, baseline), *cells])
    return rows


def lead_rows(study):
    """Heading and rows: student - control = gap - lead, for each student and seed."""
    rows = [["student", "seed", "lead", "gap", "student - control"]]
    for name in study.students:
        for seed, results in study.seeds.items():
            if {name, study.ensembles[name], study.control} <= results.keys():
                student, control = (cross_entropy_of(results[n]) for n in (name, study.control))
                teacher = cross_entropy_of(results[study.ensembles[name]], "teaching")
                values = (control - teacher, student - teacher, student - control)
                cells = [with_minus(f"{value:+.3f}") for value in values]
                rows.append([study.models[name], str(seed), *cells])
    return rows


def detail_rows(study, title, values, digits):
    """Heading and one row for each name in `values(result)`, {name: number}: its mean for each model."""
    rows = [[title, *study.models.values()]]
    for name in values(study.every_result()[0]):
        numbers = [[values(result)[name] for result in study.results(model)] for model in study.models]
        rows.append([name, *(mean_and_deviation(of_model, digits) for of_model in numbers)])
    return rows


def sub_corpus_rows(study):
    """Cross-entropy by sub-corpus."""

    def values(result):
        per_file = result["report"]["per_file"]
        return {name: scores["cross_entropy"] for name, scores in per_file.items()}

    return detail_rows(study, "sub-corpus", values, digits=3)


def field_rows(study, folder):
    """Accuracy by field of minimal pairs, and its mean over fields, in percent."""

    def values(result):
        scores = result["report"]["pairs"][folder]
        accuracies = scores["per_field"] | {"mean over fields": scores["accuracy_over_fields"]}
        return {name: 100 * accuracy for name, accuracy in accuracies.items()}

    return detail_rows(study, f"{folder} (%)", values, digits=1)
