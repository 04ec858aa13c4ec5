"""The layout: which module may import which, and what a name of a folder promises."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("training", "corpus", "evaluation", "finetuning", "experiments", "toy", "benchmarks")
NOUNS = {"gpt2", "llama", "loss", "data", "model", "tokenizer"}
ALLOWED = {  # what a module of the root, or a folder, may import of them, besides training
    "training": set(),
    "corpus": set(),
    "toy": set(),
    "gpt2": set(),
    "llama": set(),
    "loss": set(),
    "tokenizer": set(),
    "data": {"corpus", "tokenizer"},
    "model": {"gpt2", "llama", "tokenizer"},
    "train": {"data", "loss", "model"},
    "distill": {"data", "loss", "model", "train"},
    "evaluation": NOUNS | {"corpus"},
    "finetuning": NOUNS,
    "tokenize_corpus": {"corpus", "tokenizer"},
    "make_toy_corpus": {"toy"},
    "generate": NOUNS,
    "evaluate": NOUNS | {"corpus", "evaluation"},
    "finetune": NOUNS | {"evaluation", "finetuning", "train"},
    "export_hf": NOUNS | {"finetuning"},
    "experiments": NOUNS | {"corpus", "evaluation", "finetuning", "train", "distill", "finetune"},
}


def modules():
    """{dotted name: path} of all modules of the project but for tests."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name: path for path, name in names.items() if not name.endswith("__init__")}


def imports(path):
    """Dotted names of the project's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & modules().keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name):
    top = name.split(".")[0]
    if top not in ALLOWED:  # reproduce and the benchmarks stand on top
        return
    imported = {other.split(".")[0] for other in imports(modules()[name])}
    assert imported <= ALLOWED[top] | {top, "training"}


def test_imports_have_no_circle():
    graph = {name: imports(path) for name, path in modules().items()}
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def test_training_is_built_upon_io():
    assert not imports(ROOT / "training" / "io.py")


def test_the_root_holds_what_is_run_and_the_method():
    libraries = {"gpt2", "llama", "loss", "model", "data", "tokenizer"}
    for path in ROOT.glob("*.py"):
        has_main = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        assert has_main != (path.stem in libraries), path.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_functions_are_short_and_have_few_parameters(name):
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.args + node.args.kwonlyargs
            parameters = [a for a in arguments if a.arg not in ("self", "cls", "ctx")]
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert len(parameters) <= 8, f"{node.name} has {len(parameters)} parameters"


def test_no_formatter_or_import_order_is_switched_off():
    for path in [*modules().values(), *(ROOT / "tests").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "fmt: " + "skip" not in text and "noqa: " + "E402" not in text, path.name


def test_the_training_loop_loads_few_modules():
    """Who imports the loop gets no teacher cache, tokenizer, evaluation or experiment."""
    command = [sys.executable, "-c", "import sys, train; print(*sys.modules)"]
    loaded = set(subprocess.check_output(command, cwd=ROOT, text=True).split())
    ours = {name for name in loaded if name in modules()}
    assert not loaded & {"sentencepiece", "tokenizers"} and "tokenizer" not in ours
    assert not {name for name in ours if name.startswith(("evaluation", "experiments", "finetuning"))}
    assert "training.teacher_cache" not in ours and len(ours) <= 11, sorted(ours)


def test_only_the_four_packages_are_needed_at_run_time():
    stated = (ROOT / "requirements.txt").read_text().split()
    packages = {line.split("==")[0].split(">=")[0] for line in stated}
    assert packages == {"torch", "sentencepiece", "numpy", "tqdm"}


def test_the_set_up_installs_exact_versions_of_what_is_needed():
    locked = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    needed = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in locked} == {re.split("[=>]", n)[0] for n in needed}
    setup = subprocess.check_output(["make", "-nB", "setup"], cwd=ROOT, text=True)
    installing = [line for line in setup.splitlines() if "pip install" in line]
    assert installing and all("-c requirements.lock" in line for line in installing)


def test_modules_can_be_imported_without_doing_anything(tmp_path):
    command = [sys.executable, "-c", f"import {', '.join(sorted(modules()))}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == b"" and list(tmp_path.iterdir()) == []
