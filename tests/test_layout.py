"""The house: which module may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOUNS = {"gpt2", "llama", "loss", "data", "model"}
ALLOWED = {
    "files": set(),
    "gpt2": set(),
    "llama": set(),
    "loss": set(),
    "data": set(),
    "model": {"gpt2", "llama"},
    "train": {"data", "loss", "model"},
    "cache": set(),
    "distill": {"cache", "data", "loss", "model", "train"},
}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def imports(path):
    """Names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", [m for m in MODULES if m != "reproduce"])
def test_imports_point_one_way(module):
    seen = imports(ROOT / f"{module}.py") & set(MODULES)
    assert seen <= ALLOWED.get(module, NOUNS) | {"files"}


def test_only_the_four_packages_are_needed_at_run_time():
    stated = (ROOT / "requirements.txt").read_text().split()
    packages = {line.split("==")[0].split(">=")[0] for line in stated}
    assert packages == {"torch", "sentencepiece", "numpy", "tqdm"}


def test_modules_can_be_imported_without_doing_anything(tmp_path):
    command = [sys.executable, "-c", f"import {', '.join(MODULES)}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == b"" and list(tmp_path.iterdir()) == []
