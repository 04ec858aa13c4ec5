"""The results of an experiment as plain data, and the rules that say what they show.

A `Study` has one result for each model and seed, a dict that reproduce.py writes:

    report            scores on the reported (test) text: an entry of evaluate.py's JSON
    teaching          the same for a teacher's best.pt, if `report` scores another of its checkpoints
    seconds, epochs, steps, train_cross_entropy       of its training, unless it is an ensemble
    curve             [(step, cross-entropy on validation text)]
    samples           {prompt: continuation}
    finetuned         {"tasks", "scores", "files", "options"} of finetune.py, only this model's
    weights, taught_by       digests of its best.pt, and of the best.pt of its teachers
    commit, machine, torch   where it was scored
"""

import dataclasses
import functools
import statistics
from pathlib import Path

from evaluation.statistics import cluster_bootstrap, compare_variants, read_losses, t_interval

LEAST_EFFECT = 0.02  # nats: a smaller gain of a student on the control is not called an effect


@dataclasses.dataclass(frozen=True)
class Study:
    """All results of an experiment.

    `models` is {name: title} in order, `teachers` {student: names of its teachers}, `ensembles`
    {student: name of its teacher, or of their ensemble}. `control` learns without teachers, and the
    experiment asks about `student`. `text` describes the reported text. `seeds` is {seed: {name:
    result}}; a seed may lack models. The losses of each model are in `folder`/seed-N/NAME.losses.npz.
    Verdicts need `least_seeds` seeds. `control_gain` (nats) is what better options gained for the
    control after the experiment: it is subtracted from each student's gain on the control.
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
        return [results[name] for results in self.seeds.values() if name in results]

    def every_result(self):
        """All results."""
        return [result for results in self.seeds.values() for result in results.values()]

    def shared_seeds(self, *names):
        """{seed: results} of the seeds that have all these models."""
        return {seed: results for seed, results in self.seeds.items() if {*names} <= results.keys()}

    @property
    def students(self):
        """The names of the models that have teachers."""
        return [name for name in self.models if name in self.teachers]

    @property
    def single_teacher_students(self):
        """The students with a single teacher and, besides it, the options of `self.student`."""
        own_teachers = self.teachers[self.student]
        own_conditions = self.results(self.student)[0].get("conditions")
        return [
            name
            for name, teachers in self.teachers.items()
            if len(teachers) == 1 and teachers != own_teachers
            if all(result.get("conditions") == own_conditions for result in self.results(name))
        ]

    def compared_models(self):
        """[(model, baseline)]: the models that the report compares.

        Each student with the control, its teachers and their ensemble; `self.student` with the
        other students; each teacher and ensemble with the control.
        """
        pairs, all_teachers = [], []
        for name in self.students:
            teachers = (*self.teachers[name], self.ensembles[name])
            pairs += [(name, baseline) for baseline in (self.control, *teachers)]
            all_teachers += teachers
        pairs += [(self.student, other) for other in self.students if self.student]
        pairs += [(name, self.control) for name in all_teachers]
        return [
            (name, baseline)
            for name, baseline in dict.fromkeys(pairs)
            if name != baseline and {name, baseline} <= self.models.keys()
        ]

    @functools.cached_property
    def comparisons(self):
        """{(model, baseline): {variant: Difference}} for the pairs that share a seed.

        The variants are those of `compare_variants`. Raises `UserError` if the losses of a shared
        seed are missing.
        """
        comparisons = {}
        for name, baseline in self.compared_models():
            if seeds := self.shared_seeds(name, baseline):
                losses = [
                    [read_losses(self.folder / f"seed-{seed}" / f"{model}.losses.npz") for seed in seeds]
                    for model in (name, baseline)
                ]
                is_gain_on_control = name in self.teachers and baseline == self.control
                shift = self.control_gain if is_gain_on_control else 0.0
                comparisons[name, baseline] = {
                    variant: difference.shifted(shift)
                    for variant, difference in compare_variants(*losses).items()
                }
        return comparisons

    def difference(self, name, baseline):
        """The main `Difference` of two models, or None if they are not compared."""
        return next(iter(self.comparisons.get((name, baseline), {}).values()), None)

    def mismatched_teachers(self):
        """[(student, seed)]: students that learned from other weights than those of the teachers here.

        A teacher that is trained again on another machine becomes a slightly different model.
        """
        return [
            (name, seed)
            for seed, results in self.seeds.items()
            for name in self.students
            if "taught_by" in results.get(name, {})
            if any(
                results.get(teacher, {}).get("weights") not in (None, *results[name]["taught_by"])
                for teacher in self.teachers[name]
            )
        ]


# ---- measures


def cross_entropy_of(result, scores="report"):
    """Nats per token; sub-corpora are weighted as in the training text, where that is known."""
    values = result[scores] if scores in result else result["report"]
    return values.get("weighted_cross_entropy", values["cross_entropy"])


def pair_folders(study):
    """The folders of minimal pairs on which every model of every seed was scored."""
    scored = [set(result["report"]["pairs"]) for result in study.every_result()]
    return sorted(set.intersection(*scored)) if scored else []


def pair_difference(study, name, baseline, folder):
    """(points, interval) of two models that share a seed, in a folder of minimal pairs.

    The difference of accuracies, averaged over seeds and files, and its 95 % interval over
    bootstrap resamples of the files.
    """
    seeds = study.shared_seeds(name, baseline).values()
    accuracies = [
        [seed[m]["report"]["pairs"][folder]["per_file"] for seed in seeds] for m in (name, baseline)
    ]
    return cluster_bootstrap(
        [
            statistics.fmean(100 * (one[file] - other[file]) for one, other in zip(*accuracies))
            for file in accuracies[0][0]
        ]
    )


def finetuned_scores(study):
    """{"tasks", "models": {name: {task: {"mean", "deviation", "interval"}}}}; None without results.

    The interval is that of the mean over seeds; with one seed, that over texts. Results of other
    files or options than the first are not used: "left_out" is their number.
    """
    every = [result["finetuned"] for result in study.every_result() if "finetuned" in result]
    if not every:
        return None

    def is_comparable(run):
        return all(run[key] == every[0][key] for key in ("files", "options", "tasks"))

    tasks, models = every[0]["tasks"], {}
    for name in study.models:
        runs = [result["finetuned"] for result in study.results(name) if "finetuned" in result]
        runs = list(filter(is_comparable, runs))
        for task, details in tasks.items() if runs else ():
            means = [run["scores"][task]["mean"] for run in runs]
            lowest = -1 if details["metric"] == "mcc" else 0
            models.setdefault(name, {})[task] = {
                "mean": statistics.fmean(means),
                "deviation": statistics.stdev(means) if len(means) > 1 else None,
                "interval": t_interval(means, lowest, 1) or runs[0]["scores"][task]["interval"],
            }
    return {"tasks": tasks, "models": models, "left_out": len(every) - sum(map(is_comparable, every))}


# ---- verdicts


def has_enough_seeds(difference, least_seeds):
    """True if a `Difference` has the seeds that a verdict needs: two at least."""
    return len(difference.per_seed) >= max(least_seeds, 2)


def verdict(difference, least_effect=LEAST_EFFECT, least_seeds=2):
    """HOLDS, REVERSED or UNDECIDED: whether a model is better, from its `Difference` in nats.

    HOLDS: below 0 with every seed, by `least_effect` or more on average, and both 95 % intervals
    below 0. REVERSED: both intervals above 0. UNDECIDED otherwise, and with too few seeds.
    """
    if not has_enough_seeds(difference, least_seeds):
        return f"UNDECIDED ({len(difference.per_seed)} of {max(least_seeds, 2)} seeds)"
    intervals = (difference.over_seeds, difference.over_text)
    below = all(value < 0 for value in difference.per_seed)
    if below and difference.mean <= -least_effect and all(high < 0 for _, high in intervals):
        return "HOLDS"
    return "REVERSED" if all(low > 0 for low, _ in intervals) else "UNDECIDED"


def verdict_of(study, name, baseline):
    """The verdict on two models. Only a student's gain on the control must reach `LEAST_EFFECT`.

    CALIBRATION: HOLDS, but not if each model is scored at the temperature that suits it best.
    """
    scaled = study.comparisons[name, baseline].get("temperature-scaled")
    least_effect = LEAST_EFFECT if baseline == study.control and name in study.teachers else 0.0
    result = verdict(study.difference(name, baseline), least_effect, study.least_seeds)
    if result == "HOLDS" and scaled is not None and verdict(scaled, least_effect) != "HOLDS":
        return "CALIBRATION"
    return result


def outperforms(study, name, baselines):
    """True if the verdict is HOLDS against each baseline; None if seeds or models are missing."""
    differences = [study.difference(name, baseline) for baseline in baselines]
    if not all(difference and has_enough_seeds(difference, study.least_seeds) for difference in differences):
        return None
    return all(verdict_of(study, name, baseline) == "HOLDS" for baseline in baselines)
