"""The house: which module may import which."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARNESS = {path.stem for path in (ROOT / "harness").glob("[!_]*.py")}
MODULES = {path.stem for path in ROOT.glob("*.py")}
NOUNS = {"gpt2", "llama", "loss", "data", "model"}
ALLOWED = {  # modules of the root that a module of the root may import
    "gpt2": set(),
    "llama": set(),
    "loss": set(),
    "data": set(),
    "cleaning": set(),
    "model": {"gpt2", "llama"},
    "train": {"data", "loss", "model"},
    "distill": {"data", "loss", "model", "train"},
    "tasks": {"data", "loss"},
    "classifier": {"llama", "model"},
    "finetune": NOUNS | {"classifier", "tasks", "train"},
    "export_hf": NOUNS | {"classifier"},
    "tokenize_corpus": NOUNS | {"cleaning"},
    "scoring": {"data", "loss"},
    "surprisal": {"scoring"},
    "evaluate": NOUNS | {"scoring", "surprisal"},
    "sampling": set(),
    "experiment": {"cleaning", "data", "model", "train", "distill", "finetune"},
}


def imports(path):
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def root_modules(path):
    """The modules of the root that a file imports."""
    return {name.split(".")[0] for name in imports(path)} & MODULES


@pytest.mark.parametrize("module", sorted(MODULES - {"reproduce"}))
def test_imports_point_one_way(module):
    assert root_modules(ROOT / f"{module}.py") <= ALLOWED.get(module, NOUNS)


def harness_imports():
    """{module of the harness: those that it imports}."""
    return {
        module: {
            other
            for other in HARNESS
            if f"harness.{other}" in imports(ROOT / "harness" / f"{module}.py")
        }
        for module in HARNESS
    }


@pytest.mark.parametrize("folder", ["harness", "toy", "report"])
def test_the_harness_the_toy_grammar_and_the_report_know_nothing_of_the_method(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not root_modules(path), path.name


def test_the_harness_is_built_upon_files_and_has_no_circle():
    graph = harness_imports()
    assert not graph["files"]
    while graph:
        leaves = {module for module, others in graph.items() if not others & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


def test_the_loop_fits_a_screen_and_its_file_an_evening():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    (fit,) = [f for f in functions if f.name == "fit"]
    assert fit.end_lineno - fit.lineno < 60 and source.count("\n") <= 320


def test_only_the_four_packages_are_needed_at_run_time():
    stated = (ROOT / "requirements.txt").read_text().split()
    packages = {line.split("==")[0].split(">=")[0] for line in stated}
    assert packages == {"torch", "sentencepiece", "numpy", "tqdm"}


def test_the_set_up_installs_exact_versions_of_what_is_needed():
    locked = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line
    ]
    needed = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in locked} == {re.split("[=>]", n)[0] for n in needed}
    setup = subprocess.check_output(["make", "-nB", "setup"], cwd=ROOT, text=True)
    installing = [line for line in setup.splitlines() if "pip install" in line]
    assert installing and all("-c requirements.lock" in line for line in installing)


def test_modules_can_be_imported_without_doing_anything(tmp_path):
    everything = [*sorted(MODULES), *(f"harness.{module}" for module in sorted(HARNESS))]
    command = [sys.executable, "-c", f"import {', '.join(everything)}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == b"" and list(tmp_path.iterdir()) == []
