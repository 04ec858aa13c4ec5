"""Draw the gain of distillation by the number of words of the training text.

    python -m benchmarks.ablations --fixed N=DIR ... --chosen N=DIR,STUDENT,CONTROL ... --out FILE.png

N is the number of words. DIR is a folder of results of `reproduce.py`, whose student and control are
compared, or the two that are named. A gain is the control's cross-entropy on the reported dev text
minus the student's, in nats per token: above 0 the student is better. --fixed has models with the same
options at each size, --chosen models with options that were chosen for the size. Needs matplotlib.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from experiments.plots import CONTROL, NOTE, STUDENT, WIDTH, picture
from experiments.results import read_study
from training.io import UserError, atomic_write, run_program

SERIES = {"fixed": "the same options at each size", "chosen": "weight decay chosen for each size"}


def gain(words, folder, *names):
    """A point of the picture: (words, gain, low, high, number of seeds), in nats per token.

    The 95 % interval is over seeds, or over text with one seed. Raises `UserError` without both models.
    """
    study = read_study(Path(folder))
    if names:
        study = dataclasses.replace(study, student=names[0], control=names[1])
    difference = study.difference(study.student, study.control)
    if difference is None:
        raise UserError(f"{folder} has no seed with {study.student} and {study.control}: train both")
    low, high = difference.over_seeds or difference.over_text
    return int(words), -difference.mean, -high, -low, len(difference.per_seed)


def paint(figure, series):
    """Draws {name of a series: its points} over words, on a logarithmic scale."""
    axes, colours = figure.subplots(), {"fixed": "#777777", "chosen": STUDENT}
    for name, points in series.items():
        style = {"color": colours[name], "linestyle": "--" if name == "fixed" else "-"}
        axes.plot(
            [x for x, *_ in points], [y for _, y, *_ in points], linewidth=2, label=SERIES[name], **style
        )
        for x, y, low, high, seeds in points:
            bars, marker = [[y - low], [high - y]], "s" if seeds > 1 else "o"
            axes.errorbar(x, y, yerr=bars, fmt=marker, markersize=7, capsize=4, color=colours[name])
    axes.axhline(0, color=CONTROL, linewidth=2)
    axes.set_xscale("log")
    ticks = sorted({x for points in series.values() for x, *_ in points})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel("words of training text")
    axes.set_ylabel("gain over the control (nats per token)")
    axes.legend(frameon=False)
    note = "95 % intervals. Dot: one seed, interval over text. Square: several seeds, interval over seeds."
    figure.supxlabel(note, **NOTE)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, text in SERIES.items():
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="N=DIR[,STUDENT,CONTROL]", help=text)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the picture, a PNG")
    args = parser.parse_args(argv)
    series = {}
    for name in SERIES:
        for text in getattr(args, name):
            words, _, value = text.partition("=")
            folder, *names = value.split(",")
            if not words.isdecimal() or not folder or len(names) not in (0, 2):
                parser.error(f"--{name} {text}: give N=DIR or N=DIR,STUDENT,CONTROL")
            point = gain(words, folder, *names)
            series.setdefault(name, []).append(point)
            print("{}  {:>9,}  {:+.4f} [{:+.4f}, {:+.4f}]  seeds: {}".format(name, *point))
    if not series:
        parser.error("nothing to draw: give --fixed or --chosen")
    image = picture(WIDTH, 4.6, lambda figure: paint(figure, series))
    if image is None:
        raise UserError("the picture needs matplotlib: pip install matplotlib")
    with atomic_write(args.out) as file:
        file.write(image)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
