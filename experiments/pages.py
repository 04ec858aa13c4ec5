"""The report of an experiment as Markdown, as one HTML file, and as JSON."""

import base64
import dataclasses
import datetime
import html

from experiments import plots, tables
from experiments.findings import finetuned_scores, pair_folders, verdict_of
from finetuning.tables import task_rows
from training.io import aligned, atomic_write, markdown, printable, write_json, write_text
from training.logger import commit

DIFFERENCES = (
    "Nats per token on the test text; below 0 the first is better. 95 % intervals: a paired t over "
    "seeds; and for these seeds a bootstrap of blocks of about 500 words within each sub-corpus. "
    "Plain: every token counts alike. Scaled: each model at the temperature that suits it best on "
    "the validation text. HOLDS: the first is better with every seed, both intervals are below 0, "
    "and the mean of a student against the control is 0.02 or more. REVERSED: both intervals are "
    "above 0. CALIBRATION: what holds goes away at the fitted temperatures."
)
PAIR_DIFFERENCES = (
    "Points of accuracy, the mean over files; above 0 the first is better. 95 % intervals over "
    "bootstrap resamples of the files, for these seeds."
)
LEAD_AND_GAP = (
    "student - control = gap - lead. Lead: how far the teacher, or the ensemble, is ahead of the "
    "control. Gap: how far the student stays behind it. Teachers count with the checkpoint that "
    "taught."
)
RESULTS = (
    "CE: cross-entropy in nats per token. Test CE is of {text}, weighted by sub-corpus as in the "
    "training text; plain, every token counts alike. Train CE: the last that training logged, on text "
    "it has seen, with dropout where there is any. Seconds: training alone. Temperature: what suits "
    "the model best on the validation text. An ensemble is the mean of its members' logits. Minimal "
    "pairs: accuracy, the mean over files."
)
FINETUNED = (
    "Each model with a classification head, trained on each task (finetune.py). In percent on the "
    "valid part, which also chose the evaluation that is reported, as in BabyLM's pipelines. "
    "Majority: the score of the class that is most frequent in the train part. In brackets a 95 % "
    "interval: over seeds, or with one seed over texts. mcc is Matthews' correlation."
)


def report_blocks(study, command):
    """The report as a list of (kind, content): heading, text, table (rows), or picture.

    The content of a picture is (name, title, PNG bytes or None).
    """
    num_seeds = len(study.seeds)
    title = f"Language models compared: recipe {study.name}, {num_seeds} seed{'s' * (num_seeds > 1)}"
    blocks = [("heading", title)]
    blocks.append(("picture", ("differences", "Cross-entropy minus the control's", plots.differences(study))))
    blocks += [("text", line) for line in (study.about, *caveats(study)) if line]
    blocks.append(("table", tables.conclusion_rows(study)))
    blocks += section("Models", tables.result_rows(study), RESULTS.format(text=study.text))
    blocks.append(("text", provenance(study, command)))
    blocks += section("Differences", tables.difference_rows(study), DIFFERENCES)
    blocks += section("Differences in minimal pairs", tables.pair_difference_rows(study), PAIR_DIFFERENCES)
    blocks += section("Lead and gap", tables.lead_rows(study), LEAD_AND_GAP)
    if plots.drawn_models(study):
        image = plots.picture(plots.WIDTH, 3.8, lambda figure: plots.paint_curves(figure, study))
        title = "Cross-entropy on validation text by epochs of training"
        blocks += [("heading", "Learning curves"), ("picture", ("curves", title, image))]
    blocks += section("By sub-corpus", tables.sub_corpus_rows(study))
    for folder in pair_folders(study):
        blocks.append(("heading", f"Minimal pairs of {folder}, by field"))
        blocks.append(("picture", (f"fields-{folder}", f"{folder} by field", plots.fields(study, folder))))
        blocks.append(("table", tables.field_rows(study, folder)))
    if scores := finetuned_scores(study):
        blocks += section("Fine-tuned", task_rows(scores, study.models), FINETUNED)
        image = plots.picture(plots.WIDTH, 4, lambda figure: plots.paint_tasks(figure, study, scores))
        blocks.append(("picture", ("finetuned", "Scores of the fine-tuned models", image)))
    return [*blocks, *sample_blocks(study)]


def section(title, rows, note=""):
    """The blocks of a table with its heading and note; none if the table has no row."""
    if len(rows) < 2:
        return []
    return [("heading", title), *([("text", note)] if note else []), ("table", rows)]


def caveats(study):
    """Lines that a reader must know beside the numbers."""
    if study.control_gain and study.control:
        yield (
            f"A better tuned control gains {study.control_gain:.4f} nats: they are taken off each "
            f"student's lead on {study.models[study.control]}."
        )
    for name, seed in study.mismatched_teachers():
        yield (
            f"{study.models[name]}, seed {seed}: its teachers were trained again since, and their "
            "rows here are of the new instances."
        )
    if (scores := finetuned_scores(study)) and scores["left_out"]:
        yield f"{scores['left_out']} results of fine-tuning, with other files or options, are left out."


def provenance(study, command):
    """The command and commit of the report, and where and with what the models were scored."""
    lines = [f"Report: {command}, commit {commit()}, {datetime.date.today()}."]
    for key in ("commit", "machine", "torch"):
        if values := {str(result[key]) for result in study.every_result() if key in result}:
            lines.append(f"Models, {key}: {', '.join(sorted(values))}.")
    return " ".join(lines)


def sample_blocks(study):
    """Each model's continuations of the same prompts, with the first seed."""
    results = {name: runs[0] for name in study.models if (runs := study.results(name))}
    prompts = [prompt for result in results.values() for prompt in result.get("samples", {})]
    blocks = [("heading", "Samples")] if prompts else []
    for prompt in dict.fromkeys(prompts):
        rows = [[f"“{prompt} ...”", "goes on"]]
        for name, result in results.items():
            if prompt in result.get("samples", {}):
                rows.append([study.models[name], " ".join(result["samples"][prompt].split())])
        blocks.append(("table", rows))
    return blocks


def escape_markdown(text):
    """The text as Markdown that shows it as it is."""
    text = printable(text)
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("](", "]\\("), ("![", "!\\[")):
        text = text.replace(mark, escaped)
    return text


def as_markdown(blocks, out):
    """The report as Markdown; its pictures are written into the folder `out`."""
    lines = []
    for i, (kind, content) in enumerate(blocks):
        if kind == "heading":
            lines.append(f"{'##' if i else '#'} {escape_markdown(content)}")
        elif kind == "text":
            lines.append(escape_markdown(content))
        elif kind == "table":
            lines += markdown([[escape_markdown(cell) for cell in row] for row in content])
        else:
            name, title, image = content
            if image is None:
                continue
            with atomic_write(out / f"{name}.png") as file:
                file.write(image)
            lines.append(f"![{title}]({name}.png)")
        lines.append("")
    return "\n".join(lines)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
td {{ padding: .3rem .5rem; border-bottom: 1px solid #e2e2e2; text-align: right }}
td:first-child {{ text-align: left }}
tr:first-child {{ font-weight: 600 }}
img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""


def escape_html(text):
    """The text as HTML that shows it as it is."""
    return html.escape(printable(text))


def as_html(blocks):
    """The report as one page that needs no other file."""
    body = []
    for i, (kind, content) in enumerate(blocks):
        if kind == "heading":
            level = 2 if i else 1
            body.append(f"<h{level}>{escape_html(content)}</h{level}>")
        elif kind == "text":
            body.append(f"<p>{escape_html(content)}</p>")
        elif kind == "table":
            rows = ["".join(f"<td>{escape_html(cell)}</td>" for cell in row) for row in content]
            body.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        elif content[2] is not None:
            data = base64.b64encode(content[2]).decode()
            body.append(f'<img alt="{escape_html(content[1])}" src="data:image/png;base64,{data}">')
    return PAGE.format(title=escape_html(blocks[0][1]), body="\n".join(body))


def as_json(study, command):
    """The report as plain data: all results but for samples, and all differences."""
    return {
        "recipe": study.name,
        "command": command,
        "commit": commit(),
        "date": str(datetime.date.today()),
        "findings": [" ".join(filter(None, row)) for row in tables.conclusion_rows(study)[1:]],
        "models": study.models,
        "teachers": study.teachers,
        "results": {
            str(seed): {
                name: {key: value for key, value in result.items() if key != "samples"}
                for name, result in results.items()
            }
            for seed, results in study.seeds.items()
        },
        "differences": [
            {
                "one": name,
                "other": baseline,
                "way": variant,
                "verdict": verdict_of(study, name, baseline),
                **dataclasses.asdict(difference),
            }
            for (name, baseline), variants in study.comparisons.items()
            for variant, difference in variants.items()
        ],
    }


def write_report(study, out, command):
    """Writes report.md with its pictures, report.json and report.html into the folder `out`.

    Returns the lines for the screen: the table of results and the conclusions. Raises `UserError`
    if a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    blocks = report_blocks(study, command)
    write_text(out / "report.md", as_markdown(blocks, out))
    write_text(out / "report.html", as_html(blocks))
    write_json(out / "report.json", as_json(study, command))
    lines = [*aligned(tables.result_rows(study)), "", *aligned(tables.conclusion_rows(study))]
    lines = [printable(line) for line in (*lines, *caveats(study))]
    if all(content[2] is None for kind, content in blocks if kind == "picture"):
        lines.append("no pictures: they need matplotlib (pip install matplotlib)")
    return [*lines, f"\nwritten: {out / 'report.md'}, report.html, report.json"]
