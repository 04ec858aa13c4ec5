"""The benchmarks' suite: nothing that was measured is lost, and nothing outlives its time."""

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import contest, findings, suite

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))

# A benchmark in miniature: it finds two things, starts a process that would outlive it, and hangs.
HANGS = """
import argparse, json, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--results")
args = parser.parse_args()
known = open(args.results).read()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(f"child {child.pid}; known: {known.strip()}")
with open(args.results, "w") as file:
    for name, finding in {"first": {"ms": 12.5}, "second": {"error": "out of memory"}}.items():
        file.write(json.dumps({"name": name, **finding}) + "\\n")
        file.flush()
    file.write('{"name": "third"')
    file.flush()
    time.sleep(100)
"""
CRASHES = HANGS.replace("time.sleep(100)\n", "sys.exit('it broke')\n")
ENDS = """
import sys
print("the figures")
with open(sys.argv[sys.argv.index("--results") + 1], "w") as file:
    file.write('{"name": "only", "ms": 1}\\n')
"""
FAILS = "import sys; print('half'); sys.exit('it broke')"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a suite called fake of {phase: text of a program}, and returns its command line."""
    monkeypatch.setattr(suite, "commit", lambda: "0123456789ab")

    def make(**programs):
        phases = {}
        for name, text in programs.items():
            (tmp_path / f"{name}.py").write_text(text)
            phases[name.replace("_", "-")] = str(tmp_path / f"{name}.py")
        monkeypatch.setitem(suite.SUITES, "fake", phases)
        return ["fake", "--out", str(tmp_path / "out")]

    return make


def kept(tmp_path):
    return json.loads((tmp_path / "out" / "fake.json").read_text())


def page(tmp_path):
    return (tmp_path / "out" / "fake.md").read_text()


def is_running(pid):
    """Whether there is such a process, and not only its exit code that nobody has asked for."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def child_of(entry):
    return int(entry["printed"][0].split(";")[0].removeprefix("child "))


# ---- phases


def test_a_phase_beyond_its_time_is_killed_with_its_children_and_keeps_what_it_found(
    fake, tmp_path, monkeypatch
):
    monkeypatch.setattr(suite, "PHASE_SECONDS", 2.0)
    assert suite.main(fake(hangs=HANGS, ends=ENDS)) == 1
    entry = kept(tmp_path)["hangs"]
    assert entry["state"] == "cut off" and entry["findings"]["first"] == {"ms": 12.5}
    wait_until(lambda: not is_running(child_of(entry)))
    text = page(tmp_path)
    assert "Not complete: stopped after 2 seconds." in text and "first    12.5" in text
    assert "second failed: `out of memory`" in text and "third" not in text
    assert kept(tmp_path)["ends"]["state"] == "complete" and "the figures" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fake.json", "fake.md"]


def test_a_phase_that_fails_says_why_and_does_not_stop_the_others(fake, tmp_path):
    assert suite.main(fake(fails=FAILS, ends=ENDS)) == 1
    assert kept(tmp_path)["fails"]["problem"] == "exit code 1: `it broke`"
    assert "half" in page(tmp_path) and "Not complete: exit code 1: `it broke`." in page(tmp_path)
    assert kept(tmp_path)["ends"]["state"] == "complete"


def test_places_are_given_to_commands_and_do_not_appear_in_what_is_kept(fake, tmp_path):
    out = str(tmp_path / "out")
    arguments = fake(tells=ENDS + f"\nprint({out + '/run'!r})")
    record = suite.Record("fake", out, {"DATA": ["/a/data"], "PAIRS": ["/b", "/c"]})
    command = "python x.py --data DATA --pairs PAIRS --out OUT/run"
    expected = ["x.py", "--data", "/a/data", "--pairs", "/b", "/c", "--out", f"{out}/run"]
    assert record.arguments(command) == expected
    record.places["PAIRS"] = []
    assert record.arguments(command) == [*expected[:3], *expected[6:]]
    assert suite.main(arguments) == 0
    assert kept(tmp_path)["tells"]["printed"] == ["the figures", "OUT/run"]


def test_what_is_complete_at_this_commit_is_not_repeated_unless_asked_for(fake, tmp_path, monkeypatch):
    counting = ENDS + f"\nopen({str(tmp_path / 'count')!r}, 'a').write('x')"
    arguments = fake(ends=counting)
    count = lambda: (tmp_path / "count").stat().st_size  # noqa: E731
    assert suite.main(arguments) == 0 and count() == 1
    assert suite.main(arguments) == 0 and count() == 1
    assert suite.main([*arguments, "--again"]) == 0 and count() == 2
    for name in ("0123456789ab-dirty", "unknown", "another"):
        monkeypatch.setattr(suite, "commit", lambda n=name: n)
        before = count()
        assert suite.main(arguments) == 0 and count() == before + 1
    assert suite.main(arguments) == 0 and count() == 5  # another commit, but a clean one


def test_a_phase_is_given_what_was_found_before_it_broke_off(fake, tmp_path):
    arguments = fake(steps=CRASHES, steps_huggingface=CRASHES)
    suite.main([*arguments, "--phase", "steps"])
    assert kept(tmp_path)["steps"]["printed"][0].endswith("known:")
    suite.main(arguments)
    for phase in ("steps", "steps-huggingface"):
        assert '{"name": "first", "ms": 12.5}' in kept(tmp_path)[phase]["printed"][0]
    suite.main([*arguments, "--again", "--phase", "steps"])
    assert kept(tmp_path)["steps"]["printed"][0].endswith("known:")


def test_the_minutes_are_kept(fake, tmp_path, capsys):
    started = time.monotonic()
    assert suite.main([*fake(hangs=HANGS, ends=ENDS), "--minutes", "0.015"]) == 1
    assert time.monotonic() - started < 5
    assert list(kept(tmp_path)) == ["hangs"]
    assert "ends: not started, for the 0.015 minutes are used up" in capsys.readouterr().out


def test_a_suite_that_is_terminated_takes_its_phase_along(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    program = (
        "import runpy, sys, signal; from benchmarks import suite; from training.io import "
        "run_program; signal.signal(signal.SIGTERM, signal.default_int_handler); "
        f"suite.SUITES['fake'] = {{'hangs': {str(tmp_path / 'hangs.py')!r}}}; "
        f"sys.exit(run_program(lambda: suite.main(['fake', '--out', {str(tmp_path / 'out')!r}])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    path = tmp_path / "out" / "fake.md"
    wait_until(lambda: path.exists() and "12.5" in page(tmp_path))
    assert kept(tmp_path)["hangs"]["state"] == "running" and "it is running" in page(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    entry = kept(tmp_path)["hangs"]
    assert (entry["state"], entry["problem"]) == ("cut off", "the suite was stopped")
    assert entry["findings"]["first"] == {"ms": 12.5}
    wait_until(lambda: not is_running(child_of(entry)))


MARK = "BABYLLAMA_REHEARSAL"  # an environment variable, which all processes of a suite inherit


def rehearsal(out):
    """The command of a rehearsal, and the environment that marks its processes by `out`."""
    command = [sys.executable, "-m", "benchmarks.suite", "gpu", "--rehearse", "--minutes", "30"]
    return [*command, "--out", str(out)], os.environ | {MARK: str(out)}


def marked_processes(out):
    """The processes of a rehearsal into `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it is another user's, or has just ended
            if f"{MARK}={out}".encode() in path.read_bytes() and is_running(path.parent.name):
                found.append(path.parent.name)
    return found


@pytest.mark.faults
def test_the_rehearsal_runs_to_its_end_and_leaves_few_small_files(tmp_path):
    command, environment = rehearsal(tmp_path)
    assert subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode == 1
    entries = json.loads((tmp_path / "rehearsal.json").read_text())
    states = {phase: entry["state"] for phase, entry in entries.items()}
    assert states.pop("recipe") == "cut off"  # it is rehearsed with no time, and then continued
    assert states == dict.fromkeys(set(suite.SUITES["rehearsal"]) - {"recipe"}, "complete")
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)
    assert not marked_processes(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rehearsal_killed_at_a_random_moment_keeps_its_results_and_leaves_no_process(number, tmp_path):
    command, environment = rehearsal(tmp_path)
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    moment = random.uniform(5, 120)
    print(f"killed after {moment:.1f} seconds")
    time.sleep(moment)
    assert len(marked_processes(tmp_path)) > 1
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not marked_processes(tmp_path))
    path = tmp_path / "rehearsal.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    *finished, last = [entry["state"] for entry in entries.values()] or ["running"]
    assert "running" not in finished and last in ("running", "cut off")
    if entries:
        assert subprocess.run([*command, "--page"], check=False, cwd=ROOT).returncode == 0


# ---- the page


def test_the_page_is_made_of_what_is_there(tmp_path):
    """Earlier versions wrote a file for each phase; the file of today goes before them."""
    old = {"command": "python a.py --json", "failed": False, "date": "2026-11-23"}
    old |= {"printed": ["old figures"], "commit": "a", "ours": {"peak_gb": 1.0}}
    (tmp_path / "cpu-steps.json").write_text(json.dumps(old))
    (tmp_path / "cpu-loss.json").write_text(json.dumps(old | {"failed": True}))
    entry = {"command": "python b.py", "date": "2026-12-01", "commit": "b", "state": "complete"}
    entry |= {"printed": ["new figures"], "findings": {}}
    (tmp_path / "cpu.json").write_text(json.dumps({"loss": entry}))
    assert suite.main(["cpu", "--page", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "cpu.md").read_text()
    assert text.startswith("# Benchmarks: cpu\n\n## steps\n\n`python a.py --json`, 2026-11-23\n")
    assert text.index("old figures") < text.index("## loss") < text.index("new figures")
    assert text.count("old figures") == 1 and "Not complete" not in text


def test_a_page_of_nothing_and_a_damaged_file_are_reported(tmp_path):
    with pytest.raises(suite.UserError, match="has no results of gpu"):
        suite.main(["gpu", "--page", "--out", str(tmp_path)])
    for damaged in ("{", "[]"):
        (tmp_path / "gpu.json").write_text(damaged)
        with pytest.raises(suite.UserError, match="is damaged"):
            suite.main(["gpu", "--page", "--out", str(tmp_path)])


def test_the_committed_results_can_be_read():
    for name in ("cpu", "cpu-fp32"):
        record = suite.Record(name, ROOT / "benchmarks" / "results")
        assert record.entries and all(e["state"] == "complete" for e in record.entries.values())


# ---- contestants


# Contestants: one that is served by the real thing, and two that die, at once and in their turn.
GOOD = "import time; from benchmarks.contest import serve; serve(lambda: time.sleep(0.01))"
DIES_AT_ONCE = "1 / 0"
DIES_IN_ITS_TURN = """
import os
print('@contest "ready"', flush=True)
input()
os._exit(3)
"""


def test_contestants_take_turns_and_one_that_dies_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    args = findings.benchmark_parser("").parse_args(["--results", str(tmp_path / "results")])
    found = findings.Findings(args, torch.device("cpu"))
    texts = {"good": GOOD, "dies at once": DIES_AT_ONCE, "dies in its turn": DIES_IN_ITS_TURN}
    commands = {name: [sys.executable, "-c", text] for name, text in texts.items()}
    judge = lambda _, result: {"ms": 1000 * contest.median(result)}  # noqa: E731
    outcome = contest.compete(found, commands, 2, torch.device("cpu"), judge)
    assert 10 <= outcome["good"]["ms"] < 1000 and "unfinished" not in outcome["good"]
    assert outcome["dies at once"] == {"error": "ZeroDivisionError: division by zero"}
    assert "exit code 3" in outcome["dies in its turn"]["error"]
    in_file = findings.read_findings(tmp_path / "results")
    assert in_file == {"machine": found.found["machine"]} | outcome
    assert "good: finished" in capsys.readouterr().err
    assert '"unfinished": true' in (tmp_path / "results").read_text()  # after each turn


def test_a_gpu_does_not_repeat_what_is_known_of_it(tmp_path, monkeypatch):
    """It never believes what was found on another card or by other files."""
    machine = {"device": "H100", "torch": "2", "commit": "0123456789ab", "card": "one"}
    monkeypatch.setattr(findings, "describe", lambda _: machine)
    path = tmp_path / "results"
    args = findings.benchmark_parser("").parse_args(["--results", str(path)])
    earlier = {"machine": machine, "ours": {"ms": 1.5}, "died": {"error": "?"}}
    earlier["cut"] = {"ms": 1.0, "unfinished": True}

    def known(device, **changes):
        findings.write_findings(path, earlier | {"machine": machine | changes})
        return findings.Findings(args, torch.device(device)).known.keys() - {"machine"}

    assert known("cuda") == {"ours"}
    assert not known("cpu") and not known("cuda", card="two") and not known("cuda", torch="3")
    machine["commit"] += "-dirty"
    assert not known("cuda")
    machine["commit"] = machine["commit"].removesuffix("-dirty")
    findings.write_findings(path, earlier)
    found = findings.Findings(args, torch.device("cuda"))
    commands = {"ours": ["no such program"]}
    assert contest.compete(found, commands, 1, torch.device("cuda"), None) == {"ours": {"ms": 1.5}}
    assert findings.read_findings(path)["ours"] == {"ms": 1.5}


@pytest.mark.parametrize("name", [p for p in PROGRAMS if p not in ("contest", "findings", "steps")])
def test_every_program_describes_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out
