"""The report of a reproduction: pictures, tables and findings from the scores of its models.

The input is plain data. `seeds` is a list with one dict for each seed, {role: result}, whose roles
are the keys of `ROLES`. A result is an entry of evaluate.py's JSON: "parameters", "cross_entropy"
(nats per token), "perplexity", "per_file" and "pairs", with accuracies between 0 and 1. The result
of a model that was trained, thus not that of the ensemble, has besides what its log says:

    seconds           time spent on training
    epochs, steps     the length of the training
    curve             [(step, dev cross-entropy)], over the part of the dev text that training reads
"""

import dataclasses
import datetime
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from harness.files import atomic_write, write_text
from harness.record import commit
from harness.tables import aligned, markdown

ROLES = {
    "gpt2-teacher": "GPT-2 teacher",
    "llama-teacher": "LLaMA teacher",
    "ensemble": "ensemble of both",
    "control": "control (alone)",
    "student": "student (distilled)",
}


def write_report(seeds, out, *, recipe, command, device):
    """Writes report.md and its pictures into the folder `out`.

    `recipe`, `command` and `device` are the names that the report gives to what was run. Returns
    the lines for the screen: the table of results and the findings. Raises `UserError` where a file
    cannot be written.
    """
    rows, curves = result_rows(seeds), learning_curves(seeds)
    overview, chart = [], ["```", *text_chart(curves), "```", ""]
    if draw_overview(seeds, out / "overview.png"):
        overview = ["![The models by dev cross-entropy and minimal pairs](overview.png)", ""]
    if draw_curves(curves, out / "curves.png"):
        chart = ["![Dev cross-entropy against epochs of training](curves.png)", ""]
    epochs = [f"{ROLES[r]} {v['epochs']:.3g}" for r, v in seeds[0].items() if "epochs" in v]
    lines = [
        f"# Recipe {recipe}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        "",
        *overview,
        f"`{command}`, commit {commit()}, {datetime.date.today()}, {machine(device)}, "
        f"torch {torch.__version__}.",
        "",
        *markdown(rows),
        "",
        "Cross-entropy (nats per token) and perplexity are of the whole dev shard, at the best dev",
        "cross-entropy seen in training. The ensemble is the mean of the teachers' logits.",
        f"Seconds: training alone. Epochs: {', '.join(epochs)}.",
        "",
        *findings(seeds),
        "",
        *chart,
        *detail_tables(seeds),
    ]
    write_text(out / "report.md", "\n".join(lines))
    return [*aligned(rows), "", *findings(seeds), f"\nwritten: {out / 'report.md'}"]


def machine(device):
    """What the numbers were measured on: the GPU's name, or the number of CPU cores."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    flags = "/proc/cpuinfo"
    bf16 = os.path.exists(flags) and "avx512_bf16" in Path(flags).read_text()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}{', avx512_bf16' if bf16 else ''})"


# ---- what is compared


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number by which models are compared."""

    name: str  # in the findings
    axis: str  # the label of an axis
    value: Callable[[dict], float]  # from a model's result
    lower_is_better: bool
    digits: int  # after the decimal point
    unit: str  # in which a difference is given

    def wins(self, seeds, one, other):
        """The number of seeds in which the role `one` is better than the role `other`."""
        sign = -1 if self.lower_is_better else 1
        return sum(sign * self.value(s[one]) > sign * self.value(s[other]) for s in seeds)


def measures(seeds):
    """Dev cross-entropy and, for each folder of minimal pairs, the mean accuracy over its files."""
    found = [
        Measure(
            "dev cross-entropy", "dev cross-entropy\n(nats per token, lower is better)",
            lambda result: result["cross_entropy"], lower_is_better=True, digits=3, unit="nats",
        )
    ]  # fmt: skip
    for folder in seeds[0]["student"]["pairs"]:
        name = Path(folder).name
        found.append(
            Measure(
                f"minimal pairs of {name} (mean over files)",
                f"minimal pairs judged right, {name}\n(%, mean over files, higher is better)",
                lambda result, f=folder: 100 * result["pairs"][f]["accuracy_over_files"],
                lower_is_better=False, digits=1, unit="points",
            )
        )  # fmt: skip
    return found


def spread(values, digits, sign=""):
    """The mean of the values, with their standard deviation where there are several.

    With `sign="+"`, a mean above zero has its sign too.
    """
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def advantage(seeds, measure):
    """The student's value minus that of its twin, the control: "−0.061 ± 0.006 nats".

    The mean and the standard deviation are those of the seeds' differences.
    """
    differences = [measure.value(s["student"]) - measure.value(s["control"]) for s in seeds]
    text = spread(differences, measure.digits, sign="+").replace("-", "\N{MINUS SIGN}")
    return f"{text} {measure.unit}"


def findings(seeds):
    """Sentences that say whether the paper's effect appeared, from the numbers alone."""
    lines = []
    for measure in measures(seeds):
        for other in ("control", "gpt2-teacher", "llama-teacher", "ensemble"):
            won = measure.wins(seeds, "student", other)
            lines.append(
                f"- {measure.name}: the student beats the {ROLES[other]} "
                f"in {won} of {len(seeds)} seeds"
            )
        led = measure.wins(seeds, "ensemble", "control")
        lines.append(
            f"- {measure.name}: the ensemble beats the control in {led} of {len(seeds)} seeds"
        )
    return lines


# ---- tables


def result_rows(seeds):
    """Heading and rows of the main table: one row for each role, over all seeds."""
    folders = list(seeds[0]["student"]["pairs"])
    heading = ["model", "parameters", "dev cross-entropy", "dev perplexity"]
    heading += [f"{Path(f).name}, {kind} (%)" for f in folders for kind in ("files", "fields")]
    rows = [[*heading, "seconds"]]
    for role, title in ROLES.items():
        runs = [seed[role] for seed in seeds]
        row = [title, f"{runs[0]['parameters']:,}"]
        row.append(spread([r["cross_entropy"] for r in runs], 3))
        row.append(spread([r["perplexity"] for r in runs], 2))
        for folder in folders:
            for key in ("accuracy_over_files", "accuracy_over_fields"):
                row.append(spread([100 * r["pairs"][folder][key] for r in runs], 1))
        row.append(spread([r["seconds"] for r in runs], 0) if "seconds" in runs[0] else "-")
        rows.append(row)
    return rows


def detail_tables(seeds):
    """Lines of Markdown: cross-entropy by sub-corpus, and accuracy by field of minimal pairs."""
    first, lines = seeds[0]["student"], []
    if len(first["per_file"]) > 1:
        lines += detail_table(
            seeds, "dev cross-entropy by sub-corpus", first["per_file"],
            lambda result, name: result["per_file"][name]["cross_entropy"], digits=3,
        )  # fmt: skip
    for folder, scores in first["pairs"].items():
        lines += detail_table(
            seeds, f"{Path(folder).name}, by field (%)", scores["per_field"],
            lambda result, name, f=folder: 100 * result["pairs"][f]["per_field"][name], digits=1,
        )  # fmt: skip
    return lines


def detail_table(seeds, title, names, value, digits):
    """The lines of a table with a row for each name; `value(result, name)` is what is in it."""
    rows = [[title, *ROLES.values()]]
    for name in names:
        cells = [spread([value(seed[role], name) for seed in seeds], digits) for role in ROLES]
        rows.append([name, *cells])
    return [*markdown(rows), ""]


# ---- learning curves


def learning_curves(seeds):
    """{role: (mean, singles)} of the models that were trained.

    `mean` is the curve of the mean over seeds, `singles` has that of each seed. A curve is a list
    of (epoch, dev cross-entropy). The mean stands where every seed has a value; a role of which
    some seed has no curve is left out.
    """
    curves = {}
    for role in ROLES:
        runs = [seed[role] for seed in seeds]
        if all(run.get("curve") for run in runs):
            singles = [over_epochs(run, sorted(run["curve"])) for run in runs]
            curves[role] = (over_epochs(runs[0], mean_curve(runs)), singles)
    return curves


def mean_curve(runs):
    """[(step, mean dev cross-entropy)], in order, of the steps at which every run has a value."""
    by_step = defaultdict(list)
    for run in runs:
        for step, value in dict(run["curve"]).items():
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


def text_chart(curves, width=64, height=16):
    """Lines that draw the means of `learning_curves`, each by the first letter of its title.

    The chart has `height` lines of `width` characters beside its labels; what is above
    `value_range` is not drawn. The last lines are the axis and the titles.
    """
    means = {ROLES[role]: mean for role, (mean, _) in curves.items() if mean}
    if not means:
        return ["no learning curves"]
    epochs = max(mean[-1][0] for mean in means.values()) or 1
    low, high = value_range(means.values())
    grid = [[" "] * width for _ in range(height)]
    for title, mean in means.items():
        plot(grid, title[0], [(e / epochs, (high - value) / (high - low)) for e, value in mean])
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    lines = [f"{label:>8} |{''.join(cells)}" for label, cells in zip(labels, grid)]
    lines += [" " * 10 + f"0{epochs:>{width - 1}.3g}", " " * 10 + "epochs".center(width)]
    lines += ["", "dev cross-entropy (nats per token), mean over seeds:", *means]
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

# Colours that remain apart for colour-blind readers (Okabe and Ito).
COLOURS = {
    "gpt2-teacher": "#0072B2",
    "llama-teacher": "#009E73",
    "ensemble": "#CC79A7",
    "control": "#4D4D4D",
    "student": "#D55E00",
}
DASHES = {"gpt2-teacher": (4, 1.5), "llama-teacher": (1.5, 1)}  # the other curves are solid
ROWS = {
    "gpt2-teacher": "GPT-2 teacher",
    "llama-teacher": "LLaMA teacher",
    "ensemble": "ensemble\nof both teachers",
    "control": "control: the student's\ntwin, trained alone",
    "student": "student,\ndistilled from both",
}
HEIGHTS = (0, 1, 2, 3, 4.5)  # where the rows are; the arrow has its place between the last two
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


def draw(path, width, height, paint):
    """Writes a PNG of `width` x `height` inches on which `paint(figure)` has drawn.

    Returns whether it did: not where matplotlib is not installed. Raises `UserError` where the
    file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
    return True


def draw_overview(seeds, path):
    """Draws all models by dev cross-entropy and by the first folder's minimal pairs, if any.

    Returns whether the picture was written, as `draw` does.
    """
    shown = measures(seeds)[:2]
    width = 5.2 + 3.9 * (len(shown) - 1)
    return draw(path, width, 3.9, lambda figure: paint_overview(figure, seeds, shown))


def paint_overview(figure, seeds, shown):
    """Draws a panel for each of the measures `shown`, side by side, with the same rows."""
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, shown):
        paint_measure(axes, seeds, measure)
    panels[0].set_yticks(HEIGHTS, ROWS.values())
    if len(seeds) > 1:
        legend = f"large dot: mean of {len(seeds)} seeds    bar: ± one standard deviation"
        legend += "    small dots: single seeds"
        figure.supxlabel(legend, fontsize=8.5, color="#666666")


def paint_measure(axes, seeds, measure):
    """Draws one panel of the overview: a row for each role, an arrow from twin to student."""
    means, several = {}, len(seeds) > 1
    for role, height in zip(ROLES, HEIGHTS):
        values = [measure.value(seed[role]) for seed in seeds]
        means[role] = statistics.fmean(values)
        axes.errorbar(
            means[role], height, xerr=statistics.stdev(values) if several else None,
            fmt="o", markersize=8, capsize=4, elinewidth=1.8, color=COLOURS[role],
        )  # fmt: skip
        if several:
            beside = 0.27 if role == "student" else -0.27  # on the side away from the arrow
            axes.scatter(values, [height + beside] * len(values), s=11, color=COLOURS[role])
    won = measure.wins(seeds, "student", "control")
    axes.set_title(f"student beats its twin in {won} of {len(seeds)} seeds")
    axes.set_xlabel(measure.axis)
    axes.set_ylim(HEIGHTS[-1] + 0.6, -0.6)  # the first row is on top
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    paint_arrow(axes, means["control"], means["student"], advantage(seeds, measure))


def paint_arrow(axes, start, end, label):
    """Draws an arrow with a label from the twin's value to the student's, between their rows."""
    between = (HEIGHTS[-2] + HEIGHTS[-1]) / 2 + 0.08
    for value, height in ((start, HEIGHTS[-2]), (end, HEIGHTS[-1])):
        axes.plot([value, value], [height, between], ":", color="#888888", linewidth=1.2, zorder=1)
    shape = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        "", (end, between), (start, between),
        arrowprops=shape | {"color": "#222222", "linewidth": 1.6},
    )  # fmt: skip
    axes.annotate(
        label, ((start + end) / 2, between), (0, 7), textcoords="offset points", ha="center",
        bbox={"boxstyle": "square,pad=0", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def draw_curves(curves, path):
    """Draws `learning_curves`: a line for each role's mean, thin ones for single seeds.

    Returns whether the picture was written, as `draw` does.
    """
    return draw(path, 7.2, 4.2, lambda figure: paint_curves(figure, curves))


def paint_curves(figure, curves):
    """Draws the learning curves over epochs, with the dev cross-entropy as far as it is of use."""
    axes = figure.subplots()
    for role, (mean, singles) in curves.items():
        if len(singles) > 1:
            for single in singles:
                axes.plot(*zip(*single), color=COLOURS[role], linewidth=0.7, alpha=0.45)
        if mean:
            dashes = {"dashes": DASHES[role]} if role in DASHES else {}
            axes.plot(*zip(*mean), color=COLOURS[role], linewidth=2, label=ROLES[role], **dashes)
    if curves:
        axes.set_ylim(value_range([single for _, singles in curves.values() for single in singles]))
        axes.legend(frameon=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("dev cross-entropy\n(nats per token, lower is better)")
