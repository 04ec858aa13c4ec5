"""Surprisal, -log2 p in bits, of each word and token of a text, to compare with reading times.

Whitespace separates words. The bits of a word are the sum over its tokens; the blank before a word
is part of its first token. Each line is scored alone, after the prefix of the convention.

A blank ends a word, but its bits are in the next word. The corrected bits of a word have the blank
after it in place of the blank before it (Pimentel and Meister 2024, arXiv 2406.14561):

    corrected = bits - log2 P(blank | up to the word's end) + log2 P(blank | up to its start)

P(blank) is the sum over all pieces that begin with whitespace. The first word of a line has no
blank before it, unless the convention puts one there.
"""

import bisect
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from corpus.text_files import read_text
from evaluation.scoring import context_length, prefix_ids, scored_text
from training.io import write_text

COLUMNS = ("line", "position", "word", "bits", "tokens", "token_bits")


class Word(NamedTuple):
    """A word of a line. Bits are None where they are not defined."""

    text: str
    bits: float | None
    pieces: list[str]
    piece_bits: list[float | None]
    corrected_bits: float | None


@torch.no_grad()
def token_bits(model, ids, blanks=()):
    """Bits of each of `ids` but the first, and after each of `ids` those of any of `blanks`: two lists.

    A text beyond the model's context is read in windows that overlap by half.
    """
    context, device = context_length(model), next(model.parameters()).device
    bits, blank_bits = [], []
    while (done := len(blank_bits)) < len(ids):
        start = max(0, min(done - context // 2, len(ids) - context))
        window = torch.tensor([ids[start : start + context]], device=device)
        log2_p = model(window)[0, done - start :].float().log_softmax(-1) / math.log(2)  # (N, V)
        targets = torch.tensor(ids[done + 1 : start + context + 1], dtype=torch.long, device=device)
        bits += (-log2_p[: len(targets)].gather(1, targets[:, None])[:, 0]).tolist()
        blank_bits += (-torch.exp2(log2_p[:, list(blanks)]).sum(-1).log2()).tolist()
    return bits, blank_bits


def blank_pieces(tokenizer):
    """The ids of the pieces that begin with whitespace."""
    return [i for i in range(tokenizer.vocabulary_size) if tokenizer.begins_with_space(i)]


def align(tokenizer, text):
    """Words (regular expression matches), tokens (ids, pieces, offsets), and each token's word number.

    The tokenizer says which characters a token stands for, whatever it normalises or inserts. A
    token belongs to the first word that it has a character of; without any, to the word after it,
    or at the end to the word before.
    """
    words = list(re.finditer(r"\S+", text))
    ends = [word.end() for word in words]
    tokens = tokenizer.tokens(text)
    numbers = [min(bisect.bisect_right(ends, start), len(ends) - 1) for start, _ in tokens.offsets]
    return words, tokens, numbers


def word_surprisals(model, tokenizer, line, convention="newline", blanks=()):
    """The `Word`s of a line. `blanks`, from `blank_pieces`, are needed for the corrected bits.

    Bits are None for a word without a token of its own, and for the first token if no prefix
    precedes it. Corrected bits are None as well where no token begins at a boundary of the word.
    """
    prefix = prefix_ids(tokenizer, convention)
    words, tokens, numbers = align(tokenizer, scored_text(line, convention, tokenizer))
    ids, blank_ids = tokens.ids, frozenset(blanks)
    is_blank = [i in blank_ids for i in ids]
    bits, blank_bits = token_bits(model, prefix + ids, blanks)
    bits = [None, *bits][len(prefix) :]  # of each of `ids`
    blank_before = [None, *blank_bits][len(prefix) :]  # each of `ids`, and at the end of the line
    members = [[] for _ in words]
    for i, number in enumerate(numbers):
        members[number].append(i)
    results = []
    for word, own in zip(words, members):
        own_bits, total, corrected = [bits[i] for i in own], None, None
        if own and None not in own_bits:
            total, first = sum(own_bits), own[0]
            # Without the blanks at the end of the line, which the last word has too.
            end = next((i for i in own if tokens.offsets[i][0] >= word.end()), own[-1] + 1)
            if blanks and (first == 0 or is_blank[first]) and (end == len(ids) or is_blank[end]):
                before = blank_before[first] if is_blank[first] else 0
                corrected = sum(bits[first:end]) - before + blank_before[end]
        results.append(Word(word.group(), total, [tokens.pieces[i] for i in own], own_bits, corrected))
    return results


def write_surprisals(path, text_path, model, tokenizer, convention="newline", correct=False):
    """Writes the surprisals of a text's lines as a tab-separated table with the `COLUMNS`.

    `correct` adds the column corrected_bits. Tokens and their bits are separated by blanks. Raises
    `UserError` for a text that cannot be read.
    """
    blanks = blank_pieces(tokenizer) if correct else ()

    def cell(bits):
        return "" if bits is None else f"{bits:.6f}"

    rows = [(*COLUMNS, "corrected_bits") if correct else COLUMNS]
    for i, line in enumerate(read_text(Path(text_path)).split("\n"), 1):
        words = word_surprisals(model, tokenizer, line, convention, blanks) if line.strip() else []
        for position, word in enumerate(words, 1):
            pieces = " ".join(word.pieces).replace("\t", "<0x09>")
            row = [str(i), str(position), word.text, cell(word.bits), pieces]
            row.append(" ".join(map(cell, word.piece_bits)))
            rows.append([*row, cell(word.corrected_bits)] if correct else row)
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))
