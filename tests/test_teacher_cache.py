"""Teachers run once per chunk, and the student is that of live teachers."""

import errno
import os

import pytest
import torch

import distill
from conftest import OPTIONS, interrupt_after, log_entries, run, weights
from gpt2 import GPT2
from training import teacher_cache
from training.io import PAGE_BYTES, UserError
from training.teacher_cache import TeacherCache

N, T = 6, 4
ARRAYS = {"shapes": [(N, T, 3), (N, T, 5)], "dtype": torch.bfloat16}
MADE_FROM = {"teachers": ["a", "b"], "shard": "c"}


def equal(tensors, others):
    return len(tensors) == len(others) and all(torch.equal(a, b) for a, b in zip(tensors, others))


def states(chunk_ids):
    """Returns states that differ from chunk to chunk."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(torch.bfloat16)[chunk_ids] for shape in ARRAYS["shapes"]]


def open_file(path, **changes):
    return TeacherCache.in_file(path, **(ARRAYS | {"made_from": MADE_FROM} | changes))


@pytest.fixture(params=["memory", "file"])
def empty(request, tmp_path):
    if request.param == "file":
        return open_file(tmp_path / "cache.bin")
    return TeacherCache.in_memory(**ARRAYS, device="cpu")


def test_what_was_written_is_read_chunk_by_chunk(empty):
    written, ids = torch.tensor([4, 0, 2]), torch.tensor([2, 4])
    empty.write(written, states(written))
    assert empty.read(torch.tensor([4, 1])) is None
    assert equal(empty.read(ids), states(ids)) and empty.read(ids)[0].dtype == torch.bfloat16


def test_a_gpu_is_given_pinned_memory(empty, monkeypatch):
    written, ids, allocate, pinned = torch.arange(5), torch.tensor([3, 1, 4]), torch.empty, []

    def allocate_anywhere(*args, pin_memory=False, **options):
        pinned.append(pin_memory)
        return allocate(*args, **options)

    empty.write(written, states(written))
    empty.pins = True
    monkeypatch.setattr(torch, "empty", allocate_anywhere)
    assert equal(empty.read(ids), states(ids)) and pinned == [True, True]


def test_a_chunk_is_written_once(empty):
    first, again = torch.tensor([4, 1]), torch.tensor([2, 4])
    empty.write(first, states(first))
    changed = [state + 1 for state in states(again)]
    assert equal(empty.write(again, changed), changed)
    expected = [torch.stack([new[0], old[0]]) for new, old in zip(changed, states(first))]
    assert equal(empty.read(again), expected)


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
    path = tmp_path / "c"
    open_file(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="choose another file, or delete it"):
        open_file(path, **changes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "magic", "header", "text"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "c"
    open_file(path)
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": content[:-1],
        "longer": content + b"x",
        "magic": b"X" + content[1:],
        "header": content[:100] + b"?" + content[101:],
        "text": b"my thesis",
    }
    path.write_bytes(damaged[damage])
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
    assert equal(open_file(path).read(ids), states(ids))
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

# 525 chunks at 16 a step: an epoch and a third.
RUN = [*OPTIONS, "--batch-size", "16", "--steps", "44", "--log-every", "100", "--save-every", "30"]
STATE_BYTES = 525 * 32 * (96 + 96) * 4  # in float32


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
def arguments(teachers, data_folder):
    """Of a distillation, but for its folder; the last of them are the teachers."""
    return ["--model", "llama-tiny-student", "--data", data_folder, *RUN, "--teachers", *teachers]


@pytest.fixture
def distilled(arguments):
    """A function that distils into a folder and returns the exit code."""
    return lambda out, *options: run(distill, *arguments, "--out", out, *options)


def last_weights(out):
    return list(weights(out / "checkpoint.pt").values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_is_that_of_live_teachers(distilled, tmp_path, calls, precision):
    distilled(tmp_path / "live", "--precision", precision)
    assert calls[0] == 44 * 16
    calls[0] = 0
    distilled(tmp_path / "cached", "--precision", precision, "--cache-teachers", "host")
    assert 525 <= calls[0] <= 525 + 16  # each chunk once; the batch at the end of the epoch is run whole
    pairs = zip(last_weights(tmp_path / "live"), last_weights(tmp_path / "cached"))
    assert max((a - b).abs().max() for a, b in pairs) <= (1e-5 if precision == "fp32" else 2e-2)
    losses = [
        [entry["dev_cross_entropy"] for entry in log_entries(tmp_path / name) if "dev_cross_entropy" in entry]
        for name in ("live", "cached")
    ]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_second_student_runs_no_teacher_at_all_and_only_theirs(
    distilled, arguments, teachers, tmp_path, calls, refused
):
    option = ("--cache-teachers", tmp_path / "c.bin")
    distilled(tmp_path / "one", *option)
    calls[0] = 0
    distilled(tmp_path / "two", *option)
    assert calls[0] == 0 and equal(last_weights(tmp_path / "one"), last_weights(tmp_path / "two"))
    others = [*arguments[:-2], *reversed(teachers), *option, "--out", tmp_path / "three"]
    assert "c.bin" in refused(distill, *others) and not (tmp_path / "three").exists()


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(distilled, tmp_path, monkeypatch, place):
    def end_of(name):
        cache = "host" if place == "host" else tmp_path / f"{name}.bin"
        return distilled(tmp_path / name, "--cache-teachers", cache)

    end_of("undisturbed")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 37)
        assert end_of("stopped") == 143
    assert end_of("stopped") == 0
    assert equal(last_weights(tmp_path / "undisturbed"), last_weights(tmp_path / "stopped"))


def test_a_cache_that_does_not_fit_is_refused_and_auto_goes_on_without(
    distilled, arguments, tmp_path, capsys, monkeypatch, refused
):
    monkeypatch.setattr(teacher_cache, "_free_bytes", lambda place, device: STATE_BYTES - 1)
    error = refused(distill, *arguments, "--out", tmp_path / "s", "--cache-teachers", "host")
    assert f"{STATE_BYTES} bytes needed, {STATE_BYTES - 1} free" in error
    assert not (tmp_path / "s").exists()
    assert distilled(tmp_path / "s", "--cache-teachers", "auto", "--steps", "2") == 0
    assert "cache      none" in capsys.readouterr().out


def test_gpu_memory_needs_a_gpu(arguments, tmp_path, refused):
    error = refused(distill, *arguments, "--out", tmp_path / "s", "--cache-teachers", "gpu")
    assert "use host or a FILE" in error


def test_a_dry_run_prints_the_size_and_makes_no_file(distilled, tmp_path, capsys):
    assert distilled(tmp_path / "s", "--cache-teachers", tmp_path / "c.bin", "--dry-run") == 0
    assert "of the teachers' hidden states in" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
