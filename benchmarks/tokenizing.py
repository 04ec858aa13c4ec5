"""Memory of tokenising a corpus: the peak of all its processes together, for texts of some sizes.

    python -m benchmarks.tokenizing --megabytes 50 200 500

The text is invented: lines of words drawn from a made-up vocabulary, as rare as those of a language
are. It is written into a temporary folder and removed. Memory is the proportional set size (PSS) of
tokenize_corpus.py and its processes, what they share counted once, ten times a second. With --train
and --dev, folders of text are measured instead.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.findings import Findings, benchmark_parser, print_table
from corpus.text_files import list_text_files
from training.io import UserError, run_program

ROOT = Path(__file__).resolve().parent.parent

MIB = 1 << 20
SYLLABLES = "ba be di fo ga hu ji ko la me ni or pu ra se to un vi wa yo".split()
VOCABULARY = 50_000  # words that are invented
LINE_WORDS = 10
BATCH_LINES = 10_000
INTERVAL = 0.1  # seconds


def write_text(path, megabytes, seed):
    """Writes lines of invented words, of so many million bytes."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 5, VOCABULARY)
    words = np.array(["".join(generator.choice(SYLLABLES, n)) for n in lengths])
    ranks = np.arange(1, VOCABULARY + 1)
    frequencies = 1 / ranks / (1 / ranks).sum()  # Zipf's law
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            drawn = generator.choice(words, (BATCH_LINES, LINE_WORDS), p=frequencies)
            file.writelines(" ".join(line) + ".\n" for line in drawn)


def processes_of(pid):
    """A process and all that descend from it."""
    found = [pid]
    for process in found:  # it grows while it is gone through
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def memory_of(pid):
    """The proportional set size of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def measure(arguments):
    """Runs tokenize_corpus.py: its peak memory in bytes, and its seconds."""
    command = [sys.executable, str(ROOT / "tokenize_corpus.py"), *map(str, arguments)]
    peak, started = 0, time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        while process.poll() is None:
            peak = max(peak, sum(map(memory_of, processes_of(process.pid))))
            time.sleep(INTERVAL)
        errors.seek(0)
        if process.returncode:
            raise UserError(f"tokenize_corpus.py failed: {errors.read().decode()}")
    return peak, time.perf_counter() - started


def measurements(args):
    """Yields the megabytes of text, the peak in bytes and the seconds of each corpus."""
    options = ["--clean", args.clean, "--vocab-size", args.vocab_size]
    if args.train:
        paths = [path for folder in (args.train, args.dev) for path in list_text_files(folder)]
        size = sum(path.stat().st_size for path in paths) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            given = ["--train", args.train, "--dev", args.dev, "--out", folder]
            yield size, *measure(given + options)
        return
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_text(folder / "train" / "invented.train", megabytes, 0)
            write_text(folder / "dev" / "invented.dev", 1, 1)
            given = ["--train", folder / "train", "--dev", folder / "dev", "--out", folder / "out"]
            yield megabytes + 1, *measure(given + options)


def parse_arguments(argv):
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        default=[50, 200, 500],
        help="millions of bytes of training text (default: 50 200 500)",
    )
    parser.add_argument("--train", metavar="DIR", help="training text to measure instead")
    parser.add_argument("--dev", metavar="DIR", help="dev text, with --train")
    parser.add_argument("--clean", default="light", help="as tokenize_corpus.py (default: light)")
    parser.add_argument(
        "--vocab-size", type=int, default=4000, help="pieces of the tokenizer (default: 4000)"
    )
    args = parser.parse_args(argv)
    if bool(args.train) != bool(args.dev):
        parser.error("--train and --dev go together")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("memory is read from /proc/PID/smaps_rollup: measure on Linux")
    findings = Findings(args, torch.device("cpu"))
    rows = [["MB of text", "peak MiB", "seconds"]]
    for megabytes, peak, seconds in measurements(args):
        name = f"{megabytes:.0f} MB"
        findings.add(name, {"megabytes": megabytes, "peak_bytes": peak, "seconds": seconds})
        rows.append([f"{megabytes:.0f}", f"{peak / MIB:.0f}", f"{seconds:.0f}"])
    print_table(rows)
    findings.close(args)


if __name__ == "__main__":
    sys.exit(run_program(main))
