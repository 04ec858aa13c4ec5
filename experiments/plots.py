"""The pictures of a report, as bytes of PNG. They need matplotlib."""

import io
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from experiments.findings import cross_entropy_of, pair_folders
from experiments.tables import mean_and_deviation, with_minus

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
    "text.color": "#222222",
    "text.parse_math": False,  # a title may hold dollar signs
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#222222",
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


def model_order(study):
    """The names of the models; control and student are the last."""
    last = [name for name in (study.control, study.student) if name]
    return [name for name in study.models if name not in last] + last


# ---- overview


class Measure(NamedTuple):
    """A panel of the overview; `value(result)` is the number, `sign` is 1 if higher is better."""

    label: str
    value: Callable[[dict], float]
    sign: int
    digits: int
    unit: str


def measures(study):
    """Cross-entropy, and the accuracy on the first folder of minimal pairs, the mean over its files."""
    label = "test cross-entropy\n(nats per token, lower is better)"
    panels = [Measure(label, cross_entropy_of, -1, 3, "nats")]
    for folder in pair_folders(study)[:1]:

        def accuracy(result, folder=folder):
            return 100 * result["report"]["pairs"][folder]["accuracy_over_files"]

        label = f"minimal pairs judged right, {folder}\n(%, mean over files, higher is better)"
        panels.append(Measure(label, accuracy, 1, 1, "points"))
    return panels


def overview(study):
    """The picture of all models by each of the `measures`."""
    panels, names = measures(study), model_order(study)
    width, height = 5.6 + 3.9 * (len(panels) - 1), 1.5 + 0.45 * (len(names) + 1)
    return picture(width, height, lambda figure: paint_overview(figure, study, names))


def paint_overview(figure, study, names):
    """Draws a panel for each of the `measures`, side by side, with the same rows."""
    shown = measures(study)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    heights = [float(i) for i in range(len(names))]
    if study.student and study.control:
        heights[-1] += 0.5  # room for the arrow between the last two rows
    for axes, measure in zip(panels, shown):
        paint_measure(axes, study, dict(zip(names, heights)), measure)
    panels[0].set_yticks(heights, [study.models[name] for name in names])
    if len(study.seeds) > 1:
        legend = f"large dot: mean of {len(study.seeds)} seeds    bar: ± one standard deviation"
        legend += "    small dots: single seeds"
        figure.supxlabel(legend, fontsize=8.5, color="#666666")


def paint_measure(axes, study, rows, measure):
    """Draws one panel of the overview: a row for each model, an arrow from control to student."""
    means, colour = {}, colours(study)
    for name, height in rows.items():
        values = [measure.value(result) for result in study.results(name)]
        means[name] = statistics.fmean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        style = {"fmt": "o", "markersize": 8, "capsize": 4, "elinewidth": 1.8}
        axes.errorbar(means[name], height, xerr=deviation, color=colour[name], **style)
        if len(values) > 1:
            beside = 0.27 if name == study.student else -0.27  # on the side away from the arrow
            axes.scatter(values, [height + beside] * len(values), s=11, color=colour[name])
    axes.set_xlabel(measure.label)
    axes.set_ylim(max(rows.values()) + 0.6, -0.6)  # the first row is on top
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    if study.student in means and study.control in means:
        pairs = [map(measure.value, pair) for pair in study.paired_results(study.student, study.control)]
        gains = [student - control for student, control in pairs]
        wins = sum(measure.sign * gain > 0 for gain in gains)
        axes.set_title(f"student better than control in {wins} of {len(gains)} seed{'s' * (len(gains) > 1)}")
        label = f"{with_minus(mean_and_deviation(gains, measure.digits, sign='+'))} {measure.unit}"
        start, end = ((means[name], rows[name]) for name in (study.control, study.student))
        paint_arrow(axes, start, end, label)


def paint_arrow(axes, start, end, label):
    """Draws an arrow with a label between the rows of two (value, height)."""
    between = (start[1] + end[1]) / 2 + 0.08
    for value, height in (start, end):
        axes.plot([value, value], [height, between], ":", color="#888888", linewidth=1.2, zorder=1)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    arrow |= {"color": "#222222", "linewidth": 1.6}
    axes.annotate("", (end[0], between), (start[0], between), arrowprops=arrow)
    middle, box = (start[0] + end[0]) / 2, {"boxstyle": "square,pad=0", "facecolor": "white"}
    axes.annotate(
        label,
        (middle, between),
        (0, 7),
        textcoords="offset points",
        ha="center",
        bbox=box | {"edgecolor": "none"},
    )


# ---- curves


def learning_curves(study):
    """{name: (mean curve, [curve of each seed])} of the trained models.

    A curve is [(epoch, cross-entropy on validation text)]. The mean has the steps at which every
    seed has a value. A model is left out if a seed of it has no curve.
    """
    curves = {}
    for name in study.models:
        runs = study.results(name)
        if runs and all(run.get("curve") for run in runs):
            singles = [over_epochs(run, sorted(map(tuple, run["curve"]))) for run in runs]
            curves[name] = (over_epochs(runs[0], mean_curve(runs)), singles)
    return curves


def mean_curve(runs):
    """[(step, mean cross-entropy)], in order, at the steps at which every run has a value."""
    by_step = defaultdict(list)
    for run in runs:
        for step, value in dict(map(tuple, run["curve"])).items():
            by_step[step].append(value)
    common = sorted(step for step, values in by_step.items() if len(values) == len(runs))
    return [(step, statistics.fmean(by_step[step])) for step in common]


def over_epochs(run, curve):
    """[(epoch, value)] of a run's [(step, value)]."""
    return [(step * run["epochs"] / run["steps"], value) for step, value in curve]


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
    for name, (mean, singles) in curves.items():
        for single in singles if len(singles) > 1 else ():
            axes.plot(*zip(*single), color=colour[name], linewidth=0.7, alpha=0.45)
        if mean:
            style = "-" if name in (study.student, study.control) else "--"
            axes.plot(*zip(*mean), style, color=colour[name], linewidth=2, label=study.models[name])
    axes.set_ylim(value_range([single for _, singles in curves.values() for single in singles]))
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("cross-entropy on validation text\n(nats per token, lower is better)")


def training_curves(study):
    """{name: (cross-entropy curve, KL curve)} of the first seed, over epochs, where it was logged."""
    curves = {}
    for name in study.models:
        for run in study.results(name)[:1]:
            if points := run.get("training"):
                curves[name] = (
                    over_epochs(run, [(step, value) for step, value, _ in points]),
                    over_epochs(run, [(step, kl) for step, _, kl in points if kl is not None]),
                )
    return curves


def paint_training(figure, study, curves):
    """Draws cross-entropy and KL on the training text over epochs, in a panel each."""
    distilled = {name: kl for name, (_, kl) in curves.items() if kl}
    panels = figure.subplots(1, 1 + bool(distilled), squeeze=False)[0]
    colour = colours(study)
    for axes, lines in zip(panels, ({name: curve for name, (curve, _) in curves.items()}, distilled)):
        for name, line in lines.items():
            axes.plot(*zip(*line), color=colour[name], linewidth=1.2, label=study.models[name])
        axes.set_xlabel("epochs of training")
        axes.set_xlim(left=0)
        axes.set_ylim(value_range(list(lines.values())))
    panels[0].set_ylabel("cross-entropy on the training text\n(nats per token)")
    panels[0].legend(frameon=False, fontsize=8.5)
    if distilled:
        panels[1].set_ylabel("KL to the teachers, as the loss has it")


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
            error_kw={"elinewidth": 1, "ecolor": "#222222"},
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=7.5)
    axes.grid(axis="x", visible=False)


def paint_fields(figure, study, folder):
    """Draws a group of bars for each field of a folder's minimal pairs."""
    axes, names = figure.subplots(), model_order(study)
    fields = study.results(names[0])[0]["report"]["pairs"][folder]["per_field"]

    def accuracy(name, field):
        runs = study.results(name)
        return statistics.fmean(100 * r["report"]["pairs"][folder]["per_field"][field] for r in runs)

    values = {name: [accuracy(name, field) for field in fields] for name in names}
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
    for name in model_order(study):
        if name in scores["models"]:
            of_tasks = scores["models"][name].values()
            values[name] = [100 * score["mean"] for score in of_tasks]
            ends = [[100 * end for end in score["interval"]] for score in of_tasks]
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
