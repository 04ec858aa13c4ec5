"""Presets with their hyperparameters; a model by name, from a config, or from a checkpoint.

A new architecture is a file of its own beside `llama.py` and one line in `ARCHITECTURES`. Its
config is a dataclass with the fields that `check_shape` reads and `max_position_embeddings`; its
model has `config`, `blocks`, `head`, `hidden_states(tokens)` and `forward(tokens)`.
"""

import dataclasses
import json
import math

import torch

from gpt2 import GPT2, GPT2Config
from llama import Llama, LlamaConfig
from tokenizer import VOCABULARY_SIZE
from training.checkpoint import read_checkpoint
from training.io import UserError, aligned, printable

ARCHITECTURES = {"gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig)}
LARGEST_SIZE = 1 << 20  # for each size in a shape


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """How a preset is trained: peak learning rate, sequences per step, epochs, warm-up steps, decay."""

    learning_rate: float
    batch_size: int
    epochs: float
    warmup_steps: int
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Preset:
    config: GPT2Config | LlamaConfig
    hyperparameters: Hyperparameters


def _gpt2(layers, heads, hidden, hyperparameters, **options):
    config = GPT2Config(VOCABULARY_SIZE, hidden, 4 * hidden, layers, heads, **options)
    return Preset(config, hyperparameters)


def _llama(layers, heads, hidden, inner, hyperparameters, **options):
    config = LlamaConfig(VOCABULARY_SIZE, hidden, inner, layers, heads, **options)
    return Preset(config, hyperparameters)


# Layers, heads, hidden size, and for LLaMA the inner size. The paper's three models have the
# hyperparameters of the first published scripts (commit d3b831c of timinar/BabyLlama), the next
# three those of its later files. Those also shift chunks at random, which is --random-offset here:
# a teacher cache cannot follow it.
PRESETS = {
    "gpt2-705m": _gpt2(24, 16, 1536, Hyperparameters(2.5e-4, 256, 6, 200)),
    "llama-360m": _llama(24, 8, 1024, 3072, Hyperparameters(3e-4, 128, 4, 200)),
    "llama-58m": _llama(16, 8, 512, 1024, Hyperparameters(2.5e-4, 32, 6, 200, 0.1)),
    "gpt2-97m": _gpt2(12, 12, 768, Hyperparameters(7e-4, 128, 6, 300), dropout=0.0),
    "llama-97m": _llama(12, 12, 768, 2048, Hyperparameters(7e-4, 128, 6, 300), tie_word_embeddings=True),
    "llama-16m": _llama(8, 8, 256, 1024, Hyperparameters(3e-4, 128, 4, 300)),
    # Ours, for recipes that a CPU can run. The teachers see little text many times and need strong
    # weight decay: with 0.1 the LLaMA overfits from its fifth epoch on. The GPT-2 learns its
    # positions slowly, so it has half the batch size and twice the steps.
    "gpt2-small": _gpt2(6, 6, 192, Hyperparameters(1.5e-3, 16, 7, 100, 0.5)),
    "llama-small": _llama(6, 6, 192, 512, Hyperparameters(1.5e-3, 32, 6, 100, 1.0)),
    "llama-small-student": _llama(4, 4, 128, 320, Hyperparameters(1.5e-3, 16, 6, 100, 0.1)),
    "gpt2-tiny": _gpt2(3, 4, 96, Hyperparameters(3e-3, 16, 30, 50, 0.5)),
    "llama-tiny": _llama(3, 4, 96, 256, Hyperparameters(3e-3, 16, 15, 50, 0.5)),
    "llama-tiny-student": _llama(2, 4, 64, 160, Hyperparameters(3e-3, 16, 14, 50, 0.1)),
}


def preset(name):
    """The preset of that name. Raises `UserError` with the list of names if there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset is called {name}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_table():
    """The presets and their sizes, for --help."""
    rows = [["presets", "parameters", "layers x hidden size"]]
    for name, entry in PRESETS.items():
        with torch.device("meta"):  # without memory for the weights
            parameters = count_parameters(build(entry.config))
        size = f"{entry.config.num_hidden_layers} x {entry.config.hidden_size}"
        rows.append([name, f"{parameters:,}", size])
    return "\n".join([*aligned(rows), f"(with a vocabulary of {VOCABULARY_SIZE:,})"])


def with_hyperparameters(config, out_prefix=""):
    """`config` with the preset's values for hyperparameters that are None, and a folder for the run."""
    values = dataclasses.asdict(preset(config.model).hyperparameters)
    if config.steps is not None:
        del values["epochs"]
    values["out"] = f"runs/{out_prefix}{config.model}"
    return dataclasses.replace(
        config, **{key: value for key, value in values.items() if getattr(config, key) is None}
    )


# ---- shapes and building


def preset_shape(config):
    """The shape of the preset --model, changed by --shape, then by --dropout.

    Raises `UserError` unless --shape is a list of fields and values that make a possible shape.
    """
    shape = preset(config.model).config
    names = [field.name for field in dataclasses.fields(shape) if field.name != "vocab_size"]
    changes = {}
    for item in config.shape.split(",") if config.shape else ():
        name, _, value = item.strip().partition("=")
        if name not in names:
            raise UserError(f"--shape {name}: choose from {', '.join(names)}")
        try:
            changes[name] = json.loads(value.lower())  # 384, 0.1 or true
        except ValueError as error:
            raise UserError(
                f"--shape {item!r}: give name=value, such as hidden_size=384, with commas between several"
            ) from error
    if config.dropout is not None:
        changes["dropout"] = config.dropout
    return with_overrides(shape, changes)


def with_overrides(shape, changes):
    """`shape` with other values of some fields. Raises `UserError` if no model can have it."""
    shape = dataclasses.replace(shape, **changes)
    try:
        check_shape(shape)
    except ValueError as error:
        raise UserError(f"--shape: {error}") from error
    return shape


def check_shape(shape):
    """Raises ValueError if no model can have this shape."""
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.type is int:
            valid = type(value) is int and 0 < value < LARGEST_SIZE
        elif field.type is float:
            valid = type(value) in (int, float) and 0 <= value < math.inf
        elif field.type == int | None:
            valid = value is None or (type(value) is int and 0 < value < LARGEST_SIZE)
        else:
            valid = type(value) is field.type
        if not valid or (field.name == "dropout" and value >= 1):
            raise ValueError(f"{field.name} cannot be {value!r}")
    hidden_size, heads = shape.hidden_size, shape.num_attention_heads
    groups = getattr(shape, "num_key_value_heads", None) or heads
    size = getattr(shape, "head_dim", None)
    if size is None and hidden_size % heads:
        raise ValueError(f"{heads} attention heads do not divide hidden_size {hidden_size}")
    if heads % groups:
        raise ValueError(f"{groups} key-value heads do not divide {heads} attention heads")
    size = size or hidden_size // heads
    if isinstance(shape, LlamaConfig) and (size % 2 or shape.rope_theta <= 0):
        raise ValueError(f"rotary positions need heads of an even size, here {size}, and a theta above 0")


def architecture(shape):
    """The key of a shape's class in `ARCHITECTURES`."""
    return next(name for name, (_, config_class) in ARCHITECTURES.items() if type(shape) is config_class)


def build(shape):
    """A new model of that shape, initialised from torch's global generator."""
    model_class, _ = ARCHITECTURES[architecture(shape)]
    return model_class(shape)


def build_model(name, vocabulary_size=VOCABULARY_SIZE, **changes):
    """`build` of a preset; `changes` override fields of its shape."""
    return build(dataclasses.replace(preset(name).config, vocab_size=vocabulary_size, **changes))


def count_parameters(model):
    """The number of parameters, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


# ---- loading


def model_from_state_dict(shape, weights, add_head=None):
    """The model of that shape with these weights, which are not copied.

    `add_head(model)` adds the modules that its class does not have, such as a classifier's.
    """
    with torch.device("meta"):
        model = build(shape)
        if add_head:
            add_head(model)
    model.load_state_dict(weights, assign=True)
    return model


def load_checkpoint(path, add_head=None):
    """The rebuilt model, in eval mode on the CPU, and the checkpoint's dict, in that order.

    `add_head(model, config)` adds a classifier's head, as the run's config says. Raises `UserError`
    as `read_checkpoint` does, if weights and shape do not fit each other, if the architecture is
    not in `ARCHITECTURES`, or if the model is a classifier and `add_head` is not given.
    """
    checkpoint = read_checkpoint(path)
    config, name = checkpoint["config"], checkpoint["model"].get("architecture")
    if add_head is None and "classes" in config:
        raise UserError(
            f"{path} is a classifier and predicts no tokens: only export_hf.py takes it; otherwise give "
            "the checkpoint that it was made from"
        )
    try:
        if name not in ARCHITECTURES:
            raise UserError(
                f"{path} is a {name!r}, and only {', '.join(ARCHITECTURES)} are known here: use "
                "the version of this project that trained it"
            )
        shape = ARCHITECTURES[name][1](**checkpoint["model"]["shape"])
        check_shape(shape)
        head = add_head and (lambda model: add_head(model, config))
        model = model_from_state_dict(shape, checkpoint["weights"], head)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that do not fit the model it names") from error
    if config["sequence_length"] > shape.max_position_embeddings:
        raise UserError(f"{path} says that it was trained on more positions than it has")
    if not all(torch.isfinite(weight).all() for weight in checkpoint["weights"].values()):
        raise UserError(f"{path} holds weights that are not finite: use an earlier checkpoint")
    for record in (checkpoint["model"], *checkpoint["teachers"]):
        record["name"] = printable(record["name"])
    return model.eval(), checkpoint


def load_compatible(path, corpus):
    """`load_checkpoint` for a model that works on `corpus`.

    Raises `UserError` if the corpus was made with another tokenizer, or has another vocabulary.
    """
    model, checkpoint = load_checkpoint(path)
    identity, tokenizer = checkpoint["tokenizer"]["identity"], corpus.tokenizer
    if identity != tokenizer.identity:
        raise UserError(
            f"{path} was trained with another tokenizer ({identity[:12]}) than {corpus.folder} "
            f"({tokenizer.identity[:12]}): encode the data with that of the checkpoint, "
            "which export_hf.py writes (tokenize_corpus.py --tokenizer)"
        )
    rows, pieces = model.config.vocab_size, tokenizer.vocabulary_size
    if rows != pieces:
        raise UserError(f"{path} has {rows} logits for {pieces} pieces: use a model trained on this data")
    return model, checkpoint


def check_context(model, sequence_length, name):
    """Raises `UserError` if the model reads fewer tokens than a sequence has."""
    positions = model.config.max_position_embeddings
    if sequence_length > positions:
        raise UserError(f"--sequence-length {sequence_length}: {name} reads at most {positions}: lower it")


def check_weights(weights, num_teachers):
    """Raises `UserError` unless `weights` is None or has a usable weight for each teacher."""
    if weights is None:
        return
    if len(weights) != num_teachers:
        raise UserError(f"--teacher-weights: {len(weights)} given for {num_teachers} teachers")
    if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise UserError("--teacher-weights: give weights of 0 or more, and at least one above 0")


def initial_model(config, corpus):
    """The model to train, its name, and the digest of the checkpoint --init, or None.

    Without --init it is drawn from the seed in the shape of `preset_shape`. Raises `UserError` for
    an impossible shape, for an --init that does not fit the corpus, or for a context that is too short.
    """
    torch.manual_seed(config.seed)
    name, digest = config.model, None
    if config.init is None:
        shape = preset_shape(config)
        model = build(dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocabulary_size))
    elif config.shape:
        raise UserError("--shape and --init exclude each other, since --init brings its shape: leave one out")
    else:
        model, checkpoint = load_compatible(config.init, corpus)
        name, digest = checkpoint["model"]["name"], checkpoint["digest"]
        if config.dropout is not None:
            shape = with_overrides(model.config, {"dropout": config.dropout})
            model = model_from_state_dict(shape, model.state_dict())
    check_context(model, config.sequence_length, name)
    return model, name, digest
