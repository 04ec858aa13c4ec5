"""What a benchmark finds: told on the screen, and kept in a file as soon as it is there."""

import argparse
import json
from pathlib import Path

import torch

from training.io import aligned
from training.logger import commit


def benchmark_parser(description):
    """An argument parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="file that gets each finding as one line of JSON as soon "
        "as it is there; a GPU does not measure again what the file holds of it at this commit",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all findings as a JSON object in the last line"
    )
    return parser


class Findings:
    """What a benchmark has found so far: `found`, {name: finding}, where a finding is a dict.

    The first finding is the machine, which is also printed. `known` are the findings of an earlier
    try that hold still: complete ones of the same machine and commit. On a CPU none is,
    for its contestants are fair to each other only when they take turns.
    """

    def __init__(self, args, device):
        self.path = Path(args.results) if args.results else None
        machine = describe(device)
        earlier = read_findings(self.path) if self.path else {}
        self.known, self.found = {}, {}
        comparable = device.type != "cpu" and is_clean(machine["commit"])
        if comparable and earlier.get("machine") == machine:
            complete = lambda finding: not {"error", "unfinished"} & finding.keys()  # noqa: E731
            self.known = {name: value for name, value in earlier.items() if complete(value)}
        if self.path:
            write_findings(self.path, {})
        self.add("machine", machine)
        print(
            f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}",
            flush=True,
        )

    def add(self, name, finding):
        """Notes a finding, which replaces an earlier one of that name."""
        self.found[name] = finding
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(finding_line(name, finding))

    def close(self, args):
        """Prints all findings, if --json asks for them."""
        if args.json:
            print(json.dumps(self.found))


def read_findings(path):
    """The findings in a file of --results, {name: finding}; of those with one name the last."""
    findings = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # whole lines alone
            finding = json.loads(line)
            findings[finding.pop("name")] = finding
    return findings


def write_findings(path, findings):
    """Writes {name: finding} as a file of --results."""
    lines = [finding_line(name, finding) for name, finding in findings.items()]
    path.write_text("".join(lines), encoding="utf-8")


def finding_line(name, finding):
    """The line of a finding in a file of --results."""
    return json.dumps({"name": name, **finding}) + "\n"


def describe(device):
    """What the figures were measured on: the chip, and torch's version and the project's commit."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, chip = properties.name, {"card": str(getattr(properties, "uuid", ""))}
    else:
        bf16 = ", native bf16" if torch.cpu._is_avx512_bf16_supported() else ""
        name, chip = f"{torch.get_num_threads()} CPU threads{bf16}", {}
    return {"device": name, "torch": torch.__version__, "commit": commit()} | chip


def is_clean(commit_name):
    """Whether the name of a commit tells exactly what was run: no changes, and not unknown."""
    return commit_name != "unknown" and not commit_name.endswith("-dirty")


def print_table(rows):
    """Prints rows of strings, the heading first, in aligned columns."""
    print("\n".join(aligned(rows)), flush=True)


def print_errors(findings):
    """Prints a line for each of {name: finding} that is an error."""
    for name, finding in findings.items():
        if "error" in finding:
            print(f"{name} failed: {finding['error']}", flush=True)
