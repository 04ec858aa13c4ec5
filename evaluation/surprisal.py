"""Surprisal, -log2 p in bits, of each word and token of a text, to compare with reading times.

A word is what whitespace parts. Its surprisal is the sum over its tokens; the blank before a word
is in its first token. Every line stands for itself, after what the convention puts before it.
"""

import math
from pathlib import Path

import torch

from evaluation.scoring import context_length, prefix_ids, scored_text, token_losses
from training.io import UserError, warn, write_text

COLUMNS = ("line", "position", "word", "bits", "tokens", "token_bits")


def token_bits(model, ids):
    """Bits of each of `ids` but the first, given those before it: a list of numbers.

    What is longer than the model's context is read in windows that overlap by half.
    """
    context, targets = context_length(model), len(ids) - 1
    found = []
    while len(found) < targets:
        start = max(0, min(len(found) - context // 2, targets - context))
        window = torch.tensor([ids[start : start + context + 1]])
        losses = token_losses(model, window[:, :-1], window[:, 1:])[0].double() / math.log(2)
        found += losses[len(found) - start :].tolist()
    return found


def words_of_tokens(processor, ids, text):
    """The pieces of a text and the number of the word, from 0, to which each belongs: two lists.

    A piece of blanks alone belongs to the word after it, or at the end to the word before. The
    tokenizer is one that keeps text as it is, so that its pieces are the text, cut.
    """
    word_at, number = [], -1  # by byte; a blank counts to the word after it
    for i, character in enumerate(text):
        if not character.isspace() and (i == 0 or text[i - 1].isspace()):
            number += 1
        word_at += [number + character.isspace()] * len(character.encode())
    pieces, numbers, start = [processor.id_to_piece(i) for i in ids], [], 0
    for i, piece in zip(ids, pieces):
        numbers.append(min(word_at[min(start, len(word_at) - 1)], number))
        start += 1 if processor.is_byte(i) else len(piece.replace("\u2581", " ").encode())
    return pieces, numbers


def word_surprisals(model, tokenizer, line, convention="newline"):
    """[(word, bits, pieces, bits of each piece)] of a line.

    Bits are None where nothing precedes: the first token under convention 2025, and its word.
    """
    text = scored_text(line, convention)
    own = tokenizer.encode(text)
    ids = prefix_ids(tokenizer, convention) + own
    pieces, numbers = words_of_tokens(tokenizer.processor, own, text)
    bits = [None, *token_bits(model, ids)][-len(own) :]  # without what precedes the line
    found = []
    for number, word in enumerate(text.split()):
        mine = [i for i, owner in enumerate(numbers) if owner == number]
        parts = [bits[i] for i in mine]
        total = None if None in parts else sum(parts)
        found.append((word, total, [pieces[i] for i in mine], parts))
    return found


def write_surprisals(path, text_path, model, tokenizer, convention="newline"):
    """Writes the surprisals of a text's lines as a table whose columns are `COLUMNS`.

    Tokens and their bits are parted by blanks. Raises `UserError` for a text that is not UTF-8.
    """
    try:
        text = Path(text_path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{text_path} is not UTF-8: convert it, for example with iconv") from error
    if text.startswith("\ufeff"):
        warn(f"{text_path}: its byte-order mark is left out")
    lines = text.removeprefix("\ufeff").split("\n")

    def number(value):
        return "" if value is None else f"{value:.6f}"

    rows = [COLUMNS]
    for i, line in enumerate(lines, 1):
        if line.strip():
            words = word_surprisals(model, tokenizer, line, convention)
            for position, (word, bits, pieces, parts) in enumerate(words, 1):
                values = " ".join(map(number, parts))
                rows.append((str(i), str(position), word, number(bits), " ".join(pieces), values))
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))
