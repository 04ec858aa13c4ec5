"""The table of fine-tuning's scores: rows of strings, the first of them the heading."""

import statistics


def task_rows(summary, titles=None):
    """Returns a row for each task and model of `finetune.summarize`, in percent.

    A cell is the mean, with several seeds its standard deviation, and the 95 % interval. The means over
    tasks stand below, those of MSGS apart. `titles` are {model: title}.
    """
    tasks, models = summary["tasks"], summary["models"]
    rows = [["task", "metric", "texts", "majority", *((titles or {}).get(model, model) for model in models)]]
    for name, task in tasks.items():
        cells = [score_text(scores[name]) if name in scores else "-" for scores in models.values()]
        rows.append([name, metric_text(task), f"{task['texts']:,}", f"{100 * task['majority']:.1f}", *cells])
    for of_msgs, family in ((False, ""), (True, " of MSGS")):
        names = [name for name, task in tasks.items() if task["msgs"] == of_msgs]
        if len(names) < 2:
            continue
        cells = [percent(statistics.fmean(tasks[name]["majority"] for name in names))]
        for scores in models.values():
            means = [scores[name]["mean"] for name in names if name in scores]
            cells.append(percent(statistics.fmean(means)) if len(means) == len(names) else "-")
        rows.append([f"mean of {len(names)}{family}", "", "", *cells])
    return rows


def metric_text(task):
    """Returns the metric's name; F1 with the class that it is the F1 of, such as "f1 of equivalent"."""
    positive = task.get("positive")  # reports from before it was recorded have none
    return f"f1 of {positive}" if task["metric"] == "f1" and positive else task["metric"]


def score_text(score):
    """Returns a score in percent, such as 62.3 ± 1.2 [59.3, 65.3]."""
    deviation = "" if score["deviation"] is None else f" ± {percent(score['deviation'])}"
    low, high = map(percent, score["interval"])
    return f"{percent(score['mean'])}{deviation} [{low}, {high}]"


def percent(share):
    """Returns 100 times a share with one decimal, and a minus sign where it is negative."""
    return f"{100 * share:.1f}".replace("-", "\N{MINUS SIGN}")
