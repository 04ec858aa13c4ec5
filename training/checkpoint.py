"""The checkpoint format: one dict of primitives and tensors, written atomically, with a digest.

`torch.load(path, weights_only=True)` reads it:

    format, version   "babyllama-checkpoint", 1
    model             {"name", "architecture", "shape": the fields of its config}
    weights           {parameter name: float32 tensor}
    config            the run's conditions: its options as used, and digests of what it read
    tokenizer         {"identity", "model": the SentencePiece file as a uint8 tensor}
    progress          {"step", "steps", "words", "dev_cross_entropy", ...}
    teachers          [{"name", "digest"}], empty unless distilled
    commit            the project's commit when it was written
    training          optimizer states by parameter name, random states; None in best.pt
    digest            SHA-256 of all of the above: torch.load itself verifies nothing
"""

import errno
import hashlib
import json
import pickletools
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

from training.io import UserError, atomic_write

FORMAT, VERSION = "babyllama-checkpoint", 1
OPERATION_BYTES = 90  # of memory, that one operation of a pickle may cost
OTHERS = b"babyllama-"  # how this project's other files begin
# What torch.save writes of ours: the only names that its pickle may look up, and the operations
# that would look up others.
WRITTEN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z]\w*Storage|torch Size"
    r"|torch b?float\d+|torch u?int\d+|torch bool|torch\.storage (Untyped|Typed)Storage"
)
UNUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class DamagedFile(UserError):
    """The file could be read, and is not what was written."""


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


def make_checkpoint(
    *, model, weights, config, tokenizer, progress, teachers=(), commit="unknown", training=None
):
    """The dict of this module's docstring, but for its digest.

    `weights` is a state dict, `tokenizer` has `identity` and `model_bytes`. Raises TypeError for
    what `read_checkpoint` would refuse.
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
    if not _has_expected_types(checkpoint):
        raise TypeError(
            "a checkpoint holds float32 weights, whole and fractional numbers as progress, and "
            "primitives as config: something here is of another type"
        )
    return checkpoint


def write_checkpoint(path, **fields):
    """Writes `make_checkpoint` of the fields atomically.

    Raises `UserError` if it cannot be written; what stood there is then untouched.
    """
    checkpoint = make_checkpoint(**fields)
    checkpoint["digest"] = content_digest(checkpoint)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports that a write failed
            free = shutil.disk_usage(Path(path).parent).free
            raise UserError(
                f"cannot write {path}: is the disk full? {_tensor_bytes(checkpoint)} bytes needed, "
                f"{free} free; what stood there is untouched"
            ) from error


def _tensor_bytes(value):
    """Bytes of all tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def read_checkpoint(path):
    """The checkpoint's dict, verified.

    Raises `UserError` if there is none or it is of another version, `DamagedFile` if its bytes are
    not those of a checkpoint, and OSError or MemoryError where it cannot be read: no damage.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        raise UserError(
            f"{path} is a Hugging Face folder: make a checkpoint of it with "
            f"export_hf.py --import {path} --out FILE"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a checkpoint such as {path / 'best.pt'}")
    if not path.is_file():
        raise UserError(f"{path} does not exist: train.py and distill.py write checkpoints")
    with open(path, "rb") as file:
        if file.read(len(OTHERS)) == OTHERS:
            raise DamagedFile(
                f"{path} is a token shard or a teacher cache, no checkpoint: give a best.pt that "
                "train.py or distill.py wrote"
            )
    try:
        _check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler given foreign bytes may raise anything at all
        _raise_unless_damaged(path, error)
        raise DamagedFile(
            f"{path} ({path.stat().st_size} bytes) is damaged or no checkpoint: use another of the same run"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise DamagedFile(f"{path} is not a checkpoint of this project")
    version = checkpoint.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {VERSION}")
    digest = checkpoint.pop("digest", None)
    try:
        whole = content_digest(checkpoint) == digest
    except (ValueError, RuntimeError, NotImplementedError):  # tensors such as we never save
        whole = False
    if not whole:
        raise DamagedFile(f"{path} is damaged (its digest differs): use another of the same run")
    if not _has_expected_types(checkpoint):
        raise DamagedFile(f"{path} is not a checkpoint of this project: something in it is missing")
    checkpoint["digest"] = digest
    return checkpoint


def _check_archive(path):
    """Raises ValueError for an archive that would become larger in memory than it is on disk.

    torch.save compresses nothing, and of what `weights_only` allows we write tensors, dicts and
    primitives alone: a `bytearray` can be asked to have any size, and a byte can make a dict.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its members are larger than itself")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                operations = pickletools.genops(archive.read(member))
                for count, (operation, argument, _) in enumerate(operations):
                    if OPERATION_BYTES * count > (64 << 20) + 6 * size:
                        raise ValueError("its pickle does too much")
                    named = operation.name == "GLOBAL"
                    if operation.name in UNUSED or (named and not WRITTEN.fullmatch(argument)):
                        raise ValueError(f"it names {argument}")


def _raise_unless_damaged(path, error):
    """Raises what is no damage: the system refuses to read the file, or memory is at its end."""
    if isinstance(error, MemoryError):
        raise error
    # A seek to a damaged offset is an invalid argument; any other refusal is the system's.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error
    with open(path, "rb") as file:  # torch may report a failed read as a failed parse
        while file.read(1 << 20):
            pass
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    if asked and int(asked[1]) <= path.stat().st_size:  # more than the file has is made up
        raise MemoryError(f"{path} does not fit") from error


def _has_expected_types(checkpoint):
    """Whether all fields have the expected types. The digest proves integrity, not origin."""
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
