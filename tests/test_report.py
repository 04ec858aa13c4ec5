"""The report: its rows and pictures are those of the results, with matplotlib and without."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import sys

import pytest

from benchmarks import ablations
from evaluation.statistics import Difference, write_losses
from experiments import pages, plots
from experiments.findings import Study, outperforms, pair_difference, verdict, verdict_of
from experiments.results import read_log, read_study
from experiments.tables import conclusion_rows
from training.io import UserError, aligned, markdown, write_json

FOLDER, MINUS = "blimp_filtered", "\N{MINUS SIGN}"
TEACHERS = ["gpt2-teacher", "llama-teacher"]
ENSEMBLE = "gpt2-teacher&llama-teacher"
MODELS = {  # title; cross-entropy and accuracy of two seeds
    "gpt2-teacher": ("GPT-2 teacher", (1.5, 1.6), (0.60, 0.61)),
    "llama-teacher": ("LLaMA teacher", (1.6, 1.5), (0.61, 0.62)),
    ENSEMBLE: ("ensemble", (1.4, 1.45), (0.66, 0.64)),
    "control": ("control (alone)", (1.7, 1.72), (0.64, 0.65)),
    "student": ("student (distilled)", (1.55, 1.55), (0.63, 0.68)),
}


def result(role, seed):
    """What reproduce.py hands over for a role and a seed: four epochs of ten steps each."""
    _, values, accuracies = MODELS[role]
    value, accuracy = values[seed], accuracies[seed]
    pairs = {
        "accuracy_over_files": accuracy,
        "accuracy_over_fields": accuracy + 0.1,
        "per_field": {"island": accuracy, "binding": accuracy},
        "per_file": {"a": accuracy, "b": accuracy - 0.1, "c": accuracy + 0.1},
    }
    scores = {
        "parameters": 1000,
        "cross_entropy": value + 0.3,
        "weighted_cross_entropy": value,
        "perplexity": 4.0,
        "per_file": {"novels": {"cross_entropy": value}, "letters": {"cross_entropy": value + 1}},
        "pairs": {FOLDER: pairs},
    }
    if role == ENSEMBLE:
        return {"name": role, "report": scores, "commit": "abc"}
    curve = [[10, value + 5], [20, value + 0.2], [30, value + 0.1], [40, value]]
    return {
        "commit": "abc",
        "machine": "a large one",
        "weights": f"{role} {seed}",
        "taught_by": [f"{r} {seed}" for r in TEACHERS] if role == "student" else [],
        "name": role,
        "preset": "llama-58m" if role == "student" else "x",
        "report": scores,
        "seconds": 60.0,
        "epochs": 4.0,
        "steps": 40,
        "curve": curve,
        "train_cross_entropy": value,
        "samples": {"The cat": "sat | on <b>it</b>"},
    }


def rewrite(folder, role, values, scaled=None):
    """Gives a model other losses: `values`, one for each seed."""
    for seed, value in enumerate(values):
        write_losses(
            folder / f"seed-{seed}" / f"{role}.losses.npz",
            "digest",
            [("novels", 40, 0.5), ("letters", 60, 0.5)],
            [value] * 60,
            20,
            scaled=None if scaled is None else [scaled[seed]] * 60,
            shares={"novels": 0.9, "letters": 0.1},
        )


@pytest.fixture
def study(tmp_path):
    """Two seeds, with losses kept of three pieces of text in two files."""
    seeds = {seed: {role: result(role, seed) for role in MODELS} for seed in range(2)}
    for seed in seeds:
        (tmp_path / f"seed-{seed}").mkdir()
    for role, (_, values, _) in MODELS.items():
        rewrite(tmp_path, role, values)
    titles = {role: title for role, (title, _, _) in MODELS.items()}
    roles = {"teachers": {"student": TEACHERS}, "ensembles": {"student": ENSEMBLE}}
    roles |= {"control": "control", "student": "student"}
    return Study("demo", "About.", "the second halves", titles, **roles, seeds=seeds, folder=tmp_path)


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(figsize=(6, 4))


def write(study):
    """Writes the report into the study's folder; returns its text and the lines for the screen."""
    screen = pages.write_report(study, study.folder, "python x.py")
    return (study.folder / "report.md").read_text(encoding="utf-8"), "\n".join(screen)


def one_seed(study):
    return dataclasses.replace(study, seeds={0: study.seeds[0]})


def test_the_report_begins_with_the_verdicts_and_shows_the_curves(study, figure):
    text, screen = write(study)
    title, image, about, conclusions = text.split("\n\n")[:4]
    assert title == "# Language models compared: recipe demo, 2 seeds" and about == "About."
    assert image.endswith("(differences.png)") and conclusions.startswith(
        "| conclusion | test CE | verdict |"
    )
    for name in ("differences", "curves", f"fields-{FOLDER}"):
        assert f"({name}.png)" in text
        assert (study.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Report: python x.py, commit " in text
    assert "Models, commit: abc. Models, machine: a large one." in text
    row = next(line for line in text.split("\n") if line.startswith("| student (distilled) | 1,"))
    assert "| 1.550 ± 0.000 | 1.850 ± 0.000 |" in row
    assert "student (distilled)" in screen and str(study.folder / "report.md") in screen


def test_the_page_needs_no_other_file(study, figure):
    write(study)
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 3
    assert not re.search(r"https?://|<script|<link", page)


def test_markup_in_titles_and_samples_is_shown_as_it_is(study, monkeypatch):
    monkeypatch.setattr(plots, "picture", lambda *_: None)
    study.models["student"] = "![x](y) <img src=x> \x1b[31m"
    text, screen = write(study)
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text + page and "<b>" not in text + page
    assert "](y)" not in text and "sat &#124; on &lt;b>it" in text
    assert "\x1b" not in text + page + screen


def test_the_json_holds_every_value_and_difference(study):
    write(study)
    result = json.loads((study.folder / "report.json").read_text(encoding="utf-8"))
    student = result["results"]["1"]["student"]
    assert student["report"]["weighted_cross_entropy"] == 1.55 and student["epochs"] == 4.0
    first = result["differences"][0]
    assert (first["one"], first["other"]) == ("student", "control")
    assert first["per_seed"] == pytest.approx([-0.15, -0.17])


def test_without_matplotlib_the_report_has_no_pictures_and_says_so(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text, screen = write(study)
    assert ".png" not in text and not list(study.folder.glob("*.png"))
    assert "pip install matplotlib" in screen


def test_the_tables_have_sub_corpora_fields_pairs_lead_and_gap(study):
    text, _ = write(study)
    assert "| novels | 1.550 ± 0.071 |" in text and "| letters | 2.550 ± 0.071 |" in text
    assert f"## Minimal pairs of {FOLDER}, by field" in text and "| island | 60.5 ± 0.7 |" in text
    assert "| mean over fields | " in text
    assert pair_difference(study, "student", "control", FOLDER)[0] == pytest.approx(1.0)
    assert "| student (distilled) minus control (alone) | +1.0 [+1.0, +1.0] |" in text
    assert f"| student (distilled) | 0 | +0.300 | +0.150 | {MINUS}0.150 |" in text
    assert f"| student (distilled) | 1 | +0.270 | +0.100 | {MINUS}0.170 |" in text


def test_a_gain_that_goes_away_with_the_temperature_is_called_calibration(study):
    rewrite(study.folder, "student", (1.55, 1.55), scaled=(1.5, 1.5))
    rewrite(study.folder, "control", (1.7, 1.72), scaled=(1.5, 1.48))
    assert verdict_of(study, "student", "control") == "CALIBRATION"


def add_student(study, name, title, teachers, values, seeds=(0, 1)):
    """Gives the study another student, with one loss for each seed."""
    study.models[name] = title
    study.teachers[name], study.ensembles[name] = teachers, "&".join(teachers)
    for seed in seeds:
        study.seeds[seed][name] = copy.deepcopy(study.seeds[seed]["student"])
        study.seeds[seed][name]["taught_by"] = [f"{teacher} {seed}" for teacher in teachers]
    rewrite(study.folder, name, values)


def verdicts(study):
    """{first words of a conclusion: verdict}."""
    return {row[0]: row[2] for row in conclusion_rows(study)[1:]}


@pytest.mark.parametrize(
    "values, seeds, expected",
    [
        ((1.65, 1.65), (0, 1), "shown"),
        ((1.56, 1.54), (0, 1), "not shown"),
        ((1.62,), (0,), "UNDECIDED (seeds or models are missing)"),
    ],
)
def test_the_ensemble_must_teach_more_than_one_teacher(study, values, seeds, expected):
    add_student(study, "other", "born again", ["control"], values, seeds)
    assert verdicts(study)["an ensemble teaches more than one teacher: better than born again"] == expected


def test_students_of_ensembles_or_with_other_options_are_no_single_teacher_students(study):
    add_student(study, "four", "more teachers", [*TEACHERS, "control"], (1.65, 1.65))
    add_student(study, "L", "other options", ["llama-teacher"], (1.65, 1.65))
    for results in study.seeds.values():
        results["L"]["conditions"] = {"alpha": 0.25}
    assert not study.single_teacher_students
    assert not any("an ensemble teaches more" in claim for claim in verdicts(study))


def test_the_gain_of_a_better_control_is_taken_off_each_students_lead(study):
    lead = "student (distilled) minus control (alone)"
    assert [lead, f"{MINUS}0.160", "HOLDS"] in conclusion_rows(study)
    changed = dataclasses.replace(study, control_gain=0.15)
    assert [lead, f"{MINUS}0.010", "UNDECIDED"] in conclusion_rows(changed)
    assert "gains 0.1500 nats: they are taken off" in write(changed)[0]
    teacher = ("student", "gpt2-teacher")
    assert changed.comparisons[teacher] == study.comparisons[teacher]


def test_a_report_does_not_need_its_own_student(study):
    add_student(study, "P", "the paper's loss", TEACHERS, (1.55, 1.55))
    for results in study.seeds.values():
        del results["student"]
    del study.models["student"]
    without = dataclasses.replace(study, student=None)
    assert verdicts(without) == {"the paper's loss minus control (alone)": "HOLDS, exploratory"}


def test_a_student_outperforms_its_teachers_if_it_is_better_than_each(study):
    add_student(study, "P", "the paper's loss", TEACHERS, (1.55, 1.55))
    for title in ("student (distilled)", "the paper's loss"):
        assert verdicts(study)[f"{title} is better than each of its teachers"] == "not shown"
    for teacher in TEACHERS:
        rewrite(study.folder, teacher, (1.6, 1.6))
    assert outperforms(dataclasses.replace(study), "student", TEACHERS) is True
    assert outperforms(study, "student", ["nobody"]) is None


def test_other_students_are_exploratory_unless_the_studys_own_is_shown(study):
    add_student(study, "P", "the paper's loss", TEACHERS, (1.55, 1.55))
    lead = "the paper's loss minus control (alone)"
    assert verdicts(study)[lead] == "HOLDS"
    rewrite(study.folder, "student", (1.7, 1.73))
    assert verdicts(dataclasses.replace(study))[lead] == "HOLDS, exploratory"


def test_fewer_seeds_than_the_rules_ask_for_decide_nothing(study):
    answers = verdicts(dataclasses.replace(study, least_seeds=3))
    assert answers["student (distilled) minus control (alone)"] == "UNDECIDED (2 of 3 seeds)"
    claim = "student (distilled) is better than each of its teachers"
    assert answers[claim] == "UNDECIDED (seeds or models are missing)"


def test_teachers_that_were_trained_again_are_named(study):
    assert not study.mismatched_teachers()
    llama = study.seeds[1].pop("llama-teacher")  # is not in the table
    assert not study.mismatched_teachers()
    study.seeds[1]["llama-teacher"] = llama | {"weights": "another"}
    assert study.mismatched_teachers() == [("student", 1)]
    assert "seed 1: its teachers were trained again" in write(study)[0]


def test_the_checkpoint_that_taught_counts_for_lead_and_gap(study):
    study.seeds[0][ENSEMBLE]["teaching"] = {"cross_entropy": 1.0}
    assert f"| student (distilled) | 0 | +0.700 | +0.550 | {MINUS}0.150 |" in write(study)[0]


def test_missing_losses_are_an_error(study):
    (study.folder / "seed-1" / "control.losses.npz").unlink()
    with pytest.raises(UserError, match=r"control\.losses\.npz does not exist"):
        write(study)


@pytest.mark.parametrize(
    "per_seed, over_seeds, over_text, expected",
    [
        ([-0.03, -0.02], (-0.04, -0.01), (-0.03, -0.02), "HOLDS"),
        ([-0.02, -0.01], (-0.04, -0.01), (-0.03, -0.02), "UNDECIDED"),  # too small
        ([-0.08, 0.01], (-0.07, -0.01), (-0.03, -0.02), "UNDECIDED"),  # not with every seed
        ([-0.03, -0.02], (-0.04, 0.01), (-0.03, -0.02), "UNDECIDED"),
        ([-0.03, -0.02], (-0.04, -0.01), (-0.03, 0.02), "UNDECIDED"),
        ([0.03, 0.02], (0.01, 0.04), (0.01, 0.04), "REVERSED"),
        ([0.03, 0.02], (-0.01, 0.04), (0.01, 0.04), "UNDECIDED"),
        ([-0.9], None, (-1.0, -0.8), "UNDECIDED (1 of 2 seeds)"),
    ],
)
def test_the_verdict_follows_the_rules(per_seed, over_seeds, over_text, expected):
    mean = sum(per_seed) / len(per_seed)
    assert verdict(Difference(per_seed, mean, over_seeds, over_text)) == expected


def test_the_first_picture_shows_the_differences_to_the_control_that_the_tables_have(study, figure):
    names = [name for name, baseline in study.comparisons if baseline == study.control]
    plots.paint_differences(figure, study, names)
    (axes,) = figure.axes
    texts = [text.get_text().strip() for text in axes.texts]
    for name in names:
        expected = f"{study.difference(name, study.control).mean:+.3f}".replace("-", MINUS)
        assert expected in texts, name
    low, high = axes.get_xlim()
    assert low < study.difference("student", study.control).mean < 0 < high
    assert plots.differences(dataclasses.replace(study, control=None)) is None


def test_pairs_are_left_out_where_some_model_has_none(study):
    study.seeds[1]["student"]["report"]["pairs"] = {}
    assert FOLDER not in write(study)[0]


def test_a_single_seed_has_no_spread(study, figure):
    text, _ = write(one_seed(study))
    assert text.startswith("# Language models compared: recipe demo, 1 seed\n") and "0.150 ±" not in text
    assert "| UNDECIDED (1 of 2 seeds) |" in text


def test_a_model_that_some_seeds_lack_is_compared_in_the_others(study):
    del study.seeds[0]["student"]
    text, _ = write(study)
    assert "| student (distilled) | 1,000 | 4 | 60 | 1.550 | 1.550 |" in text


def test_a_curve_is_the_mean_over_seeds_by_epochs():
    mean = plots.mean_curve([[(1, 5.0), (2, 1.75), (3, 1.65), (4, 1.5)], [(1, 4.5), (2, 1.25), (4, 1.7)]])
    assert [epoch for epoch, _ in mean] == [1, 2, 4]
    assert [value for _, value in mean] == pytest.approx([4.75, 1.5, 1.6])


def test_curves_of_the_control_the_student_and_its_best_teacher_are_drawn_over_epochs(study, figure):
    plots.paint_curves(figure, study)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if line.get_linewidth() > 1}
    assert list(lines) == ["GPT-2 teacher", "control (alone)", "student (distilled)"]
    assert lines["student (distilled)"].get_xdata()[-1] == 4
    assert lines["control (alone)"].get_ydata()[-1] == pytest.approx(1.71)
    assert len(axes.lines) == 9  # three means, and three models with two seeds
    low, high = axes.get_ylim()
    assert 1.4 < low < 1.5 and 1.92 < high < 2.0  # without the steep start


def test_without_a_control_every_model_has_its_curve(study):
    names = plots.drawn_models(dataclasses.replace(study, control=None))
    assert names == [name for name in study.models if name != ENSEMBLE]


def test_logs_without_curves_do_not_stop_the_report(study):
    for role in MODELS.keys() - {ENSEMBLE}:
        study.seeds[0][role] |= {"curve": [], "epochs": 0.0, "steps": 0}
    text, _ = write(study)
    assert "| student (distilled) |" in text and "curves.png" not in text


def test_minimal_pairs_are_drawn_as_the_students_gain_in_each_field(study, figure):
    plots.paint_fields(figure, study, FOLDER)
    (axes,) = figure.axes
    fields = study.every_result()[0]["report"]["pairs"][FOLDER]["per_field"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    for field, dot in zip(fields, dots, strict=True):
        gains = [
            100 * (s["student"]["report"]["pairs"][FOLDER]["per_field"][field])
            - 100 * (s["control"]["report"]["pairs"][FOLDER]["per_field"][field])
            for s in study.seeds.values()
        ]
        assert list(dot.get_xdata()) == pytest.approx([sum(gains) / len(gains)])
    assert [t.get_text() for t in axes.get_yticklabels()] == [f.replace("_", " ") for f in fields]


def test_the_limits_of_an_axis_hold_one_value_and_a_curve_that_rises_again():
    low, high = plots.value_range([[(0.5, 2.0)]])
    assert low < 2.0 < high
    low, high = plots.value_range([[(1, 3.0), (2, 1.0), (3, 1.5), (4, 2.0)]])
    assert low < 1.0 and 2.0 < high < 3.0


def test_rows_become_aligned_columns_or_markdown():
    rows = [["model", "score"], ["a", "10.5"], ["longer name", "9"]]
    assert aligned(rows) == ["model        score", "a             10.5", "longer name      9"]
    assert markdown(rows)[:3] == ["| model | score |", "|---|---|", "| a | 10.5 |"]


# ---- a folder of results, perhaps from somebody else


def store(study):
    """Writes the study as reproduce.py keeps it; its folder."""
    fields = {f.name: getattr(study, f.name) for f in dataclasses.fields(study)}
    del fields["seeds"], fields["folder"]
    write_json(study.folder / "experiment.json", fields)
    for seed, results in study.seeds.items():
        for name, values in results.items():
            write_json(study.folder / f"seed-{seed}" / f"{name}.json", values)
    return study.folder


@pytest.fixture
def folder(study):
    return store(study)


def edit(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value))


def test_a_folder_of_results_is_read_as_it_was_written(study, folder):
    assert read_study(folder) == study


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(losses="0" * 64), "losses beside .*control.json are gone or of another"),
        (lambda r: r.update(shards={"report": "x"}), None),  # the others do not tell theirs
        (lambda r: r["report"]["per_file"].pop("novels"), "another list of sub-corpora"),
        (lambda r: r["report"]["pairs"][FOLDER]["per_file"].pop("a"), "another list of files"),
        (lambda r: r["report"].update(cross_entropy=math.nan), "damaged"),
        (lambda r: r["report"].update(parameters="1"), "damaged"),
        (lambda r: r.update(steps=0), "damaged"),
        (lambda r: r["report"].update(pairs={"/../x": r["report"]["pairs"][FOLDER]}), "damaged"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(folder, change, message):
    edit(folder / "seed-0/control.json", change)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        read_study(folder)


@pytest.mark.parametrize("key, values", [("text", "ab"), ("precision", ["fp32", "bf16"]), ("pairs", "ab")])
def test_results_of_other_text_pairs_or_precision_are_refused(folder, key, values):
    for name, value in zip(("control", "student"), values):
        scoring = {"precision": value if key == "precision" else "fp32"}
        scoring["pairs"] = {FOLDER: value if key == "pairs" else "d"}
        shards = {"report": value if key == "text" else "t"}
        edit(folder / f"seed-0/{name}.json", lambda r, s=scoring, t=shards: r.update(scoring=s, shards=t))
    with pytest.raises(UserError, match=r"(student|control)\.json has another .* than"):
        read_study(folder)


def test_one_seed_is_not_counted_twice(folder):
    shutil.copytree(folder / "seed-0", folder / "seed-00")
    with pytest.raises(UserError, match="seed-00 is seed 0"):
        read_study(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["models"].update({"../../secret": "x"}),
        lambda f: f["models"].update({"--out": "x"}),
        lambda f: f.update(models=[]),
        lambda f: f.update(control_gain=math.inf),
        lambda f: f["teachers"].pop("student"),
    ],
)
def test_a_damaged_experiment_is_refused(folder, change):
    edit(folder / "experiment.json", change)
    with pytest.raises(UserError, match="is damaged"):
        read_study(folder)


def places(value, path=()):
    """All paths of keys in nested JSON."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def replaced(value, path, new):
    """A copy of nested JSON with another value at a path."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def test_an_edited_file_of_results_is_refused_or_reported(study, folder, monkeypatch):
    monkeypatch.setattr(plots, "picture", lambda *_: None)
    monkeypatch.setattr(Study, "comparisons", study.comparisons)
    values = [None, True, -1, 0, 10**400, math.nan, "", "\udcff", "\x1b[31m|<b>\n", [], ["x"], {}, {"x": 0}]
    generator = random.Random(0)
    for path in (folder / "experiment.json", *(folder / "seed-0").glob("*t*.json")):
        original = json.loads(path.read_text())
        cases = list(itertools.product(places(original), values))
        for place, value in generator.sample(cases, 20):
            path.write_text(json.dumps(replaced(original, place, value)))
            with contextlib.suppress(UserError):
                write(read_study(folder))
        path.write_text(json.dumps(original))


# ---- logs


def training_line(step):
    """A log line of training with 5 steps an epoch, 8 tokens a step and 4 tokens a second."""
    entry = {"step": step, "epoch": step / 5, "tokens": 8 * step, "tokens_per_second": 4.0}
    entry["cross_entropy"] = 5 - step / 10
    return json.dumps(entry).encode()


def test_a_log_tells_seconds_epochs_and_the_curve(tmp_path):
    dev = [b'{"step": 5, "dev_cross_entropy": 3.5}', b'{"step": 10, "dev_cross_entropy": 3.25}']
    lines = [b'{"config": {}}', training_line(5), dev[0], training_line(10), dev[1], b""]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert read_log(tmp_path / "log.jsonl") == {
        "seconds": 20.0,
        "epochs": 2.0,
        "steps": 10,
        "curve": [(5, 3.5), (10, 3.25)],
        "train_cross_entropy": 4.25,
    }


def test_damaged_lines_of_a_log_are_passed_over(tmp_path):
    damage = [b'{"step": 6, "dev_cross_en', b"\xff\x00\xfe", b"[1, 2]", b"7", b"null", b"[" * 100_000]
    damage += [b'{"step": 7, "dev_cross_entropy": null}', b'{"step": "7", "dev_cross_entropy": 1}']
    damage += [b'{"step": 8, "dev_cross_entropy": NaN}', b'{"dev_cross_entropy": 1}']
    damage += [b'{"step": 9, "tokens_per_second": 4.0}', b'{"step": 1' + b"0" * 5000 + b"}"]
    intact = [training_line(5), b'{"step": 5, "dev_cross_entropy": 3.5}', training_line(10)]
    lines = [line for good in intact for line in (*damage, good)]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines + damage))
    expected = {"seconds": 20.0, "epochs": 2.0, "steps": 10, "curve": [(5, 3.5)]}
    result = read_log(tmp_path / "log.jsonl")
    assert {key: result[key] for key in expected} == expected
    (tmp_path / "log.jsonl").write_bytes(intact[1])
    assert read_log(tmp_path / "log.jsonl")["curve"] == []  # nothing tells the length of an epoch


def test_the_gain_by_words_is_drawn_from_the_folders_of_results(study, figure, capsys):
    add_student(study, "alone", "of the LLaMA", ["llama-teacher"], (1.4, 1.45))
    path, picture = str(store(study)), study.folder / "words.png"
    points = ["--fixed", f"65000={path}", "--chosen", f"65000={path},alone,control", "--out", str(picture)]
    assert ablations.main(points) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["fixed", "65,000", "+0.1600"], ["chosen", "65,000", "+0.2850"]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no seed with student and nobody"):
        ablations.main(["--fixed", f"65000={path},student,nobody", "--out", str(picture)])
    for given, message in [
        ([], "give --fixed or --chosen"),
        (["--chosen", f"65000={path},alone"], "give N=DIR or N=DIR,STUDENT,CONTROL"),
    ]:
        with pytest.raises(SystemExit):
            ablations.main([*given, "--out", str(picture)])
        assert message in capsys.readouterr().err
