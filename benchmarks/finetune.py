"""Time an epoch of fine-tuning a classifier: ours beside transformers' Trainer.

    python -m benchmarks.finetune --model llama-16m

ours             finetune.py's loop: batches of texts of similar length
trainer          transformers' Trainer with dynamic padding, to the longest text of each batch
trainer_grouped  the same with batches of texts of similar length
trainer_full     the same with every text padded to 128 tokens, as BabyLM's pipeline of 2023 pads

All variants have the same texts of 8 to 128 random tokens (42 on average), batch size, AdamW,
clipping and precision. Trainer needs transformers 5 and the package accelerate.
"""

import functools
import itertools
import statistics
import sys
import tempfile

import torch

from benchmarks.measurement import Results, benchmark_parser
from benchmarks.steps import our_train_step
from benchmarks.workers import time_variants
from export_hf import hf_config, hf_weights
from finetune import ClassificationObjective, ExampleStream
from finetuning.classifier import as_classifier
from finetuning.tasks import EncodedExamples
from model import PRESETS, architecture, build_model
from training.device import choose_device, choose_precision
from training.io import run_program

VARIANTS = ("ours", "trainer", "trainer_grouped", "trainer_full")
LONGEST, VOCABULARY = 128, 16_000


def random_examples(count):
    """Returns `count` texts of two classes, the same in every worker."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(3.6 + 0.6 * torch.randn(count, generator=generator))
    lengths = lengths.long().clamp(8, LONGEST).tolist()
    ids = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return EncodedExamples(ids, torch.randint(2, (count,), generator=generator), 0, 0)


def our_epoch(model, examples, args, device):
    """Returns a function that trains for an epoch, with the batches and the step of finetune.py."""
    stream = ExampleStream(examples, args.batch_size, seed=0)
    objective = ClassificationObjective(model)
    step = our_train_step(objective, device, args.precision, compiled=False, graphed=False)
    steps = itertools.count()

    def epoch():
        for _ in range(stream.num_batches):
            step(stream(next(steps)).to(device))

    return epoch


def collate(rows, length=None):
    """Returns transformers' batch of rows, padded to `length` or to the longest of them."""
    texts = [row["input_ids"] for row in rows]
    length = length or max(map(len, texts))
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def trainer_epoch(model, examples, args, device, variant):
    """Returns a function that trains the same model for an epoch with transformers' Trainer."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    kind = architecture(model.config)
    config = transformers.AutoConfig.for_model(**hf_config(model, kind, ["0", "1"]))
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    classifier.load_state_dict(hf_weights(kind, model.state_dict()))
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        num_train_epochs=1,
        learning_rate=1e-4,
        per_device_train_batch_size=args.batch_size,
        bf16=args.precision == "bf16",
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="group_by_length" if variant == "trainer_grouped" else "random",
    )
    length = LONGEST if variant == "trainer_full" else None
    rows = [{"input_ids": ids, "labels": int(label)} for ids, label in zip(examples.ids, examples.labels)]
    trainer = transformers.Trainer(
        classifier, arguments, data_collator=lambda batch: collate(batch, length), train_dataset=rows
    )
    return trainer.train


def build_variant(args, device, examples, variant):
    """Returns an epoch of a variant, as a function, twice: the first one is the warm-up."""
    torch.manual_seed(0)
    model = as_classifier(build_model(args.model, VOCABULARY), 2)
    if variant == "ours":
        epoch = our_epoch(model, examples, args, device)
    else:
        epoch = trainer_epoch(model, examples, args, device, variant)
    return epoch, epoch


def main(argv=None):
    parser = benchmark_parser(__doc__, VARIANTS, rounds=3)
    add = parser.add_argument
    add("--model", choices=PRESETS, default="llama-16m", help="preset (default: llama-16m)")
    add("--examples", type=int, default=256, help="texts in an epoch (default: 256)")
    add("--batch-size", type=int, default=16, help="texts in a step (default: 16)")
    args = parser.parse_args(argv)
    device, examples = choose_device(args.device), random_examples(args.examples)
    args.precision = choose_precision(args.precision, device)
    results = Results(args, device)
    size = f"{args.examples} texts of {examples.num_tokens:,} tokens, batches of {args.batch_size}"
    print(f"{args.model}, {args.precision}, {size}", flush=True)

    def to_result(_variant, seconds):
        return {"examples_per_second": args.examples / statistics.median(seconds)}

    build_one = functools.partial(build_variant, args, device, examples)
    by_variant = time_variants(results, build_one, args.variants or VARIANTS, to_result)
    rows = [["variant", "examples/s", "peak GiB"]]
    for variant, result in by_variant.items():
        if "error" not in result:
            rows.append([variant, f"{result['examples_per_second']:.1f}", f"{result['peak_gb']:.2f}"])
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
