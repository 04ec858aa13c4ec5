"""A write happens whole or not at all; an error is one line and an exit code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

from training.io import (
    PAGE_BYTES,
    UserError,
    atomic_write,
    first_line_bytes,
    locked,
    open_temporary,
    pack_header,
    remove_temporaries,
    run_program,
    sha256,
    unpack_first_line,
    write_text,
)

ROOT = Path(__file__).parent.parent


def test_windows_gets_one_line():
    command = "import sys; sys.modules['fcntl'] = None; import make_toy_corpus"
    command = [sys.executable, "-c", command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "use WSL" in done.stderr


def test_what_is_written_arrives_whole(tmp_path):
    with atomic_write(tmp_path / "new" / "x") as file:
        file.write(b"all of it")
    assert (tmp_path / "new" / "x").read_bytes() == b"all of it"
    assert os.listdir(tmp_path / "new") == ["x"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError(13, "denied"), ValueError("x")])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    expected = UserError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "file" / "x"):
        pass


def fail(error):
    raise error


def in_a_process(program, **options):
    """A program of the standard library and training.io in a process of its own, to its end."""
    shared = {"stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent.parent}
    return subprocess.run([sys.executable, "-c", program], **shared | options, check=True)


def test_a_terminal_that_lacks_a_character_shows_another():
    program = r"from training.io import *; run_program(lambda: log('caf\xe9 \udcff') or warn('a\udcff'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = in_a_process(program, stdout=subprocess.PIPE, env=environment)
    assert result.stdout == "caf? ?\n" and result.stderr == "warning: a\\udcff\n"


def test_exit_codes(capsys):
    assert run_program(lambda: None) == 0 and run_program(lambda: 143) == 143
    assert run_program(lambda: fail(KeyboardInterrupt())) == 130
    # One line, whatever the name of a file holds.
    assert run_program(lambda: fail(UserError("a\nb\x1b[31m\udcff"))) == 1
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m\\udcff\n"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("training.io.fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cannot use .*: No locks available"), locked(tmp_path):
        pass


def test_an_error_within_a_lock_is_not_blamed_on_another_run(tmp_path):
    with pytest.raises(BlockingIOError), locked(tmp_path / "r"):
        raise BlockingIOError


def test_a_write_follows_no_link_and_takes_no_foreign_temporary_file(tmp_path):
    """A folder from someone else may hold links under any name that can be foreseen."""
    (target := tmp_path / "target").write_text("untouched")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x", "x.tmp"):
        (out / name).symlink_to(target)
    write_text(out / "x", "new")
    assert target.read_text() == "untouched" and (out / "x.tmp").is_symlink()
    assert (out / "x").read_text() == "new" and not (out / "x").is_symlink()


def test_temporary_files_of_known_names_and_of_dead_writers_are_removed(tmp_path):
    foreign = ["x.tmp", "best.pt.tmp", "y.0123abcd.tmp", "best.pt.0123ABCD.tmp", "mybest.pt.0123abcd.tmp"]
    for name in (*foreign, "best.pt.0123abcd.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "best.pt.ffffffff.tmp").mkdir()
    with open_temporary(tmp_path / "best.pt") as file:  # and deletes that of a killed process
        remove_temporaries(tmp_path, ["best.pt", "log.jsonl"])
        assert os.path.exists(file.name)
    remove_temporaries(tmp_path, ["best.pt", "log.jsonl"])
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "best.pt.ffffffff.tmp"])


def test_a_header_of_any_length_is_read_back():
    start = first_line_bytes("babyllama-shard")
    for length in range(3980, 4010):
        header = pack_header("babyllama-shard", 1, b"x" * length)
        version, size, digest = unpack_first_line(header[:start], "babyllama-shard")
        assert (version, size, digest) == (1, len(header), sha256(header[start:]))
        assert header[start:].strip() == b"x" * length and size % PAGE_BYTES == 0


NOT_BUGS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--micro-batch-size auto"),
    (torch._dynamo.exc.TorchDynamoException("No compiler\n\nSet X"), "No compiler: give --no-compile"),
    (
        RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
        "error: another process of this run has ended\n",
    ),
]


@pytest.mark.parametrize("error, message", NOT_BUGS)
def test_errors_of_torch_that_are_no_bugs_become_one_line(capsys, error, message):
    assert run_program(lambda: fail(error)) == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_bug_shows_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_program(lambda: fail(RuntimeError("shapes do not match")))
