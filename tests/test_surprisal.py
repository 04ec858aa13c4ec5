"""Surprisals are the model's own log-probabilities, and every token belongs to one word."""

import csv
import math

import pytest
import torch

import evaluate
import model as models
from conftest import save_model, write_text
from evaluation.minimal_pairs import sentence_scores
from evaluation.surprisal import token_bits, word_surprisals, words_of_tokens
from training.io import run_program

V = 300


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build_model("llama-tiny", V).eval()


LINES = ["the cat runs", "  the  old dog sees it. ", "ünïcode 漢字 x", "a"]


@pytest.mark.parametrize("convention", ["newline", "2023", "2024", "bos"])
@pytest.mark.parametrize("line", LINES)
def test_words_add_up_to_the_sentences_log_probability(model, tokenizer, line, convention):
    words = word_surprisals(model, tokenizer, line, convention)
    assert [word for word, *_ in words] == line.split()
    total = sum(bits for _, bits, *_ in words) * math.log(2)
    expected = -sentence_scores(model, tokenizer, [line], convention)[0].item()
    assert total == pytest.approx(expected, rel=1e-5)
    for _, bits, pieces, parts in words:
        assert bits == pytest.approx(sum(parts)) and len(pieces) == len(parts) > 0


def test_without_context_the_first_token_has_no_bits(model, tokenizer):
    words = word_surprisals(model, tokenizer, "the cat runs", "2025")
    assert words[0][1] is None and words[0][3][0] is None
    assert all(bits is not None for _, bits, *_ in words[1:])


def test_a_tokens_word_is_that_of_its_letters(tokenizer):
    text = "the old dog  sees"
    pieces, numbers = words_of_tokens(tokenizer.processor, tokenizer.encode(text), text)
    assert "".join(pieces).replace("\u2581", " ") == text
    for number, word in enumerate(text.split()):
        mine = [p for p, n in zip(pieces, numbers) if n == number]
        assert "".join(mine).replace("\u2581", " ").strip() == word


def test_a_text_beyond_the_context_is_read_in_windows(model, tokenizer):
    ids = tokenizer.encode(write_text(900, seed=3))[:700]
    bits = token_bits(model, ids)
    assert len(bits) == 699
    whole = token_bits(model, ids[:257])
    assert bits[:256] == pytest.approx(whole, rel=1e-4)
    with torch.no_grad():  # the last token, from the longest context there is
        logits = model(torch.tensor([ids[443:699]]))[0, -1]
    expected = -logits.log_softmax(-1)[ids[699]].item() / math.log(2)
    assert bits[-1] == pytest.approx(expected, rel=1e-4)


def test_the_table_has_a_row_for_each_word(model, tokenizer, tmp_path):
    save_model(tmp_path / "a.pt", model, tokenizer, "llama-tiny")
    (tmp_path / "in.txt").write_text("\ufeffthe cat runs\n\nthe dog\n", encoding="utf-8")
    arguments = [str(tmp_path / "a.pt"), "--surprisals", str(tmp_path / "out.tsv")]
    arguments += ["--text", str(tmp_path / "in.txt"), "--device", "cpu"]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    with open(tmp_path / "out.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    places = [(r["line"], r["position"], r["word"]) for r in rows]
    assert places[:3] == [("1", "1", "the"), ("1", "2", "cat"), ("1", "3", "runs")]
    assert places[3:] == [("3", "1", "the"), ("3", "2", "dog")]
    for row in rows:
        total = sum(map(float, row["token_bits"].split()))
        assert float(row["bits"]) == pytest.approx(total, abs=1e-5)
