"""Atomic writes, digests, and the one error whose message a user sees."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path


class UserError(Exception):
    """A failure that the user can mend: one line that names the file or flag and the remedy."""


def run(main):
    """The exit code of `main()`: 0 done, 1 a reported failure, 130 interrupted.

    `main` returns an exit code or None. A `UserError`, or a file that the system does not let us
    read, becomes one line on standard error. 141 says that whoever read the output left early.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _discard_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text):
    """Prints a line at once; a run goes on when nobody reads it any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_output()


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that becomes `path` on success and leaves no trace on failure.

    The bytes are on disk before the name is: write beside it, fsync, rename, fsync the folder.
    Missing folders are made. Raises `UserError` where the system refuses (full disk, permission).
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        reason = error.strerror or error
        if error.errno == errno.ENOSPC:
            reason = f"{reason}, {shutil.disk_usage(path.parent).free} bytes free"
        raise UserError(f"cannot write {path}: {reason}; what stood there is untouched") from error


@contextlib.contextmanager
def locked(folder):
    """Makes `folder` and holds it alone; `UserError` if another process does.

    The lock is on the folder itself and dies with the process, so that there is nothing to clean.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another run: wait, or choose another") from error
    finally:
        os.close(handle)


def write_text(path, text):
    """Writes `text` as UTF-8 through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path, value):
    """Writes `value` as indented JSON through `atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(data):
    """The hexadecimal SHA-256 of a bytes-like object."""
    return hashlib.sha256(data).hexdigest()
