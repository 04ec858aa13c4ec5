"""The first minute on a GPU: each test is one thing on which the runs of the list rely.

    python -m pytest -m gpu -v tests/test_smoke.py

On a CPU those that can run do so with small models.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import step_of
from data import Batch
from model import PRESETS, build, build_model
from train import CrossEntropyObjective
from training.cuda_graph import GraphedStep
from training.device import choose_compute, choose_device, compile_and_check_blocks

LENGTH = 128
LAYERS = [
    *(("cpu", name, 2) for name in ("gpt2-tiny", "llama-tiny")),
    *(
        pytest.param("cuda", name, batch_size, marks=pytest.mark.gpu)
        for name, batch_size in (
            ("gpt2-705m", 256),
            ("llama-360m", 128),
            ("llama-58m", 32),
            ("gpt2-97m", 128),
            ("llama-97m", 128),
        )
    ),
]


def one_layer(device, name, **changes):
    """The objective of a preset with one layer, on its device."""
    shape = dataclasses.replace(PRESETS[name].config, num_hidden_layers=1, vocab_size=500, **changes)
    torch.manual_seed(0)
    return CrossEntropyObjective(build(shape)).to(choose_device(device)).train()


@pytest.mark.parametrize("device, name, batch_size", LAYERS)
def test_a_compiled_layer_is_the_eager_one_at_its_real_size(device, name, batch_size):
    compute = choose_compute(device, "bf16")
    objective = one_layer(device, name)
    tokens = torch.randint(500, (batch_size, LENGTH))
    compile_and_check_blocks(objective, tokens, compute)
    assert objective.compiled


@pytest.mark.parametrize("device, name, batch_size", [LAYERS[0], LAYERS[2]])
def test_a_compiled_layer_drops_the_share_that_it_is_asked_to_drop(device, name, batch_size):
    """With weights of zero and biases of one, a layer adds the masks of its two dropouts, over 1 - p."""
    compute, objective = choose_compute(device, "bf16"), one_layer(device, name, dropout=0.1)
    block, hidden = objective.model.blocks[0], objective.model.config.hidden_size
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            if "c_proj" in key:
                parameter.fill_(1.0 if key.endswith("bias") else 0.0)
    compile_and_check_blocks(objective, torch.randint(500, (batch_size, LENGTH)), compute)
    with torch.no_grad(), compute.autocast:
        added = block(torch.zeros(batch_size, LENGTH, hidden, device=compute.device))
    assert abs(added.float().mean().item() * 0.9 / 2 - 0.9) < (0.0005 if device == "cuda" else 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_attention_can_be_flash_attention(head_size):
    q = torch.randn(2, 8, LENGTH, head_size, device=choose_device("cuda"), dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.gpu
def test_a_step_of_the_papers_student_is_replayed_as_a_graph():
    objective = CrossEntropyObjective(build_model("llama-58m")).to(choose_device("cuda")).train()
    step = GraphedStep(step_of(objective, device="cuda", precision="bf16"))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(16000, (32, LENGTH + 1), generator=generator).cuda()
        batch = Batch.whole(torch.arange(32).cuda(), tokens[:, :-1], tokens[:, 1:])
        loss = step(batch, 1e-4)["loss"]
    assert step.replay and torch.isfinite(loss)
