"""Predictions of fine-tuned checkpoints: ours beside transformers' on the exported folder.

    python finetune.py runs/control/best.pt --tasks glue_filtered --only cola rte --keep
    python -m benchmarks.predictions runs/finetune/control --tasks glue_filtered

Each classifier that is there (TASK/seed-N/best.pt, which --keep keeps) is exported as export_hf.py
does it, and transformers reads the folder and the texts of valid. In float32.
"""

import sys
import tempfile
from pathlib import Path

import torch

import export_hf
from benchmarks.findings import Findings, benchmark_parser, print_table
from data import Tokenizer
from finetune import predict
from finetuning.classifier import load_classifier
from finetuning.tasks import encode, read_tasks
from training.device import autocast_for, choose_device
from training.io import UserError, run_program

ROWS = 32  # texts of a batch


def our_logits(path, examples, device):
    """Logits (N, classes) of a checkpoint, as finetune.py computes them, and `max_length`."""
    model, checkpoint = load_classifier(path)
    max_length = checkpoint["config"]["sequence_length"]
    encoded = encode(examples, Tokenizer.of_checkpoint(checkpoint, path), max_length)
    return predict(model.to(device), encoded, autocast_for(device, "fp32")), max_length


@torch.no_grad()
def their_logits(path, examples, max_length, device):
    """The same by transformers: its model, its tokenizer, its padding."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        export_hf.export(path, Path(folder) / "hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder) / "hf")
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(Path(folder) / "hf").eval().to(device)
    columns = [list(column) for column in zip(*examples.texts)]
    options = {"truncation": True, "max_length": max_length, "padding": True}
    parts = []
    for start in range(0, len(columns[0]), ROWS):
        rows = [column[start : start + ROWS] for column in columns]
        batch = tokenizer(*rows, **options, return_tensors="pt").to(device)
        parts.append(model(**batch).logits.cpu())
    return torch.cat(parts)


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument("runs", type=Path, metavar="DIR", help="a checkpoint's runs: OUT/NAME")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="folder of tasks")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these tasks (default: all of the folder)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    findings = Findings(args, device)
    rows = [["task", "run", "texts", "largest difference of a logit", "other predictions"]]
    for task in read_tasks(args.tasks, args.only):
        for path in sorted(args.runs.glob(f"{task.name}/*/best.pt")):
            for name, examples in task.valid.items():
                ours, max_length = our_logits(path, examples, device)
                theirs = their_logits(path, examples, max_length, device)
                largest = (ours - theirs).abs().max().item()
                others = (ours.argmax(1) != theirs.argmax(1)).sum().item()
                run = path.parent.name
                found = {"texts": len(ours), "largest": largest, "others": others}
                findings.add(f"{name}/{run}", found)
                rows.append([name, run, str(len(ours)), f"{largest:.1e}", str(others)])
    if len(rows) == 1:
        raise UserError(f"{args.runs} holds no TASK/seed-N/best.pt: fine-tune with --keep")
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
