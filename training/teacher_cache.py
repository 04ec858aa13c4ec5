"""Final hidden states of frozen teachers: computed once per chunk, read in every later epoch.

The ensemble's logits are one linear map of them, so they are all that has to be kept to never run a
teacher twice on the same chunk; dense logits would take six times the space. One array a teacher,
(chunks, positions, hidden size), addressed by chunk id, in the dtype that its head's product reads:
nothing is rounded that would not have been. In GPU memory, host memory, or a file:

    header (training/io.py)       a JSON object that says what the states were made from
    one SHA-256 a chunk             zeros where the chunk is not filled
    the arrays, one teacher after another

Dimensions: N chunks, B sequences, T positions, C hidden.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training import distributed
from training.io import GIB, UserError, log, pack_header, warn

MAGIC = "babyllama-cache"
VERSION = 1
DIGEST_BYTES = 32
AUTO_SHARE = 0.7  # the share of free memory that --cache-teachers auto may take


@dataclass(frozen=True)
class Layout:
    """The arrays of a cache: N chunks of T positions, a hidden size per teacher, one dtype."""

    num_chunks: int
    sequence_length: int
    hidden_sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shapes(self):
        """(N, T, C_k) of each teacher's array."""
        return [(self.num_chunks, self.sequence_length, size) for size in self.hidden_sizes]

    @property
    def bytes(self):
        """The size of all arrays."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize


class TeacherCache:
    """Hidden states by chunk: `read(ids)` returns what `write(ids, states)` was given."""

    def __init__(self, arrays, digests=None, file=None):
        self.arrays, self.digests, self.file = arrays, digests, file
        self.size = file and os.fstat(file.fileno()).st_size
        self.filled = torch.zeros(len(arrays[0]), dtype=torch.bool)
        if digests is not None:
            self.filled = torch.from_numpy(digests.any(axis=1))

    @classmethod
    def in_memory(cls, layout, device):
        """An empty cache on `device`."""
        return cls([torch.empty(s, device=device, dtype=layout.dtype) for s in layout.shapes])

    @classmethod
    def in_file(cls, path, layout, made_from, verify=True):
        """The cache in `path`, made where there is none; chunks that are damaged are empty again.

        Raises `UserError` if the file is of something else than `made_from`, a dict of JSON's
        types, or if the disk has no room.
        """
        path = Path(path)
        described = {"shapes": layout.shapes, "dtype": str(layout.dtype)} | made_from
        header = pack_header(MAGIC, VERSION, json.dumps(described).encode())
        start = len(header) + DIGEST_BYTES * layout.num_chunks
        is_new = not path.exists()
        if is_new:
            allocate(path, header, start + layout.bytes)
        with open(path, "rb") as file:
            found = file.read(len(header))
            if not found.startswith(MAGIC.encode()):
                raise UserError(f"{path} is no teacher cache, or damaged: choose another name")
            if found != header or path.stat().st_size != start + layout.bytes:
                raise UserError(
                    f"{path} is damaged, or was made with other teachers, tokenizer, data, "
                    "--sequence-length or --precision: choose another file, or delete it"
                )
        file = open(path, "r+b")
        mapped = np.memmap(file, np.uint8, mode="r+")
        digests = mapped[len(header) : start].reshape(layout.num_chunks, DIGEST_BYTES)
        cache = cls(_arrays(mapped[start:], layout), digests, file)
        if verify and not is_new:
            cache.drop_damaged(path)
        return cache

    def read(self, chunk_ids):
        """[(B, T, C_k)] of the chunks `chunk_ids` (B,) on the CPU; None if any is not there."""
        self._check_size()
        if self.digests is not None:  # another process may have filled it
            filled = self.digests[chunk_ids.numpy()].any(axis=1)
            self.filled[chunk_ids] = torch.from_numpy(filled)
        if not self.filled[chunk_ids].all():
            return None
        # Not to wait for a GPU: the few ids are on their way when this returns.
        return [array[chunk_ids.to(array.device, non_blocking=True)] for array in self.arrays]

    def write(self, chunk_ids, states):
        """Keeps `states`, [(B, T, C_k)], of the chunks `chunk_ids` (B,) that it does not hold yet.

        `chunk_ids` are on the CPU. Returns all states in the dtype in which they will be read.
        """
        self._check_size()
        states = [state.to(array.dtype) for array, state in zip(self.arrays, states)]
        new = (~self.filled[chunk_ids]).nonzero().squeeze(1)
        new_ids = chunk_ids[new]
        for array, state in zip(self.arrays, states):
            ids = new_ids.to(array.device, non_blocking=True)
            array[ids] = state[new.to(state.device, non_blocking=True)].to(array.device)
        if self.digests is not None:
            for i in new_ids.tolist():  # after the states: a chunk without a digest is empty
                self.digests[i] = self.digest(i)
        self.filled[new_ids] = True
        return states

    def _check_size(self):
        """Raises `UserError` if someone cut the file: to read beyond its end is a SIGBUS."""
        if self.file and os.fstat(self.file.fileno()).st_size != self.size:
            raise UserError(
                f"{self.file.name} was cut by another program: delete it, and give the same command again"
            )

    def digest(self, chunk):
        """The SHA-256 of all teachers' states of a chunk, as 32 bytes."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(array[chunk].contiguous().view(torch.uint8).numpy())
        return np.frombuffer(digest.digest(), np.uint8)

    def drop_damaged(self, path):
        """Empties, with a warning, each chunk whose bytes are not those that were written."""
        chunks = self.filled.nonzero().flatten().tolist()
        bar = tqdm(chunks, desc="verifying the cache", disable=None, leave=False)
        damaged = [i for i in bar if not np.array_equal(self.digest(i), self.digests[i])]
        if damaged:
            self.filled[damaged], self.digests[damaged] = False, 0
            warn(f"{path}: {len(damaged)} chunks are damaged and will be made again")


def _arrays(payload, layout):
    """The teachers' arrays as views of the file's bytes."""
    arrays, start = [], 0
    for shape in layout.shapes:
        stop = start + layout.dtype.itemsize * math.prod(shape)
        arrays.append(torch.from_numpy(payload[start:stop]).view(layout.dtype).view(shape))
        start = stop
    return arrays


def open_cache(place, layout, made_from, device, dry_run=False):
    """The cache that --cache-teachers asks for, or None: `place` is off, auto, gpu, host or a file.

    Prints where it is and its size. Raises `UserError` where it does not fit.
    """
    if place == "auto" and distributed.world_size() > 1:
        log("cache      none: several processes share one in a file, --cache-teachers FILE")
        return None
    if place == "off":
        return None
    if place in ("gpu", "host") and distributed.world_size() > 1:
        raise UserError(
            f"--cache-teachers {place}: each of {distributed.world_size()} processes would keep chunks that "
            "another one reads; give a FILE that they share, in /dev/shm for one in memory"
        )
    if place == "gpu" and device.type != "cuda":
        raise UserError(f"--cache-teachers gpu: training is on {device}; use host or a FILE")
    machine = distributed.node_rank()
    if machine is not None and place not in ("auto", "host", "gpu"):
        place = f"{place}.{machine}"  # a file of each machine, wherever it is
    place, free = _choose_place(place, layout.bytes, device)
    distributed.all_gather(None)  # nobody takes room before all have looked
    if place is None:
        log(f"cache      none: {layout.bytes / GIB:.2f} GiB do not fit")
        return None
    room = "" if free is None else f", {free / GIB:.1f} GiB free"
    log(f"cache      {layout.bytes / GIB:.2f} GiB of the teachers' hidden states in {place}{room}")
    if dry_run:
        return None
    if place in ("gpu", "host"):
        return TeacherCache.in_memory(layout, device if place == "gpu" else "cpu")
    is_first = distributed.local_rank() == 0  # of those that can share the file
    return distributed.rank_zero_first(
        lambda: TeacherCache.in_file(place, layout, made_from, verify=is_first), is_first
    )


def _choose_place(place, needed, device):
    """The place that has room, with its free bytes; (None, None) where auto finds none.

    Raises `UserError` if a place was asked for by name and has too little.
    """
    candidates, share = [place], 1.0
    if place == "auto":
        candidates, share = ["gpu", "host"] if device.type == "cuda" else ["host"], AUTO_SHARE
    for candidate in candidates:
        free = free_bytes(candidate, device)
        if free is None or needed < share * free:
            return candidate, free
    if place != "auto":
        raise UserError(f"--cache-teachers {place}: {needed} bytes needed, {free} free")
    return None, None


def allocate(path, header, size):
    """Makes a file of `size` bytes of which `header` is the start. `UserError` without room.

    The blocks are really reserved: writing to a hole of a full disk through a map is a SIGBUS.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, {size} bytes: {error.strerror}") from error


def free_bytes(place, device):
    """Free memory of the GPU, of the host (None if unknown), or of the disk of a file."""
    if place == "gpu":
        return torch.cuda.mem_get_info(device)[0]
    if place == "host":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    folder = next(p for p in Path(place).absolute().parents if p.exists())
    there = Path(place).stat().st_size if Path(place).is_file() else 0
    return shutil.disk_usage(folder).free + there
