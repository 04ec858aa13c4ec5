"""The benchmarks in one go: what is committed under benchmarks/results/ comes from here.

    python -m benchmarks.suite cpu                        under 20 minutes on two cores
    python -m benchmarks.suite cpu-fp32                   ours without bf16, some minutes more
    python -m benchmarks.suite gpu --minutes 30           what can be done in that time
    python -m benchmarks.suite gpu --part 1               of four, each in less than 9 minutes
    python -m benchmarks.suite gpu --phase steps          one phase: each ends within 8 minutes
    python -m benchmarks.suite gpu --page                 no measuring, the page alone
    python -m benchmarks.suite gpu --rehearse --out DIR   the same phases on a CPU, tiny models

A suite is a list of phases, each of them a command. OUT/SUITE.json holds what each phase printed
and found, OUT/SUITE.md is the same for readers, and both are kept up to date while a phase runs: of
a phase that is cut off, they have all that its contestants had finished.

The same command goes on where it was stopped. Phases that were completed at this commit are not
repeated, and on a GPU neither are the contestants that a cut-off phase had finished. This needs
commits: where files have changed since the last one, everything is repeated. On a machine that has
the files without .git, the environment variable BABYLLAMA_COMMIT names the commit.

A recipe of reproduce.py is among the phases of a GPU where --data names the shards that
`reproduce.py --recipe medium --train DIR --dev DIR --dry-run` has made. Its report and scores are
in OUT/SUITE-recipe.tar.gz; what it trained is too large to be brought along, and stays behind.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

from benchmarks.findings import is_clean, read_findings, write_findings
from training.io import (
    UserError,
    aligned,
    log,
    run_program,
    write_json,
    write_text,
)
from training.logger import commit

ROOT = Path(__file__).resolve().parent.parent

PHASE_SECONDS = 480  # what any phase may take
POLL_SECONDS = 0.2

# A phase whose name ends so compares the phase without it with Hugging Face's models. It comes last
# and takes from that phase what was measured there on the same GPU.
CONTINUES = "-huggingface"
GPU_STEPS = "-m benchmarks.distill_step --device cuda --teachers paper --variants"
GPU_STUDENT = "-m benchmarks.train_step --device cuda --models llama-58m --batch-size 32 --variants"
GPU_GPT2 = "-m benchmarks.train_step --device cuda --models gpt2-705m --batch-size 256 --variants"
# Seven and a half minutes, so that it ends by itself within a phase; the second phase continues.
GPU_RECIPE = "reproduce.py --recipe medium --data DATA --pairs PAIRS --out OUT/trained"
KEPT = "--results OUT/recipe --stop-after"
REHEARSED_RECIPE = "reproduce.py --recipe benchmarks/rehearsal.json --out OUT/trained"
GPU_LLAMA = "-m benchmarks.train_step --device cuda --models llama-360m --batch-size 128 --variants"

SUITES = {
    "cpu": {
        "steps": "-m benchmarks.distill_step",
        "plain": "-m benchmarks.distill_step --variants ours_eager ours_plain",
        "loss": "-m benchmarks.loss --rounds 3",
        "training": "-m benchmarks.train_step --rounds 3",
        "scaling": "-m benchmarks.scaling",
        "evaluation": "-m benchmarks.evaluation",
        "numerics": "-m benchmarks.numerics",
    },
    "cpu-fp32": {  # as on a processor that does not multiply bf16 natively
        "steps": "-m benchmarks.distill_step --precision fp32 --variants ours ours_eager huggingface",
    },
    "gpu": {
        "tests": "-m pytest -m gpu -p no:cacheprovider",
        "attention": "-m benchmarks.attention --device cuda",
        "student": f"{GPU_STUDENT} ours ours_graph",
        "gpt2": f"{GPU_GPT2} ours",
        "llama": f"{GPU_LLAMA} ours",
        "steps": f"{GPU_STEPS} ours ours_graph ours_cached ours_cached_graph",
        "recipe": f"{GPU_RECIPE} {KEPT} 7.5",
        "recipe-continued": f"{GPU_RECIPE} {KEPT} 7.5",
        "loss": "-m benchmarks.loss --device cuda --rounds 3",
        "numerics": "-m benchmarks.numerics --device cuda",
        "evaluation": "-m benchmarks.evaluation --device cuda --model llama-58m",
        "kernels": "-m benchmarks.kernels --device cuda",
        "steps-huggingface": f"{GPU_STEPS} ours ours_plain huggingface huggingface_compiled",
        "student-huggingface": f"{GPU_STUDENT} ours huggingface huggingface_compiled",
        "gpt2-huggingface": f"{GPU_GPT2} ours huggingface huggingface_compiled",
        "llama-huggingface": f"{GPU_LLAMA} ours huggingface huggingface_compiled",
    },
    "rehearsal": {
        "tests": "-m pytest -m gpu -p no:cacheprovider",
        "attention": "-m benchmarks.attention --device cpu",
        "student": "-m benchmarks.train_step --device cpu --models llama-tiny-student --rounds 1 "
        "--variants ours ours_eager",
        "gpt2": "-m benchmarks.train_step --device cpu --models gpt2-tiny --rounds 1 --variants ours",
        "llama": "-m benchmarks.train_step --device cpu --models llama-tiny --rounds 1 --variants ours",
        "steps": "-m benchmarks.distill_step --device cpu --teachers tiny --rounds 1 "
        "--variants ours ours_cached ours_plain",
        "recipe": f"{REHEARSED_RECIPE} {KEPT} 0",
        "recipe-continued": f"{REHEARSED_RECIPE} {KEPT} 7.5",
        "loss": "-m benchmarks.loss --device cpu --tokens 256 --rounds 1",
        "numerics": "-m benchmarks.numerics --device cpu",
        "evaluation": "-m benchmarks.evaluation --device cpu --model llama-tiny --sentences 200",
        "kernels": "-m benchmarks.kernels --device cpu",
        "steps-huggingface": "-m benchmarks.distill_step --device cpu --teachers tiny --rounds 1 "
        "--variants ours huggingface huggingface_compiled",
    },
}
PARTS = {  # of the GPU's phases: names, and minutes that such machines are had for at a time
    1: (("tests", "attention"), 5),
    2: (("student", "gpt2", "llama", "steps"), 8.5),
    3: (("recipe",), 8.5),
    4: (
        ("recipe-continued", "loss", "numerics", "evaluation", "kernels", "steps-huggingface"),
        8.5,
    ),
}


# ---- what is kept


class Record:
    """What is known of a suite's phases: OUT/SUITE.json, and the page OUT/SUITE.md.

    `entries` is {phase: entry}. An entry has the command, date and commit, the state ("complete",
    "failed", "cut off", or "running", which remains if the suite itself is killed), the problem if
    it is not complete, the seconds, the lines that were printed, and {name: finding}.
    """

    def __init__(self, suite, out, places=None):
        """`places` is {word: what stands for it in commands, a list}."""
        self.suite, self.out = suite, Path(out)
        self.places = {"OUT": [str(self.out.resolve())]} | (places or {})
        self.path = self.out / f"{suite}.json"
        self.entries = {}
        for phase in SUITES[suite]:  # earlier versions wrote one file for each phase
            path = self.out / f"{suite}-{phase}.json"
            if path.exists():
                self.entries[phase] = entry_of_old(read_object(path))
        if self.path.exists():
            self.entries |= read_object(self.path)

    def save(self):
        """Writes both files."""
        write_json(self.path, self.entries)
        self.save_page()

    def arguments(self, command):
        """A command's arguments after python, with the places that its words in capitals name.

        An option whose place was not given is left out.
        """
        found = []
        for word in shlex.split(command)[1:]:
            name, slash, rest = word.partition("/")
            place = self.places.get(name)
            found += [word] if place is None else [p + slash + rest for p in place]
            if place == []:
                found.pop()
        return found

    def without_places(self, lines):
        """Lines in which each place is called by its word: where it is on a machine is its own."""
        for word, paths in self.places.items():
            for path in paths:
                lines = [line.replace(path, word) for line in lines]
        return list(lines)

    def keep_recipe(self):
        """Packs what the recipe's phases found into one file, which is small."""
        if (self.out / "recipe").exists():
            shutil.make_archive(str(self.out / f"{self.suite}-recipe"), "gztar", self.out / "recipe")

    def save_page(self):
        """Writes the page."""
        order = [*SUITES[self.suite], *self.entries]
        lines = [f"# Benchmarks: {self.suite}", ""]
        for phase in dict.fromkeys(name for name in order if name in self.entries):
            lines += [f"## {phase}", "", *entry_lines(self.entries[phase]), ""]
        write_text(self.out / f"{self.suite}.md", "\n".join(lines))

    def is_complete(self, phase, command):
        """Whether this very command was completed at this commit."""
        entry = self.entries.get(phase, {})
        return entry.get("state") == "complete" and self.is_current(entry, command)

    def is_current(self, entry, command=None):
        """Whether an entry is of this commit and, if one is given, of this command."""
        is_current = is_clean(commit()) and entry.get("commit") == commit()
        return is_current and command in (None, entry["command"])

    def known_findings(self, phase, command):
        """What earlier tries of a phase found, and the phase that it continues, on one machine."""
        own, base = self.entries.get(phase, {}), {}
        if phase.endswith(CONTINUES):
            base = self.entries.get(phase.removesuffix(CONTINUES), {})
        known = own["findings"] if self.is_current(own, command) else {}
        if self.is_current(base):
            others = base["findings"]
            if known.get("machine", others.get("machine")) == others.get("machine"):
                known = others | known
        return known


def read_object(path):
    """The JSON object in a file. `UserError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it or restore it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: delete it or restore it")
    return value


def entry_of_old(old):
    """The entry that one of the files with one phase each stands for."""
    kept = {key: old.pop(key) for key in ("command", "date", "printed")}
    state = "failed" if old.pop("failed") else "complete"
    return kept | {"commit": old.get("commit", "unknown"), "state": state, "findings": old}


def entry_lines(entry):
    """An entry in Markdown: command and printed lines, and what a phase found that was cut off."""
    lines = [f"`{entry['command']}`, {entry['date']}", "", "```", *entry["printed"], "```"]
    if entry["state"] == "complete":
        return lines
    problem = entry.get("problem") or "it is running, or the suite was killed"
    lines += ["", f"Not complete: {problem}."]
    rows = findings_rows(entry["findings"])
    if len(rows) > 1:
        lines += ["What had been found by then:", "", "```", *aligned(rows), "```"]
    errors = {name: f["error"] for name, f in entry["findings"].items() if "error" in f}
    return lines + [f"\n{name} failed: `{error}`" for name, error in errors.items()]


def findings_rows(findings):
    """The numbers of findings as a table; contestants that had not taken all turns say so."""
    numbers = {
        name: {key: value for key, value in finding.items() if type(value) in (int, float)}
        for name, finding in findings.items()
        if isinstance(finding, dict)
    }
    keys = list(dict.fromkeys(key for values in numbers.values() for key in values))
    rows = [["finding", *keys]]
    for name, values in numbers.items():
        if values:
            label = f"{name} (unfinished)" if "unfinished" in findings[name] else name
            rows.append([label, *(number_text(values[k]) if k in values else "" for k in keys)])
    return rows


def number_text(value):
    """A number in four digits or more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- a phase


# Kills a process group as soon as its input ends, which also happens when the suite is killed.
GUARD = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


class PhaseProcess:
    """A phase's command in a process group of its own. What it prints is copied line by line.

    Leaving its `with` ends the whole group, whatever it is doing, and so does a SIGKILL here.
    """

    def __init__(self, arguments):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(self.process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where it complains that nobody of the group is left
            start_new_session=True,
        )
        self.printed, self.complaints = [], []
        self.copiers = [
            Thread(target=copy_lines, args=(self.process.stdout, sys.stdout, self.printed)),
            Thread(target=copy_lines, args=(self.process.stderr, sys.stderr, self.complaints)),
        ]

    def __enter__(self):
        for copier in self.copiers:
            copier.daemon = True
            copier.start()
        return self

    def __exit__(self, *_error):
        self.guard.communicate()  # ends its input, and waits
        self.process.wait()
        for copier in self.copiers:
            copier.join(timeout=10)

    def follow(self, seconds, update):
        """Waits until it ends and calls `update()` often; False if the seconds did not suffice."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL_SECONDS)
                return True
            update()
        return False

    def problem(self):
        """What went wrong, once it has ended; None if nothing did."""
        if self.process.returncode == 0:
            return None
        lines = [line for line in self.complaints if line]
        return f"exit code {self.process.returncode}" + (f": `{lines[-1]}`" if lines else "")


def copy_lines(source, screen, lines):
    """Copies a stream to the screen, line by line, and collects its lines."""
    for line in source:
        lines.append(line.rstrip())
        with contextlib.suppress(BrokenPipeError):  # it goes on when nobody looks any more
            print(lines[-1], file=screen, flush=True)


def command_of(suite, phase):
    """A phase's command as one types it."""
    return f"python {SUITES[suite][phase]}"


def measure_phase(record, phase, seconds, again=False):
    """Executes a phase for at most so many seconds and keeps what it finds; whether it completed.

    `again`: nothing counts as known from earlier tries.
    """
    command = command_of(record.suite, phase)
    known = {} if again else record.known_findings(phase, command)
    entry = {"command": command, "date": str(datetime.date.today()), "commit": commit()}
    entry |= {"state": "running", "seconds": 0, "printed": [], "findings": {}}
    record.entries[phase] = entry
    log(f"\n$ {command}")
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.jsonl"
            write_findings(results, known)
            entry["state"], entry["problem"] = execute(record, entry, results, seconds)
    finally:
        if entry["state"] == "running":
            entry["state"], entry["problem"] = "cut off", "the suite was stopped"
        entry["seconds"] = round(time.monotonic() - started)
        record.keep_recipe()
        record.save()
        problem = f": {entry['problem']}" if entry["problem"] else ""
        log(f"({entry['state']} after {entry['seconds']} seconds{problem})")
    return entry["state"] == "complete"


def execute(record, entry, results, seconds):
    """Executes an entry's command, which writes to `results`; its state and problem at the end."""
    arguments = record.arguments(entry["command"])
    if arguments[0] not in ("-m", "reproduce.py"):  # they keep their own results, or none
        arguments += ["--results", str(results)]

    def update():
        now = {
            "printed": record.without_places(process.printed),
            "findings": read_findings(results),
        }
        if any(entry[key] != value for key, value in now.items()):
            entry.update(now)
            record.save()

    process = PhaseProcess(arguments)
    try:
        with process:
            in_time = process.follow(seconds, update)
    finally:
        update()
    if not in_time:
        return "cut off", f"stopped after {seconds:.0f} seconds"
    if "stopped before the end" in "".join(process.printed[-1:]):
        return "cut off", process.printed[-1]
    problem = process.problem()
    return ("failed", problem) if problem else ("complete", None)


def measure(record, phases, minutes, again):
    """Executes the phases that are not complete, as far as the time goes; whether all are now."""
    deadline = time.monotonic() + 60 * minutes
    all_complete = True
    for phase in phases:
        left = deadline - time.monotonic()
        if not again and record.is_complete(phase, command_of(record.suite, phase)):
            log(f"{phase}: completed at this commit, see {record.path} (--again repeats it)")
        elif left <= 0:
            log(f"{phase}: not started, for the {minutes:g} minutes are used up")
            all_complete = False
        else:
            in_time = min(left, PHASE_SECONDS)
            all_complete = measure_phase(record, phase, in_time, again) and all_complete
    return all_complete


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, help="list of phases")
    parser.add_argument(
        "--part",
        type=int,
        choices=PARTS,
        help="only this part of the GPU's phases, in its own minutes unless --minutes are given",
    )
    parser.add_argument("--rehearse", action="store_true", help="the GPU's phases on a CPU, with tiny models")
    parser.add_argument("--data", metavar="DIR", help="shards of the recipe among the GPU's phases")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="DIR", help="minimal pairs for that recipe")
    parser.add_argument(
        "--phase",
        action="append",
        metavar="NAME",
        help="only this phase; may be given several times",
    )
    parser.add_argument(
        "--out",
        default="benchmarks/results",
        metavar="DIR",
        help="folder of SUITE.json and SUITE.md (default: benchmarks/results)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="time after which no phase starts and the one that runs is stopped (default: no end)",
    )
    parser.add_argument("--again", action="store_true", help="repeat what was completed at this commit")
    parser.add_argument(
        "--page", action="store_true", help="only make the page again from what is in the folder"
    )
    args = parser.parse_args(argv)
    if (args.part or args.rehearse or args.data or args.pairs) and args.suite != "gpu":
        parser.error("--part, --rehearse, --data and --pairs are of the suite gpu")
    if args.part and args.phase:
        parser.error("give --part or --phase")
    if args.rehearse:
        args.suite = "rehearsal"
    unknown = set(args.phase or ()) - SUITES[args.suite].keys()
    if unknown:
        parser.error(f"no phase {min(unknown)}: choose from {', '.join(SUITES[args.suite])}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    places = {"DATA": [str(Path(args.data).resolve())] if args.data else []}
    places["PAIRS"] = [str(Path(folder).resolve()) for folder in args.pairs]
    record = Record(args.suite, args.out, places)
    if args.page:
        if not record.entries:
            raise UserError(f"{args.out} has no results of {args.suite}: measure them first")
        record.save_page()
        return 0
    phases, minutes = args.phase or list(SUITES[args.suite]), float("inf")
    if args.part:
        phases, minutes = PARTS[args.part]
    if args.suite == "gpu" and not args.data:
        log("the recipe is left out: --data DIR gives it its shards")
        phases = [phase for phase in phases if not phase.startswith("recipe")]
    minutes = minutes if args.minutes is None else args.minutes
    return 0 if measure(record, phases, minutes, args.again) else 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as Ctrl-C does, and take the phase along
        signal.signal(number, signal.default_int_handler)
    sys.exit(run_program(main))
