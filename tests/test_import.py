"""Published models: folders of their forms compute and tokenize what transformers does."""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
import transformers

import distill
import evaluate
import export_hf
import generate
import model as models
import published
import tokenize_corpus
from conftest import ROOT, run, write_text
from published import FORMS, NASTY, TOKENIZERS
from tokenizer import Tokenizer
from training.checkpoint import read_checkpoint
from training.io import UserError

NAMES = ("tokenizer.model", "tokenizer.json", "vocab.json")
TEXTS = [*NASTY, *write_text(600, seed=7).split("\n")]


def imported(folder):
    """The path of our checkpoint of a folder."""
    out = folder.with_suffix(".pt")
    assert run(export_hf, "--import", folder, "--out", out) == 0
    return out


def tokenizer_file(folder):
    return next(folder / name for name in NAMES if (folder / name).exists())


def largest_difference(ours, folder):
    """Between our logits and those of transformers' model of a folder."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(ours.config.vocab_size, (3, 64))
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


def their_ids(folder, texts=TEXTS):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_ids_are_those_of_transformers_and_what_comes_in_goes_out(form, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "exported"
    published.save_model(theirs, **FORMS[form])
    ours, checkpoint = models.load_checkpoint(imported(theirs))
    assert largest_difference(ours, theirs) <= 1e-5
    tokenizer = Tokenizer.of_checkpoint(checkpoint, "it")
    assert_same_ids(tokenizer, theirs)
    assert tokenizer.identity == Tokenizer.load(tokenizer_file(theirs)).identity
    assert run(export_hf, theirs.with_suffix(".pt"), "--out", out) == 0
    assert largest_difference(ours, out) <= 1e-5
    assert_same_ids(tokenizer, out)


def assert_same_ids(tokenizer, folder):
    """Where a tokenizer puts a blank before a text, a text that begins with one is left out.

    Versions of transformers differ about it.
    """
    texts, blank = TEXTS, " " if tokenizer.adds_space else ""
    if blank:
        texts = [text for text in texts if not unicodedata.normalize("NFKC", text[:1]).isspace() and text]
    ours = tokenizer.encode([blank + text for text in texts])
    for text, expected, ids in zip(texts, their_ids(folder, texts), ours):
        assert ids == expected, text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_of_lines_are_those_of_the_text_and_give_it_back(name, tmp_path):
    TOKENIZERS[name](tmp_path)
    tokenizer = Tokenizer.load(tokenizer_file(tmp_path))
    lines = [line for text in TEXTS for line in text.split("\n") if line.strip()]
    text = "\n".join(lines)
    ids = tokenizer.encode(text)
    assert [i for line in tokenizer.encode([f"{line}\n" for line in lines]) for i in line][:-1] == ids
    if "Baby Llama" not in name:  # it normalises text
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"
    assert not tokenizer.special_ids & set(tokenizer.encode("<s> </s> <pad> <|endoftext|>"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_token_stands_for_its_characters(name, tmp_path):
    TOKENIZERS[name](tmp_path)
    tokenizer = Tokenizer.load(tokenizer_file(tmp_path))
    text = "the old  dog don't naïve\tcat"
    tokens = tokenizer.tokens(text)
    assert tokens.ids == tokenizer.encode(text) and not any(" " in piece for piece in tokens.pieces)
    for i, (start, stop) in zip(tokens.ids, tokens.offsets):
        if (decoded := tokenizer.decode([i])).isascii():
            assert decoded == text[start:stop]
        assert tokenizer.begins_with_space(i) == text[start:stop][:1].isspace()
    assert tokens.offsets[0][0] == 0 and tokens.offsets[-1][1] == len(text)


def test_blocks_of_a_text_have_its_tokens_where_newlines_are_joined(tmp_path):
    TOKENIZERS["GPT-2"](tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    tokenizer.call_characters = 40
    text = "the cat\n\nthe dog\n\n\nthe \n garden\n\n\n\na river\n  the old\ndog\n" * 30
    assert tokenizer.encode("\n\n\n") != 3 * tokenizer.encode("\n")
    ids, exact = tokenize_corpus.encode(tokenizer, text)
    assert ids.tolist() == tokenizer.encode(text) and exact


def test_special_tokens_are_those_that_a_folder_names(tmp_path):
    expected = {
        "Baby Llama": (0, 1, 2, None),
        "GPT-2": (None, 0, 0, None),
        "SmolLM2": (None, 0, 0, 0),
        "Llama 2": (None, 1, 2, 0),
    }
    for name, ids in expected.items():
        folder = tmp_path / name
        config = TOKENIZERS[name](folder)
        published.write_json(folder, "config.json", config)
        tokenizer = Tokenizer.load(tokenizer_file(folder))
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == ids, name


METASPACE = {"type": "Metaspace", "replacement": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREFIXES = {  # of several versions of the library: with a blank before each text, the last without
    "older": {"pre_tokenizer": METASPACE | {"add_prefix_space": True}},
    "both": {"pre_tokenizer": METASPACE | {"add_prefix_space": True, "prepend_scheme": "first"}},
    "newer": {"pre_tokenizer": METASPACE | {"prepend_scheme": "always", "split": False}},
    "normalizer": {
        "pre_tokenizer": None,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE],
        },
    },
    "none": {"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
}


def test_the_blank_before_a_text_is_known_in_each_spelling(tmp_path):
    published.llama2_json(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for name, rules in PREFIXES.items():
        tokenizer = Tokenizer.read(json.dumps(content | rules).encode())
        assert tokenizer.adds_space == (name != "none")
        assert tokenizer.decode(tokenizer.encode("the cat")[:1])[0] == "t", name
        assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat", name


def test_a_vocabulary_is_the_same_tokenizer_as_its_json(tmp_path):
    published.gpt2(tmp_path)
    tokenizer, size = Tokenizer.load(tmp_path / "tokenizer.json"), 400
    published.gpt2_vocabulary(tmp_path)
    other = Tokenizer.load(tmp_path / "vocab.json")
    assert other.vocabulary_size == tokenizer.vocabulary_size == size
    assert other.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_pickled_weights_in_several_files_are_read(tmp_path):
    folder = tmp_path / "theirs"
    published.save_model(folder, **FORMS["Baby Llama"])
    expected = read_checkpoint(imported(folder))
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / "unused")
    for i in range(2):
        part = {name: weights[name] for name in sorted(weights)[i::2]}
        torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    folder.with_suffix(".pt").unlink()
    assert read_checkpoint(imported(folder))["digest"] == expected["digest"]


def test_pickled_weights_that_hold_code_are_refused(tmp_path, refused):
    published.save_model(tmp_path / "theirs", **FORMS["Baby Llama"])
    torch.save({"a": print}, tmp_path / "theirs" / "pytorch_model.bin")
    error = refused(export_hf, "--import", tmp_path / "theirs", "--out", tmp_path / "out.pt")
    assert "pytorch_model.bin is damaged, or holds more than tensors" in error


def test_a_name_of_the_hub_is_answered_with_how_to_download_it(tmp_path, refused):
    error = refused(export_hf, "--import", "someone/a-model", "--out", tmp_path / "out.pt")
    assert "hf download someone/a-model --local-dir a-model" in error


def change(**changes):
    """A change of a tokenizer.json."""

    def rewrite(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(content[key], dict) else value
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return rewrite


FAULTS = {
    "another kind": (change(model={"type": "Unigram"}), "is of the type 'Unigram': only BPE is read"),
    "no merges": (change(model={"merges": None}), "is no tokenizer.json that can be read"),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
    "a huge id": (change(model={"vocab": {"a": 1 << 60}}), "ids that no vocabulary has"),
    "rules that are unknown": (change(pre_tokenizer={"type": "Magic"}), "is no tokenizer.json that can be"),
    "lines that are trimmed": (
        change(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        "the tokens of lines are not those of a text",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_json_that_is_not_ours_to_read_is_one_line(fault, tmp_path, refused):
    break_it, expected = FAULTS[fault]
    published.save_model(tmp_path / "theirs", **FORMS["BabyLM's GPT-2"])
    break_it(tmp_path / "theirs")
    error = refused(export_hf, "--import", tmp_path / "theirs", "--out", tmp_path / "out.pt")
    assert expected in error and not (tmp_path / "out.pt").exists()


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(tmp_path, refused):
    published.save_model(tmp_path / "theirs", **FORMS["BabyLM's GPT-2"])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    published.write_json(tmp_path / "theirs", "config.json", config | {"vocab_size": 300})
    error = refused(export_hf, "--import", tmp_path / "theirs", "--out", tmp_path / "out.pt")
    assert "400 pieces for 300 embeddings" in error


def test_without_the_package_a_checkpoint_says_what_its_tokenizer_needs(tmp_path, monkeypatch, refused):
    published.save_model(tmp_path / "theirs", **FORMS["BabyLM's GPT-2"])
    checkpoint = imported(tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    error = refused(generate, checkpoint, "--prompt", "the", "--device", "cpu")
    assert f"the tokenizer in {checkpoint} is a tokenizer.json: pip install tokenizers" in error


# ---- the paper's own tokenizer


@pytest.fixture(scope="module")
def paper_folder(tmp_path_factory):
    """A corpus with the paper's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("paper")
    for split, seed in (("train", 1), ("dev", 2)):
        (folder / split).mkdir()
        text = write_text(2000, seed) + "\nﬁne café\n\nnaïve\n"
        (folder / split / f"a.{split}").write_text(text, encoding="utf-8")
    options = ["--train", folder / "train", "--dev", folder / "dev", "--out", folder / "data"]
    assert run(tokenize_corpus, *options, "--kind", "byte-bpe", "--vocab-size", 300) == 0
    return folder


def test_the_papers_tokenizer_is_byte_level_after_nfkc(paper_folder):
    tokenizer = Tokenizer.load(paper_folder / "data" / "tokenizer.model")
    assert [tokenizer.piece(i) for i in range(3)] == ["<pad>", "<s>", "</s>"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("ﬁne ½ \x07 日本")) == "fine 1\u20442 \x07 日本"
    text = write_text(2000, 1).split("\n")
    again = tokenize_corpus.train_byte_bpe([(paper_folder / "train" / "a.train").read_text()], 300)
    assert Tokenizer.read(again).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "size, message", [(200, "at least --vocab-size 259"), (9000, "at most --vocab-size")]
)
def test_a_size_that_the_papers_tokenizer_cannot_have_is_refused(size, message):
    with pytest.raises(UserError, match=message):
        tokenize_corpus.train_byte_bpe([write_text(2000, 1)], size)


def test_surprisals_and_minimal_pairs_take_any_tokenizer(tmp_path):
    (tmp_path / "pairs").mkdir()
    pair = {"sentence_good": "the cat runs", "sentence_bad": "the dog's run"}
    (tmp_path / "pairs" / "a.jsonl").write_text(json.dumps(pair))
    (tmp_path / "in.txt").write_text("the cat  runs\n")
    for form in ("Baby Llama", "TinyLlama", "SmolLM2"):
        published.save_model(tmp_path / form, **FORMS[form])
        checkpoint, out = imported(tmp_path / form), tmp_path / f"{form}.tsv"
        files = ["--surprisals", out, "--text", tmp_path / "in.txt"]
        assert run(evaluate, checkpoint, *files, "--bow-correction", "--device", "cpu") == 0
        assert [row.split("\t")[2] for row in out.read_text().splitlines()] == ["word", "the", "cat", "runs"]
        model, saved = models.load_checkpoint(checkpoint)
        tokenizer = Tokenizer.of_checkpoint(saved, checkpoint)
        for convention in ("newline", "2023"):
            scores = ["--pair-scores", tmp_path / "s.npz", "--convention", convention]
            assert run(evaluate, checkpoint, "--pairs", tmp_path / "pairs", *scores, "--device", "cpu") == 0
            # As transformers' tokenizer has it, of a sentence alone and of the next line.
            start = [tokenizer.eos_id] if convention == "2023" else tokenizer.encode("\n")
            sentence = pair["sentence_good"]
            ids = tokenizer.encode(sentence)
            if convention == "2023":
                (ids,) = their_ids(tmp_path / form, [sentence])
            with torch.no_grad():
                log_p = model(torch.tensor([start + ids]))[0].log_softmax(-1)
            expected = sum(log_p[len(start) - 1 + k, i].item() for k, i in enumerate(ids))
            np.testing.assert_allclose(np.load(tmp_path / "s.npz")["good"][0], expected, rtol=1e-5)


def test_a_student_learns_from_a_published_model(tmp_path, paper_folder):
    """Data with its tokenizer, a student, and what the student's checkpoint says."""
    published.save_model(tmp_path / "theirs", **FORMS["Baby Llama"])
    teacher, data = imported(tmp_path / "theirs"), tmp_path / "data"
    splits = ["--train", paper_folder / "train", "--dev", paper_folder / "dev", "--out", data]
    assert run(tokenize_corpus, *splits, "--tokenizer", tmp_path / "theirs" / "tokenizer.json") == 0
    options = ["--teachers", teacher, "--model", "llama-tiny-student", "--data", data, "--steps", 2]
    options += ["--batch-size", 4, "--sequence-length", 32, "--device", "cpu", "--out", tmp_path / "run"]
    assert run(distill, *options) == 0
    student = read_checkpoint(tmp_path / "run" / "best.pt")
    assert student["tokenizer"]["identity"] == read_checkpoint(teacher)["tokenizer"]["identity"]
    assert [t["name"] for t in student["teachers"]] == ["theirs"]
    assert run(export_hf, tmp_path / "run" / "best.pt", "--out", tmp_path / "out") == 0
    # The exported tokenizer is as in training: no blank before a line, a newline between two texts.
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    assert tokenizer.adds_space and their_ids(tmp_path / "out") == tokenizer.encode(TEXTS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the cat", "a dog")["input_ids"] == tokenizer.encode("the cat\na dog")
    assert run(export_hf, "--import", tmp_path / "out", "--out", tmp_path / "back.pt") == 0
    assert read_checkpoint(tmp_path / "back.pt")["tokenizer"]["identity"] == tokenizer.identity


# ---- without the extras


EXTRAS = (
    "tokenizers",
    "safetensors",
    "transformers",
    "huggingface_hub",
    "matplotlib",
    "tensorboard",
    "wandb",
)
WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
import distill, evaluate, finetune, generate, make_toy_corpus, reproduce, tokenize_corpus, train

def run(program, command):
    assert not program.main(command.split()), command

run(make_toy_corpus, "--out text --words 3000")
run(tokenize_corpus, "--train text/train --dev text/dev --vocab-size 400 --out data")
recipe = " --data data --steps 2 --batch-size 4 --sequence-length 32 --device cpu"
run(train, "--model llama-tiny-student --out teacher" + recipe)
run(distill, "--model llama-tiny-student --teachers teacher/best.pt --out student" + recipe)
run(evaluate, "student/best.pt --device cpu")
run(generate, "student/best.pt --prompt a --tokens 3 --device cpu")
"""


def test_what_needs_no_extra_runs_without_them(tmp_path):
    command = [sys.executable, "-c", WITHOUT_EXTRAS, ",".join(EXTRAS)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
