"""The benchmarks: no result is lost, no process is left, and each program accepts its commands."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import evaluation, measurement, suite, workers

ROOT = Path(__file__).parent.parent
COMMANDS = {command for phases in suite.SUITES.values() for command in phases.values()}
PROGRAMS = [p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()]
COMMANDS |= {f"python -m benchmarks.{name}" for name in PROGRAMS}

# Prints the id of a child that would outlive it, writes two results and the half of one, and hangs.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(child.pid)
with open(sys.argv[sys.argv.index("--results") + 1], "w") as file:
    file.write('{"name": "first", "ms": 12.5}\\n{"name": "second", "error": "no memory"}\\n{"name": "thi')
time.sleep(100)
"""
COMPLETES = """
import sys
print("the figures")
with open(sys.argv[sys.argv.index("--results") + 1], "w") as file:
    file.write('{"name": "only", "ms": 1}\\n')
"""
FAILS = "import sys; print('half'); sys.exit('it broke')"


@pytest.fixture
def fake_suite(tmp_path, monkeypatch):
    """Makes a suite of {phase: text of a program}, and returns its command line."""
    monkeypatch.setattr(suite, "commit", lambda: "0123456789ab")

    def make(**programs):
        for name, text in programs.items():
            (tmp_path / f"{name}.py").write_text(text)
        phases = {name: f"python {tmp_path / name}.py" for name in programs}
        monkeypatch.setitem(suite.SUITES, "fake", phases)
        return ["fake", "--out", str(tmp_path / "out")]

    return make


def entries(tmp_path):
    return json.loads((tmp_path / "out" / "fake.json").read_text())


def page(tmp_path):
    return (tmp_path / "out" / "fake.md").read_text()


def is_running(pid):
    """True if the process runs. One that only waits for its parent to read its exit code does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- the suite


def test_a_phase_that_hangs_or_fails_keeps_its_results_and_does_not_stop_the_others(
    fake_suite, tmp_path, monkeypatch
):
    """What hangs is killed with its children."""
    monkeypatch.setattr(suite, "PHASE_SECONDS", 2.0)
    assert suite.main(fake_suite(hangs=HANGS, fails=FAILS, completes=COMPLETES)) == 1
    phases, text = entries(tmp_path), page(tmp_path)
    assert phases["hangs"]["state"] == "cut off"
    assert phases["hangs"]["results"] == {"first": {"ms": 12.5}, "second": {"error": "no memory"}}
    wait_until(lambda: not is_running(phases["hangs"]["printed"][0]))
    assert "Not complete: stopped after 2 seconds." in text
    assert phases["fails"]["problem"] == "exit code 1: `it broke`"
    assert "half" in text and "Not complete: exit code 1: `it broke`." in text
    assert phases["completes"]["state"] == "complete" and "the figures" in text


def test_a_phase_completed_at_this_commit_is_repeated_only_by_name(fake_suite, tmp_path, monkeypatch):
    path = tmp_path / "count"
    arguments = fake_suite(counts=COMPLETES + f"\nopen({str(path)!r}, 'a').write('x')")
    expected = 0
    for commit, options, runs in [
        ("0123456789ab", [], 1),
        ("0123456789ab", [], 0),
        ("0123456789ab", ["--phase", "counts"], 1),
        ("another", [], 1),
        ("another-dirty", [], 1),
        ("another-dirty", [], 1),
        ("unknown", [], 1),
        ("unknown", [], 1),
    ]:
        monkeypatch.setattr(suite, "commit", lambda commit=commit: commit)
        expected += runs
        assert suite.main([*arguments, *options]) == 0
        assert len(path.read_text()) == expected, (commit, options)


def test_no_phase_starts_after_the_minutes_are_used_up(fake_suite, tmp_path, capsys):
    started = time.monotonic()
    assert suite.main([*fake_suite(hangs=HANGS, completes=COMPLETES), "--minutes", "0.015"]) == 1
    assert time.monotonic() - started < 5
    assert list(entries(tmp_path)) == ["hangs"]
    assert "completes: not started, the 0.015 minutes are used up" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_is_killed_ends_its_phase_and_leaves_its_results(tmp_path, number):
    (tmp_path / "hangs.py").write_text(HANGS)
    program = (
        "import sys, signal; from benchmarks import suite; from training.io import run_program; "
        "signal.signal(signal.SIGTERM, signal.default_int_handler); "
        f"suite.SUITES['fake'] = {{'hangs': 'python {tmp_path / 'hangs.py'}'}}; "
        f"sys.exit(run_program(lambda: suite.main(['fake', '--out', {str(tmp_path / 'out')!r}])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: (tmp_path / "out" / "fake.md").exists() and entries(tmp_path)["hangs"]["results"])
    assert "Not complete: it is running, or the suite was killed." in page(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGTERM else -number)
    entry = entries(tmp_path)["hangs"]
    assert entry["state"] == ("cut off" if number == signal.SIGTERM else "running")
    assert entry["results"]["first"] == {"ms": 12.5}
    wait_until(lambda: not is_running(entry["printed"][0]))


def test_a_damaged_file_is_refused_by_its_name(fake_suite, tmp_path):
    arguments = fake_suite(completes=COMPLETES)
    (tmp_path / "out").mkdir()
    for damaged in ("{", "7"):
        (tmp_path / "out" / "fake.json").write_text(damaged)
        with pytest.raises(suite.UserError, match=r"fake\.json is damaged"):
            suite.main(arguments)


def test_the_committed_results_are_those_of_their_pages(tmp_path):
    for name in ("cpu", "cpu-fp32"):
        record = suite.Record(name, ROOT / "benchmarks" / "results")
        assert record.entries and all(e["state"] == "complete" for e in record.entries.values())
        committed, record.path = record.path.with_suffix(".md"), tmp_path / f"{name}.json"
        record.save()
        assert (tmp_path / f"{name}.md").read_text() == committed.read_text()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_program_describes_itself_and_accepts_each_command_of_the_suites(command, capsys):
    _, module, *arguments = shlex.split(command.replace("python -m ", "python "))
    module = module.removesuffix(".py")
    if module != "pytest":
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main([*arguments, "--help"])
        printed = capsys.readouterr()
        assert ended.value.code == 0 and f"{module}" in printed.out, printed.err


# ---- workers


def build_fake(variant):
    """A variant that sleeps, one that cannot be built, and one whose process dies in its second round."""
    calls = []

    def run_round():
        calls.append(time.sleep(0.01))
        if variant == "dies" and len(calls) == 2:
            os._exit(3)

    if variant == "fails":
        raise ValueError("out of something")
    return run_round, lambda: None


def test_workers_are_timed_and_one_that_dies_is_reported(tmp_path):
    parser = measurement.benchmark_parser("", ["sleeps"], rounds=3)
    args = parser.parse_args(["--results", str(tmp_path / "results")])
    results = measurement.Results(args, torch.device("cpu"))

    def to_result(variant, seconds):
        return {"variant": variant, "ms": 1000 * min(seconds)}

    names = ["fails", "sleeps", "dies"]
    by_variant = workers.time_variants(results, build_fake, names, to_result, prefix="x ")
    assert by_variant["fails"] == {"error": "ValueError: out of something"}
    assert by_variant["dies"] == {"error": "exit code 3"}
    sleeps = by_variant["sleeps"]
    assert sleeps["variant"] == "sleeps" and sleeps["rounds"] == 3 and 10 <= sleeps["ms"] < 1000
    assert sleeps["peak_gb"] > sleeps["own_gb"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [line["rounds"] for line in lines if line["name"] == "x sleeps"] == [1, 2, 3, 3]
    assert [line["rounds"] for line in lines if line["name"] == "x dies" and "rounds" in line] == [1]
    expected = {"machine": results.values["machine"]} | {f"x {k}": v for k, v in by_variant.items()}
    assert measurement.read_results(tmp_path / "results") == expected


# ---- programs


def test_the_last_line_of_a_benchmark_with_json_has_all_results():
    command = [sys.executable, "-m", "benchmarks.loss", "--device", "cpu", "--tokens", "16"]
    command += ["--rounds", "1", "--variants", "fused", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == {"machine", "16 fused"} and results["16 fused"]["ms"] > 0


def test_all_ways_of_scoring_agree_and_what_is_not_installed_is_said(monkeypatch, capsys):
    def other_way(folder, device, sentences):
        assert (folder / "model.safetensors").exists()
        return lambda: torch.zeros(len(sentences), dtype=torch.float64)

    monkeypatch.setattr(evaluation, "OTHERS", {"json": other_way, "no_such_module": other_way})
    monkeypatch.setattr(evaluation, "SENTENCES", 30)
    evaluation.main(["--model", "llama-tiny-student", "--device", "cpu", "--json"])
    *printed, results = capsys.readouterr().out.splitlines()
    results = json.loads(results)
    assert results.keys() == {"machine", "by length", "one at a time", "padded to the longest", "json"}
    assert results["one at a time"]["difference"] < 1e-4 > results["padded to the longest"]["difference"]
    assert results["json"]["difference"] > 10  # this way is wrong
    assert any(line.split() == ["no_such_module", "not", "installed", "-", "-"] for line in printed)
