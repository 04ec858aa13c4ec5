"""The checkpoint format: what is written is read, and nothing else."""

import dataclasses
import math

import pytest
import torch

import model as models
from conftest import save_model
from training.checkpoint import FORMAT, content_digest
from training.io import UserError


def saved(path, tokenizer, name="llama-tiny", training=None):
    torch.manual_seed(0)
    model = models.build_model(name, tokenizer.vocabulary_size)
    save_model(path, model, tokenizer, name, progress={"step": 3}, training=training)
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
    assert checkpoint["tokenizer"]["identity"] == tokenizer.identity
    assert bytes(checkpoint["tokenizer"]["model"].numpy()) == tokenizer.model_bytes
    assert not any(k.startswith(("_orig_mod.", "module.")) for k in checkpoint["weights"])


def test_a_checkpoint_is_plain_data(tmp_path, tokenizer):
    saved(tmp_path / "a.pt", tokenizer)
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    assert plain["model"]["shape"] == dataclasses.asdict(
        models.build_model("llama-tiny", tokenizer.vocabulary_size).config
    )


def test_a_changed_weight_is_refused(tmp_path, tokenizer):
    path = tmp_path / "a.pt"
    saved(path, tokenizer)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["weights"]["norm.weight"][0] += 1e-3
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="damaged"):
        models.load_checkpoint(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "text"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, tokenizer, damage):
    path = tmp_path / "a.pt"
    saved(path, tokenizer)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:half],
            "zeros": content[:half] + bytes(4096) + content[half + 4096 :],
            "text": b"hello, world",
        }[damage]
    )
    with pytest.raises(UserError, match=r"a\.pt"):
        models.load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"format": FORMAT, "weights": Payload()}, tmp_path / "a.pt")
    with pytest.raises(UserError):
        models.load_checkpoint(tmp_path / "a.pt")
    assert "executed" not in capsys.readouterr().out


def test_foreign_files_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="does not exist"):
        models.load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"is a folder: give a checkpoint such as"):
        models.load_checkpoint(tmp_path)
    torch.save({"weights": {}}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="no checkpoint of this project"):
        models.load_checkpoint(tmp_path / "b.pt")
    torch.save({"format": FORMAT, "version": 99}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="version 99"):
        models.load_checkpoint(tmp_path / "c.pt")


def resigned(path, change):
    """Changes a checkpoint and gives it a valid digest, as someone else may do."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["digest"]
    change(checkpoint)
    torch.save(checkpoint | {"digest": content_digest(checkpoint)}, path)


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
    resigned(tmp_path / "a.pt", change)
    with pytest.raises(UserError, match=message):
        models.load_checkpoint(tmp_path / "a.pt")
