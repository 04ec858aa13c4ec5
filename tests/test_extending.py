"""What someone who changes the project does, as examples: each takes one place and a few lines."""

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distill
import evaluate
import export_hf
import generate
import model as models
import train
from conftest import interrupt_after, step_of
from data import Batch, BatchStream, open_corpus
from distill import DistillationObjective, DistillConfig, FusedDistillationObjective
from loss import cross_entropy, ensemble_logits, kl_divergence, mixed_loss
from test_train import config_for, fitted, stopped, trained
from train import CrossEntropyObjective, Objective, build_optimizer
from training.checkpoint import content_digest, read_checkpoint
from training.io import UserError, run_program

OPTIONS = ["--steps", "6", "--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]
OPTIONS += ["--precision", "fp32", "--eval-sequences", "8", "--log-every", "2"]


def run_train(data_folder, out, *more):
    arguments = ["--data", str(data_folder), "--out", str(out), *OPTIONS, *map(str, more)]
    return run_program(lambda: train.main(arguments))


def state_digest(path):
    checkpoint = read_checkpoint(path)
    return content_digest([checkpoint["weights"], checkpoint["training"]])


# ---- an objective with parameters of its own


class MatchingObjective(CrossEntropyObjective):
    """Cross-entropy, and the squared distance of projected hidden states to a frozen teacher's."""

    def __init__(self, model, teacher):
        super().__init__(model)
        self.teacher = teacher.eval().requires_grad_(False)
        sizes = model.config.hidden_size, teacher.config.hidden_size
        self.projection = nn.Linear(*sizes, bias=False)

        model.blocks[0].register_forward_hook(self.keep_hidden)

    def keep_hidden(self, block, inputs, output):
        self.first_layer = output  # (B, T, C)

    def forward(self, batch):
        logits = self.model(batch.tokens)
        ce = F.cross_entropy(logits.mT, batch.targets)
        with torch.no_grad():
            teacher_hidden = self.teacher.hidden_states(batch.tokens)
        distance = F.mse_loss(self.projection(self.first_layer), teacher_hidden)
        return {"loss": ce + 0.5 * distance, "cross_entropy": ce, "distance": distance}


def matching_run(data_folder, out):
    torch.manual_seed(0)
    model, teacher = (models.build_model(n, 300) for n in ("llama-tiny-student", "gpt2-tiny"))
    objective = MatchingObjective(model, teacher)
    start = objective.projection.weight.detach().clone()
    progress = fitted(objective, config_for(data_folder, out, model="llama-tiny-student"))
    return objective, start, progress


def test_an_objectives_own_parameters_are_trained_clipped_and_resumed(data_folder, tmp_path, monkeypatch):
    objective, start, _ = matching_run(data_folder, tmp_path / "whole")
    assert not torch.equal(objective.projection.weight, start)
    assert all(p.grad is None for p in objective.teacher.parameters())
    step = step_of(objective)
    assert "objective.projection.weight" in step.parameters  # what is clipped
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        assert matching_run(data_folder, tmp_path / "cut")[2]["step"] == 8
    matching_run(data_folder, tmp_path / "cut")
    uninterrupted, resumed = (state_digest(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert uninterrupted == resumed
    weights = read_checkpoint(tmp_path / "whole" / "checkpoint.pt")["weights"]
    assert not any("projection" in name for name in weights)  # they are the model's alone


def test_a_state_without_the_objectives_own_parameters_is_refused(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny-student")
    stopped(config, monkeypatch, 8)
    with pytest.raises(UserError, match="no state of this run's model"):
        matching_run(data_folder, tmp_path / "r")


def test_the_gradient_of_everything_that_is_trained_is_clipped_together(train_shard):
    model, teacher = (models.build_model(n, 300) for n in ("llama-tiny-student", "gpt2-tiny"))
    step = step_of(MatchingObjective(model, teacher))
    batch, seen = BatchStream(train_shard, 4, 32, seed=0)(0), []
    step.clip = 1e-3
    for parameter in step.parameters.values():  # what the optimizer is given
        parameter.register_post_accumulate_grad_hook(seen.append)
    step.optimizers[0].register_step_pre_hook(
        lambda optimizer, *_: norms.append(nn.utils.get_total_norm([p.grad for p in seen]))
    )
    norms = []
    step(batch, 1e-3)
    assert len(seen) == len(step.parameters)
    torch.testing.assert_close(norms[0], torch.tensor(1e-3), rtol=1e-3, atol=0)


# ---- another architecture: a file, and a line in a table


@dataclasses.dataclass(frozen=True)
class AveragerConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    max_position_embeddings: int = 256
    dropout: float = 0.0


class Averager(nn.Module):
    """Each position sees the mean of all embeddings up to it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )

    @property
    def head(self):
        return self.embedding.weight

    def hidden_states(self, tokens):
        x = self.embedding(tokens).cumsum(1)
        x = x / torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        for block in self.blocks:
            x = x + block(x).tanh()
        return x

    def forward(self, tokens):
        return F.linear(self.hidden_states(tokens), self.head)


@pytest.fixture
def averager(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "averager", (Averager, AveragerConfig))
    preset = models.Preset(AveragerConfig(16_000, 24), models.Hyperparameters(3e-3, 4, 1, 2))
    monkeypatch.setitem(models.PRESETS, "averager-tiny", preset)


def test_a_third_architecture_is_trained_scored_and_taught_by(averager, data_folder, tmp_path, capsys):
    assert run_train(data_folder, tmp_path / "a", "--model", "averager-tiny") == 0
    best = tmp_path / "a" / "best.pt"
    model, checkpoint = models.load_checkpoint(best)
    assert isinstance(model, Averager) and checkpoint["model"]["architecture"] == "averager"
    data = ["--data", str(data_folder)]
    assert run_program(lambda: evaluate.main([str(best), *data, "--device", "cpu"])) == 0
    assert run_program(lambda: generate.main([str(best), "--prompt", "the", "--tokens", "3"])) == 0
    student = ["--teachers", str(best), "--model", "averager-tiny", *data, *OPTIONS]
    assert run_program(lambda: distill.main([*student, "--out", str(tmp_path / "s")])) == 0
    capsys.readouterr()
    assert run_program(lambda: export_hf.main([str(best), "--out", str(tmp_path / "e")])) == 1
    error = capsys.readouterr().err
    assert "averager" in error and "llama and gpt2" in error and error.count("\n") == 1
    assert not (tmp_path / "e").exists()


def test_a_checkpoint_of_an_unknown_architecture_says_so(averager, data_folder, tmp_path, monkeypatch):
    run_train(data_folder, tmp_path / "a", "--model", "averager-tiny")
    monkeypatch.delitem(models.ARCHITECTURES, "averager")
    with pytest.raises(UserError, match=r"'averager'.*only gpt2, llama are known"):
        models.load_checkpoint(tmp_path / "a" / "best.pt")


# ---- another optimizer: `build_optimizer`, and nothing else


def sgd_with_momentum(objective, weight_decay, *_, **__):
    parameters = [p for p in objective.parameters() if p.requires_grad]
    half = len(parameters) // 2
    groups = [{"params": parameters[:half], "lr": 0.5}, {"params": parameters[half:]}]
    return [torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=weight_decay)]


def adagrad(objective, weight_decay, *_, **__):
    return [torch.optim.Adagrad(objective.model.parameters(), lr=1.0, weight_decay=weight_decay)]


def lion_like(objective, weight_decay, *_, **__):
    """An optimizer nobody has heard of, whose state is a tensor and a whole number."""

    class Sign(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("mean", torch.zeros_like(p))
                    state["count"] = state.get("count", 0) + 1
                    state["mean"].lerp_(p.grad, 1 / state["count"])
                    p.data.sub_(state["mean"].sign(), alpha=0.1 * group["lr"])

    return [Sign(objective.model.parameters(), {"lr": 1.0})]


@pytest.mark.parametrize("build", ["adamw", "muon", sgd_with_momentum, adagrad, lion_like])
def test_any_optimizer_is_resumed_with_the_same_bits(data_folder, tmp_path, monkeypatch, build):
    name = build if isinstance(build, str) else "adamw"
    if not isinstance(build, str):
        monkeypatch.setattr(train, "build_optimizer", build)
    uninterrupted, resumed = (
        config_for(data_folder, tmp_path / folder, optimizer=name) for folder in ("whole", "cut")
    )
    first = trained(uninterrupted)
    assert stopped(resumed, monkeypatch, 8)["step"] == 8
    assert trained(resumed)["dev_cross_entropy"] == first["dev_cross_entropy"]
    digests = [state_digest(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "cut")]
    assert digests[0] == digests[1]


def test_a_state_of_another_optimizer_is_refused(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r")
    stopped(config, monkeypatch, 5)
    with pytest.raises(UserError, match="optimizer: adamw -> muon"):
        trained(dataclasses.replace(config, optimizer="muon"))
    monkeypatch.setattr(train, "build_optimizer", sgd_with_momentum)
    with pytest.raises(UserError, match="no state of this run's model"):
        trained(config)


@pytest.mark.parametrize("build", [build_optimizer, sgd_with_momentum])
def test_a_group_keeps_its_ratio_to_the_scheduled_rate(build):
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    optimizers = build(objective, 0.1, "muon", 0.9)
    ratios = [g["lr"] for o in optimizers for g in o.param_groups]
    step = train.TrainStep(objective, optimizers, torch.autocast("cpu", enabled=False))
    tokens = torch.zeros(2, 2, 8, dtype=torch.long)
    for rate in (0.25, 0.125):
        step(Batch.whole(torch.arange(2), *tokens), rate)
        assert [g["lr"] for o in optimizers for g in o.param_groups] == [rate * r for r in ratios]


def test_muon_gets_the_layers_matrices_and_adamw_the_rest():
    for name in ("gpt2-tiny", "llama-tiny"):
        model = models.build_model(name, 300)
        adamw, muon = build_optimizer(CrossEntropyObjective(model), 0.1, "muon")
        matrices = {p for b in model.blocks for p in b.parameters() if p.dim() == 2}
        assert {p for g in muon.param_groups for p in g["params"]} == matrices
        others = {p for g in adamw.param_groups for p in g["params"]}
        assert others == set(model.parameters()) - matrices and model.head in others


def fused_sgd(objective, weight_decay, *_, **__):
    return [torch.optim.SGD(objective.parameters(), lr=1.0, momentum=0.9, fused=True)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("build", ["muon", sgd_with_momentum, fused_sgd, adagrad, lion_like])
def test_any_optimizer_skips_a_gradient_that_is_not_finite(train_shard, build, first):
    """Be it that of the very first step."""
    objective = CrossEntropyObjective(models.build_model("llama-tiny", 300))
    make = build_optimizer if build == "muon" else build
    optimizers = make(objective, 0.1, "muon", 0.99)
    step = train.TrainStep(objective, optimizers, torch.autocast("cpu", enabled=False))
    batch = BatchStream(train_shard, 4, 32, seed=0)(0)
    for _ in range(first):
        step(batch, 1e-3)

    def state():
        """Weights and optimizer states; before a first step there may be none, or zeros."""
        states = [o.state_dict()["state"] for o in optimizers] if first else []
        return content_digest([dict(objective.state_dict()), *states])

    before = state()
    hook = objective.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    step(batch, 1e-3)
    assert state() == before
    assert step.nonfinite_steps == 1
    hook.remove()
    assert torch.isfinite(step(batch, 1e-3)["loss"]) and torch.isfinite(step(batch, 1e-3)["loss"])
    assert step.nonfinite_in_a_row == 0


# ---- another loss, by autograd


def teachers_and_student():
    torch.manual_seed(0)
    names = ("llama-tiny-student", "gpt2-tiny", "llama-tiny")
    student, *teachers = (models.build_model(name, 300) for name in names)
    return student, teachers


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_plain_objective_equals_the_fused_one(train_shard, reduction):
    student, teachers = teachers_and_student()
    config = DistillConfig(teachers=[], kl_reduction=reduction, teacher_weights=[1, 3])
    batch, results = BatchStream(train_shard, 4, 32, seed=0)(0), []
    for objective_class in (FusedDistillationObjective, DistillationObjective):
        objective = objective_class(student, teachers, config).train()
        terms = objective(objective.prepare(batch))
        gradients = torch.autograd.grad(terms["loss"], list(student.parameters()))
        results.append(({k: v.detach() for k, v in terms.items()}, gradients))
    (fused, ours), (plain, theirs) = results
    assert fused.keys() == plain.keys()
    for key in fused:
        torch.testing.assert_close(fused[key], plain[key], rtol=1e-5, atol=1e-7)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_distill_trains_with_the_plain_objective(data_folder, tmp_path, capsys):
    run_train(data_folder, tmp_path / "t", "--model", "gpt2-tiny")
    arguments = ["--teachers", str(tmp_path / "t" / "best.pt"), "--model", "llama-tiny-student"]
    arguments += ["--data", str(data_folder), *OPTIONS, "--cache-teachers", "host"]
    ends = []
    for name in ("plain", "fused"):
        out = ["--out", str(tmp_path / name), "--objective", name]
        assert run_program(lambda o=out: distill.main([*arguments, *o])) == 0
        ends.append(read_checkpoint(tmp_path / name / "checkpoint.pt")["progress"])
    values = [end["dev_cross_entropy"] for end in ends]
    assert abs(values[0] - values[1]) < 1e-3


class ReverseObjective(DistillationObjective):
    """Cross-entropy and KL(student ‖ teachers)."""

    def forward(self, batch):
        alpha, tau, num_targets, kl_denominator = self.coefficients(batch)
        student = self.model(batch.tokens).float()  # (B, T, V)
        ensemble = ensemble_logits(self.teacher_logits(batch), self.weights)  # (B, T, V)
        ce = cross_entropy(student, batch.targets, num_targets)
        kl = kl_divergence(student, ensemble, tau, kl_denominator)
        return {"loss": mixed_loss(ce, kl, alpha, tau), "cross_entropy": ce, "kl": kl}


def test_the_example_in_the_contributors_page_is_this_one():
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert inspect.getsource(ReverseObjective) in page


def test_a_changed_loss_is_an_option_of_distill(data_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(distill.OBJECTIVES, "reverse", ReverseObjective)
    run_train(data_folder, tmp_path / "t", "--model", "gpt2-tiny")
    arguments = ["--teachers", str(tmp_path / "t" / "best.pt"), "--model", "llama-tiny-student"]
    arguments += ["--data", str(data_folder), *OPTIONS, "--learning-rate", "3e-3"]
    for name, more in (("a", []), ("b", ["--micro-batch-size", "3"])):
        out = ["--objective", "reverse", "--out", str(tmp_path / name), *more]
        assert run_program(lambda o=out: distill.main([*arguments, *o])) == 0
    logs = [log_lines(tmp_path / name / "log.jsonl") for name in ("a", "b")]
    assert logs[0][-1]["kl"] > 0 and logs[0][-1]["loss"] < logs[0][0]["loss"]
    assert all(abs(a["loss"] - b["loss"]) < 1e-3 for a, b in zip(*logs))
    other = ["--objective", "reverse", "--alpha", "0.9", "--out", str(tmp_path / "c")]
    distill.main([*arguments, *other])
    assert log_lines(tmp_path / "c" / "log.jsonl")[0]["loss"] != logs[0][0]["loss"]


def log_lines(path):
    """The training lines of a log."""
    return [e for e in map(json.loads, path.read_text().splitlines()) if "loss" in e]


class LossAlone(Objective):
    """The least that an objective can be."""

    def forward(self, batch):
        logits = self.model(batch.tokens)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())}


def test_an_objective_may_return_its_loss_alone(data_folder, tmp_path):
    torch.manual_seed(0)
    model = models.build_model("llama-tiny-student", 300)
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny-student")
    assert fitted(LossAlone(model), config)["step"] == 12
    assert "cross_entropy" not in log_lines(tmp_path / "r" / "log.jsonl")[0]


def test_an_evaluation_may_return_more_and_in_any_number(data_folder, tmp_path, monkeypatch):
    original = train.fit

    def with_more(objective, config, stream, evaluate, provenance):
        def more(model, autocast):
            cross_entropy = evaluate(model, autocast)["dev_cross_entropy"]
            return {"dev_cross_entropy": np.float64(cross_entropy), "perfect": cross_entropy < 1}

        return original(objective, config, stream, more, provenance)

    monkeypatch.setattr(train, "fit", with_more)
    trained(config_for(data_folder, tmp_path / "r"))
    progress = read_checkpoint(tmp_path / "r" / "checkpoint.pt")["progress"]
    assert progress["perfect"] == 0 and progress["dev_cross_entropy"] > 1


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(data_folder, tmp_path):
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    objective.model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    with pytest.raises(TypeError, match="float32 weights"):
        fitted(objective, config_for(data_folder, tmp_path / "r"))
    assert not (tmp_path / "r" / "log.jsonl").exists()


def test_a_parameter_that_no_optimizer_has_is_an_error():
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    (optimizer,) = build_optimizer(objective, 0.1)
    objective.projection = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="each parameter that is trained"):
        train.TrainStep(objective, [optimizer], torch.autocast("cpu", enabled=False))


# ---- shapes of one's own


def test_a_shape_of_ones_own_is_printed_trained_and_saved(data_folder, tmp_path, capsys):
    shape = "hidden_size=32, num_hidden_layers=1,num_attention_heads=2"
    options = ["--model", "llama-tiny", "--shape", shape, "--dropout", "0.25"]
    assert run_train(data_folder, tmp_path / "r", *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "hidden_size=32" in printed and "dropout=0.25" in printed
    assert run_train(data_folder, tmp_path / "r", *options) == 0
    model, _ = models.load_checkpoint(tmp_path / "r" / "best.pt")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.dropout) == (32, 1, 0.25)
    assert config.intermediate_size == models.PRESETS["llama-tiny"].config.intermediate_size
    assert run_train(data_folder, tmp_path / "r", *options) == 0  # is finished
    assert run_train(data_folder, tmp_path / "r", "--shape", "dropout=0.1", "--dropout", "0") == 1
    assert "leave one" in capsys.readouterr().err
    assert run_train(data_folder, tmp_path / "r", *options[:4], "--dropout", "0") == 1
    assert "shape.dropout: 0.25 -> 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, message",
    [
        ("hiden_size=3", "choose from hidden_size"),
        ("vocab_size=9", "choose from hidden_size"),
        ("hidden_size=32,hidden_size=64", "hidden_size is given twice"),
        ("num_attention_heads=5", "5 attention heads do not divide hidden_size 96"),
        ("num_attention_heads=32", "heads of an even size, here 3"),
        ("hidden_size=big", "give name=value"),
        ("hidden_size", "give name=value"),
        ("num_hidden_layers=0", "num_hidden_layers cannot be 0"),
        ("dropout=1", "dropout cannot be 1.0"),
        ("num_hidden_layers=5000", "at most 1000"),
    ],
)
def test_an_impossible_shape_is_one_line(data_folder, tmp_path, capsys, shape, message):
    assert run_train(data_folder, tmp_path / "r", "--model", "llama-tiny", "--shape", shape) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: --shape") and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_dropout_in_a_llama_acts_where_gpt2s_does():
    """The embeddings and both residual branches lose their share, and attention varies."""
    torch.manual_seed(0)
    config = dataclasses.replace(models.PRESETS["llama-tiny"].config, vocab_size=300, dropout=0.5)
    model, tokens = models.build(config), torch.randint(300, (4, 64))
    shares = {}

    def count(name):
        def hook(module, inputs, output):
            shares[name] = (output == 0).float().mean().item()

        return hook

    block = model.blocks[0]
    block.self_attn.register_forward_hook(count("attention"))
    block.mlp.register_forward_hook(count("feed-forward"))
    block.register_forward_pre_hook(
        lambda module, inputs: shares.update(embedding=(inputs[0] == 0).float().mean().item())
    )
    model(tokens)
    assert all(abs(share - 0.5) < 0.02 for share in shares.values()) and len(shares) == 3
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_goes_with_an_initial_checkpoint(data_folder, tmp_path, capsys):
    run_train(data_folder, tmp_path / "a", "--model", "gpt2-tiny")
    more = ["--model", "gpt2-tiny", "--init", tmp_path / "a" / "best.pt"]
    assert run_train(data_folder, tmp_path / "b", *more, "--dropout", "0.3") == 0
    model, _ = models.load_checkpoint(tmp_path / "b" / "best.pt")
    assert model.config.dropout == 0.3
    assert run_train(data_folder, tmp_path / "c", *more, "--shape", "hidden_size=8") == 1
    assert "leave one" in capsys.readouterr().err


# ---- recipe options


def test_the_end_of_the_schedule_can_be_above_zero():
    rates = [train.learning_rate(s, 100, 1.0, 10, 0.1) for s in (10, 55, 100)]
    assert rates == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_what_decays_is_an_option(name):
    model = models.build_model(name, 300)
    names = {p: n for n, p in model.named_parameters()}
    vectors = {n for p, n in names.items() if p.dim() < 2}
    embeddings = {n for n in names.values() if n.split(".")[0] in ("wte", "wpe", "embed_tokens")}
    layernorm = {n for n in vectors if n.endswith("bias") or ".ln_" in n or "ln_f" in n}
    expected = {"layernorm": layernorm, "norms": vectors, "norms+embeddings": vectors | embeddings}
    for choice, exempt in expected.items():
        (optimizer,) = build_optimizer(CrossEntropyObjective(model), 0.1, no_decay=choice)
        decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert decay == {n: 0.0 if n in exempt else 0.1 for n in names.values()}


def test_clipping_and_beta2_are_options(data_folder, tmp_path):
    results = []
    for name, more in (("a", {}), ("b", {"clip": 0.0}), ("c", {"beta2": 0.9}), ("d", {})):
        config = config_for(data_folder, tmp_path / name, steps=3, **more)
        trained(config)
        results.append(state_digest(tmp_path / name / "checkpoint.pt"))
    assert results[0] == results[3] and len(set(results)) == 3
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    (optimizer,) = build_optimizer(objective, 0.1, beta2=0.95)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_an_ensemble_is_scored_with_its_weights(data_folder, tmp_path, capsys):
    for name in ("gpt2-tiny", "llama-tiny"):
        run_train(data_folder, tmp_path / name, "--model", name)
    paths = [str(tmp_path / name / "best.pt") for name in ("gpt2-tiny", "llama-tiny")]
    both = [models.load_checkpoint(path)[0] for path in paths]
    tokens = torch.randint(4, 300, (2, 9))
    expected = (3 * both[0](tokens) + both[1](tokens)) / 4
    torch.testing.assert_close(evaluate.Ensemble(both, [3.0, 1.0])(tokens), expected)
    arguments = ["--ensemble", *paths, "--data", str(data_folder), "--device", "cpu"]
    assert run_program(lambda: evaluate.main([*arguments, "--teacher-weights", "1", "0"])) == 0
    dev = open_corpus(data_folder).dev
    alone = evaluate.corpus_scores(dev, evaluate.shard_losses(both[0], dev, 32))
    assert f"{alone['cross_entropy']:.4g}" in capsys.readouterr().out
    assert run_program(lambda: evaluate.main([*arguments, "--teacher-weights", "1"])) == 1
    assert "--teacher-weights: 1 given for 2 teachers" in capsys.readouterr().err
