"""Equal to code that no one here wrote: Hugging Face's models, and the original's objective."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

import model as models
from benchmarks.reference import hugging_face_model, original_loss
from conftest import step_of
from data import Batch
from distill import DistillConfig, FusedDistillationObjective
from export_hf import hf_config, hf_name, is_transposed
from generate import generate
from gpt2 import GPT2Config
from llama import LlamaConfig
from loss import IGNORED
from model import architecture, build
from train import CrossEntropyObjective, learning_rate

V = 211
SMALL = {
    "gpt2": GPT2Config(V, 48, 192, 3, 4, max_position_embeddings=40, dropout=0.0),
    "gpt2, other sizes": GPT2Config(V, 24, 56, 2, 3, 33, dropout=0.0, layer_norm_epsilon=1e-3),
    "llama": LlamaConfig(V, 48, 80, 3, 4, max_position_embeddings=40),
    "llama, other theta and eps": LlamaConfig(V, 24, 56, 2, 3, 33, 1e-3, 500.0),
    "llama, tied": LlamaConfig(V, 48, 80, 2, 2, 40, tie_word_embeddings=True),
}
# The presets' own widths, heads and vocabulary; the layers being alike, one of them is enough.
ONE_LAYER = {
    name: dataclasses.replace(preset.config, num_hidden_layers=1) for name, preset in models.PRESETS.items()
}
exact = pytest.mark.parametrize("config", [*SMALL.values(), *ONE_LAYER.values()], ids=[*SMALL, *ONE_LAYER])
small = pytest.mark.parametrize("config", [SMALL["gpt2"], SMALL["llama"]], ids=["gpt2", "llama"])


def perturbed(config, seed=0, spread=0.05):
    """A model none of whose parameters is the constant that it was initialised with."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model.eval()


def assert_equal_to_scale(ours, theirs, tolerance):
    """The largest difference, relative to the largest value."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_equal_gradients(model, twin, tolerance):
    kind, theirs = architecture(model.config), dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[hf_name(kind, name)].grad
        gradient = gradient.T if is_transposed(kind, name) else gradient
        assert_equal_to_scale(parameter.grad, gradient, tolerance)


@exact
def test_logits_and_all_gradients_are_the_references(config):
    config = dataclasses.replace(config, **({"dropout": 0.0} if hasattr(config, "dropout") else {}))
    model = perturbed(config)
    twin = hugging_face_model(model)
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 33))
    ours, theirs = model(tokens), twin(tokens).logits
    assert_equal_to_scale(ours.detach(), theirs.detach(), 1e-5)
    F.cross_entropy(ours.flatten(0, 1), targets.flatten()).backward()
    F.cross_entropy(theirs.flatten(0, 1), targets.flatten()).backward()
    assert_equal_gradients(model, twin, 2e-5)


def train_both(objective, their_model, their_loss, batches, peak=1e-2, decay=0.1):
    """Losses and gradient norms of our loop and of the reference's parts, step by step."""
    steps = len(batches)
    step = step_of(objective, weight_decay=decay)
    decayed = get_parameter_names(their_model, [nn.LayerNorm])
    decayed = {name for name in decayed if "bias" not in name}
    named = list(their_model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    curves = []
    for i, batch in enumerate(batches):
        ours = step(batch, learning_rate(i, steps, peak, warmup_steps=100))
        loss = their_loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(their_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curves.append([ours["loss"], loss.detach(), ours["gradient_norm"], norm])
    return torch.tensor(curves).T


def random_batches(count, sequences=4, length=20):
    """Batches with structure: a token is followed by its double, mostly."""
    batches = []
    for _ in range(count):
        ids = torch.randint(4, V, (sequences, length + 1))
        for t in range(1, length + 1):
            follows = torch.rand(sequences) < 0.8
            ids[:, t] = torch.where(follows, 4 + 2 * ids[:, t - 1] % (V - 4), ids[:, t])
        batches.append(Batch.whole(torch.arange(sequences), ids[:, :-1], ids[:, 1:]))
    return batches


@small
def test_ten_steps_of_training_are_the_references(config):
    model = perturbed(config)  # biases and gains too are to have something that could decay
    twin = hugging_face_model(model)
    twin.train()

    def their_loss(batch):
        logits = twin(batch.tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    ours, theirs, our_norms, their_norms = train_both(
        CrossEntropyObjective(model.train()), twin, their_loss, random_batches(10), decay=5.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(our_norms, their_norms, rtol=1e-4, atol=0)
    assert ours[-1] < ours[0] - 0.1  # something was learned


@small
def test_the_likeliest_continuation_is_the_references(config):
    model = perturbed(config, spread=0.2)
    prompt = torch.randint(4, V, (7,))
    ours = generate(model, prompt, 25, temperature=0, excluded=range(4))
    theirs = hugging_face_model(model).generate(
        prompt[None],
        max_new_tokens=25,
        do_sample=False,
        suppress_tokens=[0, 1, 2, 3],
        eos_token_id=None,
        attention_mask=torch.ones(1, 7),
    )[0]
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[7:].tolist())) > 2  # not one token over and over


WIDE = [GPT2Config(1500, 192, 768, 4, 4, 512), LlamaConfig(1500, 192, 512, 4, 4)]


@pytest.mark.parametrize("config", WIDE, ids=["gpt2", "llama"])
def test_initialisation_has_the_references_spread(config):
    torch.manual_seed(0)
    model = perturbed(config, spread=0.0)
    kind = architecture(model.config)
    twin = dict(hugging_face_model(model, weights=False).named_parameters())
    kinds = {}
    for name, ours in model.named_parameters():
        both = kinds.setdefault(name.split(".", 2)[-1] if name.count(".") > 1 else name, ([], []))
        both[0].append(ours.detach().flatten())
        both[1].append(twin[hf_name(kind, name)].detach().flatten())
    assert len(kinds) > 8
    for name, (ours, theirs) in kinds.items():
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
        else:  # the deviation of N values is known to 1 / sqrt(2 N)
            error = 5 * math.sqrt(2 / (2 * len(ours)))
            assert abs(ours.std() / theirs.std() - 1) < error < 0.02, name
            assert abs(ours.mean()) < 5 * ours.std() / math.sqrt(len(ours)), name


SILENCED = {  # to leave dropout in one place alone to be seen
    "everywhere": (),
    "embeddings": ("attn.c_proj", "mlp.c_proj"),
    "attention": ("mlp.c_proj",),
    "feed-forward": ("attn.c_proj",),
}


@pytest.mark.parametrize("place", SILENCED)
def test_dropout_in_training_is_the_references(place):
    """Logits vary as much from one draw of masks to the next, element by element."""
    assert GPT2Config(V, 32, 128, 1, 4).dropout == transformers.GPT2Config().resid_pdrop == 0.1
    model = perturbed(GPT2Config(V, 32, 128, 1, 4, max_position_embeddings=40, dropout=0.5), 0, 0.3)
    for name, parameter in model.named_parameters():
        parameter.data *= not any(part in name for part in SILENCED[place])
    twin = hugging_face_model(model).train()
    tokens = torch.randint(V, (1, 20)).expand(1500, 20)
    with torch.no_grad():
        variances = [z.var(dim=0) for z in (model.train()(tokens), twin(tokens).logits)]
    ours, theirs = (v.mean() for v in variances)
    assert theirs > 1e-3 and abs(ours / theirs - 1) < 0.1
    assert torch.corrcoef(torch.stack([v.flatten() for v in variances]))[0, 1] > 0.9


# ---- the original's objective, as it runs


@pytest.fixture
def ensemble():
    """(our objective, the student's twin, the teachers' twins) with the same weights."""
    student = perturbed(SMALL["llama"], spread=0.0).train()
    teachers = [perturbed(SMALL["gpt2"], 1, 0.1), perturbed(SMALL["llama, tied"], 2, 0.1)]
    objective = FusedDistillationObjective(student, teachers, DistillConfig(teachers=[]))
    return objective, hugging_face_model(student).train(), [hugging_face_model(t) for t in teachers]


def as_the_original_cuts(batch):
    """The same tokens as input and labels: the last position has no target."""
    ids = batch.tokens
    targets = torch.cat((ids[:, 1:], torch.full((len(ids), 1), IGNORED)), dim=1)
    return Batch.whole(batch.chunk_ids, ids, targets)


def test_the_distillation_step_is_the_originals(ensemble):
    objective, student, teachers = ensemble
    batch = as_the_original_cuts(random_batches(1)[0])
    ours, theirs = objective(objective.prepare(batch))["loss"], original_loss(student, teachers, batch.tokens)
    assert abs(ours - theirs) <= 1e-5 * theirs
    ours.backward()
    theirs.backward()
    assert_equal_gradients(objective.model, student, 2e-5)
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (objective.model, student)]
    assert norms[1] > 1  # clipping acts
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    assert_equal_gradients(objective.model, student, 2e-5)
    # The comparison can fail: the reduction that the formula suggests gives another loss.
    objective.kl_reduction = "token"
    assert objective(objective.prepare(batch))["loss"] < 0.9 * theirs


def test_twenty_steps_of_distillation_are_the_originals(ensemble):
    objective, student, teachers = ensemble
    batches = [as_the_original_cuts(batch) for batch in random_batches(20)]
    ours, theirs, our_norms, their_norms = train_both(
        objective, student, lambda batch: original_loss(student, teachers, batch.tokens), batches
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=0)
    torch.testing.assert_close(our_norms, their_norms, rtol=2e-3, atol=0)
    assert ours[-1] < 0.9 * ours[0]


def test_hf_configs_state_both_generations():
    config = hf_config(perturbed(SMALL["llama, other theta and eps"]), "llama")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
