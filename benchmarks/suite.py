"""Run all benchmarks of a list. It wrote the files cpu.json and cpu.md in benchmarks/results/.

    python -m benchmarks.suite cpu                   under 20 minutes on two cores
    python -m benchmarks.suite cpu-fp32              ours without bf16, some minutes more
    python -m benchmarks.suite gpu --minutes 8.5     as much of the GPU's list as fits into the time
    python -m benchmarks.suite gpu --phase steps     one phase again

A list has phases. A phase is one command of at most 8 minutes. OUT/SUITE.json has what each phase
printed and its results, OUT/SUITE.md is a page of what was printed. Both are written while a phase
runs, so that one that is cut off leaves the results that it had. The processes of a phase end with it.

The same command continues where an earlier one stopped: it leaves out the phases that were completed
at this commit. Without a commit (files have changed since, or git is missing) it repeats all. Where
.git was left behind, the environment variable BABYLLAMA_COMMIT names the commit.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measurement import read_results
from training.io import UserError, log, run_program, write_json, write_text
from training.logger import commit

ROOT = Path(__file__).resolve().parent.parent
PHASE_SECONDS = 480
POLL_SECONDS = 0.2

# The shards are made with --dry-run on any machine, and brought along: docs/gpu.md.
GPU_RECIPE = "python reproduce.py --recipe first-hour --data runs/first-hour/data --pairs blimp_filtered"
GPU_DISTILL = "python -m benchmarks.distill_step --device cuda --teachers paper --variants"
GPU_TRAIN = "python -m benchmarks.train_step --device cuda"
GPU_STUDENT = f"{GPU_TRAIN} --models llama-58m --batch-size 32 --variants"
GPU_GPT2 = f"{GPU_TRAIN} --models gpt2-705m --batch-size 256 --variants"
GPU_LLAMA = f"{GPU_TRAIN} --models llama-360m --batch-size 128 --variants"
SUITES = {
    "cpu": {
        "steps": "python -m benchmarks.distill_step",
        "plain": "python -m benchmarks.distill_step --variants ours_eager ours_plain",
        "loss": "python -m benchmarks.loss --rounds 3",
        "training": "python -m benchmarks.train_step --rounds 3",
        "scaling": "python -m benchmarks.scaling",
        "evaluation": "python -m benchmarks.evaluation",
        "numerics": "python -m benchmarks.numerics",
    },
    "cpu-fp32": {  # as on a processor that does not multiply bf16 natively
        "steps": "python -m benchmarks.distill_step --precision fp32 --variants ours ours_eager huggingface",
    },
    "gpu": {
        "smoke": "python -m pytest -m gpu -v -p no:cacheprovider tests/test_smoke.py",
        "student": f"{GPU_STUDENT} ours ours_graph huggingface_compiled",
        "gpt2": f"{GPU_GPT2} ours huggingface_compiled",
        "llama": f"{GPU_LLAMA} ours huggingface_compiled",
        "recipe": f"{GPU_RECIPE} --out runs/gpu/trained --results runs/gpu/recipe",
        "steps": f"{GPU_DISTILL} ours ours_graph ours_cached ours_cached_graph huggingface_compiled",
        "tests": "python -m pytest -m gpu -p no:cacheprovider",
        "loss": "python -m benchmarks.loss --device cuda --rounds 3",
        "numerics": "python -m benchmarks.numerics --device cuda",
        "evaluation": "python -m benchmarks.evaluation --device cuda --model llama-58m",
        "eager": f"{GPU_DISTILL} ours ours_plain huggingface",
    },
}


# ---- the record


class Record:
    """The phases of a suite that were measured: `entries` is {phase: entry}, in OUT/SUITE.json and .md.

    An entry has "command", "date", "commit", "state" ("complete", "failed", "cut off" or "running"),
    "problem" (None if it is complete), "seconds", "printed" (lines) and "results" ({name: result}).
    """

    def __init__(self, suite, out):
        self.suite, self.path = suite, Path(out) / f"{suite}.json"
        self.entries = {}
        try:
            if self.path.exists():
                self.entries = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: delete it or restore it") from error

    def save(self):
        """Writes both files."""
        write_json(self.path, self.entries)
        lines = [f"# Benchmarks: {self.suite}", ""]
        order = [*SUITES[self.suite], *self.entries]
        for phase in dict.fromkeys(name for name in order if name in self.entries):
            lines += [f"## {phase}", "", *page_lines(self.entries[phase]), ""]
        write_text(self.path.with_suffix(".md"), "\n".join(lines))

    def is_complete(self, phase):
        """True if the phase's command was completed at this commit."""
        name, entry = commit(), self.entries.get(phase, {})
        if name == "unknown" or name.endswith("-dirty"):
            return False
        expected = ("complete", name, SUITES[self.suite][phase])
        return expected == tuple(entry.get(key) for key in ("state", "commit", "command"))


def page_lines(entry):
    """Returns an entry in Markdown: its command and printed lines, and why it is not complete."""
    lines = [f"`{entry['command']}`, {entry['date']}", "", "```", *entry["printed"], "```"]
    if entry["state"] == "complete":
        return lines
    return [*lines, "", f"Not complete: {entry['problem'] or 'it is running, or the suite was killed'}."]


# ---- a phase


# Kills a process group as soon as its standard input ends. That also happens when the suite is killed.
GUARD = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


@contextlib.contextmanager
def process_group(command, **streams):
    """Starts a command in a process group of its own, and kills the whole group at the end."""
    options = {"cwd": ROOT, "start_new_session": True}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, **options, **streams)
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # it complains of an empty group
    guard = subprocess.Popen([sys.executable, "-c", GUARD, str(process.pid)], **options, **pipes)
    try:
        yield process
    finally:
        guard.communicate()  # ends its input, and waits
        process.wait()


def measure_phase(record, phase, seconds):
    """Runs a phase for at most `seconds`, and keeps its entry up to date. True if it was completed."""
    started = time.monotonic()
    entry = {"command": SUITES[record.suite][phase], "date": str(datetime.date.today())}
    entry |= {"commit": commit(), "state": "running", "problem": None, "seconds": 0}
    entry |= {"printed": [], "results": {}}
    record.entries[phase] = entry
    log(f"\n$ {entry['command']}")
    try:
        entry["state"], entry["problem"] = run_phase(record, entry, seconds)
    except KeyboardInterrupt:
        entry["state"], entry["problem"] = "cut off", "the suite was stopped"
        raise
    finally:
        entry["seconds"] = round(time.monotonic() - started)
        record.save()
        log(f"({entry['state']} after {entry['seconds']} seconds)")
    return entry["state"] == "complete"


def run_phase(record, entry, seconds):
    """Runs an entry's command, and keeps its lines and results up to date. Returns (state, problem)."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr, results = (Path(folder) / name for name in ("stdout", "stderr", "results"))
        command = [sys.executable, *shlex.split(entry["command"])[1:]]
        if not {"pytest", "reproduce.py"} & set(command):
            command += ["--results", str(results)]

        def update():
            before = entry["printed"], entry["results"]
            entry["printed"] = stdout.read_text(errors="replace").split("\n")[:-1]  # whole lines
            entry["results"] = read_results(results)
            for line in entry["printed"][len(before[0]) :]:
                log(line)
            if before != (entry["printed"], entry["results"]):
                record.save()

        with open(stdout, "w") as out, open(stderr, "w") as errors:
            with process_group(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors) as process:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                    update()
                code = process.poll()
            update()
        if code is None:
            return "cut off", f"stopped after {seconds:.0f} seconds"
        if code == 0:
            return "complete", None
        lines = stderr.read_text(errors="replace").strip().splitlines()
        return "failed", f"exit code {code}" + (f": `{lines[-1]}`" if lines else "")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, forever, out = parser.add_argument, float("inf"), "benchmarks/results"
    add("suite", choices=SUITES, help="list of phases")
    add("--phase", action="append", metavar="NAME", help="run only this phase, also if it is complete")
    add("--minutes", type=float, default=forever, help="stop after this time (default: at the end)")
    add("--out", default=out, metavar="DIR", help=f"folder of SUITE.json and SUITE.md (default: {out})")
    args = parser.parse_args(argv)
    phases = args.phase or list(SUITES[args.suite])
    unknown = set(phases) - SUITES[args.suite].keys()
    if unknown:
        parser.error(f"no phase {min(unknown)}: choose from {', '.join(SUITES[args.suite])}")
    record, all_complete = Record(args.suite, args.out), True
    deadline = time.monotonic() + 60 * args.minutes
    for phase in phases:
        seconds_left = deadline - time.monotonic()
        if not args.phase and record.is_complete(phase):
            log(f"{phase}: completed at this commit, see {record.path} (--phase {phase} repeats it)")
        elif seconds_left <= 0:
            log(f"{phase}: not started, the {args.minutes:g} minutes are used up")
            all_complete = False
        else:
            complete = measure_phase(record, phase, min(seconds_left, PHASE_SECONDS))
            all_complete = all_complete and complete
    return 0 if all_complete else 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as Ctrl-C does, and end the phase too
        signal.signal(number, signal.default_int_handler)
    sys.exit(run_program(main))
