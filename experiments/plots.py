"""The pictures of a report, as bytes of PNG. They need matplotlib."""

import io
import statistics

from evaluation.statistics import t_interval
from experiments.findings import cross_entropy_of, verdict_of
from experiments.tables import with_minus

# Colours that remain apart for colour-blind readers (Okabe and Ito); the student and its control
# have one each, the others take what is left in order.
STUDENT, CONTROL = "#D55E00", "#4D4D4D"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7B61A8", "#9A9A00")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "text.parse_math": False,  # a title may hold dollar signs
}
NOTE = {"fontsize": 8.5, "color": "#555555", "x": 0.01, "ha": "left"}  # of a line below a picture
WIDTH = 8.5  # inches: 830 pixels of a page on GitHub, where the smallest text has then 11 pixels


def picture(width, height, paint):
    """The bytes of a PNG of `width` x `height` inches; `paint(figure)` draws it. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def colours(study):
    """{name: colour}."""
    others = [name for name in study.models if name not in (study.student, study.control)]
    by_name = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return by_name | {study.student: STUDENT, study.control: CONTROL}


# ---- differences to the control


def differences(study):
    """The picture of each model's cross-entropy minus the control's. None without one to compare."""
    names = [name for name, baseline in study.comparisons if baseline == study.control]
    others = [name for name in study.models if name in names and name not in study.students]
    rows = others + [name for name in study.students if name in names]
    if not rows:
        return None
    height = 1.9 + 0.42 * len(rows)
    return picture(WIDTH, height, lambda figure: paint_differences(figure, study, rows))


def paint_differences(figure, study, names):
    """Draws a row for each model: its mean difference to the control with a 95 % interval.

    The axis shows the students. A model that is farther from the control is an arrow with a number.
    """
    axes, ends = figure.subplots(), {}
    for name in names:
        difference = study.difference(name, study.control)
        ends[name] = (difference.mean, *(difference.over_seeds or difference.over_text))
    shown = [end for name in names if name in study.students for end in ends[name]] + [0.0]
    margin = 0.35 * (max(shown) - min(shown)) or 0.01
    low, high = min(shown) - margin, max(shown) + margin
    for height, name in enumerate(names):
        mean, start, stop = ends[name]
        is_student = name in study.students
        colour = STUDENT if is_student else "#777777"
        if not low < mean < high:
            edge, inside = (high, high - margin / 2) if mean > 0 else (low, low + margin / 2)
            arrow = {"arrowstyle": "-|>", "color": colour}
            axes.annotate("", (edge, height), (inside, height), arrowprops=arrow)
            side = "right" if mean > 0 else "left"
            axes.text(inside, height, f"{with_minus(f'{mean:+.3f}')} ", color=colour, ha=side, va="center")
            continue
        holds = verdict_of(study, name, study.control) == "HOLDS"
        axes.plot([start, stop], [height, height], color=colour, linewidth=2.2)
        style = {"markersize": 9, "markeredgewidth": 2, "markeredgecolor": colour}
        fill = colour if holds else "white"
        axes.plot([mean], [height], "o" if is_student else "D", markerfacecolor=fill, **style)
        label = with_minus(f"{mean:+.3f}")
        axes.annotate(label, (mean, height), (0, 8), textcoords="offset points", ha="center", color=colour)
    axes.axvline(0, color=CONTROL, linewidth=2)
    axes.text(0, -0.75, " the control", color=CONTROL, va="center")
    axes.set_xlim(low, high)
    axes.set_ylim(len(names) - 0.5, -1.1)  # the first row is on top
    millions = [study.results(name)[0]["report"]["parameters"] / 1e6 for name in names]
    labels = [f"{study.models[name]} ({size:.2g}M)" for name, size in zip(names, millions)]
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("cross-entropy on test text minus the control's (nats per token; left is better)")
    figure.supxlabel(explanation(study), **NOTE)


def explanation(study):
    """What the marks of `paint_differences` mean."""
    count = len(study.seeds)
    interval = f"Mean of {count} seeds, 95 % interval over seeds" if count > 1 else "95 % interval over text"
    text = f"{interval}. Filled: passes the test of the report's rules. Open: does not."
    if study.control_gain:
        gain = f"{study.control_gain:.3f}"
        text += f"\nStudents: {gain} are taken off, because another tuning of the control gained as much."
        text += " So compare them with the control alone."
    return text


# ---- curves


def drawn_models(study):
    """The names of the models whose curves are drawn: the control, the student, its best teacher.

    Without a control or a student, all models that are trained.
    """
    results = {name: study.results(name) for name in study.models}
    trained = {name: runs for name, runs in results.items() if runs and all(r.get("curve") for r in runs)}
    if not {study.control, study.student} <= trained.keys():
        return list(trained)
    teachers = [name for name in study.teachers[study.student] if name in trained]
    best = min(teachers, key=lambda name: cross_entropy_of(trained[name][0]), default=None)
    return [name for name in trained if name in (study.control, study.student, best)]


def over_epochs(run, curve):
    """[(epoch, value)], in order, of a run's [(step, value)]."""
    return sorted((round(step * run["epochs"] / run["steps"], 6), value) for step, value in curve)


def mean_curve(curves):
    """The mean of curves, at the epochs at which every one has a value."""
    by_epoch = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*map(set, by_epoch)))
    return [(epoch, statistics.fmean(values[epoch] for values in by_epoch)) for epoch in common]


def value_range(curves):
    """(low, high), in nats: the limits of an axis that show the differences between curves.

    The upper limit leaves out the steep start: each curve counts from the middle of its training.
    """
    values = [v for curve in curves for epoch, v in curve if epoch >= curve[-1][0] / 2]
    low, high = min(v for curve in curves for _, v in curve), max(values)
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def paint_curves(figure, study):
    """Draws cross-entropy on validation text over epochs: thick for the mean, thin for single seeds."""
    axes, colour, every_curve = figure.subplots(), colours(study), []
    for name in drawn_models(study):
        curves = [over_epochs(run, run["curve"]) for run in study.results(name)]
        every_curve += curves
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*curve), color=colour[name], linewidth=0.7, alpha=0.45)
        if mean := mean_curve(curves):
            axes.plot(*zip(*mean), color=colour[name], linewidth=2, label=study.models[name])
    axes.set_ylim(value_range(every_curve))
    axes.legend(frameon=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("cross-entropy on validation text\n(nats per token, lower is better)")


# ---- minimal pairs


def fields(study, folder):
    """The picture of the student minus the control in each field of minimal pairs. None without both."""
    if not study.shared_seeds(study.student, study.control):
        return None
    height = 1.4 + 0.3 * len(study.every_result()[0]["report"]["pairs"][folder]["per_field"])
    return picture(WIDTH, height, lambda figure: paint_fields(figure, study, folder))


def paint_fields(figure, study, folder):
    """Draws the student's accuracy minus the control's in each field of a folder of minimal pairs.

    A dot is the mean over seeds, a line its 95 % interval over seeds, where there are several.
    """
    seeds = study.shared_seeds(study.student, study.control).values()
    accuracies = [
        [seed[name]["report"]["pairs"][folder]["per_field"] for seed in seeds]
        for name in (study.student, study.control)
    ]
    fields = list(accuracies[0][0])
    axes = figure.subplots()
    for height, field in enumerate(fields):
        gains = [100 * (student[field] - control[field]) for student, control in zip(*accuracies)]
        if interval := t_interval(gains):
            axes.plot(interval, [height, height], color=STUDENT, linewidth=2.2)
        axes.plot([statistics.fmean(gains)], [height], "o", color=STUDENT, markersize=8)
    axes.axvline(0, color=CONTROL, linewidth=2)
    axes.set_yticks(range(len(fields)), [field.replace("_", " ") for field in fields])
    axes.set_ylim(len(fields) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{folder}: points of accuracy, {study.models[study.student]} minus the control")
    count = len(seeds)
    note = f"Mean of {count} seeds, 95 % interval over seeds." if count > 1 else "One seed: no interval."
    figure.supxlabel(f"{note} Right of the line the student is better.", **NOTE)


# ---- bars


def paint_bars(axes, study, groups, values, errors=None):
    """Draws a group of bars for each of `groups`, a bar for each model.

    `values` is {model: [height for each group]}, `errors` {model: [[below], [above]]}.
    """
    colour, width = colours(study), 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        offset = (i - (len(values) - 1) / 2) * width
        axes.bar(
            [group + offset for group in range(len(groups))],
            heights,
            width,
            yerr=errors and errors[name],
            color=colour[name],
            label=study.models[name],
            error_kw={"elinewidth": 1},
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=7.5)
    axes.grid(axis="x", visible=False)


def paint_tasks(figure, study, scores):
    """Draws a group of bars for each task of `finetuned_scores`, with intervals.

    A dotted line across a group is the score of the majority class.
    """
    axes, values, errors = figure.subplots(), {}, {}
    for name, of_tasks in scores["models"].items():
        values[name] = [100 * score["mean"] for score in of_tasks.values()]
        ends = [[100 * end for end in score["interval"]] for score in of_tasks.values()]
        errors[name] = [
            [max(mean - low, 0) for mean, (low, _) in zip(values[name], ends)],
            [max(high - mean, 0) for mean, (_, high) in zip(values[name], ends)],
        ]
    tasks = scores["tasks"].items()
    titles = [f"{name.replace('_', chr(10))}\n({task['metric']})" for name, task in tasks]
    paint_bars(axes, study, titles, values, errors)
    for i, (_, task) in enumerate(tasks):
        label = "majority class" if i == 0 else None
        level = [100 * task["majority"]] * 2
        axes.plot([i - 0.45, i + 0.45], level, ":", color="#444444", label=label)
    axes.set_ylabel("score on valid (%)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
