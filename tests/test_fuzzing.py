"""Damaged files, and files with a changed field under a valid digest: refused in one line, or used.

Nothing else may come of any file that the programs read: no traceback, and no code that is run.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

import evaluate
import export_hf
import generate
import model as models
import train
from conftest import FIGURES, provenance_of, run, save_model, step_of
from corpus.token_shards import MAGIC as SHARD_MAGIC
from data import Batch, TokenShard
from evaluation.minimal_pairs import read_pairs
from evaluation.statistics import comparison_table, read_losses
from finetuning import classifier, tasks
from llama import Llama, LlamaConfig
from published import TOKENIZERS
from tokenizer import Tokenizer
from training import checkpoint as checkpoints
from training.io import PAGE_BYTES, UserError, first_line_bytes, pack_header
from training.resume import check_same_run, restore, training_state
from training.teacher_cache import MAGIC as CACHE_MAGIC
from training.teacher_cache import TeacherCache

PAIR = {"sentence_good": "the cat", "sentence_bad": "cat the", "linguistics_term": "x"}
EXAMPLE = {"text": "the cat", "label": 1}
OPTIONS = train.TrainConfig(sequence_length=4)
DELETED = object()
NUMBERS = [True, -1, 0, 3, 1 << 31, 1 << 63, 0.5, math.nan, math.inf]
VALUES = [DELETED, None, *NUMBERS, "", "\udcff", "\x1b[31m|<b>\n", [], ["x"], {}, {"x": 0}]
TENSORS = [torch.zeros(3), torch.zeros(()).long()]


class Kind(NamedTuple):
    """A file, the header that `write(path, header)` puts into it, and what reads it."""

    path: object
    header: dict
    write: Callable
    read: Callable


# ---- the programs that read


def new_step():
    torch.manual_seed(0)
    return step_of(train.CrossEntropyObjective(Llama(LlamaConfig(300, 8, 8, 1, 2))), weight_decay=0.1)


def take_step(step):
    step(Batch.whole(torch.arange(2), *torch.zeros((2, 2, 4), dtype=torch.int64)), 1e-3)


def resume(provenance, path):
    checkpoint = checkpoints.read_checkpoint(path)
    check_same_run(checkpoint, OPTIONS, provenance, path)
    step = new_step()
    restore(step, checkpoint, path)
    take_step(step)


def use_checkpoint(arguments, path):
    evaluate.main([str(path), *arguments])
    generate.main([str(path), "--prompt", "a", "--tokens", "2", "--device", "cpu"])
    export_hf.main([str(path), "--out", str(path.with_suffix(".hf"))])


def use_classifier(path):
    model, _ = classifier.load_classifier(path)
    classifier.class_logits(model, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1]))
    export_hf.main([str(path), "--out", str(path.with_suffix(".hf"))])


def import_folder(path):
    out = path.parent / "imported.pt"
    out.unlink(missing_ok=True)
    export_hf.main(["--import", str(path.parent), "--out", str(out)])


def open_shard(path):
    return TokenShard(path).tokens


def compare(path):
    losses = read_losses(path)
    comparison_table([losses], [losses])


# ---- files with valid digests


def sign_header(magic, payload, path, header):
    path.write_bytes(pack_header(magic, 1, json.dumps(header).encode()) + payload)


def sign_checkpoint(path, content):
    torch.save(content | {"digest": checkpoints.content_digest(content)}, path)


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_arrays(shapes, path, arrays):
    """An .npz; a number stands for an array of it."""
    full = {n: np.broadcast_to(a, shapes[n] if np.ndim(a) == 0 else np.shape(a)) for n, a in arrays.items()}
    np.savez(path, **full)


def paged(source, path, magic, read):
    """A copy of a file of which the first page has the header."""
    content = source.read_bytes()
    header = json.loads(content[first_line_bytes(magic) : PAGE_BYTES])
    return Kind(path, header, functools.partial(sign_header, magic, content[PAGE_BYTES:]), read)


def checkpoint_kinds(folder, data_folder, tokenizer):
    """Checkpoints: weights alone, a full one, a classifier."""
    step = new_step()
    take_step(step)
    model = step.objective.model
    provenance = provenance_of(model, tokenizer, "small")
    fields = {
        "config": provenance.run_settings(OPTIONS),
        "progress": {"step": 1, "steps": 9, "best_step": 0, "best_dev_cross_entropy": 9.0},
        "teachers": [{"name": "t", "digest": "d" * 64}],
    }
    save = functools.partial(save_model, model=model, tokenizer=tokenizer, name="small", **fields)
    save(folder / "best.pt")
    save(folder / "full.pt", training=training_state(step))
    contents = [checkpoints.read_checkpoint(folder / name) for name in ("best.pt", "full.pt")]
    for content in contents:
        del content["digest"]
    best, full = contents
    classifying = classifier.as_classifier(model, 2)
    classes = best | {
        "weights": dict(classifying.state_dict()),
        "model": best["model"] | {"shape": dataclasses.asdict(classifying.config)},
        "config": best["config"] | {"classes": ["no", "yes"], "head": "linear"},
    }
    arguments = ["--data", str(data_folder), "--device", "cpu", "--pairs", str(folder / "pairs")]
    use, resume_from = functools.partial(use_checkpoint, arguments), functools.partial(resume, provenance)
    return {
        "checkpoints": Kind(folder / "a.pt", best, sign_checkpoint, use),
        "resume points": Kind(folder / "b.pt", full, sign_checkpoint, resume_from),
        "classifiers": Kind(folder / "c.pt", classes, sign_checkpoint, use_classifier),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, data_folder, tokenizer):
    """{name: Kind} of every file that the programs read."""
    folder = tmp_path_factory.mktemp("fuzzing")
    pairs, valid = folder / "pairs" / "a.jsonl", folder / "tasks" / "a.valid.jsonl"
    for path in (pairs, valid):
        path.parent.mkdir()
    write_json(pairs, PAIR)
    for path in (valid, folder / "tasks" / "a.train.jsonl"):
        path.write_text("\n".join(json.dumps(EXAMPLE | {"label": label}) for label in (1, 0)))
    result = checkpoint_kinds(folder, data_folder, tokenizer)
    export_hf.export(folder / "best.pt", folder / "hf")
    config, losses = folder / "hf" / "config.json", folder / "losses.npz"
    data = ["--data", data_folder, "--device", "cpu"]
    assert run(evaluate, folder / "best.pt", *data, "--losses", losses) == 0
    arrays = dict(np.load(losses))
    write_losses = functools.partial(write_arrays, {name: array.shape for name, array in arrays.items()})
    layout = {"shapes": [(4, 3, 2)], "dtype": torch.float32, "made_from": {"teachers": ["a"]}}
    open_cache = functools.partial(TeacherCache.in_file, **layout)
    open_cache(folder / "cache")
    return result | {
        "shards": paged(data_folder / "train.bin", folder / "a.bin", SHARD_MAGIC, open_shard),
        "teacher caches": paged(folder / "cache", folder / "a.cache", CACHE_MAGIC, open_cache),
        "config.json": Kind(config, json.loads(config.read_text()), write_json, import_folder),
        "losses": Kind(losses, arrays, write_losses, compare),
        "pairs": Kind(pairs, PAIR, write_json, lambda path: read_pairs(path.parent)),
        "tasks": Kind(valid, EXAMPLE, write_json, lambda path: tasks.read_tasks(path.parent)),
    }


def refuses(read, path):
    """Whether `read(path)` refuses the file; anything but a `UserError` is a failure."""
    try:
        read(path)
        return False
    except UserError:  # which `run_program` prints as one line
        return True
    finally:
        shutil.rmtree(path.with_suffix(".hf"), ignore_errors=True)


# ---- fields


def positions(tree, before=()):
    """The path of each field of nested dicts and lists; of a list only the ends."""
    keys = tree if isinstance(tree, dict) else sorted({0, len(tree) - 1})
    for key in keys:
        yield (*before, key)
        if isinstance(tree[key], (dict, list)) and tree[key]:
            yield from positions(tree[key], (*before, key))


def changed(tree, position, value):
    """A copy with another value at one position, or with none."""
    tree = copy.deepcopy(tree)
    inner = functools.reduce(lambda node, key: node[key], position[:-1], tree)
    if value is DELETED:
        del inner[position[-1]]
    else:
        inner[position[-1]] = copy.deepcopy(value)
    return tree


@pytest.mark.parametrize("every", [47, pytest.param(1, marks=pytest.mark.faults)])
def test_a_changed_field_is_refused_or_used(kinds, every):
    """Each `every`-th of all changes of one field."""
    totals = {}
    for name, kind in kinds.items():
        kind.write(kind.path, kind.header)
        assert not refuses(kind.read, kind.path), f"{name}: refused as it is"
        values = VALUES + (TENSORS if kind.write is sign_checkpoint else [])
        changes = itertools.product(positions(kind.header), values)
        tried, refused = 0, 0
        for position, value in itertools.islice(changes, 0, None, every):
            kind.write(kind.path, changed(kind.header, position, value))
            try:
                refused += refuses(kind.read, kind.path)
            except Exception as error:
                raise AssertionError(f"{name}: {position} was {value!r}") from error
            tried += 1
        kind.write(kind.path, kind.header)
        totals[name] = f"{name} {refused:,} of {tried:,}"
        assert tried and (refused or every > 1), name
    if every == 1:
        FIGURES["fields"] = (
            f"every field of every file changed in {len(VALUES)} ways or more, with valid digests",
            f"no traceback; refused: {', '.join(totals.values())}; the others are used",
        )


# ---- bytes


def damage(generator, content):
    """A copy that may be cut and of which a few bytes differ; sometimes any bytes at all."""
    if generator.random() < 0.2:
        return generator.randbytes(generator.randrange(300))
    result = bytearray(content[: generator.choice([len(content), generator.randrange(len(content))])])
    for _ in range(generator.randrange(4)):
        start, size = generator.randrange(len(result) + 1), generator.randrange(1, 9)
        result[start : start + size] = generator.randbytes(size)
    return bytes(result)


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.faults)])
def test_damaged_bytes_are_refused_or_used(kinds, tokenizer, tmp_path, count):
    (tmp_path / "a.model").write_bytes(tokenizer.model_bytes)
    tokenizers = Kind(tmp_path / "a.model", {}, None, Tokenizer.load)
    TOKENIZERS["Baby Llama"](tmp_path)
    published = Kind(tmp_path / "tokenizer.json", {}, None, lambda path: Tokenizer.load(path).encode("a cat"))
    loaded = kinds["checkpoints"]._replace(read=models.load_checkpoint)
    generator = random.Random(0)
    others = {"checkpoints": loaded, "tokenizers": tokenizers, "tokenizer.json": published}
    for name, kind in (kinds | others).items():
        if kind.write:
            kind.write(kind.path, kind.header)
        original, refused = kind.path.read_bytes(), 0
        for _ in range(count):
            kind.path.write_bytes(content := damage(generator, original))
            try:
                refused += refuses(kind.read, kind.path)
            except Exception as error:
                raise AssertionError(f"{name}: {content[:300]}") from error
        kind.path.write_bytes(original)
        assert refused > count / 2, name
