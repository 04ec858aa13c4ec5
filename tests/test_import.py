"""Published models: folders of their forms, with random weights, compute what transformers computes."""

import functools

import pytest
import torch
import transformers

import export_hf
import model as models
from conftest import run

V = 300
LLAMA = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
llama = functools.partial(dict, LLAMA, model_type="llama")
gpt2 = functools.partial(dict, GPT2, model_type="gpt2")
SHARDED = {"max_shard_size": "40KB"}
# {form: (config, options of save_pretrained, type of the weights)}
FORMS = {
    "Baby Llama": (llama(rms_norm_eps=1e-6), {}, torch.float32),
    "SmolLM2": (
        llama(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e5, rms_norm_eps=1e-5),
        {},
        torch.bfloat16,
    ),
    "TinyLlama": (llama(num_key_value_heads=1), {}, torch.float16),
    "heads of another size": (llama(head_dim=16), {}, torch.float32),
    "grouped heads of another size": (llama(head_dim=6, num_key_value_heads=2), {}, torch.float32),
    "a LLaMA in several files": (llama(num_key_value_heads=2), SHARDED, torch.bfloat16),
    "GPT-2": (gpt2(), {}, torch.float32),
    "a GPT-2 in several files": (gpt2(), SHARDED, torch.float16),
    "a GPT-2 with an inner size": (gpt2(n_inner=80), {}, torch.float32),
}


def save_form(folder, form, tokenizer, pickled=False):
    """Writes a folder of that form, with weights of which none is 0; returns transformers' model."""
    config, options, dtype = FORMS[form]
    torch.manual_seed(0)
    config = dict(config)
    kind = config.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    if pickled:
        pickle_weights(folder, model)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return model


def pickle_weights(folder, model):
    """Puts pytorch_model.bin in the place of the safetensors."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def imported(folder):
    """Our model of a folder."""
    out = folder.with_suffix(".pt")
    assert run(export_hf, "--import", folder, "--out", out) == 0
    return models.load_checkpoint(out)[0]


def assert_same_logits(ours, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(ours.config.vocab_size, (3, 64))
    with torch.no_grad():
        logits = theirs(tokens).logits[..., : ours.config.vocab_size]
        torch.testing.assert_close(ours(tokens), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers_and_what_comes_in_goes_out(form, tmp_path, tokenizer):
    save_form(tmp_path / "theirs", form, tokenizer)
    ours = imported(tmp_path / "theirs")
    assert_same_logits(ours, tmp_path / "theirs")
    out = tmp_path / "exported"
    assert run(export_hf, tmp_path / "theirs.pt", "--out", out) == 0
    assert_same_logits(ours, out)


@pytest.mark.parametrize("form", ["SmolLM2", "GPT-2"])
def test_pickled_weights_are_read_and_no_code_in_them_is_run(form, tmp_path, tokenizer, refused):
    save_form(tmp_path / "theirs", form, tokenizer, pickled=True)
    assert_same_logits(imported(tmp_path / "theirs"), tmp_path / "theirs")
    torch.save({"a": 1, "b": print}, tmp_path / "theirs" / "pytorch_model.bin")
    error = refused(export_hf, "--import", tmp_path / "theirs", "--out", tmp_path / "out.pt")
    assert "pytorch_model.bin is damaged, or holds more than tensors" in error


def test_a_name_of_the_hub_is_answered_with_how_to_download_it(tmp_path, refused):
    error = refused(export_hf, "--import", "someone/a-model", "--out", tmp_path / "out.pt")
    assert "hf download someone/a-model --local-dir a-model" in error
