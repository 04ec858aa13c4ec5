"""The checkpoint format: what is written is read, and nothing else."""

import math

import pytest
import torch

import model as models
from conftest import resign, save_model
from training.checkpoint import FORMAT
from training.io import UserError


def saved(path, tokenizer, name="llama-tiny"):
    torch.manual_seed(0)
    model = models.build_model(name, tokenizer.vocabulary_size)
    save_model(path, model, tokenizer, name, progress={"step": 3})
    return model


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_a_checkpoint_gives_back_the_model(tmp_path, tokenizer, name):
    model = saved(tmp_path / "a.pt", tokenizer, name).eval()
    before = torch.get_rng_state()
    loaded, checkpoint = models.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training and loaded.config == model.config
    tokens = torch.randint(tokenizer.vocabulary_size, (2, 10))
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["model"]["shape"] == vars(model.config)
    assert checkpoint["tokenizer"]["identity"] == tokenizer.identity
    assert bytes(checkpoint["tokenizer"]["model"].numpy()) == tokenizer.model_bytes
    assert not any(k.startswith(("_orig_mod.", "module.")) for k in checkpoint["weights"])


def test_a_changed_weight_is_refused(tmp_path, tokenizer):
    """Flipped bits and cut files are for test_faults.py and test_fuzzing.py."""
    path = tmp_path / "a.pt"
    saved(path, tokenizer)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["weights"]["norm.weight"][0] += 1e-3
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="damaged"):
        models.load_checkpoint(path)


@pytest.mark.parametrize(
    "content, message",
    [({"weights": {}}, "no checkpoint of this project"), ({"format": FORMAT, "version": 99}, "version 99")],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError, match=message):
        models.load_checkpoint(tmp_path / "b.pt")
    with pytest.raises(UserError, match="does not exist"):
        models.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"is a folder: give a checkpoint such as"):
        models.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"]["shape"].update(hidden_size=192), "do not fit"),
        (lambda c: c["model"]["shape"].update(hidden_size=-96), "do not fit"),
        (lambda c: c["model"]["shape"].update(num_attention_heads=0), "do not fit"),
        (lambda c: c["config"].update(sequence_length=300), "more positions than it has"),
        (lambda c: c["weights"]["norm.weight"].mul_(math.nan), "not finite"),
        (lambda c: c["weights"]["norm.weight"].fill_(math.inf), "not finite"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tmp_path, tokenizer, change, message):
    saved(tmp_path / "a.pt", tokenizer)
    resign(tmp_path / "a.pt", change)
    with pytest.raises(UserError, match=message):
        models.load_checkpoint(tmp_path / "a.pt")
