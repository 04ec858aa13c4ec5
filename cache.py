"""Final hidden states of frozen teachers: computed once per chunk, read in every later epoch.

The ensemble's logits are one linear map of them, so they are all that has to be kept to never run a
teacher twice on the same chunk; dense logits would take six times the space. One array a teacher,
(chunks, positions, hidden size), addressed by chunk id, in the dtype that its head's product reads:
nothing is rounded that would not have been. In GPU memory, host memory, or a file:

    babyllama-cache VERSION HEADER_BYTES SHA256     as a shard begins; then, in JSON, what it is of
    one SHA-256 a chunk                             zeros where the chunk is not filled
    the arrays, one teacher after another

Dimensions: N chunks, B sequences, T positions, C hidden.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from files import UserError, say, sha256

MAGIC = "babyllama-cache"
VERSION = 1
HEADER_BYTES = 4096
FIRST_LINE_BYTES = len(MAGIC) + len(" 00000001 0000004096 ") + 64 + 1
DIGEST_BYTES = 32


class TeacherCache:
    """Hidden states by chunk: `read(ids)` returns what `write(ids, states)` was given."""

    def __init__(self, arrays, digests=None):
        self.arrays, self.digests = arrays, digests
        self.filled = torch.zeros(len(arrays[0]), dtype=torch.bool)
        if digests is not None:
            self.filled = torch.from_numpy(digests.any(axis=1))

    @classmethod
    def in_memory(cls, num_chunks, sequence_length, hidden_sizes, device, dtype):
        """An empty cache on `device`. `hidden_sizes`: of each teacher."""
        shapes = [(num_chunks, sequence_length, size) for size in hidden_sizes]
        return cls([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])

    @classmethod
    def in_file(cls, path, num_chunks, sequence_length, hidden_sizes, dtype, made_from):
        """The cache in `path`, made where there is none; chunks that are damaged are empty again.

        Raises `UserError` if the file is of something else than `made_from`, a dict of JSON's
        types, or if the disk has no room.
        """
        path = Path(path)
        shapes = [(num_chunks, sequence_length, size) for size in hidden_sizes]
        described = {"shapes": shapes, "dtype": str(dtype)} | made_from
        body = json.dumps(described).encode().ljust(HEADER_BYTES - FIRST_LINE_BYTES - 1) + b"\n"
        header = f"{MAGIC} {VERSION:08d} {HEADER_BYTES:010d} {sha256(body)}\n".encode() + body
        starts = [HEADER_BYTES + DIGEST_BYTES * num_chunks]
        for shape in shapes:
            starts.append(starts[-1] + dtype.itemsize * math.prod(shape))
        is_new = not path.exists()
        if is_new:
            allocate(path, header, starts[-1])
        with open(path, "rb") as file:
            if file.read(HEADER_BYTES) != header or path.stat().st_size != starts[-1]:
                raise UserError(
                    f"{path} is damaged, or was made with other teachers, tokenizer, data, "
                    "--sequence-length or --precision: choose another file, or delete it"
                )
        whole = np.memmap(path, np.uint8, mode="r+")
        digests = whole[HEADER_BYTES : starts[0]].reshape(num_chunks, DIGEST_BYTES)
        arrays = [
            torch.from_numpy(whole[start:stop]).view(dtype).view(shape)
            for start, stop, shape in zip(starts, starts[1:], shapes)
        ]
        cache = cls(arrays, digests)
        if not is_new:
            cache.drop_damaged(path)
        return cache

    def read(self, chunk_ids):
        """[(B, T, C_k)] of the chunks `chunk_ids` (B,) on the CPU; None if any is not there."""
        if not self.filled[chunk_ids].all():
            return None
        # Not to wait for a GPU: the few ids are on their way when this returns.
        return [array[chunk_ids.to(array.device, non_blocking=True)] for array in self.arrays]

    def write(self, chunk_ids, states):
        """Keeps `states`, [(B, T, C_k)], of the chunks `chunk_ids` (B,) on the CPU."""
        for array, state in zip(self.arrays, states):
            array[chunk_ids.to(array.device)] = state.to(array.device, array.dtype)
        if self.digests is not None:
            for i in chunk_ids.tolist():  # after the states: a chunk without a digest is empty
                self.digests[i] = self.digest(i)
        self.filled[chunk_ids] = True

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
            self.filled[damaged] = False
            say(f"warning: {path}: {len(damaged)} chunks are damaged and will be made again")


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
