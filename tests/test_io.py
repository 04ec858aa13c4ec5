"""A write happens whole or not at all; an error is one line and an exit code."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.io import UserError, atomic_write, locked, run_program


def test_what_is_written_arrives_whole(tmp_path):
    with atomic_write(tmp_path / "new" / "x") as file:
        file.write(b"all of it")
    assert (tmp_path / "new" / "x").read_bytes() == b"all of it"
    assert os.listdir(tmp_path / "new") == ["x"]


FAULTS = [
    OSError(28, "No space left"),
    OSError(30, "Read-only"),
    OSError(13, "denied"),
    ValueError("x"),
]


@pytest.mark.parametrize("error", FAULTS)
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
    show = "print('caf\\xe9 \\udcff'), io.warn('a\\udcff')"
    program = f"from training import io; io.run_program(lambda: ({show}, 0)[-1])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    found = in_a_process(program, stdout=subprocess.PIPE, env=environment)
    assert found.stdout == "caf? ?\n" and found.stderr == "warning: a\\udcff\n"


def test_no_file_takes_the_place_of_a_stream_that_is_closed(tmp_path):
    """What is printed or warned must not end up in a checkpoint that got the number 1 or 2."""
    program = (
        "import os, sys\nfrom training.io import UserError, run_program\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'x')!r}, 'w') as file:\n"
        "        print('told'), print('warned', file=sys.stderr)\n"
        "        os.write(1, b'by a library'), os.write(2, b'by a library')\n"
        "        file.write('written')\n"
        "    raise UserError('say what to do')\n"
        "sys.exit(0 if run_program(main) == 1 else 9)"
    )
    in_a_process(program, preexec_fn=lambda: (os.close(0), os.close(1), os.close(2)))
    assert (tmp_path / "x").read_text() == "written"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_kept_does_not_end_a_run():
    with open("/dev/full", "w") as full:
        found = in_a_process("from training.io import log; log('a'); log('b')", stdout=full)
    assert found.stderr.count("warning: standard output cannot be written") == 1


def test_exit_codes(capsys):
    assert run_program(lambda: None) == 0 and run_program(lambda: 143) == 143
    assert run_program(lambda: fail(UserError("say what to do"))) == 1
    assert capsys.readouterr().err == "error: say what to do\n"
    assert run_program(lambda: fail(KeyboardInterrupt())) == 130


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("training.io.fcntl.flock", refuse)
    message = r"cannot be locked \(No locks available\): choose a folder"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
