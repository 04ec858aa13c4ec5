"""Measure the peak memory of tokenize_corpus.py, all its processes together, for texts of several sizes.

    python -m benchmarks.tokenizing --megabytes 50 200 500

The text is invented: lines of made-up words, whose frequencies follow Zipf's law. With --train and
--dev, folders of text are measured instead. Memory is the proportional set size (PSS), in which
memory that processes share counts once. It is read ten times a second from /proc, so on Linux only.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measurement import Results, benchmark_parser
from corpus.text_files import sub_corpora
from training.io import UserError, run_program

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SYLLABLES = "ba be di fo ga hu ji ko la me ni or pu ra se to un vi wa yo".split()
VOCABULARY, LINE_WORDS, BATCH_LINES = 50_000, 10, 10_000
INTERVAL = 0.1  # seconds


def write_text(path, megabytes, seed):
    """Writes a file of invented words, of `megabytes` million bytes."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 5, VOCABULARY)
    words = np.array(["".join(generator.choice(SYLLABLES, n)) for n in lengths])
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    frequencies /= frequencies.sum()
    path.parent.mkdir()
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            lines = generator.choice(words, (BATCH_LINES, LINE_WORDS), p=frequencies)
            file.writelines(" ".join(line) + ".\n" for line in lines)


def process_tree(pid):
    """Returns the ids of a process and of all its descendants."""
    pids = [pid]
    for parent in pids:  # the loop also visits what it appends
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                pids += map(int, path.read_text().split())
            except OSError:  # the process has ended
                continue
    return pids


def pss_bytes(pid):
    """Returns the proportional set size of a process, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def measure(train, dev, args):
    """Runs tokenize_corpus.py on two folders. Returns {"peak_bytes", "seconds"}."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as stderr:
        command = [sys.executable, str(ROOT / "tokenize_corpus.py"), "--train", str(train), "--dev", str(dev)]
        command += ["--out", out, "--clean", args.clean, "--vocab-size", str(args.vocab_size)]
        peak, started = 0, time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as process:
            while process.poll() is None:
                peak = max(peak, sum(map(pss_bytes, process_tree(process.pid))))
                time.sleep(INTERVAL)
        if process.returncode:
            stderr.seek(0)
            raise UserError(f"tokenize_corpus.py failed: {stderr.read()}")
        return {"peak_bytes": peak, "seconds": time.perf_counter() - started}


def main(argv=None):
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    text = "millions of bytes of training text (default: 50 200 500)"
    add("--megabytes", type=float, nargs="+", default=[50, 200, 500], help=text)
    add("--train", metavar="DIR", help="training text to measure instead")
    add("--dev", metavar="DIR", help="dev text, with --train")
    add("--clean", default="light", help="as tokenize_corpus.py (default: light)")
    add("--vocab-size", type=int, default=4000, help="pieces of the tokenizer (default: 4000)")
    args = parser.parse_args(argv)
    if bool(args.train) != bool(args.dev):
        parser.error("--train and --dev go together")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("memory is read from /proc/PID/smaps_rollup: measure on Linux")
    results = Results(args, torch.device("cpu"))
    rows = [["MB of text", "peak MiB", "seconds"]]
    for megabytes in [None] if args.train else args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            train, dev = args.train or f"{folder}/train", args.dev or f"{folder}/dev"
            if not args.train:
                write_text(Path(train) / "invented.train", megabytes, seed=0)
                write_text(Path(dev) / "invented.dev", 1, seed=1)
            paths = [path for given in (train, dev) for path in sub_corpora(given).values()]
            size = sum(path.stat().st_size for path in paths) / 1e6
            result = measure(train, dev, args)
        results.add(f"{size:.0f} MB", {"megabytes": size} | result)
        rows.append([f"{size:.0f}", f"{result['peak_bytes'] / MIB:.0f}", f"{result['seconds']:.0f}"])
    results.finish(rows)


if __name__ == "__main__":
    sys.exit(run_program(main))
