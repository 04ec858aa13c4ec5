"""Each command in the README runs, in its order, on tiny models; its table is that of the code."""

import dataclasses
import glob
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import make_toy_corpus
import model as models
import tokenize_corpus
from conftest import write_text
from experiments import recipes
from training.io import run_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```\n(.*?)```", README, flags=re.S))
COMMANDS = re.findall(r"^(?:python|make) .*$", BLOCKS, flags=re.M)
COMMANDS += re.findall(r"`(python [^`\n]+)`", README)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A folder with the README's folders, and presets of its names that train in seconds."""
    for split, folder in (("train", "babylm_10M"), ("dev", "babylm_dev")):
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(("qed", "cbt")):
            text = write_text(2000 if split == "train" else 400, seed)
            (tmp_path / folder / f"{name}.{split}").write_text(text)
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
        kept = ("model", "like", "teachers", "title", "seed_offset")
        for role, entry in table["models"].items():
            if entry is not None:  # taken back from what the recipe is like
                table["models"][role] = {key: entry[key] for key in kept if key in entry}
        (tmp_path / "recipes" / path.name).write_text(json.dumps(table))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    monkeypatch.setattr(make_toy_corpus, "PAIRS_PER_PARADIGM", 20)  # scoring takes the most time
    monkeypatch.setattr("reproduce.SAMPLE_TOKENS", 4)
    monkeypatch.setattr(make_toy_corpus, "TASK_PAIRS", {"train": 4, "valid": 2})
    # The page and the pictures are for test_report.py.
    monkeypatch.setattr("experiments.plots.picture", lambda *_: None)
    monkeypatch.setattr("experiments.plots.overview", lambda *_: None)
    monkeypatch.setattr(tokenize_corpus, "VOCABULARY_SIZE", 300)
    monkeypatch.chdir(tmp_path)


def test_each_command_in_the_readme_runs(small_world):
    programs = set()
    for command in COMMANDS:
        words = [glob.glob(w) if "*" in w else [w] for w in shlex.split(command)]
        name, *arguments = [w for expanded in words for w in expanded][1:]
        if name == "-m":  # a benchmark, which takes minutes: only its options are read
            program = importlib.import_module(arguments[0])
            with pytest.raises(SystemExit) as ended:
                program.main([*arguments[1:], "--help"])
            assert ended.value.code == 0, command
        elif command.startswith("python "):
            program = importlib.import_module(name.removesuffix(".py"))
            assert run_program(lambda p=program, a=arguments: p.main(a)) == 0, command
            programs.add(name)
    assert programs >= {
        "tokenize_corpus.py",
        "train.py",
        "distill.py",
        "evaluate.py",
        "generate.py",
        "export_hf.py",
        "finetune.py",
    }


def test_make_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in COMMANDS
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_table_of_presets_is_that_of_the_code():
    rows = {row.split("`")[1]: row for row in re.findall(r"^\| `(?:gpt2|llama)-.*$", README, re.M)}
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
    table = README.split("## Reading order")[1].split("## ")[0]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in table
