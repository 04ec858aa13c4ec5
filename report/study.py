"""What is reported, as plain data, and what it says: the effect, in sentences.

A `Study` has a result for each model and seed, which is what reproduce.py keeps of it:

    report            an entry of evaluate.py's JSON, of the dev text that nothing was chosen on
    dev               the same of the dev text that chose; taken where there is no "report"
    seconds, epochs, steps, train_cross_entropy       of its training, unless it is an ensemble
    curve             [(step, dev cross-entropy)], over the part of the dev text that training reads
    training          [(step, cross-entropy, KL or None)], of the training text
    samples           {prompt: how the model goes on}
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

from report.compare import compare, interval, read_losses

LEAST_GAIN = 0.02  # nats: a smaller mean difference is not called an effect


@dataclasses.dataclass(frozen=True)
class Study:
    """What is reported: `models` is {name: title} in order, `teachers` {name: those who taught it}.

    `seeds` is {seed: {name: result}}; a model may be missing in some of them. `folder` has the
    losses of each, seed-N/NAME.losses.npz, where they were kept.
    """

    name: str
    about: str
    models: dict
    teachers: dict
    control: str | None
    student: str | None
    seeds: dict
    folder: Path

    def results(self, name):
        """The results of a model, one for each seed that has it."""
        return [found[name] for found in self.seeds.values() if name in found]

    def shared(self, *names):
        """[[result of each name]], for the seeds that have them all."""
        rows = ([found.get(name) for name in names] for found in self.seeds.values())
        return [row for row in rows if None not in row]

    def losses(self, one, other):
        """Their `Losses` in the seeds that have both: two lists, empty where one was not kept."""
        pairs = []
        for seed in self.seeds:
            paths = [self.folder / f"seed-{seed}" / f"{n}.losses.npz" for n in (one, other)]
            if all(path.exists() for path in paths):
                pairs.append([read_losses(path) for path in paths])
        return ([a for a, _ in pairs], [b for _, b in pairs])

    @functools.cached_property
    def comparisons(self):
        """[(one, other, {way: Difference})]: each student and control, its teachers, all of them.

        The ways are those that the kept losses allow, as `differences` says.
        """
        found = []
        for name in [n for n in self.models if self.teachers.get(n)]:
            others = [self.control, *self.teachers[name], self.ensemble(name)]
            for other in dict.fromkeys(o for o in others if o in self.models and o != name):
                ones, them = self.losses(name, other)
                if ones:
                    found.append((name, other, differences(ones, them)))
        return found

    def ensemble(self, name):
        """Who taught a model: the name of a teacher, or of the ensemble; None if nobody did."""
        return "+".join(self.teachers.get(name, ())) or None


def text_scores(result):
    """The scores on the text that is reported."""
    return result.get("report") or result["dev"]


def cross_entropy(result):
    """Nats per token; sub-corpora are weighted as in the training text, where that is known."""
    scores = text_scores(result)
    return scores.get("weighted_cross_entropy", scores["cross_entropy"])


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

    def wins(self, rows):
        """In how many of the rows, [[one's result, the other's]], the first one is better."""
        sign = -1 if self.lower_is_better else 1
        return sum(sign * self.value(one) > sign * self.value(other) for one, other in rows)


def measures(study):
    """Dev cross-entropy and, for each folder of minimal pairs, the mean accuracy over its files."""
    found = [
        Measure(
            "dev cross-entropy", "dev cross-entropy\n(nats per token, lower is better)",
            cross_entropy, lower_is_better=True, digits=3, unit="nats",
        )
    ]  # fmt: skip
    for folder in pair_folders(study):
        found.append(
            Measure(
                f"minimal pairs of {folder} (mean over files)",
                f"minimal pairs judged right, {folder}\n(%, mean over files, higher is better)",
                lambda result, f=folder: 100
                * text_scores(result)["pairs"][f]["accuracy_over_files"],
                lower_is_better=False, digits=1, unit="points",
            )
        )  # fmt: skip
    return found


def pair_folders(study):
    """The folders of minimal pairs on which every model of every seed was scored."""
    scored = [
        set(text_scores(result)["pairs"])
        for found in study.seeds.values()
        for result in found.values()
    ]
    return sorted(set.intersection(*scored)) if scored else []


def spread(values, digits, sign=""):
    """The mean of the values, with their standard deviation where there are several.

    With `sign="+"`, a mean above zero has its sign too. "-" where there are none.
    """
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def minus(text):
    """A number's hyphen as a minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def advantage(study, measure):
    """The student's value minus that of its control: "−0.061 ± 0.006 nats"."""
    rows = study.shared(study.student, study.control)
    differences = [measure.value(one) - measure.value(other) for one, other in rows]
    return f"{minus(spread(differences, measure.digits, sign='+'))} {measure.unit}"


def verdict(difference, least_gain=LEAST_GAIN):
    """HOLDS, REVERSED or UNDECIDED: what seeds and text say of a `compare.Difference`.

    HOLDS: below 0 with every seed, by `least_gain` or more on average, and both 95 % intervals
    below 0. REVERSED: both above 0. With one seed nothing is decided.
    """
    if difference.over_seeds is None:
        return "UNDECIDED (one seed)"
    intervals = (difference.over_seeds, difference.over_text)
    below = all(value < 0 for value in difference.per_seed)
    if below and difference.mean <= -least_gain and all(high < 0 for _, high in intervals):
        return "HOLDS"
    return "REVERSED" if all(low > 0 for low, _ in intervals) else "UNDECIDED"


def differences(ones, others):
    """{way: Difference} of `compare`: weighted, plain, and at the fitted temperatures."""
    every = [*ones, *others]
    weights = "train" if all(losses.shares is not None for losses in every) else "plain"
    ways = {weights: (weights, False), "plain": ("plain", False)}
    if all(losses.scaled_nats is not None for losses in every):
        ways["temperature-scaled"] = (weights, True)
    return {name: compare(ones, others, *how) for name, how in ways.items()}


# ---- sentences


def findings(study):
    """Sentences that say whether the effect appeared, from the numbers alone."""
    lines, seeds = [], len(study.seeds)
    if study.control and study.ensemble(study.student) in study.models:
        taught_by = study.ensemble(study.student)
        rows = study.shared(study.control, taught_by)
        leads = [cross_entropy(control) - cross_entropy(other) for control, other in rows]
        what = "there is something to be taught" if min(leads) > 0 else "it has little to teach"
        lines.append(
            f"The {study.models[taught_by]} is {minus(spread(leads, 3, '+'))} nats per token ahead "
            f"of the {study.models[study.control]}: {what}."
        )
    for name, other, ways in study.comparisons:
        if other != study.control:
            continue
        found = next(iter(ways.values()))
        sentence = (
            f"{study.models[name]} minus {study.models[other]}: {minus(f'{found.mean:+.3f}')} "
            f"nats, 95 % intervals {minus(interval(found.over_seeds))} over "
            f"{len(found.per_seed)} seeds and {minus(interval(found.over_text))} over blocks of "
            f"text: **{verdict(found)}**"
        )
        scaled = ways.get("temperature-scaled")
        if scaled is not None:
            sentence += f" (temperature-scaled {minus(f'{scaled.mean:+.3f}')}: {verdict(scaled)})"
        lines.append(sentence + ".")
    for measure in measures(study):
        others = [study.control, *study.teachers.get(study.student, ())]
        parts = []
        for other in [o for o in dict.fromkeys(others) if o in study.models]:
            rows = study.shared(study.student, other)
            parts.append(f"{study.models[other]} in {measure.wins(rows)} of {len(rows)}")
        if parts:
            student, plural = study.models[study.student], "s" * (seeds > 1)
            lines.append(
                f"{measure.name}: the {student} beats the {', the '.join(parts)} seed{plural}."
            )
    return lines
