"""What someone who changes the project does, as examples: each takes one place and a few lines."""

import dataclasses
import inspect
from pathlib import Path

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
from conftest import (
    OPTIONS,
    comparable,
    config_for,
    fitted,
    interrupt_after,
    log_entries,
    run,
    save_model,
    step_of,
    stopped,
    trained,
    weights,
)
from data import Batch, BatchStream, open_corpus
from distill import DistillationObjective, DistillConfig, FusedDistillationObjective
from loss import cross_entropy, ensemble_logits, kl_divergence, mixed_loss
from train import CrossEntropyObjective, Objective, build_optimizer
from training.checkpoint import content_digest
from training.io import UserError


def train_arguments(data_folder, out, *more):
    return [train, "--data", data_folder, "--out", out, *OPTIONS, *more]


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
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    # Of the weights only the model's are saved.
    assert not any("projection" in name for name in weights(tmp_path / "whole" / "checkpoint.pt"))


def test_a_state_without_the_objectives_own_parameters_is_refused(data_folder, tmp_path, monkeypatch):
    config = config_for(data_folder, tmp_path / "r", model="llama-tiny-student")
    stopped(config, monkeypatch, 8)
    with pytest.raises(UserError, match="no state of this run's model"):
        matching_run(data_folder, tmp_path / "r")


def test_the_gradient_of_everything_that_is_trained_is_clipped_together(train_shard):
    model, teacher = (models.build_model(n, 300) for n in ("llama-tiny-student", "gpt2-tiny"))
    step, seen, norms = step_of(MatchingObjective(model, teacher)), [], []
    step.clip = 1e-3
    for parameter in step.parameters.values():  # what the optimizer is given
        parameter.register_post_accumulate_grad_hook(seen.append)
    step.optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in seen]))
    )
    step(BatchStream(train_shard, 4, 32, seed=0)(0), 1e-3)
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
        self.blocks = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size)])

    @property
    def head(self):
        return self.embedding.weight

    def hidden_states(self, tokens):
        total = self.embedding(tokens).cumsum(1)
        mean = total / torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        return mean + self.blocks[0](mean).tanh()

    def forward(self, tokens):
        return F.linear(self.hidden_states(tokens), self.head)


@pytest.fixture
def averager(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "averager", (Averager, AveragerConfig))
    preset = models.Preset(AveragerConfig(16_000, 24), models.Hyperparameters(3e-3, 4, 1, 2))
    monkeypatch.setitem(models.PRESETS, "averager-tiny", preset)


def test_a_third_architecture_is_trained_scored_and_taught_by(averager, data_folder, tmp_path, refused):
    assert run(*train_arguments(data_folder, tmp_path / "a", "--model", "averager-tiny")) == 0
    best = tmp_path / "a" / "best.pt"
    model, checkpoint = models.load_checkpoint(best)
    assert isinstance(model, Averager) and checkpoint["model"]["architecture"] == "averager"
    data = ["--data", data_folder]
    assert run(evaluate, best, *data, "--device", "cpu") == 0
    assert run(generate, best, "--prompt", "the", "--tokens", "3") == 0
    student = ["--teachers", best, "--model", "averager-tiny", *data, *OPTIONS]
    assert run(distill, *student, "--out", tmp_path / "s") == 0
    error = refused(export_hf, best, "--out", tmp_path / "e")
    assert "averager" in error and "llama and gpt2" in error
    assert not (tmp_path / "e").exists()


def test_a_checkpoint_of_an_unknown_architecture_says_so(averager, tokenizer, tmp_path, monkeypatch):
    save_model(tmp_path / "a.pt", models.build_model("averager-tiny", 300), tokenizer, "averager-tiny")
    monkeypatch.delitem(models.ARCHITECTURES, "averager")
    with pytest.raises(UserError, match=r"'averager'.*only gpt2, llama are known"):
        models.load_checkpoint(tmp_path / "a.pt")


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


@pytest.mark.parametrize("build", ["muon", sgd_with_momentum, adagrad, lion_like])
def test_any_optimizer_is_resumed_with_the_same_bits(data_folder, tmp_path, monkeypatch, build):
    """AdamW is for test_train.py."""
    name = "muon" if build == "muon" else "adamw"
    if build != "muon":
        monkeypatch.setattr(train, "build_optimizer", build)
    uninterrupted, resumed = (
        config_for(data_folder, tmp_path / folder, optimizer=name) for folder in ("whole", "cut")
    )
    trained(uninterrupted)
    assert stopped(resumed, monkeypatch, 8)["step"] == 8
    trained(resumed)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


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
@pytest.mark.parametrize("build", ["adamw", "muon", sgd_with_momentum, fused_sgd, adagrad, lion_like])
def test_any_optimizer_skips_a_gradient_that_is_not_finite(train_shard, build, first):
    """Be it that of the very first step."""
    objective = CrossEntropyObjective(models.build_model("llama-tiny", 300))
    make, name = (build_optimizer, build) if isinstance(build, str) else (build, None)
    optimizers = make(objective, 0.1, name, 0.99)
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
    terms = step(batch, 1e-3)
    assert state() == before and not torch.isfinite(terms["gradient_norm"])
    assert step.nonfinite_steps == step.nonfinite_in_a_row == 1
    hook.remove()
    assert torch.isfinite(step(batch, 1e-3)["loss"]) and torch.isfinite(step(batch, 1e-3)["loss"])
    assert step.nonfinite_in_a_row == 0 and state() != before


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


def test_a_changed_loss_is_an_option_of_distill(teachers, data_folder, tmp_path, monkeypatch):
    """Micro-batches and a cache change nothing about it."""
    monkeypatch.setitem(distill.OBJECTIVES, "reverse", ReverseObjective)
    arguments = ["--teachers", *teachers, "--model", "llama-tiny-student", "--objective", "reverse"]
    arguments += ["--data", data_folder, *OPTIONS, "--learning-rate", "3e-3"]

    def losses(name, *more):
        assert run(distill, *arguments, "--out", tmp_path / name, *more) == 0
        return [entry["loss"] for entry in log_entries(tmp_path / name) if entry.get("kl", 0) > 0]

    first = losses("a")
    assert len(first) == 3 and first[-1] < first[0]
    parts = losses("b", "--micro-batch-size", "3", "--cache-teachers", "host")
    assert parts == pytest.approx(first, abs=1e-3)
    assert losses("c", "--alpha", "0.9")[0] != first[0]


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
    assert "cross_entropy" not in log_entries(tmp_path / "r")[0]


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(data_folder, tmp_path):
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    objective.model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    with pytest.raises(TypeError, match="float32"):
        fitted(objective, config_for(data_folder, tmp_path / "r"))
    assert not (tmp_path / "r" / "log.jsonl").exists()


def test_a_parameter_that_no_optimizer_has_is_an_error():
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    (optimizer,) = build_optimizer(objective, 0.1)
    objective.projection = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="each parameter that is trained"):
        train.TrainStep(objective, [optimizer], torch.autocast("cpu", enabled=False))


# ---- shapes of one's own


def test_a_shape_of_ones_own_is_printed_trained_and_saved(data_folder, tmp_path, capsys, refused):
    shape = "hidden_size=32, num_hidden_layers=1,num_attention_heads=2"
    plain = train_arguments(data_folder, tmp_path / "r", "--model", "llama-tiny")
    command = [*plain, "--shape", shape, "--dropout"]
    assert run(*command, "0.25", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "hidden_size=32" in printed and "dropout=0.25" in printed
    assert run(*command, "0.25") == 0
    model, _ = models.load_checkpoint(tmp_path / "r" / "best.pt")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.dropout) == (32, 1, 0.25)
    assert config.intermediate_size == models.PRESETS["llama-tiny"].config.intermediate_size
    assert run(*command, "0.25") == 0  # is finished
    assert "shape.dropout: 0.25 -> 0.0" in refused(*command, "0")


@pytest.mark.parametrize(
    "shape, message",
    [
        ("hiden_size=3", "choose from hidden_size"),
        ("vocab_size=9", "choose from hidden_size"),
        ("num_attention_heads=5", "5 attention heads do not divide hidden_size 96"),
        ("num_attention_heads=32", "heads of an even size, here 3"),
        ("num_key_value_heads=3", "3 key-value heads do not divide 4 attention heads"),
        ("head_dim=0", "head_dim cannot be 0"),
        ("hidden_size=big", "give name=value"),
        ("hidden_size", "give name=value"),
        ("num_hidden_layers=0", "num_hidden_layers cannot be 0"),
        ("dropout=1", "dropout cannot be 1"),
    ],
)
def test_an_impossible_shape_is_one_line(data_folder, tmp_path, refused, shape, message):
    command = train_arguments(data_folder, tmp_path / "r", "--model", "llama-tiny", "--shape", shape)
    error = refused(*command)
    assert message in error and error.startswith("error: --shape")
    assert not (tmp_path / "r").exists()


def test_dropout_in_a_llama_acts_where_gpt2s_does():
    """The embeddings and both residual branches lose their share, and attention varies."""
    torch.manual_seed(0)
    config = dataclasses.replace(models.PRESETS["llama-tiny"].config, vocab_size=300, dropout=0.5)
    model, tokens = models.build(config), torch.randint(300, (4, 64))
    shares = []

    def count(tensor):
        shares.append((tensor == 0).float().mean().item())

    block = model.blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: count(inputs[0]))  # the embeddings
    block.self_attn.register_forward_hook(lambda module, inputs, output: count(output))
    block.mlp.register_forward_hook(lambda module, inputs, output: count(output))
    model(tokens)
    assert shares == pytest.approx([0.5, 0.5, 0.5], abs=0.02)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_goes_with_an_initial_checkpoint(teachers, data_folder, tmp_path, refused):
    command = train_arguments(data_folder, tmp_path / "b", "--model", "gpt2-tiny", "--init", teachers[0])
    assert "leave one" in refused(*command, "--shape", "hidden_size=8")
    assert run(*command, "--dropout", "0.3") == 0
    model, _ = models.load_checkpoint(tmp_path / "b" / "best.pt")
    assert model.config.dropout == 0.3


# ---- recipe options


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
    for name, more in (("a", {}), ("b", {"clip": 0.0}), ("c", {"beta2": 0.9})):
        trained(config_for(data_folder, tmp_path / name, steps=3, **more))
        results.append(content_digest(weights(tmp_path / name / "checkpoint.pt")))
    assert len(set(results)) == 3
    objective = CrossEntropyObjective(models.build_model("gpt2-tiny", 300))
    (optimizer,) = build_optimizer(objective, 0.1, beta2=0.95)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_an_ensemble_is_scored_with_its_weights(teachers, data_folder, capsys, refused):
    both = [models.load_checkpoint(path)[0] for path in teachers]
    tokens = torch.randint(4, 300, (2, 9))
    expected = (3 * both[0](tokens) + both[1](tokens)) / 4
    torch.testing.assert_close(evaluate.Ensemble(both, [3.0, 1.0])(tokens), expected)
    command = [evaluate, "--ensemble", *teachers, "--data", data_folder, "--device", "cpu"]
    assert run(*command, "--teacher-weights", "1", "0") == 0
    dev = open_corpus(data_folder).dev
    alone = evaluate.corpus_scores(dev, *evaluate.shard_losses(both[0], dev, 128))
    assert f"{alone['cross_entropy']:.4g}" in capsys.readouterr().out
    error = refused(*command, "--teacher-weights", "1")
    assert "--teacher-weights: 1 given for 2 teachers" in error
