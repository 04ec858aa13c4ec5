"""The report: what it says and draws is what the results say, with matplotlib and without."""

import copy
import sys

import pytest

import report
from harness.tables import aligned, markdown

FOLDER = "text/blimp_filtered"
CROSS_ENTROPY = {
    "gpt2-teacher": (1.5, 1.6),
    "llama-teacher": (1.6, 1.5),
    "ensemble": (1.4, 1.45),
    "control": (1.7, 1.72),
    "student": (1.55, 1.55),
}
ACCURACY = {
    "gpt2-teacher": (0.60, 0.61),
    "llama-teacher": (0.61, 0.62),
    "ensemble": (0.66, 0.64),
    "control": (0.64, 0.65),
    "student": (0.63, 0.68),
}


def result(role, seed):
    """What reproduce.py hands over for a role and a seed: four epochs of ten steps each."""
    value, accuracy = CROSS_ENTROPY[role][seed], ACCURACY[role][seed]
    pairs = {
        "accuracy_over_files": accuracy,
        "accuracy_over_fields": accuracy + 0.1,
        "per_field": {"island": accuracy, "binding": accuracy},
    }
    scores = {
        "parameters": 1000,
        "cross_entropy": value,
        "perplexity": 4.0,
        "per_file": {"novels": {"cross_entropy": value}, "letters": {"cross_entropy": value + 1}},
        "pairs": {FOLDER: pairs},
    }
    if role == "ensemble":
        return scores
    curve = [(10, value + 5), (20, value + 0.2), (30, value + 0.1), (40, value)]
    return scores | {"seconds": 60.0, "epochs": 4.0, "steps": 40, "curve": curve}


@pytest.fixture
def seeds():
    return [{role: result(role, seed) for role in report.ROLES} for seed in range(2)]


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(figsize=(6, 4))


def write(seeds, out):
    """Writes the report into a folder; returns its text and the lines for the screen."""
    screen = report.write_report(seeds, out, recipe="demo", command="python x.py", device="cpu")
    return (out / "report.md").read_text(encoding="utf-8"), "\n".join(screen)


def test_the_report_begins_with_the_overview_and_shows_the_curves(seeds, figure, tmp_path):
    text, screen = write(seeds, tmp_path)
    heading, _, picture = text.split("\n")[:3]
    assert heading == "# Recipe demo, 2 seeds" and "(overview.png)" in picture
    assert "(curves.png)" in text and "```" not in text
    for name in ("overview.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "`python x.py`, commit " in text and "torch" in text
    assert "| student (distilled) | 1,000 | 1.550 ± 0.000 |" in text
    assert "student (distilled)" in screen and str(tmp_path / "report.md") in screen


def test_without_matplotlib_the_curves_are_text(seeds, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text, _ = write(seeds, tmp_path)
    assert ".png" not in text and not list(tmp_path.glob("*.png"))
    chart = text.split("```")[1]
    drawing, axis = chart.split("\n          0 ")
    # Epochs 2, 3 and 4. The teachers' means are the student's, which is drawn over them.
    assert [drawing.count(letter) for letter in "GLcs"] == [0, 0, 3, 3]
    assert axis.split()[:2] == ["4", "epochs"]
    for role in report.ROLES:
        assert (report.ROLES[role] in chart) == (role != "ensemble")


def test_sub_corpora_and_fields_have_tables_of_their_own(seeds, tmp_path):
    text, _ = write(seeds, tmp_path)
    assert "| novels | 1.550 ± 0.071 |" in text and "| letters | 2.550 ± 0.071 |" in text
    assert "| blimp_filtered, by field (%) |" in text and "| island | 60.5 ± 0.7 |" in text


def test_findings_count_the_seeds_in_which_a_model_is_better(seeds):
    lines = report.findings(seeds)
    assert "- dev cross-entropy: the student beats the control (alone) in 2 of 2 seeds" in lines
    assert "- dev cross-entropy: the student beats the GPT-2 teacher in 1 of 2 seeds" in lines
    assert "- dev cross-entropy: the student beats the ensemble of both in 0 of 2 seeds" in lines
    pairs = "- minimal pairs of blimp_filtered (mean over files): the"
    assert f"{pairs} student beats the control (alone) in 1 of 2 seeds" in lines
    assert f"{pairs} ensemble beats the control in 1 of 2 seeds" in lines
    seeds[0]["student"], seeds[0]["control"] = seeds[0]["control"], seeds[0]["student"]
    lines = report.findings(seeds)
    assert "- dev cross-entropy: the student beats the control (alone) in 1 of 2 seeds" in lines
    assert f"{pairs} student beats the control (alone) in 2 of 2 seeds" in lines


def test_the_arrow_goes_from_the_twins_mean_to_the_students_and_says_how_far(seeds, figure):
    report.paint_overview(figure, seeds, report.measures(seeds))
    labels = ("\N{MINUS SIGN}0.160 ± 0.014 nats", "+1.0 ± 2.8 points")
    for axes, label, ends in zip(figure.axes, labels, ((1.71, 1.55), (64.5, 65.5))):
        arrow = next(text for text in axes.texts if text.arrow_patch)
        assert (arrow.xyann[0], arrow.xy[0]) == pytest.approx(ends)
        assert label in [text.get_text() for text in axes.texts]
    assert [axes.get_title() for axes in figure.axes] == [
        "student beats its twin in 2 of 2 seeds",
        "student beats its twin in 1 of 2 seeds",
    ]


def test_the_overview_has_a_panel_for_pairs_only_where_there_are_some(seeds, figure, monkeypatch):
    for seed in seeds:
        for role in seed:
            seed[role]["pairs"] = {}
    monkeypatch.setattr(report, "draw", lambda path, width, height, paint: paint(figure))
    report.draw_overview(seeds, "overview.png")
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "dev cross-entropy\n(nats per token, lower is better)"
    ]


def test_the_axis_of_the_overview_is_no_wider_than_its_values_need(seeds, figure):
    report.paint_overview(figure, seeds, report.measures(seeds))
    low, high = figure.axes[0].get_xlim()
    assert 1.3 < low < 1.4 and 1.72 < high < 1.85


def test_a_single_seed_has_no_spread(seeds, figure, tmp_path):
    text, _ = write(seeds[:1], tmp_path)
    assert text.startswith("# Recipe demo, 1 seed\n") and "±" not in text
    report.paint_overview(figure, seeds[:1], report.measures(seeds))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "\N{MINUS SIGN}0.150 nats" in texts and not any("±" in text for text in texts)


def test_a_curve_is_the_mean_over_seeds_by_epochs(seeds):
    seeds[1]["student"]["curve"] = [(10, 4.55), (20, 1.75), (40, 1.65)]  # a line was damaged
    curves = report.learning_curves(seeds)
    assert list(curves) == ["gpt2-teacher", "llama-teacher", "control", "student"]
    mean, singles = curves["student"]
    assert [epoch for epoch, _ in mean] == [1, 2, 4]
    assert [value for _, value in mean] == pytest.approx([5.55, 1.75, 1.6])
    assert singles[0][2] == (3, pytest.approx(1.65)) and singles[1][-1] == (4, 1.65)


def test_curves_are_drawn_over_epochs_without_their_steep_start(seeds, figure):
    report.paint_curves(figure, report.learning_curves(seeds))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["student (distilled)"].get_xdata()[-1] == 4
    assert lines["control (alone)"].get_ydata()[-1] == pytest.approx(1.71)
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert len(thin) == 8 and len(axes.lines) == 12
    low, high = axes.get_ylim()
    assert 1.4 < low < 1.5 and 1.92 < high < 2.0


def test_logs_without_curves_do_not_stop_the_report(seeds, monkeypatch, tmp_path):
    bare = copy.deepcopy(seeds)
    for role in CROSS_ENTROPY.keys() - {"ensemble"}:
        bare[0][role] |= {"curve": [], "epochs": 0.0, "steps": 0}
    assert "| student (distilled) |" in write(bare, tmp_path)[0]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no learning curves" in write(bare, tmp_path)[0]


def test_one_value_for_all_can_be_drawn(seeds, tmp_path):
    curves = {"student": ([(0.5, 2.0)], [[(0.5, 2.0)]])}
    assert any("s" in line for line in report.text_chart(curves)[:16])
    report.draw_curves(curves, tmp_path / "curves.png")


def test_rows_become_aligned_columns_or_markdown():
    rows = [["model", "score"], ["a", "10.5"], ["longer name", "9"]]
    assert aligned(rows) == ["model        score", "a             10.5", "longer name      9"]
    assert markdown(rows)[:3] == ["| model | score |", "|---|---|", "| a | 10.5 |"]


def test_a_curve_that_rises_in_its_second_half_is_drawn():
    """As that of a teacher that overfits."""
    curves = {"gpt2-teacher": ([(1, 3.0), (2, 1.0), (3, 1.5), (4, 2.0)], [])}
    assert any("G" in line for line in report.text_chart(curves))
