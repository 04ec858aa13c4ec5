"""Where and how a step is computed: precision, compiled layers, and one CUDA graph for a step."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as models
from conftest import interrupt_after, step_of
from data import BatchStream, count_chunks
from distill import DistillConfig, EnsembleObjective
from harness.cache import Layout, TeacherCache
from harness.devices import GraphedStep, choose_device
from test_train import config_for, fitted, trained
from train import CrossEntropyObjective


def objectives():
    """Names of both kinds of objective, with dropout in the student."""
    return pytest.mark.parametrize("kind", ["alone", "distilled"])


def full_step(kind, device, precision):
    """A step of three and three and two of eight sequences."""
    torch.manual_seed(0)
    model = models.build_model("gpt2-tiny", 300)
    teachers = [models.build_model(name, 300) for name in ("gpt2-tiny", "llama-tiny")]
    objective = CrossEntropyObjective(model)
    if kind == "distilled":
        objective = EnsembleObjective(model, teachers, DistillConfig(teachers=[]))
    return step_of(objective.to(device).train(), 3, 0.1, device, precision)


class Recording(TorchDispatchMode):
    """The operations run in it: their names, numbers, and what memory they read, and as what.

    Memory from outside is known by its address, what was made inside by its number.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.kept = [], {}, []

    def place(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return str(leaf)
        storage = leaf.untyped_storage()
        where = self.made.get(storage._cdata, storage.data_ptr())
        return where, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        read = tree_leaves((args, kwargs or {}))
        self.operations.append((str(operation), [self.place(leaf) for leaf in read]))
        result = operation(*args, **(kwargs or {}))
        here = {t.untyped_storage()._cdata for t in read if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.kept.append(tensor)  # so that no address is used twice
                storage = tensor.untyped_storage()._cdata
                if storage not in here:
                    self.made.setdefault(storage, f"made {len(self.made)}")
        return result


def recorded(step, batches):
    """The operations of each `update`, with another batch and another rate each time."""
    operations = []
    for i, batch in enumerate(batches):
        step.load(batch, 1e-3 * i)
        with Recording() as recording:
            step.train_step.update(step.parts)
        operations.append(recording.operations)
    return operations


@objectives()
def test_every_update_does_the_same_to_the_same_memory(train_shard, kind):
    """What a CUDA graph replays, once captured, must be what the next update would have done.

    Shown without a GPU for each operation of an eager update on a CPU, whose loss takes other
    branches and whose kernels are others. The first update also makes what is made once.
    """
    stream = BatchStream(train_shard, 8, 32, seed=0)
    step = GraphedStep(full_step(kind, "cpu", "bf16"))
    _, second, third, fourth = recorded(step, [stream(i) for i in range(4)])
    assert second == third == fourth and len(second) > 500
    names = {name.split(".")[1] for name, _ in second}
    assert names.isdisjoint({"_local_scalar_dense", "nonzero", "masked_select", "_unique2"})

    # The check can fail: rates and counts that move to new memory.
    for group in step.train_step.groups:
        group["lr"] = group["lr"].clone()
    step.train_step.nonfinite_steps = step.train_step.nonfinite_steps.clone()
    [changed] = recorded(step, [stream(4)])
    differing = [(a, b) for a, b in zip(changed, fourth, strict=True) if a != b]
    assert 0 < len(differing) < 10


@objectives()
def test_a_step_that_loads_its_input_equals_the_plain_one(train_shard, kind):
    stream = BatchStream(train_shard, 8, 32, seed=0)
    plain = full_step(kind, "cpu", "fp32")
    terms = [plain(stream(i), 1e-3 * i) for i in range(3)]
    loading = GraphedStep(full_step(kind, "cpu", "fp32"))
    for i in range(3):
        loading.load(stream(i), 1e-3 * i)
        loaded = loading.train_step.update(loading.parts)
        torch.testing.assert_close(loaded["loss"], terms[i]["loss"], rtol=1e-6, atol=0)
    for a, b in zip(plain.parameters.values(), loading.train_step.parameters.values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@objectives()
def test_a_graph_equals_eager_steps_on_a_gpu(train_shard, kind):
    stream = BatchStream(train_shard, 8, 32, seed=0, device="cuda")
    ends = []
    for wrap in (lambda step: step, GraphedStep):
        plain = full_step(kind, "cuda", "bf16")
        step, parameters = wrap(plain), plain.parameters.values()
        start = torch.cat([p.detach().flatten() for p in parameters])
        losses = [step(stream(i), 1e-3)["loss"].item() for i in range(10)]
        end = torch.cat([p.detach().flatten() for p in parameters])
        ends.append((losses, end - start, torch.cuda.get_rng_state()))
    (eager, moved, random), (graphed, moved_by_graph, random_of_graph) = ends
    assert step.graph is not None and plain.nonfinite_steps == 0
    assert torch.equal(random, random_of_graph)  # dropout went on, replay by replay
    assert torch.allclose(torch.tensor(eager), torch.tensor(graphed), rtol=1e-3)
    # Adam makes whole steps of rounding errors where a gradient is zero, as that of a key's bias.
    assert (moved - moved_by_graph).norm() < 0.2 * moved.norm()


def runs_with_and_without_a_graph(run_in, out, monkeypatch):
    """Dev cross-entropies of both, the former stopped and resumed in the middle of its replays."""
    plain = run_in(out / "plain", cuda_graph=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8, step_class=GraphedStep)
        assert run_in(out / "graph", cuda_graph=True)["step"] == 8
    graphed = run_in(out / "graph", cuda_graph=True)
    assert graphed["step"] == plain["step"] == 24
    return graphed["dev_cross_entropy"], plain["dev_cross_entropy"]


GPU_RUN = {"device": "cuda", "precision": "bf16", "compile": True, "steps": 24}


@pytest.mark.gpu
def test_a_run_with_a_graph_ends_where_one_without_does_on_a_gpu(
    data_folder, tmp_path, monkeypatch
):
    """Compiled layers, evaluations between the replays, a stop and a resume."""

    def run_in(out, **changes):
        return trained(config_for(data_folder, out, **GPU_RUN, **changes))

    graphed, plain = runs_with_and_without_a_graph(run_in, tmp_path, monkeypatch)
    assert abs(graphed - plain) < 0.01 * plain


@pytest.mark.gpu
def test_a_distilled_run_with_a_graph_and_cached_teachers_on_a_gpu(
    data_folder, train_shard, tmp_path, monkeypatch
):
    """What the graph is for. The cache is filled in the first of some two epochs."""

    def run_in(out, **changes):
        config = config_for(data_folder, out, model="llama-tiny-student", **GPU_RUN, **changes)
        config = dataclasses.replace(config, batch_size=16)
        torch.manual_seed(0)
        names = ("llama-tiny-student", "gpt2-tiny", "llama-tiny")
        student, *teachers = (models.build_model(name, 300) for name in names)
        chunks = count_chunks(len(train_shard.tokens), 32)
        sizes = [t.config.hidden_size for t in teachers]
        cache = TeacherCache.in_memory(Layout(chunks, 32, tuple(sizes), torch.bfloat16), "cuda")
        options = DistillConfig(teachers=[])
        return fitted(EnsembleObjective(student, teachers, options, cache), config)

    graphed, plain = runs_with_and_without_a_graph(run_in, tmp_path, monkeypatch)
    assert abs(graphed - plain) < 0.01 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("probability", [0.1, 0.03, 0.3])
def test_attention_drops_the_share_that_it_is_asked_to_drop_on_a_gpu(probability):
    """Counted, because some of cuDNN's kernels round the probability to sixteenths in torch 2.11.

    With values of one the output is the sum of the weights that are kept, each over 1 - p: of N
    equal weights the kept ones are counted.
    """
    device = choose_device("cuda")
    N = 128
    q = torch.zeros(64, 16, N, 96, device=device, dtype=torch.bfloat16)
    v = torch.ones_like(q)
    with torch.no_grad():
        y = F.scaled_dot_product_attention(q, q, v, dropout_p=probability)
    kept = y[..., 0].float().mean().item() * (1 - probability)
    assert abs(1 - kept - probability) < 0.002
