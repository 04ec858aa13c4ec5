"""Fixtures: a corpus, a tokenizer and shards so small that every test can have its own run."""

import os
import random
import signal

import numpy as np
import pytest
import torch

import export_hf
import model as models
import tokenize_corpus
from data import Tokenizer, TokenShard, write_shard
from train import TrainStep

torch.set_num_threads(2)
TEXT = "the a cat dog child sees hears small old garden river runs sleeps and but never"
WORDS = TEXT.split(" ")


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
    return Tokenizer(tokenize_corpus.train_tokenizer([text], vocabulary_size))


def write_split(folder, split, tokenizer, texts):
    """Writes `texts`, {name: text}, as the folder's train.bin or dev.bin."""
    entries = [
        (name, np.array(tokenizer.encode(text)), len(text.split()), len(text.encode()))
        for name, text in texts.items()
    ]
    write_shard(folder / f"{split}.bin", entries, tokenizer, cleaning="none")


def hf_twin(model, weights=True):
    """Hugging Face's model of the same shape, and with the same weights unless asked otherwise."""
    import transformers  # here, because it takes seconds and few tests need it

    kind = models.architecture(model)
    described = export_hf.hf_config(model, kind)
    for key in ("architectures", "torch_dtype", "dtype"):
        del described[key]
    config = transformers.AutoConfig.for_model(**described)
    twin = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if weights:
        tensors = export_hf.hf_weights(kind, model.state_dict())
        missing, unexpected = twin.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        assert not missing or twin.lm_head.weight is twin.get_input_embeddings().weight
    return twin.eval()


def interrupt_after(
    monkeypatch, steps, then=lambda: os.kill(os.getpid(), signal.SIGTERM), kind=TrainStep
):
    """Makes a run stop itself during the given step."""
    call, count = kind.__call__, [0]

    def counted(self, *arguments):
        count[0] += 1
        if count[0] == steps:
            then()
        return call(self, *arguments)

    monkeypatch.setattr(kind, "__call__", counted)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(write_text(2000, seed=1))


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


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
