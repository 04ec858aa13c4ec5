"""Every program at every call: what a kill or a full disk leaves is continued to the same end.

A process that is killed leaves what it has handed to the system, and nothing else. So one run shows
every kill: before each open, rename, link, removal and mkdir below a folder, the folder is copied
as it is at that moment. These tests belong to `make test-faults`; test_faults.py really kills.
"""

import contextlib
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch

import model as models
from conftest import FIGURES, comparable, save_model, write_in_background, write_text
from data import open_corpus
from llama import LlamaConfig
from training import plan, teacher_cache
from training.checkpoint import read_checkpoint
from training.io import UserError, run_program
from training.resume import CHECKPOINT_NAMES

pytestmark = pytest.mark.faults
EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
CALLS, DISKS = {}, {}
OPTIONS = "--batch-size 8 --sequence-length 16 --eval-sequences 4 --steps 5 --save-every 2"
OPTIONS += " --eval-every 2 --log-every 2 --device cpu --precision fp32 --save-at-words 200"
OPTIONS += " --model llama-tiny --shape hidden_size=16,intermediate_size=32,num_hidden_layers=1"


def content(folder):
    """{name: digest of the bytes} of a folder; what is temporary has no random name and no digest."""
    result = {}
    for path in sorted(Path(folder).rglob("*")):
        name = TEMPORARY.sub(".tmp", str(path.relative_to(folder)))
        has_digest = path.is_file() and ".tmp" not in name
        result[name] = hashlib.sha256(path.read_bytes()).hexdigest() if has_digest else ""
    return result


class Watch:
    """Copies `folder` to `copies`/0, 1, ... before each call that changes it, if it has changed."""

    def __init__(self, folder, copies):
        self.folder, self.copies, self.seen, self.busy = str(folder), copies, [], False
        self.lock = threading.RLock()  # another thread may write a checkpoint
        sys.addaudithook(self.hook)
        write = teacher_cache.TeacherCache.write  # its file is written through memory, without any call

        def watched(cache, *arguments):
            self.copy()
            result = write(cache, *arguments)
            self.copy()
            return result

        teacher_cache.TeacherCache.write = watched

    def hook(self, event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        with self.lock:
            if not self.busy:
                self.before_call(event, arguments)

    def before_call(self, event, arguments):
        if os.path.abspath(arguments[0]).startswith(self.folder):
            reads = event == "open" and "r" in (arguments[1] or "")
            assert not (reads and TEMPORARY.search(str(arguments[0]))), "a temporary file is read"
            self.copy()

    def copy(self):
        with self.lock:
            self.busy = True
            now = content(self.folder)
            if now not in self.seen:
                shutil.copytree(self.folder, self.copies / str(len(self.seen)))
                self.seen.append(now)
            self.busy = False


@pytest.fixture
def perform(tmp_path):
    """`perform(program, arguments, before)`: a program's exit code and errors, in a child."""

    def run(program, arguments, before=lambda: None):
        pid = os.fork()
        if not pid:
            code = 99
            with open(tmp_path / "errors", "w") as errors, contextlib.suppress(BaseException):
                sys.stdout = sys.stderr = errors
                try:
                    before()
                    code = run_program(lambda: importlib.import_module(program).main(arguments))
                except BaseException:
                    traceback.print_exc()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, (tmp_path / "errors").read_text()

    return run


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizer):
    """Two untrained teachers."""
    folder, paths = tmp_path_factory.mktemp("teachers"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.build(LlamaConfig(tokenizer.vocabulary_size, 16, 32, 1, 2))
        paths.append(str(folder / f"{seed}.pt"))
        save_model(paths[-1], model, tokenizer)
    return paths


def run_arguments(program, root, data_folder, teachers):
    arguments = [*OPTIONS.split(), "--data", str(data_folder), "--out", str(root / "run")]
    if program == "distill":
        arguments += ["--teachers", *teachers, "--cache-teachers", str(root / "states.cache")]
    return arguments


def text_arguments(folder, seed, train_words=2000):
    for split, words in (("train", train_words), ("dev", 500)):
        (folder / split).mkdir(parents=True)
        (folder / split / "a.txt").write_text(write_text(words, seed))
        seed += 1
    return ["--train", str(folder / "train"), "--dev", str(folder / "dev"), "--vocab-size", "300"]


def newest_step(out):
    """The step of the newest checkpoint of a run that can be read; 0 without any."""
    steps = [0]
    for name in CHECKPOINT_NAMES:
        with contextlib.suppress(UserError):
            steps.append(read_checkpoint(out / name)["progress"]["step"])
    return max(steps)


def folders_left(perform, program, arguments, root, copies, in_background=False):
    """Every folder that a kill of the program may leave, in order; `root` has the last one."""

    def watch():
        Watch(root, copies)
        if in_background:
            write_in_background(setattr)

    copies.mkdir()
    code, errors = perform(program, arguments, watch)
    assert code == 0, errors
    folders = sorted(copies.iterdir(), key=lambda path: int(path.name))
    CALLS[f"{program}{in_background}"] = f"{program}.py{' in background' * in_background} {len(folders)}"
    FIGURES["kills at a call"] = (
        "each folder that a kill leaves before an open, rename, link, removal or mkdir, or within "
        f"the cache's memory: {', '.join(CALLS.values())}",
        "every one continued to the same weights, moments, best.pt, log, shards; no debris",
    )
    return folders


@pytest.mark.parametrize("program, in_background", [("train", False), ("train", True), ("distill", False)])
def test_a_kill_at_any_call_of_a_run_loses_nothing(
    perform, data_folder, teachers, tmp_path, program, in_background
):
    root, step = tmp_path / "r", 0
    root.mkdir()
    arguments = run_arguments(program, root, data_folder, teachers)
    if in_background:
        arguments += ["--save-every-minutes", "0"]  # after each step
    folders = folders_left(perform, program, arguments, root, tmp_path / "copies", in_background)
    expected, names = comparable(root / "run"), content(root).keys()
    for folder in folders:
        shutil.rmtree(root)
        shutil.copytree(folder, root)
        assert newest_step(root / "run") >= step, folder  # what was saved stays saved
        step = newest_step(root / "run")
        code, errors = perform(program, arguments)
        assert code == 0, (folder, errors)
        assert comparable(root / "run") == expected, folder
        assert content(root).keys() == names, folder  # no debris
    assert len(folders) > 20 and step == 5


@pytest.mark.parametrize("tokenizer", ["new", "kept"])
def test_a_kill_at_any_call_of_the_tokenizer_leaves_no_mixture(perform, tmp_path, tokenizer):
    """Old shards or new ones, or a folder that is refused; the same command makes it whole."""
    root = tmp_path / "r"
    old, new = text_arguments(tmp_path / "old", 1), text_arguments(tmp_path / "new", 9, 3000)
    assert perform("tokenize_corpus", [*old, "--out", str(root)])[0] == 0
    before, mixed = content(root), 0
    if tokenizer == "kept":  # with another one, old shards would be refused for that alone
        new = [*new[:-2], "--tokenizer", shutil.copy(root / "tokenizer.model", tmp_path)]
    arguments = [*new, "--out", str(root)]
    folders = folders_left(perform, "tokenize_corpus", arguments, root, tmp_path / "copies")
    after = content(root)
    assert after.keys() >= before.keys() and after != before
    for folder in folders:
        shutil.rmtree(root)
        shutil.copytree(folder, root)
        files = {name: digest for name, digest in content(root).items() if digest}
        if files not in (before, after):
            mixed += 1
            with pytest.raises(UserError):
                open_corpus(root)
        assert perform("tokenize_corpus", arguments)[0] == 0
        assert content(root) == after, folder
    assert mixed and len(folders) > 5


# ---- disks that really are full


@pytest.fixture
def disk(tmp_path):
    """A disk of its own in memory, and a function that sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs"]
        return subprocess.run([*command, str(folder)], capture_output=True, check=False).returncode

    if mount(1 << 26):
        pytest.skip("no disk in memory can be mounted here")
    yield folder, lambda size: mount(size, "remount") and pytest.fail("cannot set its size")
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("program", ["train", "distill", "tokenize_corpus"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    perform, data_folder, teachers, tmp_path, disk, program
):
    """Of thirteen sizes, from nothing to what the end leaves, which is less than a save needs."""
    (root, resize), refused = disk, 0
    if program == "tokenize_corpus":
        arguments = [*text_arguments(tmp_path / "texts", 1), "--out", str(root / "run")]
        outcome = content
    else:
        arguments, outcome = run_arguments(program, root, data_folder, teachers), comparable
    assert perform(program, arguments)[0] == 0
    expected, needed = outcome(root / "run"), shutil.disk_usage(root).used
    ignore_disk = lambda: setattr(plan, "check_disk", lambda *_: None)  # noqa: E731
    for part in range(13):
        shutil.rmtree(root / "run")
        (root / "states.cache").unlink(missing_ok=True)
        resize(4096 + needed * part // 12)
        code, errors = perform(program, arguments, ignore_disk)
        if code:
            refused += 1
            assert code == 1 and errors.count("error: ") == 1, errors
            assert "Traceback" not in errors and ("free" in errors or "No space" in errors), errors
        resize(1 << 26)
        assert perform(program, arguments)[0] == 0 and outcome(root / "run") == expected
    DISKS[program] = refused
    FIGURES["full disks"] = (
        "a disk in memory that is full, of 13 sizes each: "
        + ", ".join(f"{program} was stopped by {count}" for program, count in DISKS.items()),
        "one line each time; with room again the same command ends with the same bytes",
    )
    assert refused > 5
