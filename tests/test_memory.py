"""What a step is said to take of memory is what it takes."""

import dataclasses

import pytest
import torch

import model as models
import train
from conftest import step_of
from data import open_corpus
from distill import DistillConfig, FusedDistillationObjective
from test_train import config_for, trained
from train import CrossEntropyObjective
from training import memory
from training.checkpoint import read_checkpoint
from training.io import UserError
from training.memory import COMPILED_SHARE, Memory, estimate, kept_bytes


def really_kept(model, function, *inputs):
    """Bytes of what `function(*inputs)` keeps for the backward pass, the model's weights aside."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    own |= {buffer.untyped_storage()._cdata for buffer in model.buffers()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        function(*inputs)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_what_is_traced_is_what_is_kept(name):
    model = models.build_model(name, 300, dropout=0.1)
    found = [kept_bytes(model, n, 64, "bf16") for n in (1, 2, 3)]
    tokens = [torch.zeros(n, 64, dtype=torch.int64) for n in (1, 2, 3)]
    assert model.training
    model.eval()  # a GPU has FlashAttention with dropout, which keeps no scores
    assert found == [really_kept(model, model, t) for t in tokens]
    assert found[2] - found[1] == found[1] - found[0] > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_checkpointed_layers_keep_their_input_and_one_of_them_the_rest(name):
    layers, one = (models.build_model(name, 300, num_hidden_layers=n) for n in (5, 1))
    inputs = 2 * 64 * layers.config.hidden_size * 4
    kept = kept_bytes(layers, 2, 64, "bf16", checkpointed=True)
    assert kept == kept_bytes(one, 2, 64, "bf16") + 5 * inputs
    assert kept < kept_bytes(layers, 2, 64, "bf16")


def test_an_estimate_counts_state_teachers_and_loss():
    student, *teachers = (models.build_model(n, 300) for n in ("llama-tiny-student", "gpt2-tiny"))
    alone = estimate(CrossEntropyObjective(student), 32, "fp32", compiled=False)
    taught = FusedDistillationObjective(student, teachers, DistillConfig(teachers=[]))
    distilled = estimate(taught, 32, "fp32", compiled=False)
    assert distilled.per_sequence == alone.per_sequence
    assert distilled.fixed - alone.fixed == 4 * models.count_parameters(teachers[0])
    assert alone.fixed >= 16 * models.count_parameters(student)
    compiled = estimate(CrossEntropyObjective(student), 32, "fp32", compiled=True)
    assert compiled.per_sequence == round(COMPILED_SHARE * alone.per_sequence)


def test_as_many_sequences_as_fit_divide_the_batch():
    needed = Memory(fixed=1000, per_sequence=10)
    assert [needed.sequences(12, room / 0.9) for room in (1130, 1120, 1119, 1010, 1009)] == [12, 12, 6, 1, 0]


def test_auto_takes_what_fits_and_keeps_the_choice(data_folder, tmp_path, monkeypatch, capsys):
    config = config_for(data_folder, tmp_path / "run", steps=2, micro_batch_size="auto")
    model = models.build_model(config.model, 300)
    needed = estimate(CrossEntropyObjective(model), 32, "fp32", compiled=False)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed.of(3) / 0.9)
    trained(config)
    assert read_checkpoint(tmp_path / "run" / "best.pt")["config"]["micro_batch_size"] == 2
    assert "2 sequences at a time" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda *_: needed.of(0))
    with pytest.raises(UserError, match="smaller model"):
        trained(dataclasses.replace(config, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_a_dry_run_advises_for_gpus_of_several_sizes(data_folder, tmp_path, capsys):
    options = ["--data", str(data_folder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    options += ["--model", "gpt2-tiny", "--dry-run", "--sequence-length", "32"]
    assert train.main(options) == 0
    printed = capsys.readouterr().out
    assert "estimate   0." in printed and "16 on a GPU of 24 GB" in printed


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_compiled_layers_keep_the_share_that_is_said(name):
    model = models.build_model(name, 300, hidden_size=256, num_hidden_layers=1)
    block, backend = model.blocks[0].train(), "aot_eager_decomp_partition"
    compiled = torch.compile(block.forward, backend=backend, dynamic=False)

    def of_a_sequence(function):
        inputs = [torch.randn(n, 128, 256, requires_grad=True) for n in (1, 2)]
        tables = (model.cos[:128], model.sin[:128]) if name == "llama-tiny" else ()
        one, two = (really_kept(model, function, x, *tables) for x in inputs)
        return two - one

    assert abs(of_a_sequence(compiled) / of_a_sequence(block) - COMPILED_SHARE) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2-97m", "llama-58m"])
def test_a_step_on_a_gpu_takes_about_what_is_estimated(data_folder, name):
    objective = CrossEntropyObjective(models.build_model(name, 300, dropout=0.1)).cuda().train()
    shard = open_corpus(data_folder).train
    stream = train.BatchStream(shard, 32, 128, seed=0, device="cuda")
    step = step_of(objective, device="cuda", precision="bf16")
    torch.cuda.reset_peak_memory_stats()
    for i in range(2):
        step(stream(i), 1e-3)
    taken = torch.cuda.max_memory_allocated()
    assert 0.6 < taken / estimate(objective.cpu(), 128, "bf16", compiled=False).of(32) < 1.1
