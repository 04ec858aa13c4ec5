"""Every program at every call: what a SIGKILL or a full disk leaves is continued to the same end.

`kills.py` says how one run shows what a kill at each of its calls leaves. These tests belong to
`make test-faults`; those of test_faults.py really kill.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kills
import model as models
from conftest import FIGURES, comparable, save_model, write_text
from data import open_corpus
from llama import LlamaConfig
from training.checkpoint import read_checkpoint
from training.io import UserError
from training.resume import CHECKPOINT_NAMES

pytestmark = pytest.mark.faults
CALLS, DISKS = {}, {}
OPTIONS = "--batch-size 8 --sequence-length 16 --eval-sequences 4 --steps 5 --save-every 2"
OPTIONS += " --eval-every 2 --log-every 2 --device cpu --precision fp32 --save-at-words 200"
OPTIONS += " --model llama-tiny --shape hidden_size=16,intermediate_size=32,num_hidden_layers=1"


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """`perform(**task)`: kills.py in a process of its own; "errors" is what it wrote there."""
    command = [sys.executable, str(Path(__file__).with_name("kills.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    errors = tmp_path_factory.mktemp("worker") / "errors"
    with open(errors, "w") as file, subprocess.Popen(command, **pipes, stderr=file) as process:

        def perform(**task):
            start = errors.stat().st_size
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            return answer | {"errors": errors.read_text()[start:]}

        yield perform
        process.stdin.close()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizer):
    """Two teachers that know nothing."""
    folder, paths = tmp_path_factory.mktemp("teachers"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.build(LlamaConfig(tokenizer.vocabulary_size, 16, 32, 1, 2))
        paths.append(str(folder / f"{seed}.pt"))
        save_model(paths[-1], model, tokenizer)
    return paths


def program(name, root, data_folder, teachers):
    """The task of a program, but for what is done with it: `folder` is all that it writes."""
    arguments = [*OPTIONS.split(), "--data", str(data_folder), "--out", str(root / "run")]
    if name == "distill":
        arguments += ["--teachers", *teachers, "--cache-teachers", str(root / "states.cache")]
    return {"program": name, "arguments": arguments, "folder": str(root)}


def newest_step(out):
    """The step of the newest state in a run's folder that can be read; 0 without any."""
    steps = [0]
    for name in CHECKPOINT_NAMES:
        try:
            steps.append(read_checkpoint(out / name)["progress"]["step"])
        except UserError:
            continue
    return max(steps)


def count_calls(name, whole, states):
    """Notes how many calls of a program were tried, and how many folders they left."""
    CALLS[name] = f"{name}.py {sum(whole['calls'].values()):,} calls, {len(states)} folders"
    FIGURES["kills at a call"] = (
        "what a kill leaves at each call (open, write whole and torn, fsync, rename, link, unlink, "
        f"close, the cache's memory), debris aside: {'; '.join(CALLS.values())}",
        "every one continued to the same weights, moments, best.pt, log, shards; no debris",
    )


@pytest.mark.parametrize("name", ["train", "distill"])
def test_a_kill_at_any_call_of_a_run_loses_nothing(worker, data_folder, teachers, tmp_path, name):
    root, copies = tmp_path / "r", tmp_path / "copies"
    for folder in (root, copies):
        folder.mkdir()
    task = program(name, root, data_folder, teachers)
    whole = worker(**task, copies=str(copies))
    assert whole["code"] == 0 and not whole["read"], whole
    assert {"open", "write", "fsync", "replace", "link", "close"} <= whole["calls"].keys()
    expected, names, step = comparable(root / "run"), kills.content(root).keys(), 0
    states = sorted(copies.iterdir(), key=lambda path: int(path.name))
    for state in states:
        shutil.rmtree(root)
        shutil.copytree(state, root)
        assert newest_step(root / "run") >= step, state  # what was saved stays saved
        step = newest_step(root / "run")
        again = worker(**task)
        assert again["code"] == 0 and not again["read"], (state, again)
        assert comparable(root / "run") == expected, state
        assert kills.content(root).keys() == names, state  # no debris
    count_calls(name, whole, states)
    assert len(states) > 40 and step == 5


def write_texts(folder, seed, train_words=2000):
    for split, words in (("train", train_words), ("dev", 500)):
        (folder / split).mkdir(parents=True)
        (folder / split / "a.txt").write_text(write_text(words, seed))
        seed += 1
    return ["--train", str(folder / "train"), "--dev", str(folder / "dev"), "--vocab-size", "300"]


@pytest.mark.parametrize("tokenizer", ["new", "kept"])
def test_a_kill_at_any_call_of_the_tokenizer_leaves_no_mixture(worker, tmp_path, tokenizer):
    """Old shards or new ones, or a folder that is refused; the same command makes it whole."""
    root, copies = tmp_path / "r", tmp_path / "copies"
    copies.mkdir()
    old, new = write_texts(tmp_path / "old", 1), write_texts(tmp_path / "new", 9, 3000)
    common = {"program": "tokenize_corpus", "folder": str(root)}
    assert worker(**common, arguments=[*old, "--out", str(root)])["code"] == 0
    before = kills.content(root)
    if tokenizer == "kept":  # with another one, old shards would be refused for that alone
        kept = shutil.copy(root / "tokenizer.model", tmp_path)
        new = [*new[:-2], "--tokenizer", kept]
    task = common | {"arguments": [*new, "--out", str(root)]}
    whole = worker(**task, copies=str(copies))
    after = kills.content(root)
    assert whole["code"] == 0 and after.keys() == before.keys() and after != before
    mixed, states = 0, sorted(copies.iterdir(), key=lambda path: int(path.name))
    for state in states:
        shutil.rmtree(root)
        shutil.copytree(state, root)
        found = {name: digest for name, digest in kills.content(root).items() if digest}
        if found not in (before, after):
            mixed += 1
            with pytest.raises(UserError):
                open_corpus(root)
        assert worker(**task)["code"] == 0
        assert kills.content(root) == after, state
    count_calls("tokenize_corpus", whole, states)
    assert mixed and len(states) > 5


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


@pytest.mark.parametrize("name", ["train", "distill", "tokenize_corpus"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    worker, data_folder, teachers, tmp_path, disk, name
):
    """Of thirteen sizes, from nothing to what the end leaves, which is less than a save needs."""
    (root, resize), refused = disk, 0
    if name == "tokenize_corpus":
        arguments = [*write_texts(tmp_path / "texts", 1), "--out", str(root / "run")]
        task = {"program": name, "arguments": arguments, "folder": str(root)}
        outcome = kills.content
    else:
        task, outcome = program(name, root, data_folder, teachers), comparable
    assert worker(**task)["code"] == 0
    expected, needed = outcome(root / "run"), shutil.disk_usage(root).used
    for part in range(13):
        shutil.rmtree(root / "run")
        (root / "states.cache").unlink(missing_ok=True)
        resize(4096 + needed * part // 12)
        found = worker(**task, watch=False)
        if found["code"]:
            refused += 1
            assert found["code"] == 1 and found["errors"].count("error: ") == 1, found
            assert "Traceback" not in found["errors"] and "free" in found["errors"], found
        resize(1 << 26)
        assert worker(**task)["code"] == 0 and outcome(root / "run") == expected
    DISKS[name] = refused
    FIGURES["full disks"] = (
        "a disk in memory that is full, of 13 sizes each: "
        + ", ".join(f"{name} was stopped by {count}" for name, count in DISKS.items()),
        "one line each time; with room again the same command ends with the same bytes",
    )
    assert refused > 5
