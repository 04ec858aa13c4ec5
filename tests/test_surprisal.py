"""Surprisals are the model's own log-probabilities, and every token belongs to the word that it spells."""

import csv
import math

import pytest
import torch

import evaluate
import model as models
from conftest import make_tokenizer, save_model, write_text
from evaluation.minimal_pairs import sentence_scores
from evaluation.surprisal import align, blank_pieces, token_bits, word_surprisals
from training.io import run_program

V = 300


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build_model("llama-tiny", V).eval()


LINES = ["the cat runs", "  the  old dog sees it. ", "ünïcode 漢字 x", "a", "the \u2581\u2581 dog sees"]


@pytest.mark.parametrize("convention", ["newline", "2023", "2024", "bos"])
@pytest.mark.parametrize("line", LINES)
def test_words_add_up_to_the_sentences_log_probability(model, tokenizer, line, convention):
    words = word_surprisals(model, tokenizer, line, convention)
    assert [word.text for word in words] == line.split()
    expected = -sentence_scores(model, tokenizer, [line], convention)[0].item() / math.log(2)
    assert sum(word.bits for word in words) == pytest.approx(expected, rel=1e-5)
    for word in words:
        assert word.bits == pytest.approx(sum(word.piece_bits)) and len(word.pieces) > 0


def test_without_a_prefix_the_first_token_has_no_bits(model, tokenizer):
    first, *others = word_surprisals(model, tokenizer, "the cat runs", "2025", blank_pieces(tokenizer))
    assert first.bits is first.piece_bits[0] is first.corrected_bits is None
    assert all(word.bits is not None and word.corrected_bits is not None for word in others)


SPELLED = [  # a text, and its words' pieces joined; "_" stands for U+2581
    ({}, "the old dog", ["_the", "_old", "_dog"]),  # a dummy prefix
    ({"add_dummy_prefix": False}, "the  old dog ", ["the", "_old", "_dog"]),
    ({}, "\ufb01ne \u00bd, cat", ["_fine", "_1<0xE2><0x81><0x84>2<0x2C>", "_cat"]),  # NFKC
    ({}, "the\u00a0cat\u3000runs", ["_the", "_cat", "_runs"]),  # other blanks, which NFKC makes one
    ({"remove_extra_whitespaces": False}, "the \u2581\u2581 dog", ["_the", "___", "_dog"]),
]


@pytest.mark.parametrize("options, text, expected", SPELLED)
def test_a_token_belongs_to_the_word_whose_letters_it_spells(options, text, expected):
    tokenizer = make_tokenizer(**options)
    words, tokens, numbers = align(tokenizer, text)
    assert [word.group() for word in words] == text.split() and tokens.ids == tokenizer.encode(text)
    spelled = [""] * len(words)
    for piece, number in zip(tokens.pieces, numbers):
        spelled[number] += piece
    for byte, letter in ((b, chr(b)) for b in range(33, 127)):
        spelled = [word.replace(f"<0x{byte:02X}>", letter) for word in spelled]
        expected = [word.replace(f"<0x{byte:02X}>", letter) for word in expected]
    assert [word.replace("\u2581", "_") for word in spelled] == expected


def test_no_break_spaces_separate_words_in_this_projects_tokenizer(tokenizer):
    words, tokens, numbers = align(tokenizer, "the\u00a0cat runs")
    assert [word.group() for word in words] == ["the", "cat", "runs"]
    own = [tokenizer.decode([i for i, n in zip(tokens.ids, numbers) if n == word]) for word in range(3)]
    assert own == ["the", "\u00a0cat", " runs"]


def test_a_word_without_a_token_of_its_own_has_no_bits(model):
    tokenizer = make_tokenizer(user_defined_symbols=["the\u00a0cat"], normalization_rule_name="identity")
    blanks = blank_pieces(tokenizer)
    first, second, last = word_surprisals(model, tokenizer, "the\u00a0cat runs", "newline", blanks)
    assert first.bits > 0 and second.bits is None and last.bits > 0
    assert second.pieces == [] and second.corrected_bits is None


def test_corrected_bits_move_the_blank_from_the_next_word_to_its_own(model, tokenizer):
    """Against a sum over all pieces that begin a word, from the softmax of every prefix."""
    line = "the old dog sees it"
    ids = tokenizer.encode("\n" + line)
    assert ids[0] == tokenizer.encode("\n")[0]
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(V)]
    whitespace = {f"<0x{byte:02X}>" for byte in b" \t\n\r\v\f"}
    begins = torch.tensor([piece[0] in "\u2581\n" or piece in whitespace for piece in pieces])
    starts = [i for i in range(1, len(ids)) if pieces[ids[i]][0] == "\u2581"]
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0].softmax(-1).double()
    blank = -p[:, begins].sum(-1).log2()  # after each of `ids`
    bits = [-p[i - 1, ids[i]].log2().item() for i in range(1, len(ids))]
    words = word_surprisals(model, tokenizer, line, blanks=blank_pieces(tokenizer))
    for word, first, end in zip(words, [1, *starts], [*starts, len(ids)]):
        before = blank[first - 1].item() if first > 1 else 0  # the newline begins the first word
        expected = sum(bits[first - 1 : end - 1]) - before + blank[end - 1].item()
        assert word.corrected_bits == pytest.approx(expected, rel=1e-4)
    total = sum(word.corrected_bits for word in words)  # all blanks cancel, but for the last
    assert total == pytest.approx(sum(bits) + blank[-1].item(), rel=1e-5)
    spaced = word_surprisals(model, tokenizer, line + "  ", blanks=blank_pieces(tokenizer))
    assert [w.corrected_bits for w in spaced] == pytest.approx([w.corrected_bits for w in words], rel=1e-5)


def test_a_text_beyond_the_context_is_read_in_windows(model, tokenizer):
    ids = tokenizer.encode(write_text(900, seed=3))[:700]
    bits, _ = token_bits(model, ids)
    assert len(bits) == 699
    assert bits[:255] == pytest.approx(token_bits(model, ids[:256])[0], rel=1e-4)
    with torch.no_grad():  # the last window has the last 256 tokens
        logits = model(torch.tensor([ids[444:699]]))[0, -1]
    expected = -logits.log_softmax(-1)[ids[699]].item() / math.log(2)
    assert bits[-1] == pytest.approx(expected, rel=1e-4)


def test_the_table_has_a_row_for_each_word(model, tokenizer, tmp_path):
    save_model(tmp_path / "a.pt", model, tokenizer, "llama-tiny")
    (tmp_path / "in.txt").write_text("\ufeffthe cat runs\n\nthe\tdog\n", encoding="utf-8")
    arguments = [tmp_path / "a.pt", "--surprisals", tmp_path / "out.tsv", "--bow-correction"]
    arguments += ["--text", tmp_path / "in.txt", "--device", "cpu"]
    assert run_program(lambda: evaluate.main([str(argument) for argument in arguments])) == 0
    with open(tmp_path / "out.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    cells = [(row["line"], row["position"], row["word"]) for row in rows]
    assert cells[:3] == [("1", "1", "the"), ("1", "2", "cat"), ("1", "3", "runs")]
    assert cells[3:] == [("3", "1", "the"), ("3", "2", "dog")]
    for row in rows:
        total = sum(map(float, row["token_bits"].split()))
        assert float(row["bits"]) == pytest.approx(total, abs=1e-5) != float(row["corrected_bits"])
