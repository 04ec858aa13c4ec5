"""Each command in the README runs, in its order, on tiny models; its table is that of the code."""

import dataclasses
import glob
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import make_toy_corpus
import model as models
import published
import tokenize_corpus
from conftest import write_text
from experiments import recipes
from training.io import run_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Commands that need a network, an account, several GPUs or the official pipeline.
UNTRIED = ("pip", "hf", "mv", "git", "torchrun", "source", "python3", "export", "./eval", "./collate")
UNTRIED += (".venv/bin/python -m pytest", "python -m pytest", "python -m evaluation_pipeline")


def commands_of(page):
    """The commands of a page, in order: lines of blocks of code, and code in a line."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, flags=re.S | re.M)
    lines = re.sub(r"\\\n *", "", "".join(blocks)).splitlines()
    known = ("python ", "make ", *UNTRIED)
    commands = [line.split("  #")[0].strip() for line in lines if line.strip().startswith(known)]
    return commands + re.findall(r"`((?:python|make) [^`\n]+)`", text)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A folder with the README's folders, and presets of its names that train in seconds."""
    for split, folder in (("train", "babylm_10M"), ("dev", "babylm_dev")):
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(("qed", "cbt")):
            text = write_text(2000 if split == "train" else 400, seed)
            (tmp_path / folder / f"{name}.{split}").write_text(text)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    for folder in ("blimp_filtered", "supplement_filtered"):
        (tmp_path / folder).mkdir()
        pair = {"sentence_good": "the cat runs", "sentence_bad": "the dog runs"}
        (tmp_path / folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "glue_filtered").mkdir()
    for part in ("train", "valid"):
        pairs = [{"sentence1": "the cat", "sentence2": "a dog", "label": i % 2} for i in range(6)]
        path = tmp_path / "glue_filtered" / f"rte.{part}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "stimuli.txt").write_text("the cat runs\nthe old dog sees\n")
    for folder, form in (("SmolLM2-135M", "SmolLM2"), ("baby-llama-58m", "Baby Llama")):  # as downloaded
        published.save_model(tmp_path / folder, **published.FORMS[form])
    tiny = {"gpt2": models.PRESETS["gpt2-tiny"], "llama": models.PRESETS["llama-tiny-student"]}
    hyperparameters = models.Hyperparameters(1e-3, 4, 0.1, 10)
    for name in models.PRESETS:
        preset = dataclasses.replace(tiny[name.split("-")[0]], hyperparameters=hyperparameters)
        monkeypatch.setitem(models.PRESETS, name, preset)
    (tmp_path / "recipes").mkdir()
    for path in recipes.FOLDER.glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        table |= {"vocabulary_size": 300} if "corpus" not in table else {"words": 1000}
        table["options"] = {"log_every": 1}
        keys = ("model", "like", "teachers", "title", "seed_offset")
        for role, entry in table["models"].items():
            if entry is not None:  # taken back from what the recipe is like
                table["models"][role] = {key: entry[key] for key in keys if key in entry}
        (tmp_path / "recipes" / path.name).write_text(json.dumps(table))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    monkeypatch.setattr(make_toy_corpus, "PAIRS_PER_PARADIGM", 20)  # scoring takes the most time
    monkeypatch.setattr("reproduce.SAMPLE_TOKENS", 4)
    monkeypatch.setattr(make_toy_corpus, "TASK_PAIRS", {"train": 4, "valid": 2})
    # The page and the pictures are for test_report.py.
    monkeypatch.setattr("experiments.plots.picture", lambda *_: None)
    monkeypatch.setattr(tokenize_corpus, "VOCABULARY_SIZE", 300)
    monkeypatch.chdir(tmp_path)


def test_each_command_of_the_pages_runs(small_world):
    programs, tried = set(), set()
    for command in dict.fromkeys(command for page in PAGES for command in commands_of(page)):
        if not command.startswith("python ") or command.startswith(UNTRIED) or "USER/" in command:
            continue
        if "chck_*" in command:  # the text is too short for a mark
            shutil.copy("runs/babylm/student/best.pt", "runs/babylm/student/chck_1M.pt")
        words = [glob.glob(w) if "*" in w else [w] for w in shlex.split(command)]
        name, *arguments = [w for expanded in words for w in expanded][1:]
        if name == "-m":  # a benchmark, which takes minutes: only its options are read
            program = importlib.import_module(arguments[0])
            with pytest.raises(SystemExit) as ended:
                program.main([*arguments[1:], "--help"])
            assert ended.value.code == 0, command
        else:
            program = importlib.import_module(name.removesuffix(".py"))
            assert run_program(lambda p=program, a=arguments: p.main(a)) == 0, command
            programs.add(name)
        tried.add(command)
    assert programs == {path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text()}
    assert len(tried) > 25


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h)).strip().lower().replace(" ", "-") for h in headings
    }


def test_no_relative_link_is_broken():
    results = (ROOT / "benchmarks" / "results").glob("*.md")
    for page in [*PAGES, *results, ROOT / "tests" / "fixtures" / "README.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short():
    assert README.count("\n") <= 200 and len(README.split()) <= 2300


def test_each_page_of_docs_is_in_its_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").iterdir():
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_make_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    for path in (".ci/run", ".github/workflows/test.yml"):
        assert "make test" in (ROOT / path).read_text()


def test_the_version_is_the_same_everywhere():
    files = {
        "pyproject.toml": '^version = "(.*)"',
        "CITATION.cff": "^version: (.*)",
        "CHANGELOG.md": "^## ([^, ]*)",
    }
    versions = {re.search(pattern, (ROOT / f).read_text(), re.M)[1] for f, pattern in files.items()}
    assert len(versions) == 1


def test_the_table_of_presets_is_that_of_the_code():
    presets = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in re.findall(r"^\| `(?:gpt2|llama)-.*$", presets, re.M)}
    assert list(rows) == list(models.PRESETS)
    for name, preset in models.PRESETS.items():
        with torch.device("meta"):
            parameters = models.count_parameters(models.build_model(name))
        config, hyperparameters = preset.config, preset.hyperparameters
        shape = (config.num_hidden_layers, config.num_attention_heads)
        shape += (config.hidden_size, config.intermediate_size)
        values = dataclasses.astuple(hyperparameters)
        assert f"| {parameters:,} | {', '.join(map(str, shape))} |" in rows[name]
        assert f"| {', '.join(f'{v:g}' for v in values)} |" in rows[name]


def test_every_file_has_its_place_in_the_reading_order():
    section = README.split("## How it works")[1].split("## ")[0]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in section, path.name
