"""How many sequences fit in memory: tried before a run, and estimated without a device."""

import pytest
import torch

import model as models
import train
from benchmarks.sizes import COMPILED_SHARE, Memory, activation_bytes, estimate
from conftest import config_for, same, step_of, trained
from data import BatchStream, open_corpus
from distill import DistillConfig, FusedDistillationObjective
from model import GPT2
from train import CrossEntropyObjective
from training.checkpoint import read_checkpoint
from training.device import choose_compute, largest_micro_batch
from training.io import UserError
from training.teacher_cache import TeacherCache

# ---- the trial


@pytest.fixture
def memory_for(monkeypatch):
    """Lets a GPT-2's forward pass run out of memory above a number of sequences; lists the tried."""
    tried = []

    def limit(sequences):
        hidden_states = GPT2.hidden_states

        def limited(self, tokens):
            tried.append(len(tokens))
            if self.training and len(tokens) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return hidden_states(self, tokens)

        monkeypatch.setattr(GPT2, "hidden_states", limited)
        return tried

    return limit


def test_a_trial_halves_the_batch_until_it_fits_and_changes_nothing(train_shard, memory_for):
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300)).train()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    random, batch = torch.get_rng_state(), BatchStream(train_shard, 12, 32, seed=0)(0)
    tried, compute = memory_for(3), choose_compute("cpu")
    assert largest_micro_batch(objective, batch, compute) == 3 and tried == [12, 6, 3]
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, dict(objective.named_parameters()))
    assert all(p.grad is None for p in objective.parameters())
    memory_for(0)
    with pytest.raises(UserError, match="one sequence does not fit"):
        largest_micro_batch(objective, batch, compute)


def test_a_trial_fills_no_teacher_cache(train_shard):
    student, teacher = (models.build_model(name, 300) for name in ("llama-tiny-student", "gpt2-tiny"))
    cache = TeacherCache.in_memory([(525, 32, 96)], torch.float32, "cpu")
    objective = FusedDistillationObjective(student, [teacher], DistillConfig(teachers=[]), cache)
    batch = BatchStream(train_shard, 4, 32, seed=0)(0)
    assert largest_micro_batch(objective, batch, choose_compute("cpu", "fp32")) == 4
    assert not cache.filled.any()


def test_auto_trains_as_the_number_that_it_chooses_and_keeps_it(data_folder, tmp_path, memory_for, capsys):
    def checkpoint_of(micro_batch_size):
        out = tmp_path / str(micro_batch_size)
        trained(config_for(data_folder, out, steps=2, micro_batch_size=micro_batch_size))
        return read_checkpoint(out / "checkpoint.pt")

    by_number = checkpoint_of(2)
    memory_for(3)
    by_trial = checkpoint_of("auto")
    assert "2 sequences at a time fit" in capsys.readouterr().out
    assert by_trial["config"]["micro_batch_size"] == 2
    assert same(by_number["weights"], by_trial["weights"])


@pytest.mark.gpu
def test_a_gpu_takes_what_the_trial_says(data_folder):
    """Another tensor takes memory away, so that the batch as a whole does not fit."""
    objective = CrossEntropyObjective(models.build_model("llama-58m", 300)).train()
    stream = BatchStream(open_corpus(data_folder).train, 256, 128, seed=0, device="cuda")
    torch.cuda.set_per_process_memory_fraction(6e9 / torch.cuda.mem_get_info()[1])
    try:
        sequences = largest_micro_batch(objective, stream(0), choose_compute("cuda", "bf16"))
        assert 1 <= sequences < 256
        step = step_of(objective, sequences, device="cuda", precision="bf16")
        for i in range(3):
            step(stream(i), 1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- the estimate


def bytes_kept(model, function, *inputs):
    """Returns the bytes that `function(*inputs)` keeps for the backward pass, weights aside."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        function(*inputs)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_traced_activations_are_those_that_a_forward_pass_keeps(name):
    model = models.build_model(name, 300, dropout=0.1)
    traced = [activation_bytes(model, n, 64) for n in (1, 2, 3)]
    model.eval()  # a GPU has FlashAttention with dropout, which keeps no scores
    assert traced == [bytes_kept(model, model, torch.zeros(n, 64, dtype=torch.int64)) for n in (1, 2, 3)]
    assert traced[2] - traced[1] == traced[1] - traced[0] > 0


def test_an_estimate_counts_state_and_teachers():
    student, teacher = (models.build_model(n, 300) for n in ("llama-tiny-student", "gpt2-tiny"))
    alone = estimate(CrossEntropyObjective(student), 32)
    distilled = estimate(FusedDistillationObjective(student, [teacher], DistillConfig(teachers=[])), 32)
    assert distilled.per_sequence == alone.per_sequence
    assert distilled.fixed - alone.fixed == 4 * models.count_parameters(teacher)
    assert alone.fixed >= 16 * models.count_parameters(student)


def test_the_largest_micro_batch_that_fits_divides_the_batch():
    memory = Memory(fixed=1000, per_sequence=10)
    assert [memory.sequences(12, free / 0.9) for free in (1130, 1120, 1119, 1010, 1009)] == [12, 12, 6, 1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2-97m", "llama-58m"])
def test_a_step_on_a_gpu_takes_about_what_is_estimated(data_folder, name):
    objective = CrossEntropyObjective(models.build_model(name, 300, dropout=0.1)).cuda().train()
    stream = train.BatchStream(open_corpus(data_folder).train, 32, 128, seed=0, device="cuda")
    step = step_of(objective, device="cuda", precision="bf16")
    torch.cuda.reset_peak_memory_stats()
    for i in range(2):
        step(stream(i), 1e-3)
    memory = estimate(objective.cpu(), 128)
    expected = memory.fixed + 32 * memory.per_sequence / COMPILED_SHARE  # these layers are not compiled
    assert 0.6 < torch.cuda.max_memory_allocated() / expected < 1.1
