"""The models in pretrained/ load, write and judge sentences; their page has the numbers of the files."""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
import export_hf
import generate
from conftest import run, same, weights

FOLDER = Path(__file__).parent.parent / "pretrained"
NAMES = ("student", "control")
EASY = (
    ("He was a good man.", "Man good a was he."),
    ("They are in the house.", "They is in the house."),
    ("I do not know.", "I do not knows."),
    ("She has two dogs.", "She have two dogs."),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_pretrained_model_writes_and_is_exported(name, tmp_path, capsys):
    model = FOLDER / f"{name}.pt"
    assert run(generate, model, "--prompt", "Once upon a time", "--device", "cpu") == 0
    assert len(capsys.readouterr().out.removeprefix("Once upon a time").split()) > 20
    assert run(export_hf, model, "--dtype", "bf16", "--out", tmp_path / "exported") == 0
    assert run(export_hf, "--import", tmp_path / "exported", "--out", tmp_path / "again.pt") == 0
    assert same(weights(model), weights(tmp_path / "again.pt"))  # they were rounded to bf16 before


def test_pretrained_models_prefer_correct_sentences(tmp_path):
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in EASY]
    (tmp_path / "easy").mkdir()
    (tmp_path / "easy/easy.jsonl").write_text("\n".join(lines))
    models = [FOLDER / f"{name}.pt" for name in NAMES]
    scores = tmp_path / "scores.json"
    assert run(evaluate, *models, "--pairs", tmp_path / "easy", "--device", "cpu", "--json", scores) == 0
    for result in json.loads(scores.read_text())["checkpoints"]:
        assert [pairs["accuracy_over_files"] for pairs in result["pairs"].values()] == [1]


def test_the_page_of_the_pretrained_models_has_the_numbers_of_their_losses():
    page = (FOLDER / "README.md").read_text("utf-8")
    for name in NAMES:
        losses = np.load(FOLDER / f"{name}.losses.npz")
        assert f"{losses['nats'].sum(dtype=np.float64) / losses['targets'].sum():.4f}" in page
