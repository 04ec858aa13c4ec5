"""Two pictures of an ablation: what distillation gains against words of text, and by its teachers.

    python -m benchmarks.ablations --words 65000=DIR 130000=DIR --teachers DIR --out FOLDER

A DIR is the folder of results of `reproduce.py`. `65000=DIR,STUDENT,CONTROL` takes two of its
models by name, where the best options for that text are not the recipe's. A gain is the control's
cross-entropy on the reported dev text minus the student's, in nats per token: above 0 the student
is better. Bars are intervals of 95 % over blocks of text, for the seeds that were trained: they do
not say what another seed would have given. Writes gain-words.png and gain-teachers.png into FOLDER,
and prints the numbers. Needs matplotlib.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from experiments.plots import CONTROL, STUDENT, picture
from experiments.results import read_study
from training.io import UserError, atomic_write, run_program


def gains(folder, **roles):
    """{title: (number of teachers, gain, low, high)} of an experiment's students, its own first.

    They are those that differ from it in nothing but their teachers. `roles` are a `student` and a
    `control` other than the experiment's. Raises `UserError` where no seed has both.
    """
    study = dataclasses.replace(read_study(Path(folder)), **roles)
    if (study.student, study.control) not in study.comparisons:
        pair = f"{study.control or 'control'} and {study.student or 'student'}"
        raise UserError(f"{folder} has no seed with {pair}: train both")
    own = study.results(study.student)[0].get("conditions")
    found = {}
    for name in sorted(study.students, key=lambda name: name != study.student):
        alike = study.results(name)[0].get("conditions") == own
        if alike and (name, study.control) in study.comparisons:
            difference = next(iter(study.comparisons[name, study.control].values()))
            low, high = difference.over_text
            count = len(study.teachers[name])
            found[study.models[name]] = (count, -difference.mean, -high, -low)
    return found


def gains_picture(points, axis, logarithmic=False):
    """The PNG of [(place, title, gain, low, high)]; None without matplotlib."""

    def paint(figure):
        axes = figure.subplots()
        places, titles, means, lows, highs = zip(*points)
        errors = [[m - low for m, low in zip(means, lows)], [h - m for m, h in zip(means, highs)]]
        axes.errorbar(places, means, yerr=errors, fmt="o", color=STUDENT, capsize=4)
        for place, title, mean in zip(places, titles, means):
            shift, side = (7, "left") if place < max(places) else (-7, "right")
            axes.annotate(title, (place, mean), (shift, 0), textcoords="offset points", ha=side, size=8)
        axes.axhline(0, color=CONTROL, linestyle=":")
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(sorted(set(places)), [f"{place:,}" for place in sorted(set(places))])
        axes.minorticks_off()
        axes.margins(x=0.25)
        axes.set_xlabel(axis)
        axes.set_ylabel("gain over the control (nats per token)")

    return picture(6, 3.6, paint)


def main(argv=None):
    """Draws as the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--words",
        nargs="+",
        default=[],
        metavar="N=DIR[,STUDENT,CONTROL]",
        help="words of training text, and the results of control and student on them",
    )
    parser.add_argument("--teachers", metavar="DIR", help="results of students of other teachers")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the pictures")
    args = parser.parse_args(argv)
    if not args.words and not args.teachers:
        parser.error("nothing to draw: give --words or --teachers")
    pictures = {}
    if args.words:
        points = []
        for text in args.words:
            words, _, folder = text.partition("=")
            folder, *names = folder.split(",")
            if not words.isdecimal() or not folder or len(names) not in (0, 2):
                parser.error(f"--words {text}: give N=DIR or N=DIR,STUDENT,CONTROL")
            roles = dict(zip(("student", "control"), names))
            _, *gain = next(iter(gains(folder, **roles).values()))
            points.append((int(words), names[0] if names else "", *gain))
        pictures["gain-words"] = (points, "words of training text", True)
    if args.teachers:
        points = [(count, title, *gain) for title, (count, *gain) in gains(args.teachers).items()]
        pictures["gain-teachers"] = (points, "teachers")
    for name, (points, *axis) in pictures.items():
        for place, title, gain, low, high in points:
            print(f"{name}  {place:>9,}  {gain:+.4f} [{low:+.4f}, {high:+.4f}]  {title}")
        if (image := gains_picture(points, *axis)) is None:
            raise UserError("the pictures need matplotlib: pip install matplotlib")
        with atomic_write(Path(args.out) / f"{name}.png") as file:
            file.write(image)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
