"""Runs a program, and keeps what a SIGKILL would leave behind at every call it makes of the system.

A process that is killed leaves what it has handed to the system, and nothing else. So one run shows
every kill: before each open, write, fsync, rename, link, unlink, mkdir, rmdir and close below a
folder, and in the middle of each write, the folder is copied as it is at that moment.

Started as a program this is a process that has imported everything and answers tasks, one JSON
object a line, each in a child of its own: {"program", "arguments", "folder"}, and "copies", a
folder, if they are to be kept, or "watch": false if no call is to be watched and the plan is not to
look at the disk; "constants", {module: {name: value}}, are set before. The answer is {"code": the
exit code, "calls": {name: count}, "read": debris that was opened}.
"""

import builtins
import collections
import contextlib
import hashlib
import importlib
import io
import json
import os
import pathlib
import shutil
import sys
from pathlib import Path

CALLS = "open mkdir rmdir replace rename link unlink remove fsync close posix_fallocate".split()


def is_debris(name):
    """Whether a file's bytes do not matter: it is deleted, and no program may read it."""
    return any(part.endswith(".tmp") for part in Path(name).parts)


def content(folder):
    """{name: digest of the bytes} of what is in a folder; debris has none."""
    return {
        str(path.relative_to(folder)): ""
        if is_debris(path.relative_to(folder)) or path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
    }


class Watch:
    """Watches this process's calls below `folder`; what they leave goes to `copies`/0, 1, ..."""

    def __init__(self, folder, copies=None):
        self.folder, self.copies = str(Path(folder).resolve()), copies and Path(copies)
        self.calls, self.read, self.seen = collections.Counter(), set(), []
        self.busy = False
        self.original = {name: getattr(os, name) for name in CALLS} | {"builtin": builtins.open}
        for name in CALLS:
            setattr(os, name, self.wrapped(name))
        builtins.open = io.open = self.opened
        if accessor := getattr(pathlib, "_normal_accessor", None):  # Python 3.10's paths call these
            for name in {*CALLS, "open"} & set(dir(accessor)):
                setattr(accessor, name, self.opened if name == "open" else getattr(os, name))

    def below(self, target, dir_fd=None):
        """The name below the folder of a path or an open file, or None."""
        if isinstance(target, int) or dir_fd is not None:
            with contextlib.suppress(OSError):
                handle = os.readlink(f"/proc/self/fd/{target if dir_fd is None else dir_fd}")
                target = handle if dir_fd is None else os.path.join(handle, target)
        path = os.path.abspath(os.fspath(target)) if not isinstance(target, int) else ""
        return os.path.relpath(path, self.folder) if path.startswith(self.folder) else None

    def point(self, name):
        """The moment before a call: if nothing like it was seen before, the folder is copied."""
        if self.busy:
            return
        self.calls[name], self.busy = self.calls[name] + 1, True
        now = self.copies and content(self.folder)
        if self.copies and now not in self.seen:
            shutil.copytree(self.folder, self.copies / str(len(self.seen)))
            self.seen.append(now)
        self.busy = False

    def wrapped(self, name):
        def call(target, *arguments, **options):
            if not self.busy and self.below(target, options.get("dir_fd")) is not None:
                self.point(name)
            return self.original[name](target, *arguments, **options)

        return call

    def opened(self, file, mode="r", *arguments, **options):
        name = None if self.busy else self.below(file)
        if name is None:
            return self.original["builtin"](file, mode, *arguments, **options)
        if mode[0] == "r":
            self.read |= {name} if is_debris(name) else set()
            return self.original["builtin"](file, mode, *arguments, **options)
        self.point("open")
        return Watched(self, self.original["builtin"](file, mode, *arguments, **options))


class Watched:
    """A file that is written to: each write can be cut in its middle."""

    def __init__(self, watch, file):
        self.watch, self.file = watch, file

    def write(self, data):
        self.watch.point("write")
        data = data if isinstance(data, str) else bytes(data)
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.file.write(half)
            self.file.flush()
            self.watch.point("torn write")
        return len(data)

    def close(self):
        self.watch.point("close")
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def perform(task):
    """Does a task in this process."""
    from training import io, plan, teacher_cache

    for module, constants in task.get("constants", {}).items():
        vars(importlib.import_module(module)).update(constants)

    def run():
        program = importlib.import_module(task["program"])
        return io.run_program(lambda: program.main(task["arguments"]))

    if not task.get("watch", True):
        plan.check_disk = lambda *_: None
        return {"code": run()}
    watch = Watch(task["folder"], task.get("copies"))
    digest = teacher_cache.TeacherCache.digest

    def counted(self, chunk):  # a cache in a file is written through memory, without any call
        watch.point("cache digest")
        return digest(self, chunk)

    teacher_cache.TeacherCache.digest = counted
    code = run()
    watch.point("exit")
    return {"code": code, "calls": watch.calls, "read": sorted(watch.read)}


def main():
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for name in ("distill", "tokenize_corpus", "torch._dynamo"):  # seconds, once for all tasks
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        reading, writing = os.pipe()
        if not os.fork():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            answer = perform(json.loads(line))
            os.write(writing, json.dumps(answer).encode() + b"\n")
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            print(pipe.readline() or "{}", end="", flush=True)
        os.wait()


if __name__ == "__main__":
    main()
