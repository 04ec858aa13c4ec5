"""Teachers run once per chunk, and the student is that of live teachers."""

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
from training.teacher_cache import TeacherCache

N, T = 6, 4
ARRAYS = {"shapes": [(N, T, 3), (N, T, 5)], "dtype": torch.bfloat16}
MADE_FROM = {"teachers": ["a", "b"], "shard": "c"}


def states(chunk_ids):
    """Returns states that differ from chunk to chunk."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(torch.bfloat16)[chunk_ids] for shape in ARRAYS["shapes"]]


def open_file(path, **changes):
    return TeacherCache.in_file(path, **(ARRAYS | {"made_from": MADE_FROM} | changes))


def same(tensors, others):
    return len(tensors) == len(others) and all(torch.equal(a, b) for a, b in zip(tensors, others))


@pytest.fixture(params=["memory", "file"])
def empty(request, tmp_path):
    if request.param == "file":
        return open_file(tmp_path / "cache.bin")
    return TeacherCache.in_memory(**ARRAYS, device="cpu")


def test_what_was_written_is_read_chunk_by_chunk(empty):
    written, ids = torch.tensor([4, 0, 2]), torch.tensor([2, 4])
    empty.write(written, states(written))
    assert empty.read(torch.tensor([4, 1])) is None
    assert same(empty.read(ids), states(ids)) and empty.read(ids)[0].dtype == torch.bfloat16


def test_a_chunk_is_written_once(empty):
    first, again = torch.tensor([4, 1]), torch.tensor([2, 4])
    empty.write(first, states(first))
    changed = [state + 1 for state in states(again)]
    assert same(empty.write(again, changed), changed)
    expected = [torch.stack([new[0], old[0]]) for new, old in zip(changed, states(first))]
    assert same(empty.read(again), expected)


def test_a_file_outlives_its_process(tmp_path):
    ids = torch.tensor([1, 5])
    open_file(tmp_path / "c").write(ids, states(ids))
    assert same(open_file(tmp_path / "c").read(ids), states(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"made_from": MADE_FROM | {"teachers": ["a", "x"]}},
        {"made_from": MADE_FROM | {"shard": "x"}},
        {"dtype": torch.float32},
        {"shapes": [(N + 1, T, 3), (N + 1, T, 5)]},
        {"shapes": [(N, T, 5), (N, T, 3)]},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, changes):
    open_file(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(UserError, match="choose another file, or delete it"):
        open_file(tmp_path / "c", **changes)
    assert (tmp_path / "c").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"X" + content[1:],
        lambda content: content[:100] + b"?" + content[101:],
        lambda content: b"my thesis",
    ],
    ids=["empty", "cut", "longer", "magic", "header", "text"],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "c"
    open_file(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged"):
        open_file(path)


def test_any_changed_byte_of_a_chunk_is_found_and_the_chunk_computed_again(tmp_path, capsys):
    path, ids = tmp_path / "c", torch.arange(N)
    open_file(path).write(ids, states(ids))
    content = bytearray(path.read_bytes())
    for position in range(PAGE_BYTES, len(content), 7):
        changed = bytearray(content)
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
    assert same(open_file(path).read(ids), states(ids))
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_file_is_complete_from_its_first_moment(tmp_path, monkeypatch):
    path, link = tmp_path / "c", os.link

    def another_run_opens_it_at_once(*arguments):
        link(*arguments)
        assert open_file(path).read(torch.tensor([0])) is None

    monkeypatch.setattr(os, "link", another_run_opens_it_at_once)
    open_file(path)


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

OPTIONS = ["--batch-size", "8", "--sequence-length", "32", "--device", "cpu", "--eval-sequences", "8"]
OPTIONS += ["--log-every", "100", "--save-every", "60"]
STEPS = ["--steps", "90"]  # 525 chunks at 8 a step: an epoch and a third
STATE_BYTES = 525 * 32 * (96 + 96) * 4  # in float32


@pytest.fixture(scope="module")
def teachers(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("gpt2-tiny", "llama-tiny"):
        options = ["--data", str(data_folder), "--out", str(folder / name), "--steps", "3"]
        train.main(["--model", name, *options, *OPTIONS])
    return [str(folder / name / "best.pt") for name in ("gpt2-tiny", "llama-tiny")]


@pytest.fixture
def calls(monkeypatch):
    """The number of chunks that the GPT-2, which is a teacher, has read: a list of one number."""
    count, hidden_states = [0], GPT2.hidden_states

    def counted(self, tokens):
        count[0] += len(tokens)
        return hidden_states(self, tokens)

    monkeypatch.setattr(GPT2, "hidden_states", counted)
    return count


@pytest.fixture
def distilled(teachers, data_folder):
    """A function that distils into a folder and returns the exit code."""

    def run(out, *options, teachers=teachers):
        arguments = ["--teachers", *teachers, "--data", str(data_folder), "--out", str(out)]
        arguments += ["--model", "llama-tiny-student", *OPTIONS, *STEPS, *map(str, options)]
        return run_program(lambda: distill.main(arguments))

    return run


def weights(out):
    return list(read_checkpoint(out / "checkpoint.pt")["weights"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_is_that_of_live_teachers(distilled, tmp_path, calls, precision):
    distilled(tmp_path / "live", "--precision", precision)
    assert calls[0] == 90 * 8
    calls[0] = 0
    distilled(tmp_path / "cached", "--precision", precision, "--cache-teachers", "host")
    assert 525 <= calls[0] <= 525 + 8  # each chunk once; the batch at the end of the epoch is run whole
    pairs = zip(weights(tmp_path / "live"), weights(tmp_path / "cached"))
    assert max((a - b).abs().max() for a, b in pairs) <= (1e-5 if precision == "fp32" else 2e-2)
    losses = []
    for name in ("live", "cached"):
        entries = map(json.loads, (tmp_path / name / "log.jsonl").open())
        losses.append([entry["dev_cross_entropy"] for entry in entries if "dev_cross_entropy" in entry])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_second_student_runs_no_teacher_at_all(distilled, tmp_path, calls):
    distilled(tmp_path / "one", "--cache-teachers", tmp_path / "c.bin")
    calls[0] = 0
    distilled(tmp_path / "two", "--cache-teachers", tmp_path / "c.bin")
    assert calls[0] == 0 and same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(distilled, tmp_path, monkeypatch, place):
    def run(name):
        return distilled(
            tmp_path / name, "--cache-teachers", "host" if place == "host" else tmp_path / f"{name}.bin"
        )

    run("undisturbed")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 75)
        assert run("stopped") == 143
    assert run("stopped") == 0 and same(weights(tmp_path / "undisturbed"), weights(tmp_path / "stopped"))


def test_a_cache_of_other_teachers_is_refused(distilled, teachers, tmp_path, capsys):
    option = ("--cache-teachers", tmp_path / "c.bin")
    distilled(tmp_path / "one", *option)
    capsys.readouterr()
    assert distilled(tmp_path / "two", *option, teachers=teachers[::-1]) == 1
    assert "c.bin" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_a_cache_that_does_not_fit_is_refused_and_auto_goes_on_without(
    distilled, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(teacher_cache, "_free_bytes", lambda place, device: STATE_BYTES - 1)
    assert distilled(tmp_path / "s", "--precision", "fp32", "--cache-teachers", "host") == 1
    assert f"{STATE_BYTES} bytes needed, {STATE_BYTES - 1} free" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert distilled(tmp_path / "s", "--precision", "fp32", "--cache-teachers", "auto") == 0
    assert "cache      none" in capsys.readouterr().out


def test_a_cache_leaves_room_for_the_checkpoints_on_its_disk(distilled, tmp_path, capsys, monkeypatch):
    """Asked before the cache takes its room: else the run would end when it saves."""
    monkeypatch.setattr(teacher_cache, "_free_bytes", lambda place, device: STATE_BYTES + 1000)
    assert distilled(tmp_path / "s", "--precision", "fp32", "--cache-teachers", tmp_path / "c.bin") == 1
    assert f"{STATE_BYTES + 1000} free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_gpu_memory_needs_a_gpu(distilled, tmp_path, capsys):
    assert distilled(tmp_path / "s", "--cache-teachers", "gpu") == 1
    assert "use host or a FILE" in capsys.readouterr().err


def test_chunks_that_move_cannot_be_kept():
    with pytest.raises(SystemExit) as stop:
        distill.main(["--teachers", "a.pt", "--random-offset", "--cache-teachers", "auto"])
    assert stop.value.code == 2


def test_a_dry_run_prints_the_size_and_makes_no_file(distilled, tmp_path, capsys):
    assert distilled(tmp_path / "s", "--cache-teachers", tmp_path / "c.bin", "--dry-run") == 0
    assert "of the teachers' hidden states in" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
