"""The pictures of a report, as bytes of PNG, and a chart of letters where matplotlib is missing."""

import io
import statistics
from collections import defaultdict

from experiments.findings import advantage, measures

# ---- learning curves


def learning_curves(study):
    """{name: (mean, singles)} of the models that were trained.

    `mean` is the curve of the mean over seeds, `singles` has that of each seed. A curve is a list
    of (epoch, dev cross-entropy). The mean stands where every seed has a value; a model of which
    some seed has no curve is left out.
    """
    curves = {}
    for name in study.models:
        runs = study.results(name)
        if runs and all(run.get("curve") for run in runs):
            singles = [over_epochs(run, sorted(map(tuple, run["curve"]))) for run in runs]
            curves[name] = (over_epochs(runs[0], mean_curve(runs)), singles)
    return curves


def mean_curve(runs):
    """[(step, mean dev cross-entropy)], in order, of the steps at which every run has a value."""
    by_step = defaultdict(list)
    for run in runs:
        for step, value in dict(map(tuple, run["curve"])).items():
            by_step[step].append(value)
    common = sorted(step for step, values in by_step.items() if len(values) == len(runs))
    return [(step, statistics.fmean(by_step[step])) for step in common]


def over_epochs(run, curve):
    """A curve over steps of a run as one over epochs, [(epoch, value)]."""
    return [(step * run["epochs"] / run["steps"], value) for step, value in curve]


def value_range(curves):
    """(low, high), in nats: the part of an axis in which the differences between curves show.

    Each curve counts from the middle of its training on, because the steep start would leave no
    room for the rest. There is at least one curve, and none is empty.
    """
    values = [v for curve in curves for epoch, v in curve if epoch >= curve[-1][0] / 2]
    low, high = min(v for curve in curves for _, v in curve), max(values)
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def text_chart(study, curves, width=64, height=16):
    """Lines that draw the means of `learning_curves`, each by a letter of its own.

    The chart has `height` lines of `width` characters beside its labels; what is above
    `value_range` is not drawn. The last lines are the axis and the titles.
    """
    means = {study.models[name]: mean for name, (mean, _) in curves.items() if mean}
    if not means:
        return ["no learning curves"]
    epochs = max(mean[-1][0] for mean in means.values()) or 1
    low, high = value_range(means.values())
    grid, legend = [[" "] * width for _ in range(height)], []
    for letter, (title, mean) in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", means.items()):
        plot(grid, letter, [(e / epochs, (high - value) / (high - low)) for e, value in mean])
        legend.append(f"{letter}  {title}")
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    lines = [f"{label:>8} |{''.join(cells)}" for label, cells in zip(labels, grid)]
    lines += [" " * 10 + f"0{epochs:>{width - 1}.3g}", " " * 10 + "epochs".center(width)]
    lines += ["", "dev cross-entropy (nats per token), mean over seeds:", *legend]
    return [line.rstrip() for line in lines]


def plot(grid, letter, points):
    """Puts the letter into a grid of characters at the points, (to the right, down).

    Both are parts of the grid's width and height, from 0 to 1; what is above it is left out.
    """
    for right, down in points:
        row = round(down * (len(grid) - 1))
        if 0 <= row < len(grid):
            grid[row][round(right * (len(grid[0]) - 1))] = letter


# ---- pictures

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
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#222222",
}


def colours(study):
    """{name: colour}."""
    others = [name for name in study.models if name not in (study.student, study.control)]
    found = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return found | {study.student: STUDENT, study.control: CONTROL}


def picture(width, height, paint):
    """The bytes of a PNG of `width` x `height` inches on which `paint(figure)` has drawn.

    None where matplotlib is not installed.
    """
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


def overview(study):
    """The picture of all models by dev cross-entropy and by the first folder's minimal pairs."""
    shown = measures(study)[:2]
    names = overview_order(study)
    width, height = 5.6 + 3.9 * (len(shown) - 1), 1.5 + 0.45 * (len(names) + 1)
    return picture(width, height, lambda figure: paint_overview(figure, study, names, shown))


def overview_order(study):
    """The names of the models from top to bottom: control and student last."""
    last = [name for name in (study.control, study.student) if name]
    return [name for name in study.models if name not in last] + last


def paint_overview(figure, study, names, shown):
    """Draws a panel for each of the measures `shown`, side by side, with the same rows."""
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    heights = [float(i) for i in range(len(names))]
    if study.student and study.control:
        heights[-1] += 0.5  # the arrow has its place between the last two
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
        several = len(values) > 1
        axes.errorbar(
            means[name],
            height,
            xerr=statistics.stdev(values) if several else None,
            fmt="o",
            markersize=8,
            capsize=4,
            elinewidth=1.8,
            color=colour[name],
        )
        if several:
            beside = 0.27 if name == study.student else -0.27  # on the side away from the arrow
            axes.scatter(values, [height + beside] * len(values), s=11, color=colour[name])
    axes.set_xlabel(measure.axis)
    last = max(rows.values())
    axes.set_ylim(last + 0.6, -0.6)  # the first row is on top
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    if study.student in means and study.control in means:
        pairs = study.shared(study.student, study.control)
        axes.set_title(
            f"student beats its control in {measure.wins(pairs)} of {len(pairs)} seed{'s' * (len(pairs) > 1)}"
        )
        ends = [(means[name], rows[name]) for name in (study.control, study.student)]
        paint_arrow(axes, *ends, advantage(study, measure))


def paint_arrow(axes, start, end, label):
    """Draws an arrow with a label between the rows of two (value, height)."""
    between = (start[1] + end[1]) / 2 + 0.08
    for value, height in (start, end):
        axes.plot([value, value], [height, between], ":", color="#888888", linewidth=1.2, zorder=1)
    shape = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "",
        (end[0], between),
        (start[0], between),
        arrowprops=shape | {"color": "#222222", "linewidth": 1.6},
    )
    axes.annotate(
        label,
        ((start[0] + end[0]) / 2, between),
        (0, 7),
        textcoords="offset points",
        ha="center",
        bbox={"boxstyle": "square,pad=0", "facecolor": "white", "edgecolor": "none"},
    )


def paint_curves(figure, study, curves):
    """Draws the learning curves over epochs, with the dev cross-entropy as far as it is of use."""
    axes, colour = figure.subplots(), colours(study)
    for name, (mean, singles) in curves.items():
        if len(singles) > 1:
            for single in singles:
                axes.plot(*zip(*single), color=colour[name], linewidth=0.7, alpha=0.45)
        if mean:
            style = "--" if name not in (study.student, study.control) else "-"
            axes.plot(*zip(*mean), style, color=colour[name], linewidth=2, label=study.models[name])
    if curves:
        axes.set_ylim(value_range([single for _, singles in curves.values() for single in singles]))
        axes.legend(frameon=False, fontsize=8.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("dev cross-entropy\n(nats per token, lower is better)")


def training_curves(study):
    """{name: [(epoch, cross-entropy, KL or None)]} of the first seed, as far as it was logged."""
    found = {}
    for name in study.models:
        for run in study.results(name)[:1]:
            if run.get("training"):
                found[name] = [
                    (step * run["epochs"] / run["steps"], *rest) for step, *rest in run["training"]
                ]
    return found


def paint_training(figure, study, curves):
    """Draws cross-entropy and KL on the training text, apart, over epochs."""
    taught = {n: c for n, c in curves.items() if any(kl is not None for _, _, kl in c)}
    panels = figure.subplots(1, 1 + bool(taught), squeeze=False)[0]
    colour = colours(study)
    for axes, chosen, column in zip(panels, (curves, taught), (1, 2)):
        lines = {
            n: [(point[0], point[column]) for point in c if point[column] is not None]
            for n, c in chosen.items()
        }
        for name, line in lines.items():
            axes.plot(*zip(*line), color=colour[name], linewidth=1.2, label=study.models[name])
        axes.set_xlabel("epochs of training")
        axes.set_xlim(left=0)
        axes.set_ylim(value_range(list(lines.values())))
    panels[0].set_ylabel("cross-entropy on the training text\n(nats per token)")
    panels[0].legend(frameon=False, fontsize=8.5)
    if taught:
        panels[1].set_ylabel("KL to the teachers, as the loss has it")


def paint_fields(figure, study, folder):
    """Draws a group of bars for each field of a folder's minimal pairs."""
    axes, colour = figure.subplots(), colours(study)
    names = overview_order(study)
    fields = study.results(names[0])[0]["report"]["pairs"][folder]["per_field"]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        means = [
            statistics.fmean(
                100 * r["report"]["pairs"][folder]["per_field"][field] for r in study.results(name)
            )
            for field in fields
        ]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(fields))]
        axes.bar(places, means, width, color=colour[name], label=study.models[name])
    axes.axhline(50, color="#888888", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(fields)), [f.replace("_", "\n") for f in fields], fontsize=7.5)
    axes.set_ylabel(f"{folder}, pairs judged right (%)")
    axes.set_ylim(bottom=0, top=100)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(axis="x", visible=False)


def paint_tasks(figure, study, data):
    """Draws a group of bars for each task of `study.finetuned`, with intervals.

    A dotted line across a group is the majority class.
    """
    axes, colour = figure.subplots(), colours(study)
    names = [name for name in overview_order(study) if name in data["models"]]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = list(data["models"][name].values())
        means = [100 * score["mean"] for score in found]
        ends = [[100 * end for end in score["interval"]] for score in found]
        errors = [
            [max(m - e[0], 0) for m, e in zip(means, ends)],
            [max(e[1] - m, 0) for m, e in zip(means, ends)],
        ]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(means))]
        axes.bar(
            places,
            means,
            width,
            yerr=errors,
            color=colour[name],
            label=study.models[name],
            error_kw={"elinewidth": 1, "ecolor": "#222222"},
        )
    for j, task in enumerate(data["tasks"].values()):
        label = "majority class" if j == 0 else None
        level = [100 * task["majority"]] * 2
        axes.plot([j - 0.45, j + 0.45], level, ":", color="#444444", label=label)
    titles = [f"{n.replace('_', chr(10))}\n({t['metric']})" for n, t in data["tasks"].items()]
    axes.set_xticks(range(len(titles)), titles, fontsize=8)
    axes.set_ylabel("score on valid (%)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    axes.grid(axis="x", visible=False)
