"""Presets with their recipes; a model by name, from a config, or from a checkpoint.

A new architecture is a file of its own beside `llama.py` and one line in `ARCHITECTURES`. Its
config is a dataclass with the fields that `check_shape` reads and `max_position_embeddings`, whole
numbers above 0, fractions or other primitives; its model has `config`, `blocks`,
`head`, `hidden_states(tokens, layers)` and `forward(tokens)` as the two that are here.
"""

import dataclasses
import math

import torch

from gpt2 import GPT2, GPT2Config
from llama import Llama, LlamaConfig
from tokenizer import VOCABULARY_SIZE
from training.checkpoint import read_checkpoint
from training.io import UserError, printable

SPARE_BYTES = 64 << 20  # what reading a file may cost besides eight times its size

ARCHITECTURES = {"gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a preset is trained: peak learning rate, sequences a batch, epochs, steps, decay."""

    learning_rate: float
    batch_size: int
    epochs: float
    warmup_steps: int
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Preset:
    config: GPT2Config | LlamaConfig
    recipe: Recipe


def _gpt2(layers, heads, hidden, recipe, **options):
    config = GPT2Config(VOCABULARY_SIZE, hidden, 4 * hidden, layers, heads, **options)
    return Preset(config, recipe)


def _llama(layers, heads, hidden, inner, recipe, **options):
    return Preset(LlamaConfig(VOCABULARY_SIZE, hidden, inner, layers, heads, **options), recipe)


# Learning rate, sequences a batch, epochs, warm-up steps, weight decay: the first published scripts
# (commit d3b831c of timinar/BabyLlama) for the three models of the paper, its later files for
# the other three. Those files also move chunks at random, which is --random-offset here, and which
# a teacher cache cannot follow.
PRESETS = {
    "gpt2-705m": _gpt2(24, 16, 1536, Recipe(2.5e-4, 256, 6, 200)),
    "llama-360m": _llama(24, 8, 1024, 3072, Recipe(3e-4, 128, 4, 200)),
    "llama-58m": _llama(16, 8, 512, 1024, Recipe(2.5e-4, 32, 6, 200, 0.1)),
    "gpt2-97m": _gpt2(12, 12, 768, Recipe(7e-4, 128, 6, 300), dropout=0.0),
    "llama-97m": _llama(12, 12, 768, 2048, Recipe(7e-4, 128, 6, 300), tie_word_embeddings=True),
    "llama-16m": _llama(8, 8, 256, 1024, Recipe(3e-4, 128, 4, 300)),
    # Ours, for the recipes that a CPU can run. The teachers see little text often, so they decay
    # more: with 0.1 the LLaMA overfits from its fifth epoch on. The GPT-2, slow to learn its
    # positions, gets half the batch and so twice the steps.
    "gpt2-small": _gpt2(6, 6, 192, Recipe(1.5e-3, 16, 7, 100, 0.5)),
    "llama-small": _llama(6, 6, 192, 512, Recipe(1.5e-3, 32, 6, 100, 1.0)),
    "llama-small-student": _llama(4, 4, 128, 320, Recipe(1.5e-3, 16, 6, 100, 0.1)),
    "gpt2-tiny": _gpt2(3, 4, 96, Recipe(3e-3, 16, 30, 50, 0.5)),
    "llama-tiny": _llama(3, 4, 96, 256, Recipe(3e-3, 16, 15, 50, 0.5)),
    "llama-tiny-student": _llama(2, 4, 64, 160, Recipe(3e-3, 16, 14, 50, 0.1)),
}


def preset(name):
    """The preset of that name. Raises `UserError` with the list of names if there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset is called {name}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_names():
    """One line with the names of all presets."""
    return f"presets: {', '.join(PRESETS)}"


def with_hyperparameters(config, out_prefix=""):
    """`config` with what was left open taken from its preset's recipe."""
    recipe = dataclasses.asdict(preset(config.model).recipe)
    if config.steps is not None:
        recipe.pop("epochs")
    values = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    if config.out is None:
        values["out"] = f"runs/{out_prefix}{config.model}"
    return dataclasses.replace(config, **values)


# ---- building


def architecture(config):
    """The key of a config's class in `ARCHITECTURES`."""
    return next(name for name, (_, c) in ARCHITECTURES.items() if type(config) is c)


def build(config):
    """A freshly initialised model of that config, whichever architecture it is of.

    Initialisation draws from torch's global generator: seed it for the same weights.
    """
    model_class, _ = ARCHITECTURES[architecture(config)]
    return model_class(config)


def build_model(name, vocabulary_size=VOCABULARY_SIZE, **changes):
    """`build` of a preset; `changes` override fields of its config."""
    return build(dataclasses.replace(preset(name).config, vocab_size=vocabulary_size, **changes))


def count_parameters(model):
    """The number of parameters, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


def parse_shape(text):
    """{field: value} of --shape, such as "hidden_size=384,num_hidden_layers=10,dropout=0.1".

    Raises `UserError` for what is not a list of names and values.
    """
    changes = {}
    for item in text.split(",") if text else ():
        name, _, value = item.strip().partition("=")
        try:
            changes[name] = {"true": True, "false": False}[value.lower()]
        except KeyError:
            try:
                changes[name] = int(value) if value.lstrip("-").isdigit() else float(value)
            except ValueError as error:
                raise UserError(
                    f"--shape {item!r}: give name=value, such as hidden_size=384, with commas between several"
                ) from error
    return changes


def with_overrides(config, changes):
    """`config` with other fields. Raises `UserError` for an unknown field, or an impossible shape.

    A whole number stands for a fractional one where the field is fractional.
    """
    fields = {f.name: f.type for f in dataclasses.fields(config) if f.name != "vocab_size"}
    for name in changes:
        if name not in fields:
            raise UserError(f"--shape {name}: choose from {', '.join(fields)}")
    changes = {n: float(v) if fields[n] is float and type(v) is int else v for n, v in changes.items()}
    changed = dataclasses.replace(config, **changes)
    try:
        check_shape(changed)
    except ValueError as error:
        raise UserError(f"--shape: {error}") from error
    return changed


def check_shape(config):
    """Raises ValueError for a config that no model has, before anything of such a size is made."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            valid = type(value) is int and 0 < value < 1 << 20
        elif field.type is float:
            valid = type(value) in (int, float) and 0 <= value < 1e15
            valid = valid and not (field.name == "dropout" and value >= 1)
        else:
            valid = type(value) is field.type
        if not valid:
            raise ValueError(f"{field.name} cannot be {value!r}")
    hidden_size, heads = config.hidden_size, config.num_attention_heads
    if config.num_hidden_layers > 1000:
        raise ValueError(f"{config.num_hidden_layers} layers are too many: at most 1000")
    if hidden_size % heads:
        raise ValueError(f"{heads} attention heads do not divide hidden_size {hidden_size}")
    if isinstance(config, LlamaConfig) and (hidden_size // heads % 2 or config.rope_theta <= 0):
        raise ValueError(
            f"rotary positions need heads of an even size, here {hidden_size // heads}, and a theta above 0"
        )


# ---- from checkpoints


def model_from_state_dict(config, weights, complete=lambda model: None):
    """The model of that config with these weights, a state dict, which are not copied.

    `complete(model)` adds what else has weights.
    """
    with torch.device("meta"):
        model = build(config)
        complete(model)
    model.load_state_dict(weights, assign=True)
    if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise AssertionError(f"{lost} must be made with device='cpu', as llama.py's tables are")
    return model


def load_checkpoint(path, add_head=None):
    """The rebuilt model, in eval mode on the CPU, and the checkpoint's dict, in that order.

    `add_head(model, config)` adds a classifier's head, by what is in the run's config. Raises
    `UserError` where `read_checkpoint` does, if weights and shape do not belong together, if the
    model is of an architecture that is not in `ARCHITECTURES`, or, without `add_head`, classifies.
    """
    checkpoint = read_checkpoint(path)
    if add_head is None and "classes" in checkpoint["config"]:
        raise UserError(
            f"{path} classifies texts, and predicts no tokens: export_hf.py takes it; for all else "
            "give the checkpoint that it was made from"
        )
    name = checkpoint["model"].get("architecture")
    try:
        if name not in ARCHITECTURES:
            raise UserError(
                f"{path} is a {name!r}, and only {', '.join(ARCHITECTURES)} are known here: use "
                "the version of this project that trained it"
            )
        _, config_class = ARCHITECTURES[name]
        config = config_class(**checkpoint["model"]["shape"])
        check_shape(config)
        check_size(config, checkpoint["weights"])
        described = checkpoint["config"]
        complete = (lambda model: add_head(model, described)) if add_head else (lambda model: None)
        model = model_from_state_dict(config, checkpoint["weights"], complete)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that do not fit the model it names") from error
    if checkpoint["config"]["sequence_length"] > config.max_position_embeddings:
        raise UserError(f"{path} says that it was trained on more positions than it has")
    if not all(torch.isfinite(weight).all() for weight in checkpoint["weights"].values()):
        raise UserError(f"{path} holds weights that are not finite: use an earlier checkpoint")
    for named in (checkpoint["model"], *checkpoint["teachers"]):
        named["name"] = printable(named["name"])
    return model.eval(), checkpoint


def check_size(config, weights):
    """Raises ValueError for a config that costs much more memory than its weights have.

    Layers and tables of positions are made before the weights are compared with them.
    """
    tables = 8 * config.max_position_embeddings * (config.hidden_size // config.num_attention_heads)
    if tables > SPARE_BYTES + 8 * sum(weight.nbytes for weight in weights.values()):
        raise ValueError(f"{config.max_position_embeddings} positions are too many")
    if config.num_hidden_layers > len(weights):
        raise ValueError(f"{config.num_hidden_layers} layers are too many")


def load_compatible(path, corpus):
    """`load_checkpoint`, but `UserError` unless `corpus` was made with the model's tokenizer."""
    model, checkpoint = load_checkpoint(path)
    theirs, ours = checkpoint["tokenizer"]["identity"], corpus.tokenizer
    if theirs != ours.identity:
        raise UserError(
            f"{path} was trained with another tokenizer ({theirs[:12]}) than {corpus.folder} "
            f"({ours.identity[:12]}): encode the data with that of the checkpoint, "
            "which export_hf.py writes as tokenizer.model (tokenize_corpus.py --tokenizer)"
        )
    if model.config.vocab_size != ours.vocabulary_size:
        raise UserError(
            f"{path} has {model.config.vocab_size} logits, the tokenizer of {corpus.folder} "
            f"{ours.vocabulary_size} pieces: use a model trained on this data"
        )
    return model, checkpoint


def check_weights(weights, num_teachers):
    """Raises `UserError` unless there is a weight for each teacher, or none at all."""
    if weights is None:
        return
    if len(weights) != num_teachers:
        raise UserError(f"--teacher-weights: {len(weights)} given for {num_teachers} teachers")
    if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UserError("--teacher-weights: none below 0, and at least one above")


def initial_model(config, corpus):
    """The model to train, its name, and the digest of what --init names, or None.

    Drawn from the seed in the preset's shape as --shape and --dropout change it, or read from
    --init. Raises `UserError` where that is impossible or its context is too short.
    """
    torch.manual_seed(config.seed)
    dropout = {} if config.dropout is None else {"dropout": config.dropout}
    if config.init is None:
        name, digest = config.model, None
        shape = with_overrides(preset(name).config, parse_shape(config.shape) | dropout)
        model = build(dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocabulary_size))
    else:
        if config.shape:
            raise UserError("--shape: the shape is that of --init, leave one of the two out")
        model, checkpoint = load_compatible(config.init, corpus)
        name, digest = checkpoint["model"]["name"], checkpoint["digest"]
        if dropout:
            model = model_from_state_dict(with_overrides(model.config, dropout), model.state_dict())
    positions = model.config.max_position_embeddings
    if config.sequence_length > positions:
        raise UserError(
            f"--sequence-length {config.sequence_length}: {name} reads at most {positions}: lower it"
        )
    return model, name, digest
