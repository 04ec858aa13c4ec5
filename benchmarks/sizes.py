"""What each preset takes on a GPU, derived and not measured: memory and hours.

    python -m benchmarks.sizes

Memory is the estimate of `training/memory.py` for bf16 and compiled layers. Hours are the step's
arithmetic at 40 % of what the data sheet promises (165 TFLOP/s for a card of 24 GB, an RTX 4090;
989 for one of 141 GB, an H200), over the epochs of the preset's recipe on ten million words. Both
are those of the preset alone: a student's teachers come on top.
"""

import argparse
import sys

from benchmarks.findings import print_table
from benchmarks.steps import flops_per_token
from model import PRESETS, build
from train import CrossEntropyObjective
from training.io import run_program
from training.memory import estimate
from training.plan import GIB

TOKENS = 13_700_000  # of ten million words, at 16,000 pieces
LENGTH = 128
SHARE = 0.4  # of the data sheet's operations
CARDS = {24: 165e12, 141: 989e12}  # {gigabytes: operations per second in bf16}
LEAST_PARAMETERS = 10_000_000  # smaller ones are for a CPU


def rows_of(name, preset):
    """The row of a preset; nothing for one that is not for a GPU."""
    model = build(preset.config)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters < LEAST_PARAMETERS:
        return []
    batch = preset.recipe.batch_size
    memory = estimate(CrossEntropyObjective(model), LENGTH, "bf16", compiled=True)
    cells = [name, f"{16 * parameters / GIB:.1f}", f"{memory.of(batch) / GIB:.1f} at {batch}"]
    flops = flops_per_token(preset.config, LENGTH, True) * TOKENS * preset.recipe.epochs
    for size, speed in CARDS.items():
        sequences = memory.sequences(batch, size * 10**9)
        cells += [str(sequences or "none"), f"{flops / (SHARE * speed) / 3600:.2f}"]
    return [cells]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    heading = ["preset", "GiB of state", "GiB in all at its batch"]
    heading += [f"{text} {size} GB" for size in CARDS for text in ("at a time,", "hours,")]
    print_table([heading, *(row for item in PRESETS.items() for row in rows_of(*item))])


if __name__ == "__main__":
    sys.exit(run_program(main))
