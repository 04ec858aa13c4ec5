"""Fine-tuning a classifier for an epoch: ours beside transformers' Trainer.

    python -m benchmarks.finetune --model llama-16m

ours             finetune.py's loop: batches of texts of like length
trainer          transformers' Trainer with dynamic padding, to the longest text of each batch
trainer_grouped  the same, its batches of texts of like length too
trainer_full     with every text padded to 128 tokens, as BabyLM's pipeline of 2023 pads

The same texts of 8 to 128 random tokens for all, 42 on average, the same batch size, AdamW, linear
schedule and clipping. Needs the package accelerate, which Trainer needs.
"""

import argparse
import inspect
import sys
from pathlib import Path

import torch

from benchmarks.contest import compete, median, serve
from benchmarks.findings import (
    Findings,
    benchmark_parser,
    print_errors,
    print_table,
)
from export_hf import hf_config, hf_weights
from finetune import ClassificationObjective, ExampleStream
from finetuning.classifier import as_classifier
from finetuning.tasks import EncodedExamples
from model import PRESETS, architecture, build_model
from train import TrainStep, build_optimizer, learning_rate
from training.device import autocast_for, choose_device, choose_precision
from training.io import run_program

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = ("ours", "trainer", "trainer_grouped", "trainer_full")
LONGEST, VOCABULARY, RATE = 128, 16_000, 5e-5


def examples(count):
    """So many texts of two classes, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(3.6 + 0.6 * torch.randn(count, generator=generator))
    lengths = lengths.long().clamp(8, LONGEST).tolist()
    ids = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return EncodedExamples(ids, torch.randint(2, (count,), generator=generator), 0, 0)


def our_epoch(model, found, args, device, precision):
    """A function that trains for an epoch, as finetune.py does."""
    objective = ClassificationObjective(model).to(device).train()
    stream = ExampleStream(found, args.batch_size, seed=0)
    step = TrainStep(objective, build_optimizer(objective, 0.0), autocast_for(device, precision))
    epochs = iter(range(1 << 30))

    def work():
        start = next(epochs) * stream.num_batches
        for i in range(stream.num_batches):
            rate = learning_rate(i, stream.num_batches, RATE, 0, schedule="linear")
            step(stream(start + i).to(device), rate)

    return work


def their_epoch(model, found, args, device, precision, variant):
    """The same by transformers' Trainer."""
    import transformers

    full, grouped = variant == "trainer_full", variant == "trainer_grouped"
    transformers.utils.logging.set_verbosity_error()
    described = hf_config(model, architecture(model.config), ["0", "1"])
    twin = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**described)
    )
    twin.load_state_dict(hf_weights(architecture(model.config), model.state_dict()))
    rows = [{"input_ids": ids, "labels": int(label)} for ids, label in zip(found.ids, found.labels)]

    def collate(batch):
        longest = LONGEST if full else max(len(row["input_ids"]) for row in batch)
        rows = [row["input_ids"] for row in batch]
        return {
            "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    grouping = {}
    if grouped:  # its name before transformers 5, and since
        named = "group_by_length" in inspect.signature(transformers.TrainingArguments).parameters
        grouping = {"group_by_length": True} if named else {"train_sampling_strategy": "group_by_length"}
    arguments = transformers.TrainingArguments(
        output_dir=str(ROOT / "runs" / "benchmark"),
        num_train_epochs=1,
        learning_rate=RATE,
        per_device_train_batch_size=args.batch_size,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **grouping,
    )
    trainer = transformers.Trainer(twin, arguments, data_collator=collate, train_dataset=rows)
    return trainer.train


def be_contestant(args, device):
    """What a process does that this program has started for a variant."""
    torch.manual_seed(0)
    precision = choose_precision(args.precision, device)
    model = as_classifier(build_model(args.model, VOCABULARY), 2)
    given = model, examples(args.examples), args, device, precision
    work = our_epoch(*given) if args.worker == "ours" else their_epoch(*given, args.worker)
    serve(work, work, device)


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", choices=PRESETS, default="llama-16m", help="preset (default: llama-16m)")
    parser.add_argument("--examples", type=int, default=256, help="of an epoch (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples (default: 16)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="(default: auto)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each contestant (default: 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="(default: all)")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = choose_device(args.device)
    if args.worker:
        be_contestant(args, device)
        return
    findings, found = Findings(args, device), examples(args.examples)
    precision = choose_precision(args.precision, device)
    print(
        f"{args.model}, {precision}, {args.examples} texts of {found.num_tokens:,} tokens, "
        f"batches of {args.batch_size}",
        flush=True,
    )
    base = [
        sys.executable,
        "-m",
        "benchmarks.finetune",
        "--device",
        str(device),
        "--model",
        args.model,
    ]
    base += ["--examples", str(args.examples), "--batch-size", str(args.batch_size)]
    base += ["--precision", precision, "--worker"]

    def judge(_name, result):
        seconds = median(result)
        memory = {key: result[key] for key in ("peak_gb", "own_gb") if key in result}
        speeds = {"examples_per_second": args.examples / seconds}
        return speeds | {"tokens_per_second": found.num_tokens / seconds} | memory

    commands = {variant: [*base, variant] for variant in args.variants}
    rates = compete(findings, commands, args.rounds, device, judge)
    rows = [["variant", "examples/s", "tokens/s", "ratio", "peak GiB"]]
    first = next(iter(rates.values())).get("examples_per_second")
    for name, finding in rates.items():
        if "error" not in finding:
            speed = finding["examples_per_second"]
            rows.append(
                [
                    name,
                    f"{speed:.1f}",
                    f"{finding['tokens_per_second']:,.0f}",
                    f"{speed / first:.2f}" if first else "-",
                    f"{finding['peak_gb']:.2f}",
                ]
            )
    print_table(rows)
    print_errors(rates)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
