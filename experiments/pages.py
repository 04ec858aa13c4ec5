"""The report of an experiment as Markdown, as one HTML file, and as JSON."""

import base64
import dataclasses
import datetime
import html
import re

from experiments.findings import findings, finetuned, judged, pair_folders
from experiments.plots import (
    learning_curves,
    overview,
    paint_curves,
    paint_fields,
    paint_tasks,
    paint_training,
    picture,
    text_chart,
    training_curves,
)
from experiments.tables import (
    PUBLISHED_BLIMP,
    any_scaled,
    comparison_rows,
    field_rows,
    lead_rows,
    pair_rows,
    record_key,
    result_rows,
    sub_corpus_rows,
)
from finetuning.tables import task_rows
from training.io import aligned, atomic_write, markdown, write_json, write_text
from training.logger import commit


def report_blocks(study, command):
    """The parts of the report, in order: (kind, what is in it, and for a picture its name).

    Kinds are heading, text, list, table (rows), lines (as they are) and picture (PNG bytes).
    """
    seeds, curves = len(study.seeds), learning_curves(study)
    blocks = [("heading", f"Recipe {study.name}, {seeds} seed{'s' * (seeds > 1)}")]
    if study.about:
        blocks.append(("text", study.about))
    blocks.append(("list", findings(study)))
    if image := overview(study):
        blocks.append(("picture", image, "overview", "The models side by side"))
    blocks.append(("table", result_rows(study)))
    blocks.append(("text", explanation(study)))
    blocks.append(("text", provenance(study, command)))
    for title, rows, note in (
        ("Differences", comparison_rows(study), DIFFERENCES),
        ("Differences in minimal pairs", pair_rows(study), PAIR_DIFFERENCES),
        ("Lead and gap", lead_rows(study), LEAD_AND_GAP),
    ):
        if len(rows) > 1:
            blocks += [("heading", title), ("text", note), ("table", rows)]
    blocks.append(("heading", "Learning curves"))
    if curves and (image := picture(7.2, 4.2, lambda f: paint_curves(f, study, curves))):
        blocks.append(("picture", image, "curves", "Dev cross-entropy against epochs of training"))
    else:
        blocks.append(("lines", text_chart(study, curves)))
    training = training_curves(study)
    if training and (image := picture(9.5, 3.8, lambda f: paint_training(f, study, training))):
        blocks.append(("picture", image, "training", "Cross-entropy and KL on the training text"))
    blocks += [("heading", "By sub-corpus"), ("table", sub_corpus_rows(study))]
    for folder in pair_folders(study):
        blocks.append(("heading", f"Minimal pairs of {folder}, by field"))
        if image := picture(11, 4, lambda f, d=folder: paint_fields(f, study, d)):
            blocks.append(("picture", image, f"fields-{folder}", f"{folder} by field"))
        blocks.append(("table", field_rows(study, folder)))
    if data := finetuned(study):
        blocks += [("heading", "Fine-tuned"), ("text", FINETUNED)]
        width = min(11, 4 + 1.4 * len(data["tasks"]))
        if image := picture(width, 4, lambda f: paint_tasks(f, study, data)):
            blocks.append(("picture", image, "finetuned", "Scores of the fine-tuned models"))
        blocks.append(("table", task_rows(data, study.models)))
    return [*blocks, *sample_blocks(study)]


DIFFERENCES = (
    "Nats per token on the reported dev text; below 0 the first is better. Intervals of 95 %: a "
    "paired t over seeds; and for these seeds a bootstrap of blocks of at most about 500 words "
    "within each sub-corpus. Plain: every token counts alike. Scaled: each model at the one "
    "temperature that suits it best on other text. HOLDS: the first is better with every seed, and "
    "both intervals are below 0, and for a student against the control the mean is 0.02 or more. "
    "REVERSED: both are above 0. CALIBRATION: what holds goes away at the fitted temperatures."
)
PAIR_DIFFERENCES = (
    "Points of accuracy, the mean over files; above 0 the first is better. The interval of 95 % is "
    "over draws of the files, for these seeds."
)
FINETUNED = (
    "Each model with a classification head, trained on each task (finetune.py). In percent, on the "
    "valid part, which also chose the evaluation that is reported, as in BabyLM's pipelines; "
    "majority: always the class that is most frequent in the train part. In brackets an interval "
    "of 95 %: over seeds, or with one seed over texts. mcc is Matthews' correlation."
)
LEAD_AND_GAP = (
    "student - control = gap - lead. The lead is how far whoever taught is ahead of the control, "
    "the gap how far the student stays behind whoever taught it. Teachers count with the "
    "checkpoint that taught."
)


def provenance(study, command):
    """A text that says what wrote the report, and where and with what the models were scored."""
    parts = [f"Report: `{command}`, commit {commit()}, {datetime.date.today()}."]
    for key, what in (("commit", "commit"), ("machine", "machine"), ("torch", "torch")):
        found = {str(result[key]) for result in study.every_result() if key in result}
        if found:
            parts.append(f"Models, {what}: {', '.join(sorted(found))}.")
    return " ".join(parts)


def explanation(study):
    """A text that says what the columns of the main table are."""
    lines = [
        f"CE: cross-entropy in nats per token. Dev CE is of {study.text}, weighted by sub-corpus "
        "as in the training text; plain, every token counts alike. Train CE: the last that "
        "training logged, on text it has seen, with dropout where there is any. Seconds: training "
        "alone. An ensemble is the mean of its members' logits."
    ]
    if any_scaled(study):
        lines.append("Temperature: what suits the model best on the other dev text.")
    if any(record_key(study, name) in PUBLISHED_BLIMP for name in study.models):
        lines.append(
            "On record: mean over files that others measured at this size with ten million words "
            "(leahphw/babylm, BabyLM 2024)."
        )
    return " ".join(lines)


def sample_blocks(study):
    """How each model goes on from the same prompts, with the first seed."""
    results = {name: runs[0] for name in study.models if (runs := study.results(name))}
    prompts = [p for result in results.values() for p in result.get("samples", {})]
    blocks = [("heading", "Samples")] if prompts else []
    for prompt in dict.fromkeys(prompts):
        rows = [[f"“{prompt} ...”", "goes on"]]
        for name, result in results.items():
            if prompt in result.get("samples", {}):
                text = " ".join(result["samples"][prompt].split()).replace("|", "/")
                rows.append([study.models[name], text])
        blocks.append(("table", rows))
    return blocks


def as_markdown(blocks, out):
    """The report as Markdown; its pictures are written into the folder `out`."""
    lines = []
    for i, (kind, content, *details) in enumerate(blocks):
        if kind == "heading":
            lines.append(f"{'#' * (1 + (i > 0))} {content}")
        elif kind == "text":
            lines.append(content)
        elif kind == "list":
            lines += [f"- {item}" for item in content]
        elif kind == "table":
            lines += markdown(content)
        elif kind == "lines":
            lines += ["```", *content, "```"]
        else:
            name, title = details
            with atomic_write(out / f"{name}.png") as file:
                file.write(content)
            lines.append(f"![{title}]({name}.png)")
        lines.append("")
    return "\n".join(lines)


def as_html(blocks):
    """The report as one page that needs nothing else."""
    title = html.escape(blocks[0][1])
    body = []
    for i, (kind, content, *details) in enumerate(blocks):
        if kind == "heading":
            level = 1 + (i > 0)
            body.append(f"<h{level}>{html.escape(content)}</h{level}>")
        elif kind == "text":
            body.append(f"<p>{inline_html(content)}</p>")
        elif kind == "list":
            items = "".join(f"<li>{inline_html(item)}</li>" for item in content)
            body.append(f"<ul>{items}</ul>")
        elif kind == "table":
            body.append(table_html(content))
        elif kind == "lines":
            body.append("<pre>" + html.escape("\n".join(content)) + "</pre>")
        else:
            data = base64.b64encode(content).decode()
            body.append(f'<img alt="{html.escape(details[1])}" src="data:image/png;base64,{data}">')
    return PAGE.format(title=title, body="\n".join(body))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 68rem;
  padding: 0 1rem }}
h1, h2 {{ line-height: 1.2; margin-top: 2rem }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #e2e2e2; text-align: right;
  font-variant-numeric: tabular-nums }}
th:first-child, td:first-child {{ text-align: left }}
td {{ white-space: nowrap }}
td.long {{ white-space: normal; text-align: left }}
img {{ max-width: 100%; height: auto; margin: 1rem 0 }}
code, pre {{ font-size: 13px; background: #f5f5f5; padding: .1rem .3rem }}
pre {{ overflow-x: auto; padding: 1rem }}
</style></head><body>
{body}
</body></html>
"""


def inline_html(text):
    """Escaped text in which `code` and **bold** are what they say."""
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def table_html(rows):
    """A table; its first row is the heading."""
    heading, *body = rows
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) + "</tr>"]
    for row in body:
        cells = [
            f'<td class="long">{html.escape(cell)}</td>'
            if len(cell) > 60
            else f"<td>{html.escape(cell)}</td>"
            for cell in row
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def as_json(study, command):
    """The report as plain data: all that is kept of the models, and how they differ."""
    return {
        "recipe": study.name,
        "command": command,
        "commit": commit(),
        "date": str(datetime.date.today()),
        "findings": findings(study),
        "models": study.models,
        "teachers": study.teachers,
        "results": {
            str(seed): {
                name: {k: v for k, v in result.items() if k != "samples"} for name, result in found.items()
            }
            for seed, found in study.seeds.items()
        },
        "differences": [
            {
                "one": one,
                "other": other,
                "way": way,
                "verdict": judged(study, one, other),
                **dataclasses.asdict(difference),
            }
            for (one, other), found in study.comparisons.items()
            for way, difference in found.items()
        ],
    }


def write_report(study, out, command):
    """Writes report.md with its pictures, report.json and report.html into the folder `out`.

    Returns the lines for the screen: the table of results and the findings. Raises `UserError`
    where a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    blocks = report_blocks(study, command)
    write_text(out / "report.md", as_markdown(blocks, out))
    write_text(out / "report.html", as_html(blocks))
    write_json(out / "report.json", as_json(study, command))
    written = f"\nwritten: {out / 'report.md'}, report.html, report.json"
    return [*aligned(result_rows(study)), "", *findings(study), written]
