"""The one loop: schedule, step, resuming, what it writes, what it refuses."""

import copy
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as models
import train
from cache import TeacherCache
from conftest import interrupt_after, train_tokenizer, write_split, write_text
from data import Batch, BatchStream, TokenShard, count_chunks
from distill import DistillConfig, EnsembleObjective
from files import UserError, run
from train import (
    CrossEntropyObjective,
    GraphedTrainStep,
    TrainConfig,
    TrainStep,
    autocast_for,
    build_optimizer,
    learning_rate,
    with_recipe,
)

ROOT = Path(__file__).parent.parent


def config_for(data_folder, out, **changes):
    options = {
        "model": "gpt2-tiny", "data": str(data_folder), "out": str(out), "steps": 12,
        "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "log_every": 2,
        "eval_sequences": 8, "save_every": 5, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    return with_recipe(TrainConfig(**options | changes))


def trained(config):
    """Runs a training from its seed; the progress it ends with."""
    torch.manual_seed(config.seed)
    model = models.build_model(config.model, 300)
    return train.fit(CrossEntropyObjective(model), config)


def step_of(model, micro_batch_size=None, weight_decay=0.0):
    objective = CrossEntropyObjective(model)
    autocast = autocast_for(torch.device("cpu"), "fp32")
    return TrainStep(objective, build_optimizer(model, weight_decay), autocast, micro_batch_size)


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- schedule, optimizer, step


def test_learning_rate_endpoints():
    rates = [learning_rate(s, 1000, 0.5, 100) for s in range(1001)]
    assert rates[0] == 0 and rates[50] == 0.25 and rates[100] == 0.5
    assert math.isclose(rates[550], 0.25) and abs(rates[1000]) < 1e-12
    assert max(rates) == 0.5 and 0 < rates[999] < 1e-5


def test_warm_up_never_exceeds_a_tenth_of_the_steps():
    assert learning_rate(2, 20, 1.0, 200) == 1.0
    assert learning_rate(0, 5, 1.0, 200) == 1.0


def test_all_but_biases_and_layer_norms_decay():
    for name in ("gpt2-tiny", "llama-tiny"):
        model = models.build_model(name, 300)
        decayed, *exempt = build_optimizer(model, 0.1).param_groups
        names = {p: n for n, p in model.named_parameters()}
        assert decayed["weight_decay"] == 0.1
        assert sum(len(g["params"]) for g in (decayed, *exempt)) == len(names)
        if name == "llama-tiny":
            assert not exempt
        else:
            assert {names[p] for p in exempt[0]["params"]} == {
                n for n in names.values() if n.endswith("bias") or ".ln_" in n or "ln_f" in n
            }


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_accumulated_micro_batches_equal_one_batch(train_shard, micro_batch_size):
    torch.manual_seed(0)
    model = models.build_model("llama-tiny", 300)
    twin = copy.deepcopy(model)
    batch = BatchStream(train_shard, 8, 32, seed=0)(0)
    batch.targets[0, 3:] = -100  # so that micro-batches have unequal numbers of targets
    batch = Batch.whole(batch.chunk_ids, batch.tokens, batch.targets)
    whole = step_of(model)(batch, 1e-3)
    parts = step_of(twin, micro_batch_size)(batch, 1e-3)
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=1e-5, atol=1e-6)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_a_gradient_that_is_not_finite_changes_nothing(train_shard):
    model = models.build_model("llama-tiny", 300)
    step = step_of(model, weight_decay=0.1)
    batch = BatchStream(train_shard, 4, 32, seed=0)(0)
    step(batch, 1e-3)
    before = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()["state"]))
    hook = model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    terms = step(batch, 1e-3)
    assert not torch.isfinite(terms["gradient_norm"]) and step.nonfinite_in_a_row == 1
    assert same(before[0], model.state_dict())
    for index, state in step.optimizer.state_dict()["state"].items():
        assert same(before[1][index], state)
    hook.remove()
    step(batch, 1e-3)
    assert step.nonfinite_in_a_row == 0 and not same(before[0], model.state_dict())


def test_a_run_without_finite_gradients_gives_up(data_folder, tmp_path):
    config = config_for(data_folder, tmp_path / "r", steps=40)
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    objective.model.ln_f.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="no finite gradient"):
        train.fit(objective, config)


def test_one_batch_can_be_learned_by_heart(train_shard):
    torch.manual_seed(0)
    for name in ("gpt2-tiny", "llama-tiny"):
        model = models.build_model(name, 300).eval()
        step, batch = step_of(model), BatchStream(train_shard, 2, 32, seed=0)(0)
        losses = [step(batch, 3e-3)["loss"].item() for _ in range(60)]
        assert losses[0] > 4 and losses[-1] < 0.1


# ---- the step as a CUDA graph


def objectives():
    """Names of both kinds of objective, with dropout in the student."""
    return pytest.mark.parametrize("kind", ["alone", "distilled"])


def full_step(step_class, kind, device, precision):
    """A step of three and three and two of eight sequences."""
    torch.manual_seed(0)
    model = models.build_model("gpt2-tiny", 300)
    teachers = [models.build_model(name, 300) for name in ("gpt2-tiny", "llama-tiny")]
    objective = CrossEntropyObjective(model)
    if kind == "distilled":
        objective = EnsembleObjective(model, teachers, DistillConfig(teachers=[]))
    objective = objective.to(device).train()
    autocast = autocast_for(torch.device(device), precision)
    return step_class(objective, build_optimizer(model, 0.1), autocast, 3)


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
            step.update(step.parts)
        operations.append(recording.operations)
    return operations


@objectives()
def test_every_update_does_the_same_to_the_same_memory(train_shard, kind):
    """What a CUDA graph replays, once captured, must be what the next update would have done.

    Shown without a GPU for each operation of an eager update on a CPU, whose loss takes other
    branches and whose kernels are others. The first update also makes what is made once.
    """
    stream = BatchStream(train_shard, 8, 32, seed=0)
    step = full_step(GraphedTrainStep, kind, "cpu", "bf16")
    _, second, third, fourth = recorded(step, [stream(i) for i in range(4)])
    assert second == third == fourth and len(second) > 500
    names = {name.split(".")[1] for name, _ in second}
    assert names.isdisjoint({"_local_scalar_dense", "nonzero", "masked_select", "_unique2"})

    # The check can fail: a rate that is a number, and counts that move to new memory.
    for group in step.optimizer.param_groups:
        group["lr"] = 0.5
    step.nonfinite_steps = step.nonfinite_steps.clone()
    [changed] = recorded(step, [stream(4)])
    differing = [(a, b) for a, b in zip(changed, fourth, strict=True) if a != b]
    assert 0 < len(differing) < 10


@objectives()
def test_a_step_that_loads_its_input_equals_the_plain_one(train_shard, kind):
    stream = BatchStream(train_shard, 8, 32, seed=0)
    plain = full_step(TrainStep, kind, "cpu", "fp32")
    terms = [plain(stream(i), 1e-3 * i) for i in range(3)]
    loading = full_step(GraphedTrainStep, kind, "cpu", "fp32")
    for i in range(3):
        loading.load(stream(i), 1e-3 * i)
        loaded = loading.update(loading.parts)
        torch.testing.assert_close(loaded["loss"], terms[i]["loss"], rtol=1e-6, atol=0)
    for a, b in zip(plain.parameters, loading.parameters):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@objectives()
def test_a_graph_equals_eager_steps_on_a_gpu(train_shard, kind):
    stream = BatchStream(train_shard, 8, 32, seed=0, device="cuda")
    ends = []
    for step_class in (TrainStep, GraphedTrainStep):
        step = full_step(step_class, kind, "cuda", "bf16")
        start = torch.cat([p.detach().flatten() for p in step.parameters])
        losses = [step(stream(i), 1e-3)["loss"].item() for i in range(10)]
        end = torch.cat([p.detach().flatten() for p in step.parameters])
        ends.append((losses, end - start, torch.cuda.get_rng_state()))
    (eager, moved, random), (graphed, moved_by_graph, random_of_graph) = ends
    assert step.graph is not None and step.nonfinite_steps == 0
    assert torch.equal(random, random_of_graph)  # dropout went on, replay by replay
    assert torch.allclose(torch.tensor(eager), torch.tensor(graphed), rtol=1e-3)
    # Adam makes whole steps of rounding errors where a gradient is zero, as that of a key's bias.
    assert (moved - moved_by_graph).norm() < 0.2 * moved.norm()


def runs_with_and_without_a_graph(run, out, monkeypatch):
    """Dev cross-entropies of both, the former stopped and resumed in the middle of its replays."""
    plain = run(out / "plain", cuda_graph=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8, kind=GraphedTrainStep)
        assert run(out / "graph", cuda_graph=True)["step"] == 8
    graphed = run(out / "graph", cuda_graph=True)
    assert graphed["step"] == plain["step"] == 24
    return graphed["dev_cross_entropy"], plain["dev_cross_entropy"]


GPU_RUN = {"device": "cuda", "precision": "bf16", "compile": True, "steps": 24}


@pytest.mark.gpu
def test_a_run_with_a_graph_ends_where_one_without_does_on_a_gpu(
    data_folder, tmp_path, monkeypatch
):
    """Compiled layers, evaluations between the replays, a stop and a resume."""

    def run(out, **changes):
        return trained(config_for(data_folder, out, **GPU_RUN, **changes))

    graphed, plain = runs_with_and_without_a_graph(run, tmp_path, monkeypatch)
    assert abs(graphed - plain) < 0.01 * plain


@pytest.mark.gpu
def test_a_distilled_run_with_a_graph_and_cached_teachers_on_a_gpu(
    data_folder, train_shard, tmp_path, monkeypatch
):
    """What the graph is for. The cache is filled in the first of some two epochs."""

    def run(out, **changes):
        config = config_for(data_folder, out, model="llama-tiny-student", **GPU_RUN, **changes)
        config = dataclasses.replace(config, batch_size=16)
        torch.manual_seed(0)
        names = ("llama-tiny-student", "gpt2-tiny", "llama-tiny")
        student, *teachers = (models.build_model(name, 300) for name in names)
        chunks = count_chunks(len(train_shard.tokens), 32)
        sizes = [t.config.hidden_size for t in teachers]
        cache = TeacherCache.in_memory(chunks, 32, sizes, "cuda", torch.bfloat16)
        options = DistillConfig(teachers=[])
        return train.fit(EnsembleObjective(student, teachers, options, cache=cache), config)

    graphed, plain = runs_with_and_without_a_graph(run, tmp_path, monkeypatch)
    assert abs(graphed - plain) < 0.01 * plain


# ---- runs


@pytest.fixture(scope="module")
def whole_run(data_folder, tmp_path_factory):
    """A run of twelve steps that nothing disturbed, with dropout on."""
    out = tmp_path_factory.mktemp("whole") / "r"
    return out, trained(config_for(data_folder, out))


def test_a_run_writes_what_it_promises(whole_run):
    out, progress = whole_run
    assert {p.name for p in out.iterdir()} == {
        "checkpoint.pt", "previous.pt", "best.pt", "log.jsonl",
    }  # fmt: skip
    first, *entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert first.keys() >= {
        "config", "model", "parameters", "tokenizer", "commit", "versions", "device",
    }  # fmt: skip
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == [2, 4, 6, 8, 10, 12]
    assert steps[-1].keys() >= {
        "epoch", "tokens", "words", "loss", "cross_entropy", "learning_rate", "gradient_norm",
        "tokens_per_second",
    }  # fmt: skip
    assert steps[-1]["tokens"] == 12 * 4 * 32
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [e for e in entries if "dev_cross_entropy" in e]
    assert evaluations[-1]["step"] == 12
    assert progress["dev_cross_entropy"] == evaluations[-1]["dev_cross_entropy"]
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["training"] is None
    assert best["progress"]["dev_cross_entropy"] == min(e["dev_cross_entropy"] for e in evaluations)
    assert best["progress"]["step"] == progress["best_step"]


def test_same_seed_same_bits(whole_run, data_folder, tmp_path):
    trained(config_for(data_folder, tmp_path / "r"))
    assert same(weights(tmp_path / "r/checkpoint.pt"), weights(whole_run[0] / "checkpoint.pt"))
    trained(config_for(data_folder, tmp_path / "s", seed=1))
    assert not same(weights(tmp_path / "s/checkpoint.pt"), weights(whole_run[0] / "checkpoint.pt"))


def comparable(path):
    """The log without its run objects and speeds."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k != "tokens_per_second"} for e in entries if "step" in e
    ]


@pytest.mark.parametrize("steps", [3, 8])
def test_resuming_equals_not_stopping(whole_run, data_folder, tmp_path, monkeypatch, steps):
    config = config_for(data_folder, tmp_path / "r")
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        assert trained(config)["stopped_by"] == signal.SIGTERM
    progress = trained(config)
    assert progress["step"] == 12
    ours = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    theirs = torch.load(whole_run[0] / "checkpoint.pt", weights_only=True)
    assert same(ours["weights"], theirs["weights"])
    for name, moments in theirs["training"]["optimizer"].items():
        assert same(ours["training"]["optimizer"][name], moments)
    assert same(weights(tmp_path / "r/best.pt"), weights(whole_run[0] / "best.pt"))
    assert comparable(tmp_path / "r/log.jsonl") == comparable(whole_run[0] / "log.jsonl")


def test_resuming_without_the_random_state_would_be_noticed(
    whole_run, data_folder, tmp_path, monkeypatch
):
    config = config_for(data_folder, tmp_path / "r")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        trained(config)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    trained(config)
    assert not same(weights(tmp_path / "r/checkpoint.pt"), weights(whole_run[0] / "checkpoint.pt"))


def test_a_killed_run_continues_from_its_last_checkpoint(
    whole_run, data_folder, tmp_path, monkeypatch
):
    config = config_for(data_folder, tmp_path / "r")

    def crash():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, crash)
        with pytest.raises(KeyboardInterrupt):
            trained(config)
    trained(config)
    assert same(weights(tmp_path / "r/checkpoint.pt"), weights(whole_run[0] / "checkpoint.pt"))
    assert comparable(tmp_path / "r/log.jsonl") == comparable(whole_run[0] / "log.jsonl")


def test_a_damaged_checkpoint_gives_way_to_the_previous_one(
    whole_run, data_folder, tmp_path, capsys
):
    config = config_for(data_folder, tmp_path / "r")
    trained(config)
    checkpoint = tmp_path / "r/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    trained(config)
    assert "falling back" in capsys.readouterr().err
    assert same(weights(checkpoint), weights(whole_run[0] / "checkpoint.pt"))
    models.read_checkpoint(tmp_path / "r/previous.pt")  # not what was damaged


def test_a_run_whose_states_are_all_damaged_says_what_to_do(data_folder, tmp_path):
    trained(config_for(data_folder, tmp_path / "r"))
    for name in ("checkpoint.pt", "previous.pt"):
        (tmp_path / "r" / name).write_bytes(b"")
    with pytest.raises(UserError, match="delete it, or choose another --out"):
        trained(config_for(data_folder, tmp_path / "r"))


def test_a_damaged_best_checkpoint_is_written_anew(data_folder, tmp_path, monkeypatch, capsys):
    config = config_for(data_folder, tmp_path / "r", eval_every=3)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        trained(config)
    (tmp_path / "r/best.pt").write_bytes(b"half")
    trained(config)
    assert "best.pt" in capsys.readouterr().err
    assert models.read_checkpoint(tmp_path / "r/best.pt")["progress"]["step"] > 5


def test_a_finished_run_says_so_and_writes_nothing(whole_run, data_folder, capsys):
    out, _ = whole_run
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    trained(config_for(data_folder, out))
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}


def test_another_recipe_is_not_continued(whole_run, data_folder):
    with pytest.raises(UserError, match=r"learning_rate.*seed"):
        trained(config_for(data_folder, whole_run[0], seed=5, learning_rate=1e-3))


def test_what_may_change_on_resuming_does(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert trained(config)["step"] == 5
    changes = {"save_every": 7, "log_every": 3, "micro_batch_size": 2, "stop_after": 60.0}
    assert trained(dataclasses.replace(config, **changes))["step"] == 12
    trained(config_for(data_folder, tmp_path / "whole", model="llama-tiny"))
    ours, theirs = (weights(tmp_path / name / "checkpoint.pt") for name in ("r", "whole"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-4)


def test_a_run_of_another_shape_is_not_continued(whole_run, data_folder):
    config = config_for(data_folder, whole_run[0])
    model = models.build_model(config.model, 300, dropout=0.0)
    with pytest.raises(UserError, match="shape"):
        train.fit(CrossEntropyObjective(model), config)


def test_what_is_left_of_another_run_is_not_overwritten(whole_run, data_folder, tmp_path):
    (tmp_path / "best.pt").write_bytes((whole_run[0] / "best.pt").read_bytes())
    with pytest.raises(UserError, match="learning_rate"):
        trained(config_for(data_folder, tmp_path, learning_rate=1e-3))
    assert trained(config_for(data_folder, tmp_path))["step"] == 12


def test_a_kill_between_two_renames_loses_nothing(whole_run, data_folder, tmp_path):
    config = config_for(data_folder, tmp_path / "r")
    trained(config)
    (tmp_path / "r/checkpoint.pt").rename(tmp_path / "r/checkpoint.new")
    (tmp_path / "r/previous.pt").write_bytes(b"")
    assert trained(config)["step"] == 12


def test_nobody_reading_the_output_does_not_end_a_run(data_folder, tmp_path):
    out = tmp_path / "r"
    command = f"{sys.executable} {ROOT / 'train.py'} --model llama-tiny --device cpu --steps 30"
    command += f" --data {data_folder} --out {out} --batch-size 2 --sequence-length 16"
    command += " --log-every 1 | head -n 8"
    subprocess.run(command, shell=True, check=True, capture_output=True)
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_with_other_data_is_not_continued(whole_run, tokenizer, data_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    for split in ("train", "dev"):
        write_split(tmp_path, split, tokenizer, {"other": write_text(3000, seed=9)})
    with pytest.raises(UserError, match="train_shard"):
        trained(config_for(tmp_path, whole_run[0]))


def test_never_and_a_path_start_new_runs(whole_run, data_folder, tmp_path):
    out, _ = whole_run
    with pytest.raises(UserError, match="holds a run"):
        trained(config_for(data_folder, out, resume="never"))
    from_path = config_for(data_folder, tmp_path / "n", resume=str(out / "previous.pt"))
    assert trained(from_path)["step"] == 12
    assert same(weights(tmp_path / "n/checkpoint.pt"), weights(out / "checkpoint.pt"))
    with pytest.raises(UserError, match="weights only"):
        trained(config_for(data_folder, tmp_path / "m", resume=str(out / "best.pt")))


def test_a_dry_run_prints_the_arithmetic_and_nothing_else_happens(data_folder, tmp_path, capsys):
    config = config_for(data_folder, tmp_path / "r", dry_run=True)
    trained(config)
    printed = capsys.readouterr().out
    assert "4 sequences x 32 = 128 tokens" in printed and "12 steps" in printed
    assert not (tmp_path / "r").exists()


def test_epochs_decide_the_number_of_steps(data_folder, tmp_path):
    shard = TokenShard(data_folder / "train.bin")
    chunks = (len(shard.tokens) - 1) // 32
    config = config_for(data_folder, tmp_path / "r", steps=None, epochs=2.5, dry_run=True)
    assert trained(config)["steps"] == round(chunks * 2.5 / 4)


def test_stop_after_saves_and_stops(data_folder, tmp_path):
    progress = trained(config_for(data_folder, tmp_path / "r", stop_after=1e-9))
    assert progress["step"] == 1 and progress["stopped_by"] is None
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["progress"]["step"] == 1


def test_bfloat16_is_near_float32(data_folder, tmp_path):
    losses = [
        trained(config_for(data_folder, tmp_path / p, model="llama-tiny", precision=p))
        for p in ("fp32", "bf16")
    ]
    values = [p["dev_cross_entropy"] for p in losses]
    assert abs(values[0] - values[1]) < 0.02 * values[0]


# ---- the command line


def test_each_option_has_its_own_help():
    for config_class in (TrainConfig, DistillConfig):
        helps = [f.metadata["help"] for f in dataclasses.fields(config_class)]
        assert len(set(helps)) == len(helps) and min(map(len, helps)) > 5


def test_help_lists_presets_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in models.PRESETS) and "(default: 128)" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["--steps", "many"],
        ["--steps", "1", "--epochs", "1"],
        ["--batch-size", "0"],
        ["--steps", "0"],
        ["--epochs", "nan"],
        ["--learning-rate", "inf"],
        ["--seed", "100000000000000000000"],
        ["--precision", "fp8"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "llama-7b"], "llama-58m"),
        (["--data", "nowhere"], "tokenize_corpus.py"),
        (["--device", "cuda:7"], "--device"),
        (["--device", "cpu", "--cuda-graph"], "--cuda-graph"),
        (["--device", "meta"], "--device"),
        (["--sequence-length", "512"], "--sequence-length"),
        (["--batch-size", "100000"], "--batch-size"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(data_folder, tmp_path, capsys, arguments, message):
    defaults = ["--data", str(data_folder), "--out", str(tmp_path / "r"), "--model", "llama-tiny"]
    assert run(lambda: train.main([*defaults, *arguments])) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_shards_of_another_tokenizer_are_refused(data_folder, tmp_path, capsys):
    for name in ("train.bin", "dev.bin"):
        (tmp_path / name).write_bytes((data_folder / name).read_bytes())
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    (tmp_path / "tokenizer.model").write_bytes(other.model_bytes)
    assert run(lambda: train.main(["--data", str(tmp_path)])) == 1
    assert "was not made with" in capsys.readouterr().err


def test_sigterm_saves_and_exits_with_143(data_folder, tmp_path):
    out = tmp_path / "r"
    command = [sys.executable, str(ROOT / "train.py"), "--model", "llama-tiny", "--device", "cpu"]
    command += ["--data", str(data_folder), "--out", str(out), "--steps", "100000"]
    command += ["--batch-size", "2", "--sequence-length", "16", "--log-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in printed
    assert (out / "checkpoint.pt").exists()


# ---- checkpoints at word counts, and other beginnings than chance


def test_weights_are_kept_when_so_many_words_have_been_seen(data_folder, tmp_path):
    """At the first step that has seen them; interrupted and continued, the same files."""
    shard = TokenShard(data_folder / "train.bin")
    words_a_step = 4 * shard.words / ((len(shard.tokens) - 1) // 32)
    marks = ["100", "400", "300"]
    config = config_for(data_folder, tmp_path / "run", save_at_words=marks)
    trained(config)
    for name, mark in (("100", 100), ("300", 300), ("400", 400)):
        checkpoint = models.read_checkpoint(tmp_path / "run" / f"chck_{name}.pt")
        assert checkpoint["training"] is None
        assert checkpoint["progress"]["step"] == math.ceil(mark / words_a_step)
        assert mark <= checkpoint["progress"]["words"] < mark + words_a_step + 1
    last = weights(tmp_path / "run" / "checkpoint.pt")
    assert not same(weights(tmp_path / "run" / "chck_400.pt"), last)

    other = config_for(data_folder, tmp_path / "cut", save_at_words=marks, stop_after=0)
    while (progress := trained(other))["step"] < progress["steps"]:
        pass
    for name in ("100", "300", "400"):
        pair = [weights(tmp_path / run / f"chck_{name}.pt") for run in ("run", "cut")]
        assert same(*pair)


def test_the_marks_of_the_2025_rules():
    marks = train.word_marks(["babylm"], 43_000_000)
    million = 1_000_000
    expected = [*range(1, 11), 20, 30, 40]
    assert marks == {f"chck_{m}M.pt": m * million for m in expected}
    assert train.word_marks(["babylm", "1500k", "700"], 2_000_000) == {
        "chck_700.pt": 700, "chck_1M.pt": million, "chck_1500k.pt": 1_500_000,
        "chck_2M.pt": 2 * million,
    }  # fmt: skip
    for wrong in ("all", "", "0", "-1M", "1G", "M", "²", "9" * 5000):
        with pytest.raises(UserError, match="--save-at-words"):
            train.word_marks([wrong], 10)


def test_training_can_begin_with_the_weights_of_another_run(data_folder, tmp_path, capsys):
    trained(config_for(data_folder, tmp_path / "first"))
    first = tmp_path / "first" / "best.pt"
    arguments = ["--model", "llama-tiny", "--init", str(first), "--data", str(data_folder)]
    arguments += ["--out", str(tmp_path / "second"), "--steps", "1", "--learning-rate", "0"]
    arguments += ["--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]
    assert run(lambda: train.main(arguments)) == 0
    assert same(weights(first), weights(tmp_path / "second" / "best.pt"))
    model, _ = models.load_checkpoint(tmp_path / "second" / "best.pt")
    assert models.architecture(model) == "gpt2"
    assert models.read_checkpoint(tmp_path / "second" / "best.pt")["model"]["name"] == "gpt2-tiny"
    # The same beginning from elsewhere is the same run; another one is not.
    first.rename(tmp_path / "moved.pt")
    arguments[3] = str(tmp_path / "moved.pt")
    assert run(lambda: train.main(arguments)) == 0
    arguments[3] = str(tmp_path / "first" / "previous.pt")
    assert run(lambda: train.main(arguments)) == 1
    assert "init_digest" in capsys.readouterr().err


def test_weights_of_another_tokenizer_are_no_beginning(data_folder, tmp_path, capsys):
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    models.save_checkpoint(
        tmp_path / "a.pt", name="llama-tiny", model=models.build_model("llama-tiny", 300),
        config={"sequence_length": 32}, tokenizer=other, progress={},
    )  # fmt: skip
    arguments = ["--init", str(tmp_path / "a.pt"), "--data", str(data_folder)]
    assert run(lambda: train.main([*arguments, "--out", str(tmp_path / "run")])) == 1
    assert "another tokenizer" in capsys.readouterr().err and not (tmp_path / "run").exists()
