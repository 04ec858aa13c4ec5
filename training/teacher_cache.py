"""Final hidden states of frozen teachers, computed once per chunk and read in every later epoch.

The ensemble's logits are a linear map of these states (loss.py). So the states are enough to never
run a teacher twice on the same chunk; dense logits would take six times the space. Each teacher has
one array, (chunks, positions, hidden size), in the dtype that the product with its head reads, so
the cache rounds nothing. The arrays are in GPU memory, host memory or a file:

    header (training/io.py)       JSON that says what the states were made from
    one SHA-256 per chunk         zeros for a chunk that is not filled
    the arrays, one teacher after another

Dimensions: N chunks, B sequences, T positions, C hidden.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training import distributed
from training.io import GIB, UserError, log, open_temporary, pack_header, remove_temporaries, warn
from training.plan import existing_folder

MAGIC = "babyllama-cache"
VERSION = 1
DIGEST_BYTES = 32
AUTO_SHARE = 0.7  # of free memory that --cache-teachers auto may take


class TeacherCache:
    """Hidden states by chunk: `read(ids)` returns what `write(ids, states)` was given."""

    # True if a GPU reads what is in host memory or a file. From pinned memory it copies without making
    # the host wait, so that the host gathers the next chunks while the GPU computes.
    pins = False

    def __init__(self, arrays, digests=None):
        """`arrays` are K × (N, T, C_k). A cache in a file has `digests` (N, 32), zero for empty chunks."""
        self.arrays, self.digests = arrays, digests
        self.filled = torch.zeros(len(arrays[0]), dtype=torch.bool)

    @classmethod
    def in_memory(cls, shapes, dtype, device):
        """Returns an empty cache on `device`; `shapes` are K × (N, T, C_k)."""
        return cls([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])

    @classmethod
    def in_file(cls, path, shapes, dtype, made_from, verify=True):
        """Returns the cache in the file `path`, which is made if it does not exist.

        `made_from` is a dict for JSON. If `verify`, damaged chunks are dropped with a warning. Raises
        `UserError` if the file was made from something else, or if the disk is full.
        """
        path, num_chunks = Path(path), shapes[0][0]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        content = {"shapes": shapes, "dtype": str(dtype)} | made_from
        header = pack_header(MAGIC, VERSION, json.dumps(content).encode())
        start = len(header) + DIGEST_BYTES * num_chunks
        if not path.exists():
            _allocate(path, header, start + sum(sizes))
        with open(path, "rb") as file:
            saved = file.read(len(header))
        if not saved.startswith(MAGIC.encode()):
            raise UserError(f"{path} is no teacher cache, or damaged: choose another name")
        if saved != header or path.stat().st_size != start + sum(sizes):
            raise UserError(
                f"{path} is damaged, or was made with other teachers, tokenizer, data, "
                "--sequence-length or --precision: choose another file, or delete it"
            )
        digests = np.memmap(path, np.uint8, "r+", len(header), (num_chunks, DIGEST_BYTES))
        states = torch.from_numpy(np.memmap(path, np.uint8, "r+", start))
        arrays = [array.view(dtype).view(shape) for array, shape in zip(states.split(sizes), shapes)]
        cache = cls(arrays, digests)
        if verify:
            cache.drop_damaged(path)
        return cache

    def read(self, chunk_ids):
        """Returns K × (B, T, C_k) of the chunks `chunk_ids` (B,) on the CPU, or None if one is missing."""
        if self.digests is not None:  # another process may have filled them
            filled = self.digests[chunk_ids.numpy()].any(axis=1)
            self.filled[chunk_ids] = torch.from_numpy(filled)
        if not self.filled[chunk_ids].all():
            return None
        # The ids are copied without waiting for the GPU, which stays busy meanwhile.
        if not self.pins:
            return [array[chunk_ids.to(array.device, non_blocking=True)] for array in self.arrays]
        shapes = [(len(chunk_ids), *array.shape[1:]) for array in self.arrays]
        pinned = [torch.empty(shape, dtype=a.dtype, pin_memory=True) for a, shape in zip(self.arrays, shapes)]
        return [torch.index_select(a, 0, chunk_ids, out=out) for a, out in zip(self.arrays, pinned)]

    def write(self, chunk_ids, states):
        """Keeps `states`, K × (B, T, C_k), of those chunks `chunk_ids` (B,) that are missing.

        Returns all `states` in the dtype of the cache.
        """
        states = [state.to(array.dtype) for array, state in zip(self.arrays, states)]
        new = (~self.filled[chunk_ids]).nonzero().squeeze(1)
        new_ids = chunk_ids[new]
        for array, state in zip(self.arrays, states):
            ids = new_ids.to(array.device, non_blocking=True)
            array[ids] = state[new.to(state.device, non_blocking=True)].to(array.device)
        if self.digests is not None:
            for i in new_ids.tolist():  # after the states: a kill between them leaves an empty chunk
                self.digests[i] = self.digest(i)
        self.filled[new_ids] = True
        return states

    def digest(self, chunk):
        """Returns the SHA-256 of all teachers' states of a chunk, as 32 bytes."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(array[chunk].contiguous().view(torch.uint8).numpy())
        return np.frombuffer(digest.digest(), np.uint8)

    def drop_damaged(self, path):
        """Empties each chunk whose bytes differ from its digest, with a warning."""
        filled = self.digests.any(axis=1).nonzero()[0]
        progress = tqdm(filled, desc="verifying the cache", disable=None, leave=False)
        damaged = [i for i in progress if not np.array_equal(self.digest(i), self.digests[i])]
        if damaged:
            self.digests[damaged] = 0
            warn(f"{path}: {len(damaged)} chunks are damaged and will be computed again")


def _allocate(path, header, size):
    """Makes the file `path` of `size` bytes that begins with `header`, unless another process has.

    Raises `UserError` if the disk is full.
    """
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_temporary(path) as file:
            # Blocks are reserved: to write into a hole of a mapped file on a full disk is a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
            file.flush()
            with contextlib.suppress(FileExistsError):  # another run has made it at the same time
                os.link(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}, {size} bytes: {error.strerror}") from error
    finally:
        if file:
            os.unlink(file.name)


def open_cache(place, shapes, dtype, made_from, device, dry_run=False):
    """Returns the cache of --cache-teachers off, auto, gpu, host or a file: None if there is none.

    `shapes` are K × (N, T, C_k). Prints place and size. Raises `UserError` if the cache does not fit,
    or if several processes cannot share it.
    """
    if place == "off":
        return None
    in_file, processes = place not in ("auto", "gpu", "host"), distributed.world_size()
    if place in ("gpu", "host") and processes > 1:
        raise UserError(
            f"--cache-teachers {place}: each of {processes} processes would keep chunks that another one "
            "reads; give a FILE that they share, in /dev/shm for one in memory"
        )
    if place == "gpu" and device.type != "cuda":
        raise UserError(f"--cache-teachers gpu: training is on {device}; use host or a FILE")
    if in_file and distributed.node_rank() is not None:
        place = f"{place}.{distributed.node_rank()}"  # each machine has its own
    if in_file and not dry_run:
        remove_temporaries(Path(place).parent, [Path(place).name])
    size = sum(map(math.prod, shapes)) * dtype.itemsize
    place, free = _choose_place(place, size, device)
    distributed.all_gather(None)  # all ranks have looked before one takes the room
    states = f"{size / GIB:.2f} GiB of the teachers' hidden states"
    if place is None:
        log(f"cache      none: {states} do not fit, or several processes need a FILE to share")
        return None
    log(f"cache      {states} in {place}, {free / GIB:.1f} GiB free")
    if dry_run:
        return None
    if in_file:
        is_first = distributed.local_rank() == 0  # on its machine
        cache = distributed.rank_zero_first(
            lambda: TeacherCache.in_file(place, shapes, dtype, made_from, verify=is_first), is_first
        )
    else:
        cache = TeacherCache.in_memory(shapes, dtype, device if place == "gpu" else "cpu")
    cache.pins = device.type == "cuda" and place != "gpu"
    return cache


def _choose_place(place, needed, device):
    """Returns a place with room for `needed` bytes, and its free bytes, or (None, None) for auto.

    Raises `UserError` if a place that was given by name has too little.
    """
    if place != "auto":
        if needed >= (free := _free_bytes(place, device)):
            raise UserError(f"--cache-teachers {place}: {needed} bytes needed, {free} free")
        return place, free
    if distributed.world_size() == 1:
        for candidate in ("gpu", "host") if device.type == "cuda" else ("host",):
            if needed < AUTO_SHARE * (free := _free_bytes(candidate, device)):
                return candidate, free
    return None, None


def _free_bytes(place, device):
    """Returns the free bytes of the GPU, of the host (infinity if unknown), or of a file's disk.

    The bytes that the file already takes count as free.
    """
    if place == "gpu":
        return torch.cuda.mem_get_info(device)[0]
    if place == "host":
        if not (meminfo := Path("/proc/meminfo")).exists():
            return math.inf
        lines = meminfo.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    size = Path(place).stat().st_size if Path(place).is_file() else 0
    return shutil.disk_usage(existing_folder(place)).free + size
