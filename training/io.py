"""Atomic writes, locks, digests, file headers, and the one error whose message a user sees."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:
    raise SystemExit("error: Windows cannot lock the folder of a run: use WSL, or Linux or macOS") from None

GIB = 1 << 30
PAGE_BYTES = 4096
rank_prefix = ""  # "rank 1: " and so on in the errors of other ranks than 0


class UserError(Exception):
    """An error that the user can mend. Its one line names the file or the option, and the remedy."""


def run_program(main):
    """The exit code of `main()`: 0 done, 1 a failure that is one line on standard error, 130 Ctrl-C.

    141: the program that reads our output, such as `head`, has ended. Bugs keep their traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack a character of a path
    try:
        return main() or 0
    except UserError as error:
        reason = error
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        reason = f"{error.filename or 'system'}: {error.strerror or error}"
    except MemoryError as error:
        reason = f"out of memory: {error or 'free some, or use a machine with more'}"
    except RuntimeError as error:
        if not (reason := _torch_problem(error)):
            raise
        if "gloo" in str(error) and rank_prefix:  # another rank has ended, and has said why
            return 1
    print(f"error: {rank_prefix}{printable(str(reason))}", file=sys.stderr)
    return 1


def _torch_problem(error):
    """What an error of torch means to the user, or None: then it is a bug."""
    first_line = str(error).strip().partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"{first_line} Training needs less with --micro-batch-size auto"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_USER")
        remedy = f"give --no-compile, or delete torch's cache ({cache}) if a kill damaged it"
        return f"torch.compile: {first_line}: {remedy}"
    return "another process of this run has ended" if "gloo" in str(error) else None


def _discard_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log(text):
    """Prints a line at once, on rank 0 alone. A run outlives the program that reads its output."""
    if rank_prefix:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_output()


def warn(text):
    """Prints one line of warning on standard error, on rank 0 alone."""
    if not rank_prefix:
        print(f"warning: {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that becomes `path` on success and leaves no trace on failure.

    It writes a temporary file beside it, then fsync, rename, fsync of the folder: the bytes are on
    the disk before the file has its name. Raises `UserError` if the system refuses (full disk).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_temporary(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what stood there is untouched"
        ) from error


def open_temporary(path):
    """Returns a new temporary file beside `path`, and deletes those that killed processes left.

    The file is locked until it is closed: the lock shows that its writer is alive.
    """
    remove_temporaries(path.parent, [path.name])
    # Nobody can place a link at a random name beforehand, and mode "x" follows no link.
    file = open(path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp"), "xb")
    with contextlib.suppress(OSError):  # some file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def remove_temporaries(folder, names):
    """Deletes temporary files of `names` in `folder` that no living process is writing."""
    pattern = rf"({'|'.join(map(re.escape, names))})\.[0-9a-f]{{8}}\.tmp"
    for path in Path(folder).glob("*.tmp"):
        if re.fullmatch(pattern, path.name) and path.is_file() and not path.is_symlink():
            # A living writer has the lock.
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def fsync_folder(path):
    """Writes the folder's list of names to the disk, so that a rename survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def locked(folder):
    """Makes `folder` and locks it. Raises `UserError` if another process has locked it.

    The lock is on the folder itself and ends with the process, so it leaves no file behind.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"{folder} is in use by another run: wait, or choose another") from error
    except OSError as error:  # some network file systems have no locks
        raise UserError(f"cannot use {folder} as a folder of a run: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(handle)


def write_text(path, text):
    """Writes `text` as UTF-8 through `atomic_write`; bytes of a name that is not UTF-8 are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path, value):
    """Writes `value` as indented JSON through `atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def printable(text):
    """`text` with escapes for characters that move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sha256(data):
    """The hexadecimal SHA-256 of a bytes-like object."""
    return hashlib.sha256(data).hexdigest()


# ---- the header of shards and teacher caches, plain text that `head` shows:
#
#     MAGIC VERSION HEADER_BYTES SHA256      one line of fixed width
#     content                                covered by the digest, padded with blanks to the size


def first_line_bytes(magic):
    """The length of the header's first line."""
    return len(magic) + len(" 00000001 0000000000 ") + 64 + 1


def pack_header(magic, version, content):
    """The header's bytes: a whole number of pages, with at least a newline after `content`."""
    start = first_line_bytes(magic)
    size = -(-(start + len(content) + 1) // PAGE_BYTES) * PAGE_BYTES
    body = content.ljust(size - start - 1) + b"\n"
    return f"{magic} {version:08d} {size:010d} {sha256(body)}\n".encode() + body


def unpack_first_line(line, magic):
    """(version, size of the header, digest of the content), or None if `line` has another magic.

    Raises ValueError if the rest of the line is missing.
    """
    fields = line.decode("ascii", "replace").split()
    if not fields or fields[0] != magic:
        return None
    if len(fields) != 4:
        raise ValueError("its first line is incomplete")
    return int(fields[1]), int(fields[2]), fields[3]


# ---- tables of text


def aligned(rows):
    """The lines of a table of text: the first column is flush left, the others are flush right."""
    first_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(first_width), *(cell.rjust(width) for cell, width in zip(others, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(rows):
    """The lines of a Markdown table; the first of `rows` is its heading."""
    heading, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [heading, "|" + "---|" * len(rows[0]), *body]
