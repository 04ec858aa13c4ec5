"""Results of a benchmark: printed as tables, and written to a file as soon as each one is known."""

import argparse
import json
from pathlib import Path

import torch

from training.io import aligned
from training.logger import commit, machine


def benchmark_parser(description, variants=None, rounds=None):
    """Returns an argument parser with the options of all benchmarks, and those of variants and rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--results", metavar="FILE", help="write each result into this file as soon as it is known")
    add("--json", action="store_true", help="print all results as one JSON object in the last line")
    if variants:
        add("--variants", nargs="+", choices=variants, help="variants to time (default: all that fit)")
        add("--rounds", type=int, default=rounds, help=f"rounds of each variant (default: {rounds})")
        text = "precision of our variants (default: auto, which is bf16 if the chip multiplies it natively)"
        add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=text)
    return parser


class Results:
    """The results of a benchmark so far: `values` is {name: dict of numbers}.

    The first result is the machine, which is also printed.
    """

    def __init__(self, args, device):
        self.args, self.device, self.values = args, device, {}
        if args.results:
            Path(args.results).write_text("", encoding="utf-8")
        measured_on = {"device": machine(device.type), "threads": torch.get_num_threads()}
        self.add("machine", measured_on | {"torch": torch.__version__, "commit": commit()})
        print("{device}, {threads} threads, torch {torch}, commit {commit}".format(**self.values["machine"]))

    def add(self, name, result):
        """Adds a result. It replaces an earlier one of the same name."""
        self.values[name] = result
        if self.args.results:
            with open(self.args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **result}) + "\n")

    def finish(self, rows=()):
        """Prints a table of rows, a line for each result that is an error, and with --json all results."""
        if rows:
            print_table(rows)
        for name, result in self.values.items():
            if "error" in result:
                print(f"{name} failed: {result['error']}", flush=True)
        if self.args.json:
            print(json.dumps(self.values))


def read_results(path):
    """Returns {name: result} of a file of --results: for each name the last line that is complete."""
    results = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            result = json.loads(line)
            results[result.pop("name")] = result
    return results


def print_table(rows):
    """Prints rows of strings, the heading first, in aligned columns."""
    print("\n".join(aligned(rows)), flush=True)
