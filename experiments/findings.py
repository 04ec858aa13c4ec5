"""What is reported, as plain data, and what it says: the effect, in sentences.

A `Study` has a result for each model and seed, which is what reproduce.py keeps of it:

    report            an entry of evaluate.py's JSON, of the dev text that is reported
    teaching          the same of a teacher's best.pt, which taught, where another one is scored
    seconds, epochs, steps, train_cross_entropy       of its training, unless it is an ensemble
    curve             [(step, dev cross-entropy)], over the part of the dev text that training reads
    training          [(step, cross-entropy, KL or None)], of the training text
    samples           {prompt: how the model goes on}
    finetuned         {"tasks", "scores"}: see finetune.py's `summarize`, of this model alone
    weights, taught_by       digests of its best.pt, and of those of its teachers
    commit, machine, torch   where it was scored
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

from evaluation.statistics import (
    cluster_bootstrap,
    compare_variants,
    format_interval,
    read_losses,
    t_interval,
)

LEAST_GAIN = 0.02  # nats: a smaller mean difference to the control is not called an effect
CONCLUSIONS = {True: "shown", False: "not shown", None: "not decided: seeds or models are missing"}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is reported.

    `models` is {name: title} in order, `teachers` {student: names of its teachers}, `ensembles`
    {student: who taught it as one}, a teacher or an ensemble. `text` says what is reported on.
    `seeds` is {seed: {name: result}}; a model may be missing in some of them. `folder` has the
    losses of each, seed-N/NAME.losses.npz. Nothing is decided with fewer seeds than `least_seeds`.
    `control_gain` is by how many nats another tuning of the control was found to be better: it is
    taken off every student's lead on it.
    """

    name: str
    about: str
    text: str
    models: dict
    teachers: dict
    ensembles: dict
    control: str | None
    student: str | None
    seeds: dict
    folder: Path
    least_seeds: int = 2
    control_gain: float = 0.0

    def results(self, name):
        """The results of a model, one for each seed that has it."""
        return [found[name] for found in self.seeds.values() if name in found]

    def every_result(self):
        """All results."""
        return [result for found in self.seeds.values() for result in found.values()]

    def shared(self, *names):
        """[[result of each name]], for the seeds that have them all."""
        rows = ([found.get(name) for name in names] for found in self.seeds.values())
        return [row for row in rows if None not in row]

    @property
    def students(self):
        """The names of the models that were taught."""
        return [name for name in self.models if name in self.teachers]

    @property
    def rivals(self):
        """The names of students that one model taught, otherwise trained as the study's own."""
        own, alike = self.teachers[self.student], self.results(self.student)[0].get("conditions")
        return [
            name
            for name, teachers in self.teachers.items()
            if len(teachers) == 1 and teachers != own
            if all(result.get("conditions") == alike for result in self.results(name))
        ]

    def losses(self, one, other):
        """Their `Losses` in the seeds that have both models: two lists.

        Raises `UserError` where those of one were not kept: no seed is dropped in silence.
        """
        pairs = []
        for seed, found in self.seeds.items():
            if one in found and other in found:
                folder = self.folder / f"seed-{seed}"
                pairs.append([read_losses(folder / f"{n}.losses.npz") for n in (one, other)])
        return ([a for a, _ in pairs], [b for _, b in pairs])

    @functools.cached_property
    def comparisons(self):
        """{(one, other): {way: Difference}}, as `compare_variants` has it.

        Each student and the control, with `control_gain` added; a student and its teachers and
        their ensemble; the student of the study and the other students; whoever taught and the
        control.
        """
        pairs = []
        for name in self.students:
            pairs += [(name, o) for o in (self.control, *self.teachers[name], self.ensembles[name])]
        pairs += [(self.student, other) for other in self.students if self.student]
        taught = [o for n in self.students for o in (*self.teachers[n], self.ensembles[n])]
        pairs += [(name, self.control) for name in taught]
        found = {}
        for one, other in dict.fromkeys(pairs):
            if one != other and {one, other} <= self.models.keys():
                losses = self.losses(one, other)
                taken = self.control_gain if one in self.teachers and other == self.control else 0.0
                if losses[0]:
                    every = compare_variants(*losses).items()
                    found[one, other] = {way: difference.shifted(taken) for way, difference in every}
        return found

    def strangers(self):
        """[(student, seed)] that learned from other instances of its teachers than those here.

        Whoever trains a teacher again, on another machine log, gets a model a little different.
        """
        return [
            (name, seed)
            for seed, found in self.seeds.items()
            for name in self.students
            if name in found and "taught_by" in found[name]
            if any(
                found[teacher]["weights"] not in found[name]["taught_by"]
                for teacher in self.teachers[name]
                if "weights" in found.get(teacher, {})
            )
        ]


def cross_entropy(result, scores="report"):
    """Nats per token; sub-corpora are weighted as in the training text, where that is known."""
    found = result.get(scores, result["report"])
    return found.get("weighted_cross_entropy", found["cross_entropy"])


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
            "dev cross-entropy",
            "dev cross-entropy\n(nats per token, lower is better)",
            cross_entropy,
            lower_is_better=True,
            digits=3,
            unit="nats",
        )
    ]
    for folder in pair_folders(study):
        found.append(
            Measure(
                f"minimal pairs of {folder} (mean over files)",
                f"minimal pairs judged right, {folder}\n(%, mean over files, higher is better)",
                lambda result, f=folder: 100 * result["report"]["pairs"][f]["accuracy_over_files"],
                lower_is_better=False,
                digits=1,
                unit="points",
            )
        )
    return found


def pair_folders(study):
    """The folders of minimal pairs on which every model of every seed was scored."""
    scored = [set(result["report"]["pairs"]) for result in study.every_result()]
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


def verdict(difference, least_gain=LEAST_GAIN, least_seeds=2):
    """HOLDS, REVERSED or UNDECIDED: what seeds and text say of a `Difference`.

    HOLDS: below 0 with every seed, by `least_gain` or more on average, and both 95 % intervals
    below 0. REVERSED: both above 0. With fewer than `least_seeds` seeds nothing is decided.
    """
    seeds, needed = len(difference.per_seed), max(least_seeds, 2)
    if seeds < needed:
        return f"UNDECIDED ({seeds} of {needed} seeds)"
    intervals = (difference.over_seeds, difference.over_text)
    below = all(value < 0 for value in difference.per_seed)
    if below and difference.mean <= -least_gain and all(high < 0 for _, high in intervals):
        return "HOLDS"
    return "REVERSED" if all(low > 0 for low, _ in intervals) else "UNDECIDED"


def judged(study, one, other):
    """The verdict on two models. Only a student's gain on its control must be `LEAST_GAIN`.

    CALIBRATION: it holds, but not at the temperatures that suit each model best.
    """
    found = study.comparisons[one, other]
    first, scaled = next(iter(found.values())), found.get("temperature-scaled")
    gain = LEAST_GAIN if other == study.control and one in study.teachers else 0.0
    answer = verdict(first, gain, study.least_seeds)
    if answer == "HOLDS" and scaled is not None and verdict(scaled, gain) != "HOLDS":
        return "CALIBRATION"
    return answer


def beats(study, one, others):
    """Whether HOLDS is the verdict on a model and each of the others; None while one is open."""
    pairs = [(one, other) for other in others]
    if not set(pairs) <= study.comparisons.keys():
        return None
    verdicts = [judged(study, *pair) for pair in pairs]
    if any(answer.startswith("UNDECIDED (") for answer in verdicts):
        return None
    return all(answer == "HOLDS" for answer in verdicts)


def pair_difference(study, one, other, folder):
    """(points, interval) of two models in a folder of minimal pairs; None where no seed has both.

    The mean over files of the accuracies' difference, itself a mean over seeds, and its 95 %
    interval over draws of the files: what other paradigms might have shown.
    """
    rows = study.shared(one, other)
    if not rows:
        return None

    def accuracies(result):
        return result["report"]["pairs"][folder]["per_file"]

    return cluster_bootstrap(
        [
            statistics.fmean(100 * (accuracies(a)[name] - accuracies(b)[name]) for a, b in rows)
            for name in accuracies(rows[0][0])
        ]
    )


def finetuned(study):
    """What fine-tuning found, as finetune.py's `summarize` has it; None where nothing was.

    What was found on other files or with other options than the first is left out. The interval is
    that of the mean over seeds, or with one seed that over texts.
    """
    every = [r["finetuned"] for r in study.every_result() if "finetuned" in r]
    if not every:
        return None
    alike = [f for f in every if all(f[key] == every[0][key] for key in ("files", "options"))]
    tasks, models = every[0]["tasks"], {}
    for name in study.models:
        several = [r["finetuned"] for r in study.results(name) if r.get("finetuned") in alike]
        for task, about in tasks.items() if several else ():
            means = [found["scores"][task]["mean"] for found in several]
            least = -1 if about["metric"] == "mcc" else 0
            models.setdefault(name, {})[task] = {
                "mean": statistics.fmean(means),
                "deviation": statistics.stdev(means) if len(means) > 1 else None,
                "interval": t_interval(means, least, 1) or several[0]["scores"][task]["interval"],
            }
    return {"tasks": tasks, "models": models}


# ---- sentences


def findings(study):
    """Sentences that say whether the effect appeared, from the numbers alone."""
    lines = [*lead_sentences(study), *effect_sentences(study)]
    if study.student in study.models:
        lines += [*teacher_sentences(study), *ensemble_sentences(study), *win_sentences(study)]
    for name, seed in study.strangers():
        lines.append(
            f"The {study.models[name]} of seed {seed} learned from other instances of its teachers "
            "than those in the table, with the same recipe and seed: its gap is to those."
        )
    return lines


def lead_sentences(study):
    """Whether those who taught the student are ahead of the control."""
    taught_by = study.ensembles.get(study.student)
    rows = study.shared(study.control, taught_by)
    if not rows:
        return []
    leads = [cross_entropy(a) - cross_entropy(b, "teaching") for a, b in rows]
    what = "there is something to be taught" if min(leads) > 0 else "it has little to teach"
    return [
        f"The {study.models[taught_by]} is {minus(spread(leads, 3, '+'))} nats per token ahead "
        f"of the {study.models[study.control]}: {what}."
    ]


def difference_text(study, one, other):
    """A difference with both intervals and its verdict."""
    found = next(iter(study.comparisons[one, other].values()))
    seeds, text = (minus(format_interval(bounds, 3)) for bounds in (found.over_seeds, found.over_text))
    intervals = f"95 % intervals {seeds} over {len(found.per_seed)} seeds and {text} over text"
    if found.over_seeds is None:
        intervals = f"95 % interval {text} over text, none over seeds"
    return (
        f"{study.models[one]} minus {study.models[other]}: {minus(f'{found.mean:+.3f}')} nats, "
        f"{intervals}: **{judged(study, one, other)}**"
    )


def effect_sentences(study):
    """Each student against the control; without the study's own, the others are exploratory."""
    pairs = [(n, study.control) for n in study.students if (n, study.control) in study.comparisons]
    pairs.sort(key=lambda pair: pair[0] != study.student)
    shown = beats(study, study.student, [study.control])
    own = study.models.get(study.student, "study's own student")
    lines = []
    if pairs and study.control_gain:
        lines.append(
            f"Another tuning of the {study.models[study.control]} was found to be "
            f"{study.control_gain:.4f} nats better: they are taken off every student's lead on it."
        )
    for pair in pairs:
        line = difference_text(study, *pair)
        if pair[0] != study.student and not shown:
            line += f"; exploratory, as the {own} was not shown to be ahead"
        lines.append(line + ".")
    return lines


def teacher_sentences(study):
    """The student against each of its teachers, and which of these are behind the control.

    Then whether it, and each other student of the same teachers, beats all of them.
    """
    lines, teachers = [], study.teachers[study.student]
    for teacher in teachers:
        if (study.student, teacher) in study.comparisons:
            line = difference_text(study, study.student, teacher)
            against = study.comparisons.get((teacher, study.control))
            if against is not None and next(iter(against.values())).mean > 0:
                line += "; this teacher is behind the control, so that beating it proves nothing"
            lines.append(line + ".")
    for name in study.students:
        if study.teachers[name] == teachers:
            answer = CONCLUSIONS[beats(study, name, teachers)]
            lines.append(f"{study.models[name]} beats each of its teachers: **{answer}**.")
    return lines


def ensemble_sentences(study):
    """Whether the ensemble taught more than its parts: the student against the other students."""
    lines = []
    own = study.comparisons.get((study.student, study.control))
    for other in study.students:
        if (study.student, other) not in study.comparisons:
            continue
        line = difference_text(study, study.student, other)
        theirs = study.comparisons.get((other, study.control))
        if own and theirs and (gain := next(iter(own.values())).mean) < 0:
            between = study.comparisons[study.student, other]
            if len({len(next(iter(f.values())).per_seed) for f in (own, theirs, between)}) == 1:
                share = next(iter(theirs.values())).mean / gain
                line += f"; the latter has {minus(f'{share:.0%}')} of the former's gain on the control"
        lines.append(line + ".")
    if study.rivals and len(study.teachers[study.student]) > 1:
        answer = CONCLUSIONS[beats(study, study.student, study.rivals)]
        names = ", ".join(study.models.get(name, name) for name in study.rivals)
        lines.append(
            f"That the ensemble taught more than soft targets alone ({study.models[study.student]} "
            f"against {names}): **{answer}**."
        )
    return lines


def win_sentences(study):
    """In how many seeds the student is better than the control and than its teachers."""
    lines = []
    for measure in measures(study):
        others = dict.fromkeys((study.control, *study.teachers[study.student]))
        rows = {other: study.shared(study.student, other) for other in others}
        parts = [
            f"{study.models[other]} in {measure.wins(found)} of {len(found)}"
            for other, found in rows.items()
            if found
        ]
        if parts:
            lines.append(
                f"{measure.name}: the {study.models[study.student]} beats the "
                f"{', the '.join(parts)} seed{'s' * (len(study.seeds) > 1)}."
            )
    return lines
