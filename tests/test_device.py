"""Devices, precision, compiled and recomputed layers, and a training step as one CUDA graph."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loss
import model as models
from conftest import config_for, fitted, interrupt_after, step_of
from data import BatchStream
from distill import DistillConfig, FusedDistillationObjective, cast_linears_to_bf16
from train import CrossEntropyObjective, TrainConfig
from training.cuda_graph import GraphedStep
from training.device import (
    Compute,
    checkpoint_activations,
    choose_device,
    compile_and_check_blocks,
    compile_blocks,
    should_capture,
)
from training.io import UserError
from training.resume import training_state
from training.teacher_cache import TeacherCache

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# Both kinds of objective, with dropout in the student.
objectives = pytest.mark.parametrize("kind", ["alone", "distilled"])


def full_step(kind, device="cpu", precision="fp32"):
    """Returns a train step with micro-batches of 3, 3 and 2 of eight sequences."""
    torch.manual_seed(0)
    model = models.build_model("gpt2-tiny", 300)
    teachers = [models.build_model(name, 300) for name in ("gpt2-tiny", "llama-tiny")]
    objective = CrossEntropyObjective(model)
    if kind != "alone":
        objective = FusedDistillationObjective(model, teachers, DistillConfig(teachers=[]))
    if kind == "cached":  # 525 chunks of 32 tokens are in the training shard
        objective.cache = TeacherCache.in_memory(2 * [(525, 32, 96)], torch.bfloat16, device)
    return step_of(objective.to(device).train(), 3, 0.1, device, precision)


def end_of(step, batches):
    """Losses of steps with these batches, and the weights after them."""
    torch.manual_seed(1)
    losses = [step(batch, 1e-3)["loss"] for batch in batches]
    parameters = getattr(step, "train_step", step).parameters
    return [*losses, *(parameter.detach() for parameter in parameters.values())]


def same(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Records operations: their names, numbers, and the memory and views that they read.

    Memory from outside is known by its address, memory from inside by the order in which it was made.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.alive = [], {}, []

    def identity(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return str(leaf)
        storage = leaf.untyped_storage()
        memory = self.made.get(storage._cdata, storage.data_ptr())
        return memory, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = tree_leaves((args, kwargs or {}))
        self.operations.append((str(operation), [self.identity(leaf) for leaf in inputs]))
        result = operation(*args, **(kwargs or {}))
        read = {tensor.untyped_storage()._cdata for tensor in tensors_in(inputs)}
        for tensor in tensors_in(result):
            self.alive.append(tensor)  # so that no address is used twice
            storage = tensor.untyped_storage()._cdata
            if storage not in read:
                self.made.setdefault(storage, f"made {len(self.made)}")
        return result


def recorded(step, batches):
    """Returns the operations of each `update`, with another batch and learning rate each time."""
    operations = []
    for i, batch in enumerate(batches):
        step.load(batch, 1e-3 * i)
        with Recording() as recording:
            step.train_step.update(step.micro_batches)
        operations.append(recording.operations)
    return operations


@objectives
def test_every_update_does_the_same_to_the_same_memory(train_shard, kind):
    """A CUDA graph that is replayed then does what the next update would have done.

    It is shown for each operation of an eager update on a CPU. The first update also makes
    optimizer states and buffers.
    """
    stream = BatchStream(train_shard, 8, 32, seed=0)
    step = GraphedStep(full_step(kind, "cpu", "bf16"))
    _, second, third, fourth = recorded(step, [stream(i) for i in range(4)])
    assert second == third == fourth and len(second) > 500
    names = {name.split(".")[1] for name, _ in second}
    assert names.isdisjoint({"_local_scalar_dense", "nonzero", "masked_select", "_unique2"})

    # The test can fail: rates and counts that move to new memory are seen.
    for group in step.train_step.groups:
        group["lr"] = group["lr"].clone()
    step.train_step.nonfinite_steps = step.train_step.nonfinite_steps.clone()
    [changed] = recorded(step, [stream(4)])
    assert 0 < sum(a != b for a, b in zip(changed, fourth, strict=True)) < 10


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError if an operation would read a value of the device on the host.

    On a CPU `host` lists the tensors that are on the host beside a GPU too; so is what is made of
    them alone.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "item")

    def __init__(self, host):
        super().__init__()
        self.host = {tensor.untyped_storage()._cdata for tensor in host}
        self.alive, self.reads_of_host = list(host), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        read = tensors_in((args, kwargs or {}))
        on_host = read and all(t.untyped_storage()._cdata in self.host for t in read)
        if str(operation).split(".")[1] in self.WAITING:
            assert on_host, f"{operation} waits for the device"
            self.reads_of_host += 1
        result = operation(*args, **(kwargs or {}))
        self.alive += tensors_in(result)
        if on_host:
            self.host |= {t.untyped_storage()._cdata for t in tensors_in(result)}
        return result


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("kind", ["alone", "distilled", "cached"])
def test_a_step_never_waits_for_the_device(train_shard, kind, micro_batch_size):
    """A whole step: teachers, filling and reading of the cache, clipping, skipping."""
    step = full_step(kind, "cpu", "bf16")
    step.micro_batch_size = micro_batch_size
    host = [step.objective.cache.filled] if kind == "cached" else []
    batch = BatchStream(train_shard, 8, 32, seed=0)(0)
    for _ in range(2):
        with NoWaiting([*host, batch.chunk_ids]) as mode:
            step(batch, 1e-3)
    assert bool(mode.reads_of_host) == (kind == "cached")  # are the chunks in the cache?

    step.optimizers[0].defaults["fused"] = False  # asks on the host whether to skip a step
    with pytest.raises(AssertionError, match="waits"), NoWaiting(host):
        step(batch, 1e-3)


@objectives
def test_a_step_that_loads_its_input_equals_the_plain_one(train_shard, kind):
    stream = BatchStream(train_shard, 8, 32, seed=0)
    plain = full_step(kind)
    terms = [plain(stream(i), 1e-3 * i) for i in range(3)]
    loading = GraphedStep(full_step(kind))
    for i in range(3):
        loading.load(stream(i), 1e-3 * i)
        loaded = loading.train_step.update(loading.micro_batches)
        torch.testing.assert_close(loaded["loss"], terms[i]["loss"], rtol=1e-6, atol=0)
    for a, b in zip(plain.parameters.values(), loading.train_step.parameters.values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Replaying(GraphedStep):
    """A graphed step whose graph is a plain update on the CPU, or one with a fault."""

    def __init__(self, train_step, fault):
        super().__init__(train_step)
        self.fault, self.replays = fault, 0

    def capture(self):
        if self.fault == "uncapturable":
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        micro_batches = self.micro_batches
        if self.fault == "stale":  # reads the input of the capture
            micro_batches = copy.deepcopy(micro_batches)

        def replay():
            self.replays += 1
            terms = self.train_step.update(micro_batches)
            if self.fault == "drifting":  # changes a weight by the least that a weight can change
                weight = next(iter(self.train_step.parameters.values())).data.view(-1)
                weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
            return terms

        return replay


@pytest.mark.parametrize("fault", [None, "drifting", "stale", "uncapturable"])
def test_a_graph_is_used_if_its_replay_equals_a_plain_step(train_shard, capsys, fault):
    """The comparison changes nothing: dropout draws the same masks as without it."""
    stream = BatchStream(train_shard, 8, 32, seed=0)
    plain, step = GraphedStep(full_step("alone")), Replaying(full_step("alone"), fault)
    plain.warm_up = math.inf
    batches = [stream(i) for i in range(7)]
    assert same(end_of(step, batches), end_of(plain, batches))
    warnings = capsys.readouterr().err.splitlines()
    if fault is None:
        assert step.replays == 1 + 4 and not warnings  # three plain steps come first
    else:
        assert step.replays == (fault != "uncapturable") and not step.replay
        [warning] = warnings
        assert "without a CUDA graph" in warning and "trace" not in warning


def test_a_graph_is_kept_where_a_tensor_repeats_its_bits_by_chance(train_shard, monkeypatch, capsys):
    """Plain steps differ in one weight, and the replay in another by the least that it can."""
    step = Replaying(full_step("alone"), "drifting")
    update, noise = step.train_step.update, itertools.count(1)
    *_, noisy = step.train_step.parameters.values()

    def noisy_update(micro_batches):
        terms = update(micro_batches)
        noisy.data += 1e-7 * next(noise)
        return terms

    monkeypatch.setattr(step.train_step, "update", noisy_update)
    end_of(step, [BatchStream(train_shard, 8, 32, seed=0)(i) for i in range(5)])
    assert step.replay and not capsys.readouterr().err


def test_a_graph_is_the_default_on_cuda_for_short_steps():
    parameter = torch.nn.Parameter(torch.zeros(2))
    adamw, sgd = [torch.optim.AdamW([parameter], fused=True)], [torch.optim.SGD([parameter])]
    cuda, cpu = Compute(CUDA, "bf16"), Compute(CPU, "fp32")
    default, asked, refused = (TrainConfig(cuda_graph=choice) for choice in (None, True, False))
    recomputed = TrainConfig(checkpoint_activations=True)
    assert should_capture(default, cuda, adamw, 1e12) and should_capture(asked, cuda, adamw, 1e14)
    assert not should_capture(default, cuda, adamw, 1e14) and not should_capture(default, cuda, sgd, 1e9)
    assert not should_capture(default, cpu, adamw, 1e9) and not should_capture(refused, cuda, adamw, 1e9)
    assert not should_capture(recomputed, cuda, adamw, 1e9)
    for compute, optimizers in ((cpu, adamw), (cuda, sgd)):
        with pytest.raises(UserError, match="leave"):
            should_capture(asked, compute, optimizers, 1e9)


def compiling_with(monkeypatch, backend):
    """Lets torch.compile use `backend`, which it returns: no compiler has to run."""
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, options=None, dynamic=None: compile(function, backend=backend, dynamic=dynamic),
    )
    loss._compiled_rows.cache_clear()
    return backend


@pytest.fixture(autouse=True)
def forget_compiled_rows():
    yield
    loss._compiled_rows.cache_clear()


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)
def test_models_that_follow_each_other_stay_far_from_the_limit_of_graphs(data_folder, tmp_path, monkeypatch):
    """Teachers, a baseline and a student in one process, as reproduce.py trains them.

    Training and evaluation have batches of two sizes, with a graph each. Beyond its limit torch
    would go on without compiling and only warn; here it raises. The graphs are executed eagerly.
    """
    counter = compiling_with(monkeypatch, CompileCounter())

    def graphs_of(name, out, teachers=()):
        counter.clear()
        options = {"model": name, "steps": 2, "micro_batch_size": 3, "compile": True}
        config = config_for(data_folder, tmp_path / out, eval_sequences=37, **options)
        model = models.build_model(name, 300)
        objective = CrossEntropyObjective(model)
        if teachers:
            objective = FusedDistillationObjective(model, teachers, DistillConfig(teachers=[]))
        fitted(objective, config)
        return counter.frame_count

    alone = 4 + 2  # of two batch sizes: layers in training and on dev, the loss in training
    assert graphs_of("gpt2-tiny", "gpt2") == alone + 1  # compared without dropout
    assert graphs_of("llama-tiny", "llama") == alone
    assert graphs_of("llama-tiny-student", "control") == alone
    sizes = [128, 160, 192, 224, 256]
    teachers = [models.build_model("llama-tiny", 300, intermediate_size=size) for size in sizes]
    assert graphs_of("llama-tiny-student", "student", teachers) == alone + 2 * len(teachers)


def test_layers_of_a_frozen_teacher_are_kept_in_the_bits_that_autocast_makes_of_them(train_shard):
    batches = [BatchStream(train_shard, 4, 32, seed=0)(0)]
    plain, narrow = (full_step("distilled", "cpu", "bf16") for _ in range(2))
    for teacher in narrow.objective.teachers:
        cast_linears_to_bf16(teacher)
    assert same(end_of(narrow, batches), end_of(plain, batches))
    types = {p.dtype for p in narrow.objective.teachers[0].blocks[0].attn.parameters()}
    assert types == {torch.bfloat16} and narrow.objective.teachers[1].head.dtype == torch.float32


@objectives
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_layers_train_to_the_same_bits(train_shard, kind, precision):
    """With dropout, whose masks are drawn again, and with the attention kernel of the precision."""
    plain, checkpointed = (full_step(kind, "cpu", precision) for _ in range(2))
    checkpoint_activations(checkpointed.objective.model, Compute(CPU, precision))
    stream = BatchStream(train_shard, 8, 32, seed=0)
    batches = [stream(i) for i in range(4)]
    assert same(end_of(checkpointed, batches), end_of(plain, batches))


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_checkpointed_layers_are_compiled_and_draw_the_same_masks(train_shard, monkeypatch, name):
    """Torch compiles the layer and not the checkpoint, which recomputes what is compiled."""
    batch, outcomes = BatchStream(train_shard, 8, 32, seed=0)(0), []
    for recompute in (False, True):
        counter = compiling_with(monkeypatch, CompileCounterWithBackend("aot_eager"))
        torch.manual_seed(0)
        objective = CrossEntropyObjective(models.build_model(name, 300, dropout=0.1)).train()
        if recompute:
            checkpoint_activations(objective.model, Compute(CPU, "fp32"))
        compile_blocks(objective)
        torch.manual_seed(1)
        objective(batch)["loss"].backward()
        operations = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
        outcomes.append([parameter.grad for parameter in objective.parameters()])
        assert counter.frame_count == 2 and not any("checkpoint" in name for name in operations)
        monkeypatch.undo()
    assert same(*outcomes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", [None, "a row of zeros", "half a gradient", "no compiler"])
def test_a_compiled_layer_is_used_if_it_equals_the_eager_one(
    train_shard, monkeypatch, capsys, fault, precision
):
    """The comparison changes nothing: neither weights, nor gradients, nor the random state."""

    def compile_with_fault(forward, options, dynamic):
        def compiled(*inputs):
            if fault == "no compiler":
                raise RuntimeError("Failed to find C compiler\nand a trace")
            output = forward(*inputs)
            if fault == "a row of zeros":
                output = output * (torch.arange(output.shape[1]) != 3)[:, None]
            return output - 0.5 * (output - output.detach()) if fault == "half a gradient" else output

        return compiled

    monkeypatch.setattr(torch, "compile", compile_with_fault)
    objective = full_step("distilled", "cpu", precision).objective
    tokens, random = BatchStream(train_shard, 8, 32, seed=0)(0).tokens, torch.get_rng_state()
    compile_and_check_blocks(objective, tokens, Compute(CPU, precision))
    assert objective.compiled == (fault is None)
    compiled = {
        block.forward.__name__ == "compiled"
        for model in (objective.model, *objective.teachers)
        for block in model.blocks
    }
    assert compiled == {fault is None}
    assert objective.training and all(block.training for block in objective.model.blocks)
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in objective.parameters())
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (fault is not None)
    assert all("without torch.compile" in warning and "trace" not in warning for warning in warnings)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["alone", "distilled", "cached"])
def test_a_step_never_waits_for_a_gpu(train_shard, kind):
    """Copies to the host, or without `non_blocking`, are only seen here."""
    step = full_step(kind, "cuda", "bf16")
    stream = BatchStream(train_shard, 8, 32, seed=0, device="cuda")
    step(stream(0), 1e-3)  # makes optimizer states
    batches = [stream(1), stream(1)]  # the second one reads what the first has put into the cache
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_state_of_a_checkpoint_has_left_the_gpu(train_shard):
    step = full_step("alone", "cuda", "bf16")
    step(BatchStream(train_shard, 8, 32, seed=0, device="cuda")(0), 1e-3)
    state = tensors_in(training_state(step))
    assert len(state) > 50 and not any(tensor.is_cuda for tensor in state)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_goes_on_without_a_graph(train_shard, monkeypatch, capsys):
    stream = BatchStream(train_shard, 8, 32, seed=0, device="cuda")
    step = GraphedStep(full_step("alone", "cuda", "bf16"))
    update = step.train_step.update
    monkeypatch.setattr(
        step.train_step, "update", lambda parts: (update(parts), parts[0].tokens.sum().item())[0]
    )
    losses = [step(stream(i), 1e-3)["loss"].item() for i in range(8)]
    assert not step.replay and all(map(math.isfinite, losses))  # dropout still draws
    assert "without a CUDA graph" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(8, 32), (32, 128)], ids=["256 tokens", "4096 tokens"])
@objectives
def test_a_graph_equals_eager_steps_on_a_gpu(train_shard, kind, size):
    """With more than 3,072 tokens the embedding's gradient is computed by another kernel."""
    stream = BatchStream(train_shard, *size, seed=0, device="cuda")
    ends = []
    for wrap in (lambda step: step, GraphedStep):
        plain = full_step(kind, "cuda", "bf16")
        step, parameters = wrap(plain), plain.parameters.values()
        start = torch.cat([p.detach().flatten() for p in parameters])
        losses = [step(stream(i), 1e-3)["loss"].item() for i in range(10)]
        end = torch.cat([p.detach().flatten() for p in parameters])
        ends.append((losses, end - start, torch.cuda.get_rng_state()))
    (eager, moved, random), (graphed, moved_by_graph, random_of_graph) = ends
    assert step.replay and plain.nonfinite_steps == 0
    assert torch.equal(random, random_of_graph)  # dropout went on, replay by replay
    assert torch.allclose(torch.tensor(eager), torch.tensor(graphed), rtol=1e-3)
    # Adam makes whole steps of rounding errors where a gradient is zero, as that of a key's bias.
    assert (moved - moved_by_graph).norm() < 0.2 * moved.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["alone", "cached"])
def test_a_run_with_a_graph_ends_where_one_without_does_on_a_gpu(data_folder, tmp_path, monkeypatch, kind):
    """Compiled layers, a cache that is filled, evaluations between replays, a stop and a resume."""

    def run(name, cuda_graph):
        options = {"device": "cuda", "precision": "bf16", "compile": True, "steps": 24, "batch_size": 16}
        config = config_for(data_folder, tmp_path / name, model="gpt2-tiny", cuda_graph=cuda_graph, **options)
        return fitted(full_step(kind, "cuda").objective, config)

    plain = run("plain", False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert run("graph", True)["step"] == 8
    graphed = run("graph", True)
    assert graphed["step"] == plain["step"] == 24
    assert abs(graphed["dev_cross_entropy"] - plain["dev_cross_entropy"]) < 0.01 * plain["dev_cross_entropy"]


@pytest.mark.gpu
@pytest.mark.parametrize("probability", [0.1, 0.03, 0.3])
def test_attention_drops_the_share_that_it_is_asked_to_drop_on_a_gpu(probability):
    """Some kernels of cuDNN round the probability to sixteenths in torch 2.11.

    With values of one and N equal weights the output is the share of weights that are kept, over 1 - p.
    """
    q = torch.zeros(64, 16, 128, 96, device=choose_device("cuda"), dtype=torch.bfloat16)
    with torch.no_grad():
        y = F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=probability)
    share = y[..., 0].float().mean().item() * (1 - probability)
    assert abs(1 - share - probability) < 0.002
