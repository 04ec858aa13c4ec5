"""Run BabyLM's own pipeline on an exported model, and compare its files with ours.

    python -m benchmarks.official PIPELINE

PIPELINE is the folder `strict` of a checkout of github.com/babylm-org/babylm-eval, whose packages
(transformers, pandas, datasets, scikit-learn, statsmodels) must be installed. The model is tiny. The
data are invented, in the forms of the official files: those may not be handed on. AoA is not run: it
needs revisions of a model on the Hugging Face hub. Sizes, which collate_preds compares with those of
the official files, are not compared.
"""

import argparse
import csv
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.measurement import print_table
from make_toy_corpus import write_json_lines
from training.io import UserError, run_program
from training.logger import commit

TASKS = {  # {folder of the full evaluation: the pipeline's name of its task}
    "blimp_filtered": "blimp",
    "supplement_filtered": "blimp",
    "ewok_filtered": "ewok",
    "comps": "comps",
    "entity_tracking": "entity_tracking",
    "wug_adj_nominalization": "wug_adj",
    "wug_past_tense": "wug_past",
}
OURS = ("blimp_filtered", "supplement_filtered", "ewok_filtered", "comps")
COMPS = ("comps_base", "comps_wugs", "comps_wugs_dist-before", "comps_wugs_dist-in-between")
GLUE = ("boolq", "cola", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")
GLUE_FILES = {"train": "train", "valid": "valid", "predict": "valid"}
RESPONSES = "RTfirstfix RTfirstpass RTgopast RTrightbound self_paced_reading_time".split()
RESPONSES += "ELAN LAN N400 P600 EPNP PNP".split()
PAIRS = 60  # of each file
ZERO_SHOT = Path("model", "main", "zero_shot", "causal")  # in a folder of results
COLLATE = """
import argparse, pathlib, sys
from evaluation_pipeline import collate_preds as collate
collate._check_size = collate._check_size_aoa = lambda *args, **options: True
collate.collate_preds(argparse.Namespace(
    model_path_or_name=pathlib.Path("model"), results_dir=pathlib.Path(sys.argv[1]), revision_name="main",
    backend="causal", fast=False, track="strict-small", multimodal=False))
"""


# ---- invented data


def write_data(out, toy):
    """Writes a folder for each of the `TASKS`, of GLUE, and of reading times from the toy corpus."""
    generator = random.Random(0)
    for path in sorted((toy / "pairs").glob("*.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()[:PAIRS]]
        pairs = [(entry["sentence_good"], entry["sentence_bad"]) for entry in entries]
        write_json_lines(out / "blimp_filtered" / path.name, entries)
        lines = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
        write_json_lines(out / "supplement_filtered" / path.name, lines)
        about = {"Domain": path.stem, "ContextType": "toy", "ContextDiff": "toy", "TargetDiff": "toy"}
        lines = [
            {"Context1": context, "Context2": bad, "Target1": good, "Target2": bad} | about
            for (good, bad), (context, _) in pairwise(pairs)
        ]
        write_json_lines(out / "ewok_filtered" / path.name, lines)
    for name in COMPS:
        lines = [
            {
                "prefix_acceptable": good,
                "prefix_unacceptable": bad,
                "property_phrase": generator.choice(pairs)[0],
            }
            for good, bad in generator.sample(pairs, 40)
        ]
        write_json_lines(out / "comps" / f"{name}.jsonl", lines)
    for name in ("regular", "ambiref", "move_contents"):
        lines = [
            {"input_prefix": good, "options": [f" {good}", f" {bad}"], "numops": i % 6}
            for i, (good, bad) in enumerate(pairs)
        ]
        write_json_lines(out / "entity_tracking" / f"{name}.jsonl", lines)
    for name in ("wug_adj_nominalization", "wug_past_tense"):
        lines = [{"sentences": "\t".join(pair), "ratio": generator.random()} for pair in pairs]
        write_json_lines(out / name / f"{name}.jsonl", lines)
    for name in GLUE:
        for part in ("train", "valid"):
            lines = (toy / "tasks" / f"acceptable.{part}.jsonl").read_text().splitlines()
            write_json_lines(out / "glue_filtered" / f"{name}.{part}.jsonl", map(json.loads, lines))
    write_reading(out / "reading" / "reading_data.csv", [good for good, _ in pairs], generator)


def write_reading(path, sentences, generator):
    """Writes reading times that have nothing to do with the words."""
    rows = []
    for words in map(str.split, sentences):
        for i in range(2, len(words)):
            row = {"item": " ".join(words[:i]), "word": words[i], "length": len(words[i])}
            row |= {"prev_item": " ".join(words[: i - 1]), "prev_word": words[i - 1], "context_length": i}
            row |= {"prev_length": len(words[i - 1]), "Subtlex_log10": generator.random()}
            rows.append(row | {response: generator.random() for response in RESPONSES})
    path.parent.mkdir()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---- the programs


def official(pipeline, *arguments):
    """Runs Python in the pipeline's folder. Raises `UserError` if that fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=pipeline, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{arguments[1]}: {done.stderr.strip().splitlines()[-1]}")


def ours(command, work):
    """Runs a program of this project; WORK in the command is the folder `work`."""
    name, *arguments = [word.replace("WORK", str(work)) for word in command.split()]
    if run_program(lambda: importlib.import_module(name).main(arguments)):
        raise UserError(f"{command} failed")


def run_all(pipeline, work):
    """Makes model and data in the folder `work`, and runs the pipeline and our programs on them."""
    ours("make_toy_corpus --out WORK/toy --words 20000", work)
    ours("tokenize_corpus --train WORK/toy/train --dev WORK/toy/dev --out WORK/data --vocab-size 500", work)
    ours("train --model llama-tiny-student --steps 40 --data WORK/data --out WORK/run --device cpu", work)
    ours("export_hf WORK/run/best.pt --out WORK/model", work)
    data, results = work / "full_eval", work / "results"
    write_data(data, work / "toy")
    common = ("--model_path_or_name", work / "model", "--backend", "causal", "--output_dir", results)
    for folder, task in TASKS.items():
        options = ("--task", task, "--data_path", data / folder, "--save_predictions")
        official(pipeline, "-m", "evaluation_pipeline.sentence_zero_shot.run", *common, *options)
    reading = ("--data_path", data / "reading" / "reading_data.csv")
    official(pipeline, "-m", "evaluation_pipeline.reading.run", *common, *reading)
    ours(
        "finetune WORK/run/best.pt --tasks WORK/full_eval/glue_filtered --epochs 1 --device cpu "
        "--out WORK/finetune --predictions WORK/results/model/main",
        work,
    )
    glue = data / "glue_filtered"
    files = [f"--{part}_data={glue / f'cola.{split}.jsonl'}" for part, split in GLUE_FILES.items()]
    options = (
        "--task cola --num_labels 2 --num_epochs 1 --sequence_length 128 --take_final --padding_side left"
    )
    options += " --metrics accuracy --metric_for_valid accuracy"
    model = ("--model_name_or_path", work / "model", "--results_dir", work / "finetuned")
    official(pipeline, "-m", "evaluation_pipeline.finetune.run", *model, *files, *options.split())
    (results / ZERO_SHOT / "AoA_word").mkdir()
    (results / ZERO_SHOT / "AoA_word" / "surprisal.json").write_text("{}")
    shutil.copytree(results, work / "ours")
    for folder in OURS:
        (work / "ours" / ZERO_SHOT / TASKS[folder] / folder / "predictions.json").unlink()
    ours(
        f"evaluate WORK/run/best.pt --pairs {' '.join(f'WORK/full_eval/{folder}' for folder in OURS)} "
        "--data WORK/data --convention 2025 --device cpu --json WORK/scores.json "
        "--predictions WORK/ours/model/main",
        work,
    )


def compare(pipeline, work):
    """Returns rows of a table, and True if collate_preds makes the same of both folders of results."""
    scores = json.loads((work / "scores.json").read_text())["checkpoints"][0]["pairs"]
    rows = [["task", "official", "evaluate.py", "predictions", "equal"]]
    for folder, task in TASKS.items():
        place = ZERO_SHOT / task / folder
        report = (work / "results" / place / "best_temperature_report.txt").read_text()
        row = [folder, re.findall(r"-?\d+\.\d+", report)[-1], "-", "-", "-"]
        if folder in OURS:
            theirs, own = (
                json.loads((work / root / place / "predictions.json").read_text())
                for root in ("results", "ours")
            )
            pairs = [
                pair for g in theirs for pair in zip(*(side[g]["predictions"] for side in (theirs, own)))
            ]
            accuracy = scores[str(work / "full_eval" / folder)]["accuracy_over_files"]
            row[2:] = f"{100 * accuracy:.2f}", str(len(pairs)), str(sum(a == b for a, b in pairs))
        rows.append(row)
    theirs, own = (
        json.loads((work / root / "model/main/finetune/cola/predictions.json").read_text())["cola"][
            "predictions"
        ]
        for root in ("finetuned", "results")
    )
    same_ids = [
        a["id"] == b["id"] and {a["pred"], b["pred"]} <= {0, 1} for a, b in zip(theirs, own, strict=True)
    ]
    rows.append(["fine-tuning: ids alone", "-", "-", str(len(theirs)), str(sum(same_ids))])
    collated = []
    for root in ("results", "ours"):
        official(pipeline, "-c", COLLATE, work / root)
        path = work / root / "model" / "all_full_preds_and_fast_scores_causal.json"
        collated.append(json.loads(path.read_text()))
    return rows, collated[0] == collated[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="the folder with evaluation_pipeline/")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        run_all(args.pipeline, Path(work))
        rows, same = compare(args.pipeline, Path(work))
    print(f"\ncommit {commit()}")
    print_table(rows)
    print(f"what collate_preds makes of both: {'equal' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
