"""Fixtures: a corpus, a tokenizer and shards so small that every test can have its own run."""

import datetime
import io
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import model as models
import tokenize_corpus
import train
from corpus.token_shards import write_shard
from data import TokenShard, open_corpus
from distill import DistillConfig
from tokenizer import Tokenizer
from train import CrossEntropyObjective, TrainConfig, TrainStep, build_optimizer
from training import logger, resume
from training.checkpoint import content_digest, read_checkpoint, write_checkpoint
from training.device import autocast_for, choose_device
from training.io import atomic_write, run_program
from training.logger import TrainingLogger, commit
from training.options import may_change
from training.resume import Provenance

# Tiny models gain nothing from a second thread, and two that wait for each other use both cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
ROOT = Path(__file__).parent.parent
FIGURES = {}  # {name: (what was done, outcome)} of the long tests
WORDS = "the a cat dog child sees hears small old garden river runs sleeps and but never".split(" ")
needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").is_char_device(), reason="needs /dev/full, a device of Linux"
)
# A short run of train.py or distill.py.
OPTIONS = (
    "--steps 6 --batch-size 4 --sequence-length 32 --device cpu --precision fp32 "
    "--eval-sequences 8 --log-every 2"
).split()


def write_text(num_words, seed):
    """Lines of words in which each depends on the one before, so that there is much to learn."""
    generator = random.Random(seed)
    words, word = [], 0
    for i in range(num_words):
        word = (word * 5 + generator.choice((1, 1, 2))) % len(WORDS)
        words.append(WORDS[word] + ("\n" if i % 9 == 8 else ""))
    return " ".join(words).replace("\n ", "\n")


def train_tokenizer(text, vocabulary_size=300):
    """A tokenizer of a few hundred pieces."""
    return Tokenizer.read(tokenize_corpus.train_tokenizer([text], vocabulary_size))


def make_tokenizer(**options):
    """A tokenizer of SentencePiece's default options, but for some."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(write_text(2000, seed=1).split("\n")),
        model_writer=buffer,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 300, "byte_fallback": True} | options,
    )
    return Tokenizer.read(buffer.getvalue())


def write_split(folder, split, tokenizer, texts):
    """Writes `texts`, {name: text}, as the folder's train.bin or dev.bin."""
    entries = [
        (name, np.array(tokenizer.encode(text)), len(text.split()), len(text.encode()))
        for name, text in texts.items()
    ]
    write_shard_file(folder / f"{split}.bin", entries, tokenizer)


def write_shard_file(path, texts, tokenizer, cleaning="none"):
    """Writes the shard `path`, and returns its header; see `write_shard`."""
    with atomic_write(path) as file:
        return write_shard(file, texts, tokenizer, cleaning)


def save_model(path, model, tokenizer, name="llama-tiny", length=16, **fields):
    """Writes a checkpoint of `model`; other fields of the format by their names."""
    given = provenance_of(model, tokenizer, name)
    options = {"config": {"sequence_length": length}, "progress": {}}
    write_checkpoint(
        path, model=given.model, weights=model.state_dict(), tokenizer=tokenizer, **options | fields
    )


def provenance_of(model, tokenizer, name="llama-tiny"):
    """The provenance of a model whose data have no digests."""
    architecture = models.architecture(model.config)
    return Provenance(name, architecture, model.config, tokenizer, {})


def resign(path, change):
    """Changes a checkpoint and gives it a valid digest, as someone else may do."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["digest"]
    change(checkpoint)
    torch.save(checkpoint | {"digest": content_digest(checkpoint)}, path)


def step_of(objective, micro_batch_size=None, weight_decay=0.0, device="cpu", precision="fp32"):
    """The train step of an objective."""
    optimizers = build_optimizer(objective, weight_decay)
    autocast = autocast_for(torch.device(device), precision)
    return TrainStep(objective, optimizers, autocast, micro_batch_size)


def run(program, *arguments):
    """The exit code of a program's command line."""
    return run_program(lambda: program.main([*map(str, arguments)]))


def config_for(data_folder, out, **changes):
    """A run of twelve steps, with dropout and two saves."""
    options = {
        "model": "gpt2-tiny",
        "data": str(data_folder),
        "out": str(out),
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 32,
        "learning_rate": 3e-3,
        "log_every": 2,
        "eval_sequences": 8,
        "save_every": 5,
        "device": "cpu",
        "precision": "fp32",
    }
    return models.with_hyperparameters(TrainConfig(**options | changes))


def trained(config):
    """Runs a training from its seed; the progress it ends with."""
    torch.manual_seed(config.seed)
    return fitted(CrossEntropyObjective(models.build_model(config.model, 300)), config)


def fitted(objective, config):
    """`fit` on the config's data."""
    return train.fit_corpus(objective, config, open_corpus(config.data), config.model)


def stopped(config, monkeypatch, step):
    """`trained`, which a signal stops during that step."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        return trained(config)


def weights(path):
    """The weights of a checkpoint."""
    return read_checkpoint(path)["weights"]


def same(tensors, others):
    """Whether two dicts of tensors have the same bits."""
    return tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)


def log_entries(out, speeds=False):
    """The lines of a run's log that belong to a step, by default without speeds."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    left_out = () if speeds else ("tokens_per_second",)
    return [{k: v for k, v in e.items() if k not in left_out} for e in entries if "step" in e]


def comparable(out):
    """What a run wrote, but for times: weights, moments, best weights, log."""
    full, best = (read_checkpoint(out / n) for n in ("checkpoint.pt", "best.pt"))
    free = may_change(DistillConfig)
    options = {key: value for key, value in full["config"].items() if key not in free}
    parts = [content_digest(full[key]) for key in ("weights", "training", "progress")]
    return options, parts, content_digest(best["weights"]), log_entries(out)


def interrupt_after(monkeypatch, steps, then=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Makes a run stop itself during the given step."""
    prepare, count = TrainStep.prepare, [0]

    def counted(self, batch):  # once a step, as a graph or not
        count[0] += 1
        if count[0] == steps:
            then()
        return prepare(self, batch)

    monkeypatch.setattr(TrainStep, "prepare", counted)


def write_in_background(setattr):
    """Lets runs on a CPU write checkpoints as on a GPU: a thread writes the host's own copy."""
    gather, init = resume.gather_on_rank_zero, TrainingLogger.__init__

    def init_in_background(self, *arguments):
        init(self, *arguments)
        self.in_background = True

    setattr(TrainingLogger, "__init__", init_in_background)
    for module in (resume, logger):
        setattr(module, "gather_on_rank_zero", lambda tensor: gather(tensor).clone())


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(write_text(2000, seed=1))


@pytest.fixture(scope="session")
def other_tokenizer():
    """A tokenizer of the same size with another piece."""
    return train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, tokenizer):
    """train.bin, dev.bin and tokenizer.model of some 6,000 tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    train = {"novels": write_text(3000, seed=2), "letters": write_text(2500, seed=3)}
    write_split(folder, "train", tokenizer, train)
    dev = {"novels": write_text(600, seed=4), "letters": write_text(500, seed=5)}
    write_split(folder, "dev", tokenizer, dev)
    return folder


@pytest.fixture(scope="session")
def train_shard(data_folder):
    return TokenShard(data_folder / "train.bin")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, tokenizer):
    """Paths of two untrained teachers."""
    folder, paths = tmp_path_factory.mktemp("teachers"), []
    for seed, name in enumerate(("gpt2-tiny", "llama-tiny")):
        torch.manual_seed(seed)
        paths.append(str(folder / f"{name}.pt"))
        save_model(paths[-1], models.build_model(name, 300), tokenizer, name, length=128)
    return paths


@pytest.fixture(scope="session")
def whole_run(data_folder, tmp_path_factory):
    """The folder of a run of `config_for` that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "r"
    trained(config_for(data_folder, out))
    return out


@pytest.fixture
def refused(capsys):
    """`refused(program, *arguments)`: the one line of error with which a command ends."""

    def end_of(program, *arguments):
        capsys.readouterr()
        assert run(program, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return end_of


@pytest.fixture(autouse=True)
def device_of_training(request):
    """On a GPU attention by cuDNN is off in tests too, whatever ran before."""
    if request.node.get_closest_marker("gpu"):
        choose_device("cuda")


@pytest.fixture(scope="session", autouse=True)
def faults_report():
    """Writes benchmarks/results/faults.md where all the long tests have run."""
    yield
    names = ("kills at a call", "full disks", "flips", "fields")
    FIGURES.setdefault("full disks", ("disks that are full", "not tried: none can be mounted"))
    if set(names) <= FIGURES.keys():
        where = f"{datetime.date.today()}, {os.cpu_count()} CPU cores, torch {torch.__version__}"
        lines = ["# Faults", "", f"`make test-faults`, commit {commit()}, {where}."]
        lines += ["", "| what was done | outcome |", "|---|---|"]
        lines += [f"| {' | '.join(FIGURES[name])} |" for name in names]
        (ROOT / "benchmarks" / "results" / "faults.md").write_text("\n".join(lines) + "\n")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
