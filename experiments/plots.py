"""The pictures of a report, as bytes of PNG. They need matplotlib."""

import io
import statistics

from experiments.findings import verdict_of
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
    return picture(8.5, height, lambda figure: paint_differences(figure, study, rows))


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
    figure.supxlabel(explanation(study), fontsize=8.5, color="#555555", x=0.01, ha="left")


def explanation(study):
    """What the marks of `paint_differences` mean."""
    count = len(study.seeds)
    interval = f"Mean of {count} seeds, 95 % interval over seeds" if count > 1 else "95 % interval over text"
    text = f"{interval}. Filled: passes the test of the report's rules. Open: does not."
    if study.control_gain:
        gain = f"{study.control_gain:.3f}"
        text += f"\nStudents: {gain} are taken off, because another tuning of the control gained as much."
    return text


# ---- curves


def learning_curves(study):
    """{name: [curve of each seed]}, where each seed of a model has one.

    A curve is [(epoch, cross-entropy on validation text)].
    """
    curves = {}
    for name in study.models:
        runs = study.results(name)
        if all(run.get("curve") for run in runs):
            curves[name] = [over_epochs(run, run["curve"]) for run in runs]
    return curves


def mean_curve(curves):
    """The mean of curves, at the epochs at which every one has a value."""
    by_epoch = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*map(set, by_epoch)))
    return [(epoch, statistics.fmean(values[epoch] for values in by_epoch)) for epoch in common]


def over_epochs(run, curve):
    """[(epoch, value)], in order, of a run's [(step, value)]."""
    return sorted((round(step * run["epochs"] / run["steps"], 6), value) for step, value in curve)


def value_range(curves):
    """(low, high), in nats: the limits of an axis that show the differences between curves.

    The upper limit leaves out the steep start: each curve counts from the middle of its training.
    """
    values = [v for curve in curves for epoch, v in curve if epoch >= curve[-1][0] / 2]
    low, high = min(v for curve in curves for _, v in curve), max(values)
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def paint_curves(figure, study, curves):
    """Draws the learning curves over epochs: thick for the mean, thin for single seeds."""
    axes, colour = figure.subplots(), colours(study)
    for name, singles in curves.items():
        for single in singles if len(singles) > 1 else ():
            axes.plot(*zip(*single), color=colour[name], linewidth=0.7, alpha=0.45)
        if mean := mean_curve(singles):
            style = "-" if name in (study.student, study.control) else "--"
            axes.plot(*zip(*mean), style, color=colour[name], linewidth=2, label=study.models[name])
    axes.set_ylim(value_range([single for singles in curves.values() for single in singles]))
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("cross-entropy on validation text\n(nats per token, lower is better)")


def training_curves(study):
    """The curves of cross-entropy and of KL on training text, each {name: curve of the first seed}."""
    curves = {}, {}
    for name in study.models:
        for run in study.results(name)[:1]:
            for by_name, column in zip(curves, (1, 2)):
                points = [(point[0], point[column]) for point in run.get("training", ())]
                if points := [point for point in points if point[1] is not None]:
                    by_name[name] = over_epochs(run, points)
    return curves


def paint_training(figure, study, cross_entropies, divergences):
    """Draws cross-entropy and KL on the training text over epochs, in a panel each."""
    colour, panels = (
        colours(study),
        [(cross_entropies, "cross-entropy on the training text\n(nats per token)")],
    )
    if divergences:
        panels.append((divergences, "KL to the teachers, as the loss has it"))
    for i, (curves, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, curve in curves.items():
            axes.plot(*zip(*curve), color=colour[name], linewidth=1.2, label=study.models[name])
        axes.set_xlabel("epochs of training")
        axes.set_xlim(left=0)
        axes.set_ylim(value_range(list(curves.values())))
        axes.set_ylabel(label)
    figure.axes[0].legend(frameon=False, fontsize=8.5)


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


def paint_fields(figure, study, folder):
    """Draws a group of bars for each field of a folder's minimal pairs."""
    axes, fields = figure.subplots(), study.every_result()[0]["report"]["pairs"][folder]["per_field"]

    def accuracy(name, field):
        runs = study.results(name)
        return statistics.fmean(100 * r["report"]["pairs"][folder]["per_field"][field] for r in runs)

    values = {name: [accuracy(name, field) for field in fields] for name in study.models}
    paint_bars(axes, study, [field.replace("_", "\n") for field in fields], values)
    axes.axhline(50, color="#888888", linewidth=1, linestyle=":")
    axes.set_ylabel(f"{folder}, pairs judged right (%)")
    axes.set_ylim(bottom=0, top=100)
    axes.legend(frameon=False, fontsize=8, ncols=2)


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
