"""Files made up to do harm, for all that is read: refused in one line, at no cost, or used.

Damaged files, files of anything at all, and files with valid digests in which one field after
another is something else. What is refused costs at most 64 MiB and eight times the file.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import export_hf
import generate
import model as models
import train
from conftest import FIGURES, provenance_of, save_model, step_of
from corpus import token_shards
from corpus.token_shards import FIRST_LINE_BYTES
from corpus.token_shards import MAGIC as SHARD_MAGIC
from data import Batch, TokenShard
from evaluation.statistics import comparison_table, read_losses
from finetuning import classifier, tasks
from llama import Llama, LlamaConfig
from tokenizer import Tokenizer
from training import checkpoint as checkpoints
from training.io import PAGE_BYTES, UserError, first_line_bytes, pack_header
from training.resume import check_same_run, restore, training_state
from training.teacher_cache import MAGIC, Layout, TeacherCache

SHAPE = LlamaConfig(300, 8, 8, 1, 2)
PAIR = {"sentence_good": "the cat", "sentence_bad": "cat the", "linguistics_term": "x"}
EXAMPLE = {"text": "the cat", "label": 1}
DELETED = object()
VALUES = [
    DELETED,
    None,
    True,
    -1,
    0,
    1,
    3,
    1 << 31,
    1 << 63,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "\udcff",
    "\x1b[31m|<b>\n",
    [],
    [0],
    ["x"],
    {},
    {"x": 0},
    torch.zeros(3),
    torch.zeros(()).long(),
]


# ---- what a file may cost


def status(field):
    """A number of bytes from /proc/self/status, or 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
    except OSError:
        return 0


def begin_peak_anew():
    """Whether the kernel lets VmHWM, the most memory that was resident, begin anew."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return status("VmHWM") > 0


def refuses(reader, path):
    """Whether `reader(path)` refuses the file, at no cost. Anything but a `UserError` is a failure.

    The file has N bytes: until it is refused it has taken no more than 64 MiB + 8 N, nor long.
    """
    begin_peak_anew()
    before, started = status("VmRSS"), time.monotonic()
    try:
        reader(path)
        return False
    except UserError:
        assert status("VmHWM") - before <= (64 << 20) + 8 * path.stat().st_size
        assert time.monotonic() - started < 20
        return True


# ---- what is read


class Files:
    """A whole file of each kind, and what the programs do with it."""

    def __init__(self, folder, data_folder, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        step = self.step()
        step(Batch.whole(torch.arange(2), *torch.zeros((2, 2, 4), dtype=torch.int64)), 1e-3)
        self.given = provenance_of(step.objective.model, tokenizer, "small")
        self.options = train.TrainConfig(sequence_length=4)
        progress = {"step": 1, "steps": 9, "best_step": 0, "best_dev_cross_entropy": 9.0}
        described = {
            "config": self.given.conditions(self.options),
            "progress": progress,
            "teachers": [{"name": "t", "digest": "d" * 64}],
        }
        save = functools.partial(
            save_model, model=step.objective.model, tokenizer=tokenizer, name="small", **described
        )
        save(folder / "full.pt", training=training_state(step))
        save(folder / "best.pt")
        self.full, self.best = self.unsigned("full.pt"), self.unsigned("best.pt")
        (folder / "pairs").mkdir()
        (folder / "pairs" / "a.jsonl").write_text(json.dumps(PAIR))
        (folder / "tasks").mkdir()
        for part in ("train", "valid"):
            lines = (json.dumps(EXAMPLE | {"label": i}) for i in (1, 0))
            (folder / "tasks" / f"a.{part}.jsonl").write_text("\n".join(lines))
        self.classifier = self.classifier_of(step.objective.model)
        export_hf.export(folder / "best.pt", folder / "hf")
        self.shard = (data_folder / "train.bin").read_bytes()
        assert int(self.shard.split()[2]) == PAGE_BYTES  # the header's size
        self.header = json.loads(self.shard[FIRST_LINE_BYTES:PAGE_BYTES])
        self.config = json.loads((folder / "hf" / "config.json").read_text())
        self.losses = str(folder / "losses.npz")
        self.arguments = ["--data", str(data_folder), "--device", "cpu"]
        evaluate.main([str(folder / "best.pt"), *self.arguments, "--losses", self.losses])
        with np.load(self.losses) as arrays:
            self.arrays = dict(arrays)
        self.layout = Layout(4, 3, (2,), torch.float32)
        TeacherCache.in_file(folder / "cache", self.layout, {"teachers": ["a"]})
        self.cache = (folder / "cache").read_bytes()
        (folder / "several").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_shards, "SHARD_TOKENS", 5)
            texts = [(name, [1, 2, 3], 2, 9) for name in "aabb"]
            self.index = token_shards.write_split(folder / "several" / "a.bin", texts, tokenizer, "1")

    @staticmethod
    def step():
        return step_of(train.CrossEntropyObjective(Llama(SHAPE)), weight_decay=0.1)

    def unsigned(self, name):
        found = checkpoints.read_checkpoint(self.folder / name)
        del found["digest"]
        return found

    def classifier_of(self, model):
        """What the checkpoint of a classifier holds."""
        model = classifier.as_classifier(model, 2)
        found = self.best | {"weights": dict(model.state_dict()), "teachers": []}
        shape = dataclasses.asdict(model.config)
        found["model"] = found["model"] | {"shape": shape}
        found["config"] = found["config"] | {"classes": ["no", "yes"], "head": "linear"}
        return found

    # ---- readers

    def resume(self, path):
        """What a resumed run does with a state, and a step."""
        found = checkpoints.read_checkpoint(path)
        check_same_run(found, self.options, self.given, path)
        step = self.step()
        restore(step, found, path)
        step(Batch.whole(torch.arange(2), *torch.zeros((2, 2, 4), dtype=torch.int64)), 1e-3)

    def use(self, path):
        """A checkpoint as evaluate.py, generate.py and export_hf.py use it."""
        pairs = ["--pairs", str(self.folder / "pairs")]
        evaluate.main([str(path), *self.arguments, *pairs])
        generate.main([str(path), "--prompt", "a", "--tokens", "2", "--device", "cpu"])
        export_hf.main([str(path), "--out", str(path.with_suffix(".hf"))])

    def use_classifier(self, path):
        """A classifier's checkpoint as finetune.py and export_hf.py use it."""
        model, _ = classifier.load_classifier(path)
        classifier.class_logits(model, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1]))
        export_hf.main([str(path), "--out", str(path.with_suffix(".hf"))])

    def import_folder(self, path):
        """A Hugging Face folder as export_hf.py reads it; `path` is a file in it."""
        out = path.parent / "imported.pt"
        out.unlink(missing_ok=True)
        export_hf.main(["--import", str(path.parent), "--out", str(out)])

    def open_cache(self, path):
        TeacherCache.in_file(path, self.layout, {"teachers": ["a"]})

    def compare(self, path):
        """A file of losses as evaluate.py --compare uses it."""
        losses = read_losses(path)
        comparison_table([losses], [losses])

    def read_pairs(self, path):
        return evaluate.read_pairs(path.parent)

    def read_tasks(self, path):
        return tasks.read_tasks(path.parent)

    # ---- writers of files with valid digests

    def sign_shard(self, path, header):
        content = json.dumps(header).encode()
        path.write_bytes(pack_header(SHARD_MAGIC, 1, content) + self.shard[PAGE_BYTES:])

    def sign_index(self, path, header):
        path.write_bytes(pack_header(token_shards.INDEX_MAGIC, 1, json.dumps(header).encode()))

    def read_split(self, path):
        """All ids of a split, so that all its files are read."""
        return TokenShard(path).tokens

    def sign_cache(self, path, header):
        content = json.dumps(header).encode()
        path.write_bytes(pack_header(MAGIC, 1, content) + self.cache[PAGE_BYTES:])

    def sign_checkpoint(self, path, content):
        torch.save(content | {"digest": checkpoints.content_digest(content)}, path)

    def write_arrays(self, path, arrays):
        """An .npz; a number stands for as many of it as there were."""
        like = {n: a.shape for n, a in self.arrays.items() if np.ndim(arrays.get(n)) == 0}
        arrays = {n: np.broadcast_to(a, like.get(n, np.shape(a))) for n, a in arrays.items()}
        np.savez(path, **arrays)

    def write_json(self, path, content):
        path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def files(tmp_path_factory, data_folder, tokenizer):
    return Files(tmp_path_factory.mktemp("fuzzing"), data_folder, tokenizer)


# ---- every field of every header, one after another


def places(tree, before=()):
    """The path of each field of nested dicts and lists; of a list only the ends."""
    keys = tree if isinstance(tree, dict) else sorted({0, len(tree) - 1})
    for key in keys:
        yield (*before, key)
        if isinstance(tree[key], (dict, list)) and tree[key]:
            yield from places(tree[key], (*before, key))


def changed(tree, place, value):
    """A copy with something else in one place, or with nothing."""
    tree = copy.deepcopy(tree)
    inner = functools.reduce(lambda found, key: found[key], place[:-1], tree)
    if value is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = copy.deepcopy(value)
    return tree


def safetensors_header(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def headers(files):
    """(name, whole header, file to write, writer(path, header), reader(path)) of each format."""
    folder = files.folder
    weights, config = folder / "hf" / "model.safetensors", folder / "hf" / "config.json"
    header, payload = safetensors_header(weights)

    def write_safetensors(path, header):
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + payload)

    json_of, checkpoint = files.write_json, files.sign_checkpoint
    return [
        ("shards", files.header, folder / "a.bin", files.sign_shard, TokenShard),
        ("indices of shards", files.index, folder / "several" / "a.bin", files.sign_index, files.read_split),
        (
            "teacher caches",
            json.loads(files.cache[first_line_bytes(MAGIC) : PAGE_BYTES]),
            folder / "a.cache",
            files.sign_cache,
            files.open_cache,
        ),
        ("checkpoints", files.best, folder / "a.pt", checkpoint, files.use),
        ("resume points", files.full, folder / "b.pt", checkpoint, files.resume),
        ("safetensors", header, weights, write_safetensors, files.import_folder),
        ("config.json", files.config, config, json_of, files.import_folder),
        ("pairs", PAIR, folder / "pairs" / "a.jsonl", json_of, files.read_pairs),
        ("losses", files.arrays, folder / "b.npz", files.write_arrays, files.compare),
        ("classifiers", files.classifier, folder / "c.pt", checkpoint, files.use_classifier),
        ("tasks", EXAMPLE, folder / "tasks" / "a.valid.jsonl", json_of, files.read_tasks),
    ]


def change_every_field(files, every):
    """{format: [files, refused]} where each `every`-th of all changes is tried."""
    totals = {}
    for name, whole, path, write, reader in headers(files):
        kept, count = path.read_bytes() if path.exists() else None, [0, 0]
        write(path, whole)
        assert not refuses(reader, path), f"{name}: refused as it is"
        shutil.rmtree(path.with_suffix(".hf"), ignore_errors=True)
        cases = itertools.product(places(whole), VALUES)
        for place, value in itertools.islice(cases, 0, None, every):
            if isinstance(value, torch.Tensor) and write != files.sign_checkpoint:
                continue
            write(path, changed(whole, place, value))
            try:
                count = [count[0] + 1, count[1] + refuses(reader, path)]
            except Exception as error:
                raise AssertionError(f"{name}: {place} was {value!r}") from error
            finally:
                shutil.rmtree(path.with_suffix(".hf"), ignore_errors=True)
        if kept is not None:
            path.write_bytes(kept)
        totals[name] = count
    return totals


def told(totals):
    return ", ".join(f"{name} {refused:,} of {total:,}" for name, (total, refused) in totals.items())


def test_a_changed_field_crashes_no_program(files):
    totals = change_every_field(files, 47)
    assert len(totals) == 11 and all(total for total, _ in totals.values())


@pytest.mark.faults
def test_every_field_of_every_header_can_be_anything(files):
    totals = change_every_field(files, 1)
    FIGURES["fields"] = (
        f"every field of every header changed in {len(VALUES)} ways, with valid digests",
        f"no crash, no memory beyond 64 MiB + 8 N; refused: {told(totals)}; the others are used",
    )
    assert all(0 < refused <= total for total, refused in totals.values())


# ---- damage, and anything at all


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
ANYTHING = st.binary(max_size=300)


def damaged(whole):
    """Copies of a file that are perhaps cut, and of which a few bytes are others."""
    replaced = st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=9))

    def edited(stop, changes):
        content = bytearray(whole[:stop])
        for position, new in changes:
            content[position : position + len(new)] = new
        return bytes(content)

    stops = st.just(len(whole)) | st.integers(0, len(whole))
    return st.builds(edited, stops, st.lists(replaced, max_size=4))


def fields_changed(tree):
    """Copies of nested dicts in which two fields are perhaps something else."""

    def replaced(changes):
        result = tree
        for place, value in changes:
            with contextlib.suppress(LookupError, TypeError):  # what was there is gone already
                result = changed(result, place, value)
        return result

    change = st.tuples(st.sampled_from(list(places(tree))), JSON)
    return st.lists(change, max_size=2).map(replaced)


def safetensors_files():
    """Whole files of a few tensors, in whose header one thing is perhaps something else."""
    names, dtypes = st.sampled_from("abc"), st.sampled_from(["F32", "F16", "BF16"])
    tensors = st.dictionaries(names, st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)))
    values = st.lists(st.integers(-8, 64) | st.integers(), max_size=3) | JSON
    keys = st.sampled_from(["dtype", "shape", "data_offsets"])

    def written(tensors, changes):
        header, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + {"F32": 4}.get(dtype, 2) * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        for name, key, value in changes:
            if name in header:
                header[name][key] = value
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + bytes(end)

    return st.builds(written, tensors, st.lists(st.tuples(names, keys, values), max_size=1))


def pair_files():
    """Files of pairs of any text, lone surrogates too, and of what is no pair."""
    text = st.text(st.characters())
    pair = st.fixed_dictionaries(
        {"sentence_good": text, "sentence_bad": text}, optional={"linguistics_term": JSON}
    )
    lines = st.lists(pair | JSON, max_size=3)
    return lines.map(lambda entries: "\n".join(map(json.dumps, entries)).encode())


def task_files():
    """Files of examples of any text and label, and of what is no example."""
    text = st.text(st.characters())
    example = st.fixed_dictionaries({"text": text, "label": st.sampled_from([0, 1]) | JSON})
    lines = st.lists(example | JSON, max_size=3)
    return lines.map(lambda entries: "\n".join(map(json.dumps, entries)).encode())


def kinds(files):
    """(name, path, reader, strategy, writer(path, example)) of all that is tried."""
    folder, write = files.folder, lambda path, content: path.write_bytes(content)
    shard, weights, model_file = folder / "a.bin", folder / "a.pt", folder / "a.model"
    tensors, pairs = folder / "a.safetensors", folder / "pairs" / "a.jsonl"
    examples = folder / "tasks" / "a.valid.jsonl"
    read_tensors, tokenizer = export_hf.read_safetensors, files.tokenizer.model_bytes
    load, sign = models.load_checkpoint, files.sign_checkpoint
    small = (folder / "best.pt").read_bytes()
    return [
        ("shards", shard, TokenShard, damaged(files.shard) | ANYTHING, write),
        ("shards", shard, TokenShard, fields_changed(files.header), files.sign_shard),
        (
            "indices of shards",
            folder / "several" / "a.bin",
            files.read_split,
            fields_changed(files.index),
            files.sign_index,
        ),
        ("checkpoints", weights, load, damaged(small) | ANYTHING, write),
        ("checkpoints", weights, files.use, fields_changed(files.best), sign),
        ("resume points", weights, files.resume, fields_changed(files.full), sign),
        ("safetensors", tensors, read_tensors, safetensors_files() | ANYTHING, write),
        ("pairs", pairs, files.read_pairs, pair_files() | ANYTHING, write),
        ("tasks", examples, files.read_tasks, task_files() | ANYTHING, write),
        ("tokenizers", model_file, Tokenizer.load, damaged(tokenizer) | ANYTHING, write),
        ("teacher caches", folder / "a.cache", files.open_cache, damaged(files.cache), write),
        (
            "losses",
            folder / "a.npz",
            files.compare,
            damaged(Path(files.losses).read_bytes()) | ANYTHING,
            write,
        ),
    ]


def fuzz(files, examples):
    """{format: [files, refused]} of `examples` files of each kind."""
    totals = {}
    for name, path, reader, strategy, write in kinds(files):
        count = totals.setdefault(name, [0, 0])
        whole = path.read_bytes() if path.exists() else None

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(example):
            write(path, example)  # noqa: B023, it runs before the loop goes on
            count[0] += 1  # noqa: B023
            count[1] += refuses(reader, path)  # noqa: B023
            shutil.rmtree(path.with_suffix(".hf"), ignore_errors=True)  # noqa: B023

        one()
        if whole is not None:
            path.write_bytes(whole)
    return totals


def test_no_bytes_crash_a_reader(files):
    for name, (total, refused) in fuzz(files, 30).items():
        assert total >= 30 and 0 < refused < total, name  # what is whole is read


@pytest.mark.faults
def test_thousands_of_inputs_crash_no_reader(files):
    totals = fuzz(files, 2000)
    inputs = sum(total for total, _ in totals.values())
    FIGURES["fuzzed"] = (
        f"{inputs:,} inputs made up for all that is read: damaged, of anything at all, and made up "
        "with valid digests",
        f"no crash, no hang; refused with the project's own error: {told(totals)}; the others are valid",
    )


# ---- files that would become large


class Bytes:
    """Becomes two billion bytes when it is unpickled."""

    def __reduce__(self):
        return (bytearray, (2_000_000_000,))


def bombs(files, folder):
    """(path, reader) of files that would take many times their size, all with valid digests."""
    path, content = folder / "bytes.pt", files.best
    torch.save(content | {"extra": Bytes()}, path)
    yield path, models.load_checkpoint
    torch.save(content | {"extra": torch.zeros(50_000_000)}, folder / "zeros.pt")
    path = folder / "deflated.pt"
    with (
        zipfile.ZipFile(folder / "zeros.pt") as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as deflated,
    ):
        for name in archive.namelist():
            deflated.writestr(name, archive.read(name))
    yield path, models.load_checkpoint
    large = {"max_position_embeddings": (1 << 20) - 1, "hidden_size": (1 << 20) - 256}
    for shape in (large | {"num_attention_heads": 1}, {"num_hidden_layers": 1000}):
        path = folder / "shape.pt"
        model = content["model"] | {"shape": content["model"]["shape"] | shape}
        files.sign_checkpoint(path, content | {"model": model})
        yield path, models.load_checkpoint
    empty = b"[" + b"{}," * (1 << 23) + b"0]"
    path = folder / "a.bin"
    header = b'{"files": ' + empty + b"}\n"
    path.write_bytes(pack_header(SHARD_MAGIC, 1, header))
    yield path, TokenShard
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(empty)) + empty)
    yield path, export_hf.read_safetensors
    one = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = ("{" + ",".join(one % i for i in range(400_000)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(many)) + many)
    yield path, export_hf.read_safetensors
    (folder / "hf").mkdir()
    path = folder / "hf" / "config.json"
    path.write_bytes(empty)
    yield path, files.import_folder
    (folder / "tasks").mkdir()
    path = folder / "tasks" / "a.train.jsonl"
    (folder / "tasks" / "a.valid.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    path.write_text('{"text":"a","label":0}\n' * 300_000 + "x")
    yield path, files.read_tasks
    path = folder / "dicts.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(folder / "d.pt", "w") as changed_archive:
        for name in archive.namelist():
            pickled = b"\x80\x02](" + b"}" * 3_000_000 + b"e."
            is_pickle = name.endswith("data.pkl")
            changed_archive.writestr(name, pickled if is_pickle else archive.read(name))
    yield folder / "d.pt", models.load_checkpoint
    objects = b",".join(b'{"k%d":0}' % i for i in range(430_000))
    path = folder / "b.bin"
    for padding in (0, 40 << 20):
        header = b'{"files":[' + objects + b"]" + b" " * padding + b"}\n"
        path.write_bytes(pack_header(SHARD_MAGIC, 1, header))
        yield path, TokenShard
    path = folder / "tokenizer.model"
    path.write_bytes(b"\x0a\x00" * 4_000_000)
    yield path, Tokenizer.load


def test_a_file_costs_no_more_memory_than_64_mib_and_eight_times_its_size(files, tmp_path):
    if not begin_peak_anew():
        pytest.skip("this kernel does not tell how much memory was resident at most")
    for path, reader in bombs(files, tmp_path):
        assert refuses(reader, path), path
