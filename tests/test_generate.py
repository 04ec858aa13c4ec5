"""Text from both architectures: seeded, sampled as asked, never longer than asked."""

import os

import pytest
import torch

import generate as program
import model as models
from conftest import make_tokenizer, save_model
from generate import complete, generate
from training.io import run_program


@pytest.fixture(params=["gpt2-tiny", "llama-tiny"])
def model(request):
    torch.manual_seed(0)
    return models.build_model(request.param, 300).eval()


def sample(model, seed=0, excluded=range(4), **options):
    generator = torch.Generator().manual_seed(seed)
    options |= {"generator": generator, "excluded": excluded}
    return generate(model, torch.tensor([20, 30, 40]), 12, **options)


def test_a_seed_decides_the_text(model):
    assert torch.equal(sample(model, 1), sample(model, 1))
    assert not torch.equal(sample(model, 1), sample(model, 2))
    assert len(sample(model)) == 15 and sample(model)[:3].tolist() == [20, 30, 40]
    small = models.build_model("llama-tiny", 300, max_position_embeddings=8).eval()
    assert len(sample(small)) == 15  # text may outgrow the context


def test_temperature_zero_and_one_candidate_are_the_likeliest(model):
    greedy = sample(model, temperature=0)
    assert torch.equal(greedy, sample(model, seed=9, top_k=1))
    logits = model(greedy[None, :3])[0, -1]
    logits[:4] = -torch.inf
    assert greedy[3] == logits.argmax()


def test_excluded_ids_are_never_sampled(model):
    assert sample(model)[3:].max() >= 60
    tokens = sample(model, temperature=100.0, excluded=[*range(4), *range(60, 300)])[3:]
    assert tokens.min() > 3 and tokens.max() < 60


def test_special_ids_are_those_of_the_tokenizer():
    """Piece 3 is text and is sampled; logits without a piece are not, which could not be decoded."""
    as_t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    tokenizer = make_tokenizer(vocab_size=40, byte_fallback=False, **as_t5)
    ids = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id
    assert ids == (0, None, 1, 2) and tokenizer.special_ids == {0, 1, 2}
    model = models.build_model("llama-tiny", tokenizer.vocabulary_size + 20).eval()
    model.lm_head.weight.data.zero_()  # all tokens are equally likely
    text = complete(model, tokenizer, "the", 400)
    assert 3 in tokenizer.encode(text.removeprefix("the"))


def test_the_program_prints_the_prompt_and_more(model, tokenizer, tmp_path, capsys):
    path = tmp_path / "a.pt"
    name = "gpt2-tiny" if hasattr(model, "wte") else "llama-tiny"
    save_model(path, model, tokenizer, name)
    arguments = [str(path), "--prompt", "the cat", "--tokens", "8", "--device", "cpu"]
    assert run_program(lambda: program.main(arguments)) == 0
    first = capsys.readouterr().out
    assert first.startswith("the cat")
    assert run_program(lambda: program.main(arguments)) == 0
    assert capsys.readouterr().out == first


def test_bad_input_is_one_line(tmp_path, capsys):
    assert run_program(lambda: program.main([str(tmp_path / "none.pt"), "--prompt", "a"])) == 1
    latin1 = os.fsdecode(b"caf\xe9")
    assert run_program(lambda: program.main([str(tmp_path / "none.pt"), "--prompt", latin1])) == 1
    no_file, no_text = capsys.readouterr().err.splitlines()
    assert "does not exist" in no_file and "--prompt is not UTF-8" in no_text
