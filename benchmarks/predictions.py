"""Compare the predictions of fine-tuned checkpoints with transformers' on the exported folder.

    python finetune.py runs/control/best.pt --tasks glue_filtered --only cola rte --keep
    python -m benchmarks.predictions runs/finetune/control --tasks glue_filtered

For each checkpoint TASK/seed-N/best.pt, which --keep keeps, it exports the classifier as export_hf.py
does. Then transformers reads the folder and the task's validation texts. All in float32.
"""

import sys
import tempfile
from pathlib import Path

import torch

import export_hf
from benchmarks.measurement import Results, benchmark_parser, print_table
from finetune import predict
from finetuning.classifier import load_classifier
from finetuning.tasks import encode, read_tasks
from tokenizer import Tokenizer
from training.device import autocast_for, choose_device
from training.io import UserError, run_program

BATCH_SIZE = 32  # texts


def our_logits(path, examples, device):
    """Returns a checkpoint's logits (N, classes), as finetune.py computes them, and its `max_length`."""
    model, checkpoint = load_classifier(path)
    max_length = checkpoint["config"]["sequence_length"]
    encoded = encode(examples, Tokenizer.of_checkpoint(checkpoint, path), max_length)
    return predict(model.to(device), encoded, autocast_for(device, "fp32")), max_length


@torch.no_grad()
def their_logits(path, examples, max_length, device):
    """Returns the logits of transformers, with its model, its tokenizer and its padding."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        export_hf.export(path, exported)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval().to(device)
    columns = [list(column) for column in zip(*examples.texts)]
    options = {"truncation": True, "max_length": max_length, "padding": True, "return_tensors": "pt"}
    logits = []
    for start in range(0, len(columns[0]), BATCH_SIZE):
        texts = [column[start : start + BATCH_SIZE] for column in columns]
        logits.append(model(**tokenizer(*texts, **options).to(device)).logits.cpu())
    return torch.cat(logits)


def main(argv=None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("runs", type=Path, metavar="DIR", help="a checkpoint's runs: OUT/NAME")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="folder of tasks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these tasks (default: all)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    results = Results(args, device)
    rows = [["task", "run", "texts", "largest difference of a logit", "different predictions"]]
    for task in read_tasks(args.tasks, args.only):
        for path in sorted(args.runs.glob(f"{task.name}/*/best.pt")):
            for name, examples in task.valid.items():
                ours, max_length = our_logits(path, examples, device)
                theirs = their_logits(path, examples, max_length, device)
                largest = (ours - theirs).abs().max().item()
                different = (ours.argmax(1) != theirs.argmax(1)).sum().item()
                result = {"texts": len(ours), "largest": largest, "others": different}
                results.add(f"{name}/{path.parent.name}", result)
                rows.append([name, path.parent.name, str(len(ours)), f"{largest:.1e}", str(different)])
    if len(rows) == 1:
        raise UserError(f"{args.runs} holds no TASK/seed-N/best.pt: fine-tune with --keep")
    print_table(rows)
    results.finish()


if __name__ == "__main__":
    sys.exit(run_program(main))
