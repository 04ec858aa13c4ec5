"""Draw two pictures of an ablation: the gain of distillation by words of text, and by teachers.

    python -m benchmarks.ablations --words 65000=DIR 130000=DIR --teachers DIR --out FOLDER

DIR is the folder of results of `reproduce.py`. `65000=DIR,STUDENT,CONTROL` takes two of its models by
name. A gain is the control's cross-entropy on the reported dev text minus the student's, in nats per
token: above 0 the student is better. Bars are intervals of 95 % over blocks of text, for the seeds that
were trained. Writes gain-words.png and gain-teachers.png. Needs matplotlib.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from experiments.plots import CONTROL, STUDENT, picture
from experiments.results import read_study
from training.io import UserError, atomic_write, run_program


def gains(folder, **roles):
    """Returns {title: (number of teachers, gain, low, high)} of an experiment's students, its own first.

    Others have the same options and other teachers. `roles` are a `student` and a `control` by name.
    """
    study = dataclasses.replace(read_study(Path(folder)), **roles)
    student, control = study.student, study.control
    if (student, control) not in study.comparisons:
        names = f"{control or 'control'} and {student or 'student'}"
        raise UserError(f"{folder} has no seed with {names}: train both")
    options = study.results(student)[0].get("conditions")
    result = {}
    for name in sorted(study.students, key=lambda name: name != student):
        comparison = study.comparisons.get((name, control))
        if comparison and study.results(name)[0].get("conditions") == options:
            difference = next(iter(comparison.values()))
            low, high = difference.over_text
            count = len(study.teachers[name])
            result[study.models[name]] = (count, -difference.mean, -high, -low)
    return result


def draw(points, label, logarithmic=False):
    """Returns the PNG of points (x, title, gain, low, high), or None without matplotlib."""

    def paint(figure):
        axes = figure.subplots()
        largest = max(x for x, *_ in points)
        for x, title, gain, low, high in points:
            axes.errorbar(x, gain, yerr=[[gain - low], [high - gain]], fmt="o", color=STUDENT, capsize=4)
            shift, side = (7, "left") if x < largest else (-7, "right")
            axes.annotate(title, (x, gain), (shift, 0), textcoords="offset points", ha=side, size=8)
        axes.axhline(0, color=CONTROL, linestyle=":")
        if logarithmic:
            axes.set_xscale("log")
        ticks = sorted({x for x, *_ in points})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.minorticks_off()
        axes.margins(x=0.25)
        axes.set_xlabel(label)
        axes.set_ylabel("gain over the control (nats per token)")

    return picture(6, 3.6, paint)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, text = parser.add_argument, "words of training text, and the results on them"
    add("--words", nargs="+", default=[], metavar="N=DIR[,STUDENT,CONTROL]", help=text)
    add("--teachers", metavar="DIR", help="results of students of other teachers")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the pictures")
    args = parser.parse_args(argv)
    if not args.words and not args.teachers:
        parser.error("nothing to draw: give --words or --teachers")
    pictures = {"gain-words": [], "gain-teachers": []}
    for text in args.words:
        words, _, value = text.partition("=")
        folder, *names = value.split(",")
        if not words.isdecimal() or not folder or len(names) not in (0, 2):
            parser.error(f"--words {text}: give N=DIR or N=DIR,STUDENT,CONTROL")
        _, *gain = next(iter(gains(folder, **dict(zip(("student", "control"), names))).values()))
        pictures["gain-words"].append((int(words), names[0] if names else "", *gain))
    if args.teachers:
        for title, (count, *gain) in gains(args.teachers).items():
            pictures["gain-teachers"].append((count, title, *gain))
    labels = {"gain-words": "words of training text", "gain-teachers": "teachers"}
    for name, points in pictures.items():
        for x, title, gain, low, high in points:
            print(f"{name}  {x:>9,}  {gain:+.4f} [{low:+.4f}, {high:+.4f}]  {title}")
        if points:
            image = draw(points, labels[name], logarithmic=name == "gain-words")
            if image is None:
                raise UserError("the pictures need matplotlib: pip install matplotlib")
            with atomic_write(args.out / f"{name}.png") as file:
                file.write(image)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
