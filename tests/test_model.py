"""Both architectures do what they are known for; presets have their sizes; checkpoints hold."""

import math

import pytest
import torch

import model as models
from gpt2 import GPT2, GPT2Config
from llama import Llama, LlamaConfig, RMSNorm, rope_tables, rotate
from training.io import UserError

SIZES = {
    "gpt2-705m": 704_928_768,
    "llama-360m": 359_973_888,
    "llama-58m": 58_343_936,
    "llama-16m": 16_584_960,
    "gpt2-97m": 97_540_608,
    "llama-97m": 97_241_856,
}


def tiny(name, **changes):
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2(GPT2Config(50, 16, 64, 2, 2, max_position_embeddings=32, **changes))
    return Llama(LlamaConfig(50, 16, 40, 2, 2, max_position_embeddings=32, **changes))


both = pytest.mark.parametrize("name", ["gpt2", "llama"])


def test_presets_have_the_papers_parameter_counts_and_tiny_ones_a_million_at_most():
    with torch.device("meta"):
        for name, parameters in SIZES.items():
            assert models.count_parameters(models.build_model(name)) == parameters
        for name in ("gpt2-tiny", "llama-tiny"):
            assert models.count_parameters(models.build_model(name, 2000)) <= 1_000_000


def test_an_unknown_preset_is_answered_with_the_list():
    with pytest.raises(UserError, match="llama-58m"):
        models.build_model("llama-7b")


@both
def test_future_tokens_do_not_change_the_past(name):
    model = tiny(name).eval()
    tokens = torch.randint(50, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@both
def test_logits_are_the_head_applied_to_hidden_states_and_dropout_acts_in_training_only(name):
    model = tiny(name, dropout=0.5)
    tokens = torch.randint(50, (2, 5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert model(tokens).shape == (2, 5, 50) and torch.equal(model(tokens), model(tokens))
    torch.testing.assert_close(model(tokens), model.hidden_states(tokens) @ model.head.T)


@both
def test_an_untrained_model_is_nearly_uniform(name):
    loss = torch.nn.functional.cross_entropy(
        tiny(name).eval()(torch.randint(50, (4, 30))).flatten(0, 1), torch.randint(50, (120,))
    )
    assert abs(loss.item() - math.log(50)) < 0.1


def test_rms_norm_is_its_formula():
    norm = RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rotary_scores_depend_on_distance_alone():
    config = LlamaConfig(50, 16, 40, 1, 2, max_position_embeddings=32)
    cos, sin = rope_tables(config)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 32, 8)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]
    torch.testing.assert_close(scores[10, 7], scores[25, 22])
    assert not torch.isclose(scores[10, 7], scores[10, 5])


@both
def test_the_residual_stream_stays_in_float32_under_autocast(name):
    model, kinds = tiny(name), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: kinds.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(torch.randint(50, (2, 9)))
    assert {*kinds, hidden.dtype} == {torch.float32}
