"""The checkpoint format: one dict of primitives and tensors, written atomically, with a digest.

`torch.load(path, weights_only=True)` reads it:

    format, version   "babyllama-checkpoint", 1
    model             {"name", "architecture", "shape": the fields of its config}
    weights           {parameter name: float32 tensor}
    config            settings of the run: its options as used, and digests of its inputs
    tokenizer         {"identity", "model": its file as a uint8 tensor}
    progress          {"step", "steps", "words", "dev_cross_entropy", ...}
    teachers          [{"name", "digest"}], empty unless distilled
    commit            the project's commit when it was written
    training          optimizer state by parameter name, random state; None in best.pt
    digest            SHA-256 of all of the above: torch.load itself verifies nothing
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from training.io import UserError, atomic_write, printable

FORMAT, VERSION = "babyllama-checkpoint", 1


class DamagedFile(UserError):
    """The file could be read, but it is not the checkpoint that was written."""


def content_digest(value):
    """The SHA-256 of nested dicts, lists, primitives and tensors: names, types, shapes, bytes."""
    digest = hashlib.sha256()

    def add(value):
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
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())

    add(value)
    return digest.hexdigest()


def make_checkpoint(
    *, model, weights, config, tokenizer, progress, teachers=(), commit="unknown", training=None
):
    """The dict of this module's docstring without its digest.

    `weights` is a state dict, `tokenizer` has `identity` and `model_bytes`. Raises TypeError for
    fields that `read_checkpoint` would refuse.
    """
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "weights": {key: value.detach().cpu().contiguous() for key, value in weights.items()},
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
    _check_types(checkpoint)
    return checkpoint


def _check_types(checkpoint):
    """Raises TypeError, or another error for a missing field, unless all fields have their types."""
    config, progress, pieces = (checkpoint[key] for key in ("config", "progress", "tokenizer"))
    texts = [checkpoint["model"]["name"], pieces["identity"]]
    texts += [*checkpoint["weights"], *config, config.get("train_shard", ""), config.get("init") or ""]
    texts += [teacher[key] for teacher in checkpoint["teachers"] for key in ("name", "digest")]
    length, training = config["sequence_length"], checkpoint["training"]
    counts = [progress[key] for key in ("step", "steps", "best_step")] if training else []
    json.dumps(config)  # raises TypeError unless it holds primitives
    if not (
        all(isinstance(text, str) for text in texts)
        and all(weight.dtype == torch.float32 for weight in checkpoint["weights"].values())
        and (pieces["model"].dtype, pieces["model"].dim()) == (torch.uint8, 1)
        and all(type(number) in (int, float) for number in progress.values())
        and all(type(count) is int and count >= 0 for count in counts)
        and type(length) is int
        and 0 < length < 1 << 20
        and isinstance(training, (dict, type(None)))
    ):
        raise TypeError("a checkpoint holds float32 weights, numbers as progress, primitives as config")


def write_checkpoint(path, previous=None, **fields):
    """Writes `make_checkpoint` of the fields atomically; an older file at `path` becomes `previous`.

    Raises `UserError` if it cannot be written: `path` is then unchanged.
    """
    checkpoint = make_checkpoint(**fields)
    checkpoint["digest"] = content_digest(checkpoint)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides the OSError of a failed write behind its own
            raise (error.__context__ or error) from None
        if previous is not None and Path(path).exists():
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)  # a second name: `path` stays until it is replaced
            except OSError:  # the file system has no hard links
                os.replace(path, previous)


def read_checkpoint(path):
    """The checkpoint's dict, verified.

    Raises `UserError` if there is none or it is of another version, `DamagedFile` if its bytes are
    not those of a checkpoint, and OSError or MemoryError if it cannot be read, which is no damage.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give a checkpoint such as best.pt; of a Hugging Face model make one "
            f"with export_hf.py --import {path} --out FILE"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist: train.py and distill.py write checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        digest, version = checkpoint.pop("digest", None), checkpoint["version"]
        if checkpoint["format"] == FORMAT and type(version) is int and version != VERSION:
            raise UserError(f"{path} has format version {version}, this program reads {VERSION}")
        _check_types(checkpoint)
        if checkpoint["format"] != FORMAT or content_digest(checkpoint) != digest:
            raise ValueError("its digest differs")
    except UserError:
        raise
    except Exception as error:  # torch raises errors of any type for bytes that it did not write
        _raise_unless_damaged(path, error)
        raise DamagedFile(
            f"{path} is damaged or no checkpoint of this project: use another of the same run"
        ) from error
    return checkpoint | {"digest": digest}


def _raise_unless_damaged(path, error):
    """Raises OSError if the system cannot read the file, MemoryError if it does not fit into memory.

    A damaged file lets a run fall back to an older one, and these do not.
    """
    with open(path, "rb") as file:  # torch reports a failed read as a failed parse
        while file.read(1 << 20):
            pass
    requested = re.search(r"tried to allocate (\d+) bytes", str(error))
    is_plausible = requested and int(requested[1]) <= path.stat().st_size  # a damaged size is larger
    if isinstance(error, MemoryError) or is_plausible:
        raise MemoryError(f"{path} does not fit") from error


def checkpoint_names(paths):
    """Returns a name for each checkpoint: its run's folder, or its file.

    As many folders above it are added as make the names differ. Raises `UserError` for a path that is
    given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UserError("a checkpoint is given twice: give each once")
    folders_differ = len({path.parent for path in resolved}) == len(resolved)
    by_folder = ("best", "checkpoint", "previous") if folders_differ else ()
    parts = [path.parent.parts if path.stem in by_folder else path.with_suffix("").parts for path in resolved]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [printable("-".join(part[-depth:])).replace("/", "root") for part in parts]
