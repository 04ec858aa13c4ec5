"""The teachers run once per chunk, and the student does not notice."""

import dataclasses
import errno
import json
import os

import pytest
import torch

import distill
import train
from conftest import interrupt_after
from gpt2 import GPT2
from training import teacher_cache
from training.checkpoint import read_checkpoint
from training.io import PAGE_BYTES, UserError, run_program
from training.teacher_cache import Layout, TeacherCache

N, T, SIZES = 6, 4, (3, 5)
LAYOUT = Layout(N, T, SIZES, torch.bfloat16)
MADE_FROM = {"teachers": ["a", "b"], "shard": "c"}


def states(chunk_ids, dtype=torch.bfloat16):
    """Other numbers for every chunk."""
    torch.manual_seed(0)
    every = [torch.randn(N, T, size).to(dtype) for size in SIZES]
    return [s[chunk_ids] for s in every]


def open_file(path, **changes):
    made_from = changes.pop("made_from", MADE_FROM)
    return TeacherCache.in_file(path, dataclasses.replace(LAYOUT, **changes), made_from)


@pytest.fixture(params=["memory", "file"])
def empty(request, tmp_path):
    if request.param == "file":
        return open_file(tmp_path / "cache.bin")
    return TeacherCache.in_memory(LAYOUT, "cpu")


def test_what_was_written_is_read_chunk_by_chunk(empty):
    first = torch.tensor([4, 0, 2])
    empty.write(first, states(first))
    assert empty.read(torch.tensor([4, 1])) is None
    ids = torch.tensor([2, 4])
    for got, expected in zip(empty.read(ids), states(ids)):
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_what_is_kept_is_not_written_again(empty):
    first, again = torch.tensor([4, 1]), torch.tensor([2, 4])
    empty.write(first, states(first))
    changed = [state + 1 for state in states(again)]
    returned = empty.write(again, changed)
    assert all(torch.equal(a, b) for a, b in zip(returned, changed))
    expected = [torch.stack([new[0], old[0]]) for new, old in zip(changed, states(first))]
    assert all(torch.equal(a, b) for a, b in zip(empty.read(again), expected))


def test_a_file_outlives_its_process(tmp_path):
    ids = torch.tensor([1, 5])
    open_file(tmp_path / "c").write(ids, states(ids))
    again = open_file(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(again.read(ids), states(ids)))


@pytest.mark.parametrize(
    "changes",
    [
        {"made_from": MADE_FROM | {"teachers": ["a", "x"]}},
        {"made_from": MADE_FROM | {"shard": "x"}},
        {"dtype": torch.float32},
        {"num_chunks": 7},
        {"sequence_length": 5},
        {"hidden_sizes": (5, 3)},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, changes):
    open_file(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(UserError, match="choose another file, or delete it"):
        open_file(tmp_path / "c", **changes)
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "magic", "header", "text"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "c"
    open_file(path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-1],
            "longer": whole + b"x",
            "magic": b"X" + whole[1:],
            "header": whole[:100] + b"?" + whole[101:],
            "text": b"my thesis",
        }[damage]
    )
    with pytest.raises(UserError, match="damaged"):
        open_file(path)


def test_any_changed_byte_of_a_chunk_is_found_and_the_chunk_made_again(tmp_path, capsys):
    path, ids = tmp_path / "c", torch.arange(N)
    open_file(path).write(ids, states(ids))
    whole = bytearray(path.read_bytes())
    for position in range(PAGE_BYTES, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert open_file(path).digests.any(axis=1).sum() == N - 1, position
        assert "1 chunks are damaged" in capsys.readouterr().err


def test_two_runs_that_make_a_file_at_the_same_time_share_it(tmp_path, monkeypatch):
    path, ids, allocate = tmp_path / "c", torch.tensor([1, 5]), os.posix_fallocate

    def another_run_is_faster(*arguments):
        monkeypatch.setattr(os, "posix_fallocate", allocate)
        open_file(path).write(ids, states(ids))
        allocate(*arguments)

    (tmp_path / "c.0123abcd.tmp").touch()  # left by a run that was killed
    monkeypatch.setattr(os, "posix_fallocate", another_run_is_faster)
    cache = open_file(path)
    assert all(torch.equal(a, b) for a, b in zip(cache.read(ids), states(ids)))
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    for name in ("c.tmp", "c.0123abcd.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    open_file(tmp_path / "c")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"):
        open_file(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# ---- in training

OPTIONS = ["--model", "llama-tiny-student", "--batch-size", "8", "--sequence-length", "32"]
OPTIONS += ["--device", "cpu", "--eval-sequences", "8", "--log-every", "100", "--save-every", "60"]
STEPS = ["--steps", "90"]  # 525 chunks at 8 a step: an epoch and a third


@pytest.fixture(scope="module")
def teachers(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("gpt2-tiny", "llama-tiny"):
        options = ["--data", str(data_folder), "--out", str(folder / name), "--steps", "3"]
        train.main(["--model", name, *options, *OPTIONS[2:]])
    return [str(folder / name / "best.pt") for name in ("gpt2-tiny", "llama-tiny")]


@pytest.fixture
def calls(monkeypatch):
    """How many chunks the GPT-2, which is a teacher, has read."""
    count, hidden_states = [0], GPT2.hidden_states

    def counted(self, tokens):
        count[0] += len(tokens)
        return hidden_states(self, tokens)

    monkeypatch.setattr(GPT2, "hidden_states", counted)
    return count


def distilled(teachers, data_folder, out, *more):
    arguments = ["--teachers", *teachers, "--data", str(data_folder), *OPTIONS, *STEPS]
    code = run_program(lambda: distill.main([*arguments, "--out", str(out), *map(str, more)]))
    return code, read_checkpoint(out / "checkpoint.pt")["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_is_that_of_live_teachers(teachers, data_folder, tmp_path, calls, precision):
    _, live = distilled(teachers, data_folder, tmp_path / "live", "--precision", precision)
    assert calls[0] == 90 * 8
    calls[0] = 0
    options = ("--precision", precision, "--cache-teachers", "host")
    _, cached = distilled(teachers, data_folder, tmp_path / "cached", *options)
    assert 525 <= calls[0] <= 525 + 8  # each chunk once; a batch over an epoch's edge is whole
    spread = max((live[n] - cached[n]).abs().max() for n in live)
    assert spread <= (1e-5 if precision == "fp32" else 2e-2)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("live", "cached")
    ]
    values = [[e["dev_cross_entropy"] for e in log if "dev_cross_entropy" in e] for log in logs]
    assert len(values[0]) == 2
    assert all(abs(a - b) < 5e-3 for a, b in zip(*values))


def test_a_second_student_runs_no_teacher_at_all(teachers, data_folder, tmp_path, calls):
    option = ("--cache-teachers", tmp_path / "c.bin")
    _, first = distilled(teachers, data_folder, tmp_path / "one", *option)
    calls[0] = 0
    _, second = distilled(teachers, data_folder, tmp_path / "two", *option)
    assert calls[0] == 0 and same(first, second)


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(teachers, data_folder, tmp_path, monkeypatch, place):
    def option(name):
        return ("--cache-teachers", place if place == "host" else tmp_path / f"{name}.bin")

    _, whole = distilled(teachers, data_folder, tmp_path / "whole", *option("whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 75)
        code, _ = distilled(teachers, data_folder, tmp_path / "cut", *option("cut"))
    assert code == 143
    code, resumed = distilled(teachers, data_folder, tmp_path / "cut", *option("cut"))
    assert code == 0 and same(whole, resumed)


def test_a_cache_of_other_teachers_is_refused(teachers, data_folder, tmp_path, capsys):
    option = ("--cache-teachers", tmp_path / "c.bin")
    distilled(teachers, data_folder, tmp_path / "one", *option)
    arguments = ["--teachers", *reversed(teachers), "--data", str(data_folder), *OPTIONS, *STEPS]
    arguments += ["--out", str(tmp_path / "two"), *map(str, option)]
    capsys.readouterr()
    assert run_program(lambda: distill.main(arguments)) == 1
    assert "c.bin" in capsys.readouterr().err and not (tmp_path / "two").exists()


def refused(teachers, data_folder, out, capsys, *more):
    arguments = ["--teachers", *teachers, "--data", str(data_folder), "--out", str(out), *more]
    assert run_program(lambda: distill.main([*arguments, *OPTIONS, *STEPS])) == 1
    assert not out.exists()
    return capsys.readouterr().err


def test_what_does_not_fit_is_said_before_training(teachers, data_folder, tmp_path, capsys, monkeypatch):
    needed = 525 * 32 * (96 + 96) * 4
    monkeypatch.setattr(teacher_cache, "_free_bytes", lambda place, device: needed - 1)
    more = ("--precision", "fp32", "--cache-teachers", "host")
    error = refused(teachers, data_folder, tmp_path / "s", capsys, *more)
    assert f"{needed} bytes needed, {needed - 1} free" in error
    more = ("--precision", "fp32", "--cache-teachers", "auto")
    assert distilled(teachers, data_folder, tmp_path / "s", *more)[0] == 0
    assert "cache      none" in capsys.readouterr().out


def test_a_cache_leaves_room_for_the_checkpoints_on_its_disk(
    teachers, data_folder, tmp_path, capsys, monkeypatch
):
    """Asked before the cache takes its room: the run would end when it saves."""
    free = 525 * 32 * (96 + 96) * 4 + 1000
    monkeypatch.setattr(teacher_cache, "_free_bytes", lambda place, device: free)
    more = ("--precision", "fp32", "--cache-teachers", str(tmp_path / "c.bin"))
    error = refused(teachers, data_folder, tmp_path / "s", capsys, *more)
    assert f"{free} free" in error and not (tmp_path / "c.bin").exists()


def test_gpu_memory_needs_a_gpu(teachers, data_folder, tmp_path, capsys):
    error = refused(teachers, data_folder, tmp_path / "s", capsys, "--cache-teachers", "gpu")
    assert "use host or a FILE" in error


def test_chunks_that_move_cannot_be_kept():
    with pytest.raises(SystemExit) as stop:
        distill.main(["--teachers", "a.pt", "--random-offset", "--cache-teachers", "auto"])
    assert stop.value.code == 2


def test_a_dry_run_prints_the_size_and_makes_no_file(teachers, data_folder, tmp_path, capsys):
    option = ["--cache-teachers", str(tmp_path / "c.bin"), "--dry-run"]
    arguments = ["--teachers", *teachers, "--data", str(data_folder), *OPTIONS, *STEPS]
    assert run_program(lambda: distill.main([*arguments, *option, "--out", str(tmp_path / "s")])) == 0
    assert "of the teachers' hidden states in" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
