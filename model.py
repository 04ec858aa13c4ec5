"""Presets with their recipes, building a model by name, its device, and the checkpoint format.

A checkpoint is one dict of primitives and tensors that `torch.load(path, weights_only=True)` reads:

    format, version   "babyllama-checkpoint", 1
    model             {"name", "architecture", "shape": the fields of its config}
    weights           {parameter name: float32 tensor}
    config            the run's options, as used
    tokenizer         {"identity", "model": the SentencePiece file as a uint8 tensor}
    progress          {"step", "steps", "words", "dev_cross_entropy", ...}
    teachers          [{"name", "digest"}], empty unless distilled
    commit            of the project when it was written
    training          moments keyed by parameter name and random states; None in best.pt
    digest            SHA-256 of all of the above: torch.load itself verifies nothing
"""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch

from files import UserError, atomic_write
from gpt2 import GPT2, GPT2Config
from llama import Llama, LlamaConfig

FORMAT, VERSION = "babyllama-checkpoint", 1
VOCABULARY_SIZE = 16_000  # the paper's; a model in training takes its tokenizer's

ARCHITECTURES = {"gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a preset is trained: AdamW's step size, sequences a batch, epochs, steps, decay."""

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
# llama-16m; the 97M pair has no recipe on record and takes its bigger sister's.
PRESETS = {
    "gpt2-705m": _gpt2(24, 16, 1536, Recipe(2.5e-4, 256, 6, 200)),
    "llama-360m": _llama(24, 8, 1024, 3072, Recipe(3e-4, 128, 4, 200)),
    "llama-58m": _llama(16, 8, 512, 1024, Recipe(2.5e-4, 32, 6, 200, 0.1)),
    "gpt2-97m": _gpt2(12, 12, 768, Recipe(2.5e-4, 256, 6, 200)),
    "llama-97m": _llama(12, 12, 768, 2048, Recipe(3e-4, 128, 4, 200), tie_word_embeddings=True),
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


def build_model(name, vocabulary_size=VOCABULARY_SIZE, **changes):
    """A freshly initialised model of that preset; `changes` override fields of its config.

    Initialisation draws from torch's global generator: seed it for the same weights.
    """
    config = dataclasses.replace(preset(name).config, vocab_size=vocabulary_size, **changes)
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def count_parameters(model):
    """The number of parameters, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


def architecture(model):
    """The key of the model's class in `ARCHITECTURES`."""
    return next(name for name, (kind, _) in ARCHITECTURES.items() if isinstance(model, kind))


def choose_device(name):
    """The torch device: of `auto`, CUDA, else MPS, else the CPU. `UserError` if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: choose auto, cuda, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: choose auto, cuda, mps or cpu")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise UserError(f"--device {name}: this machine has none; try --device auto")
    return device


# ---- checkpoints


def content_digest(value):
    """The SHA-256 of nested dicts, lists, primitives and tensors: names, types, shapes, bytes.

    Raises ValueError for what is not stored as it reads: tensors that repeat their elements, and
    containers that repeat each other, which could be of any size.
    """
    digest, count = hashlib.sha256(), 0

    def add(value):
        nonlocal count
        count += 1
        if count > 1_000_000:
            raise ValueError("too many values")
        if isinstance(value, dict):
            digest.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list {len(value)}\n".encode())
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
            if not value.is_contiguous():
                raise ValueError("a tensor is not contiguous")
            flat = value.detach().cpu().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())

    add(value)
    return digest.hexdigest()


def save_checkpoint(
    path, *, name, model, config, tokenizer, progress, teachers=(), commit="unknown", training=None
):
    """Writes the checkpoint of `model` atomically; the format is this module's docstring."""
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "name": name,
            "architecture": architecture(model),
            "shape": dataclasses.asdict(model.config),
        },
        "weights": {key: value.detach().cpu() for key, value in model.state_dict().items()},
        "config": config,
        "tokenizer": {
            "identity": tokenizer.identity,
            "model": torch.from_numpy(np.frombuffer(tokenizer.model_bytes, np.uint8).copy()),
        },
        "progress": progress,
        "teachers": list(teachers),
        "commit": commit,
        "training": training,
    }
    checkpoint["digest"] = content_digest(checkpoint)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports that a write failed
            state = {} if training is None else training["optimizer"]
            tensors = [checkpoint["weights"], *state.values()]
            needed = sum(t.nbytes for named in tensors for t in named.values())
            free = shutil.disk_usage(Path(path).parent).free
            raise UserError(
                f"cannot write {path}: is the disk full? {needed} bytes needed, {free} free; "
                "what stood there is untouched"
            ) from error


def read_checkpoint(path):
    """The checkpoint's dict, verified. Raises `UserError` if it is missing, damaged or foreign."""
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give a checkpoint such as {path / 'best.pt'}, or make one of a "
            "Hugging Face folder with export_hf.py --import"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist: train.py and distill.py write checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler given foreign bytes may raise anything at all
        size = path.stat().st_size
        raise UserError(
            f"{path} ({size} bytes) is damaged or no checkpoint: use another of the same run"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    version = checkpoint.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {VERSION}")
    digest = checkpoint.pop("digest", None)
    try:
        whole = content_digest(checkpoint) == digest
    except (ValueError, RuntimeError, NotImplementedError):  # tensors such as we never save
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged (its digest differs): use another of the same run")
    if not _is_well_formed(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: something in it is missing")
    checkpoint["digest"] = digest
    return checkpoint


def _is_well_formed(checkpoint):
    """Whether it has what the programs read of it: a digest, anyone can compute."""
    sections = ("model", "weights", "config", "tokenizer", "progress")
    if not all(type(checkpoint.get(key)) is dict for key in sections):
        return False
    try:
        config, tokenizer = checkpoint["config"], checkpoint["tokenizer"]
        length, pieces = config["sequence_length"], tokenizer["model"]
        json.dumps(config)
        texts = [checkpoint["model"]["name"], tokenizer["identity"], config.get("train_shard", "")]
        texts += [t[key] for t in checkpoint["teachers"] for key in ("name", "digest")]
        return (
            all(isinstance(text, str) for text in (*texts, *checkpoint["weights"], *config))
            and all(w.dtype == torch.float32 for w in checkpoint["weights"].values())
            and (pieces.dtype, pieces.dim()) == (torch.uint8, 1)
            and type(length) is int
            and 0 < length < 1 << 20
            and all(type(value) in (int, float) for value in checkpoint["progress"].values())
            and isinstance(checkpoint["training"], (dict, type(None)))
        )
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return False


def check_shape(config):
    """Raises ValueError for a config that no model has, before anything of such a size is made."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            valid = type(value) is int and 0 < value < 1 << 20
        elif field.type is float:
            valid = type(value) in (int, float) and 0 <= value < math.inf
            valid = valid and not (field.name == "dropout" and value >= 1)
        else:
            valid = type(value) is bool
        if not valid:
            raise ValueError(f"{field.name} cannot be {value!r}")
    if config.num_hidden_layers > 1000 or config.hidden_size % config.num_attention_heads:
        raise ValueError("there are too many layers, or heads that do not divide hidden_size")
    if isinstance(config, LlamaConfig):
        head_size = config.hidden_size // config.num_attention_heads
        if head_size % 2 or config.rope_theta <= 0:
            raise ValueError("rotary positions need heads of an even size, and a theta above 0")


def load_checkpoint(path):
    """The rebuilt model, in eval mode on the CPU, and the checkpoint's dict, in that order.

    Raises `UserError` where `read_checkpoint` does, or if weights and shape do not belong together.
    """
    checkpoint = read_checkpoint(path)
    try:
        described = checkpoint["model"]
        kind, config = ARCHITECTURES[described["architecture"]]
        config = config(**described["shape"])
        check_shape(config)
        with torch.device("meta"):
            model = kind(config)
        model.load_state_dict(checkpoint["weights"], assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds weights that do not fit the model it names") from error
    return model.eval(), checkpoint
