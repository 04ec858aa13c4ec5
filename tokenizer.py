"""The tokenizer: a SentencePiece model, or the tokenizer.json of a published model."""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from training.io import UserError

VOCABULARY_SIZE = 16_000  # the paper's; a model in training takes its tokenizer's
PAD, BOS, EOS, UNK = 0, 1, 2, 3  # ids in tokenizers that we train: three as in the paper, and unk
LARGEST_VOCABULARY = 1 << 20


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    pieces: list[str]
    offsets: list[tuple[int, int]]  # the characters (start, stop) of the text that each stands for


class Tokenizer:
    """What both kinds of tokenizers have. `read` makes one of its bytes, `load` of a file.

    `identity` is a SHA-256: it is equal for two files with the same pieces, and different for two
    tokenizers that only have the same size. `pad_id`, `bos_id`, `eos_id` and `unk_id` are None if it
    has no such piece. `special_ids` is the set of ids that are not text, such as control pieces.

    A text is a part of a longer one here, as in training: the tokens of lines, one after another,
    are those of the text. Some published tokenizers put a blank before each text, which `encode`
    leaves out. They have `adds_space`.
    """

    adds_space = False
    call_characters = 1 << 14  # of a long text, to encode at a time by a core

    def __new__(cls, *arguments):
        """`Tokenizer(model_bytes)` is of the kind that the bytes are of."""
        kind = cls
        if cls is Tokenizer:
            kind = JsonTokenizer if bytes(arguments[0][:1]) == b"{" else SentencePieceTokenizer
        return super().__new__(kind)

    @staticmethod
    def read(model_bytes, name="tokenizer.model"):
        """The tokenizer with these bytes. Raises `UserError` if they are of none that can be read."""
        return Tokenizer(model_bytes, name)

    @staticmethod
    def load(path):
        """The tokenizer in the file `path`. Raises `UserError` if there is none."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: make it with python tokenize_corpus.py")
        model_bytes = path.read_bytes()
        if model_bytes[:1] == b"{":
            model_bytes = with_special_ids(model_bytes, path)
        return Tokenizer.read(model_bytes, str(path))

    @staticmethod
    def of_checkpoint(checkpoint, path):
        """The tokenizer in a checkpoint that was read from `path`.

        Raises `UserError` if it is damaged, has another identity, or has more pieces than logits.
        """
        saved = checkpoint["tokenizer"]
        tokenizer = Tokenizer.read(saved["model"].numpy(), f"the tokenizer in {path}")
        fits = tokenizer.vocabulary_size <= checkpoint["model"]["shape"]["vocab_size"]
        if not fits or tokenizer.identity != saved["identity"]:
            raise UserError(f"the tokenizer in {path} is not that of its model: use another")
        return tokenizer

    def encode(self, text):
        """The ids of `text`, or of each of a list of texts.

        No special token is added, and no text is encoded as one.
        """
        if isinstance(text, str):
            return self.encode_batch([text])[0].tolist()
        return [ids.tolist() for ids in self.encode_batch(text)]

    def decode(self, ids):
        """The text of `ids`: exactly the encoded text, unless the tokenizer normalises it."""
        return self.decode_batch([[int(i) for i in ids]])[0]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Decoding gives the encoded text, except that U+2581 becomes a space.

    Its `identity` is the SHA-256 of pieces, types and scores.
    """

    description = "SentencePiece"
    call_characters = 4000  # SentencePiece's time per character grows with the string

    def __init__(self, model_bytes, name="tokenizer.model"):
        self.model_bytes = bytes(model_bytes)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            self.vocabulary_size = self.processor.vocab_size()
            self.identity = self._identity()
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: pieces in no UTF-8
            raise UserError(f"{name} is not a SentencePiece model, or is damaged") from error
        if not self.vocabulary_size:
            raise UserError(f"{name} is not a SentencePiece model: it has no pieces")
        processor = self.processor
        ids = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (None if i < 0 else i for i in ids)
        tests = (processor.is_control, processor.is_unknown, processor.is_unused)
        self.special_ids = frozenset(i for i in range(self.vocabulary_size) if any(t(i) for t in tests))
        # Llama 2's puts a blank before each text. A newline takes it, and both are cut off again.
        self.adds_space = processor.encode("\n", return_type=str) == ["\u2581", "<0x0A>"]
        self.lead = "\n" if self.adds_space else ""
        self.lead_ids = processor.encode(self.lead)

    def _identity(self):
        flags = ("is_control", "is_unknown", "is_byte", "is_unused")
        digest = hashlib.sha256()
        for i in range(self.vocabulary_size):
            properties = [int(getattr(self.processor, flag)(i)) for flag in flags]
            piece = [self.processor.id_to_piece(i), properties, repr(self.processor.get_score(i))]
            digest.update(json.dumps(piece).encode())
        return digest.hexdigest()

    def encode_batch(self, texts):
        """A list of ids (N,), int32, of texts. SentencePiece has threads of its own."""
        threads = min(len(texts), os.cpu_count()) or 1
        texts = [self.lead + text for text in texts]
        encoded = self.processor.encode(texts, num_threads=threads, return_type="numpy")
        return [ids[len(self.lead_ids) :] for ids in encoded]

    def decode_batch(self, ids):
        """The texts of a list of lists of ids."""
        threads = min(len(ids), os.cpu_count()) or 1
        decoded = self.processor.decode([self.lead_ids + list(row) for row in ids], num_threads=threads)
        return [text[len(self.lead) :] for text in decoded]

    def tokens(self, text):
        """The `Tokens` of a text."""
        tokens = self.processor.encode(self.lead + text, return_type="offset_mapping")
        ids, pieces, offsets = (tokens[key][len(self.lead_ids) :] for key in ("ids", "pieces", "offsets"))
        return Tokens(ids, pieces, [(a - len(self.lead), b - len(self.lead)) for a, b in offsets])

    def piece(self, i):
        """The piece with the id `i`."""
        return self.processor.id_to_piece(i)

    def begins_with_space(self, i):
        """True for a piece that begins with whitespace."""
        piece = self.piece(i)
        if self.processor.is_byte(i):  # such as <0x0A>
            return bytes.fromhex(piece[3:5]).isspace()
        return piece[:1] == "\u2581" or piece[:1].isspace()


# ---- tokenizer.json


def import_tokenizers(what):
    """The optional package. Raises `UserError`, which says what needs it, if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{what}: pip install tokenizers") from error
    return tokenizers


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of a BPE. What encodes or decodes needs the optional package `tokenizers`.

    `model_bytes` is the file, with the ids of its special tokens as "special_ids". The `identity` is
    the SHA-256 of what text is turned into: pieces, merges, and the rules that are applied before.
    """

    description = "BPE (tokenizer.json)"

    def __init__(self, model_bytes, name="tokenizer.json"):
        self.model_bytes, self.name = bytes(model_bytes), name
        try:
            content = json.loads(self.model_bytes)
            model, added = content["model"], content["added_tokens"]
            if (kind := model.get("type", "BPE")) != "BPE":
                raise UserError(f"{name} is of the type {kind!r}: only BPE is read")
            roles = content.pop("special_ids", {})
            ids = [*model["vocab"].values(), *(token["id"] for token in added)]
            self.vocabulary_size = max(ids) + 1
            self.special_ids = frozenset(token["id"] for token in added if token["special"])
            self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
                roles.get(role) for role in ("pad", "bos", "eos", "unk")
            )
            rules = {key: content[key] for key in ("normalizer", "pre_tokenizer")}
            self.content = content | {"post_processor": None, "decoder": without_prefix(content["decoder"])}
            self.content |= {key: without_prefix(rule) for key, rule in rules.items()}
            self.adds_space = any(self.content[key] != rule for key, rule in rules.items())
            self.identity = self._identity()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{name} is no tokenizer.json that can be read") from error
        known = set(ids)
        if not (
            {type(i) for i in known} == {int}
            and 0 <= min(known) <= max(known) < LARGEST_VOCABULARY
            and set(roles.values()) <= known
        ):
            raise UserError(f"{name} has ids that no vocabulary has")

    def _identity(self):
        model = self.content["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]

        def stated(options):  # files of older versions lack options that are off
            return {key: value for key, value in options.items() if value and key != "type"}

        parts = [stated(model | {"merges": merges}), list(map(stated, self.content["added_tokens"]))]
        parts += [self.content["normalizer"], self.content["pre_tokenizer"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def processor(self):
        """The tokenizer of the package. Raises `UserError` if it is not installed."""
        tokenizers = import_tokenizers(f"{self.name} is a tokenizer.json")
        try:
            processor = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        except Exception as error:  # the package raises no other type
            raise UserError(f"{self.name} is no tokenizer.json that can be read: {error}") from error
        processor.encode_special_tokens = True  # a text that spells <s> stays text
        processor.no_padding()
        processor.no_truncation()
        return processor

    def encode_batch(self, texts):
        """A list of ids (N,), int32, of texts. The package has threads of its own."""
        encoded = self.processor.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(text.ids, np.int32) for text in encoded]

    def decode_batch(self, ids):
        """The texts of a list of lists of ids."""
        return self.processor.decode_batch([list(row) for row in ids], skip_special_tokens=False)

    def tokens(self, text):
        """The `Tokens` of a text."""
        encoded = self.processor.encode(text, add_special_tokens=False)
        pieces = [piece.replace(" ", "\u2581") for piece in encoded.tokens]
        return Tokens(encoded.ids, pieces, encoded.offsets)

    def piece(self, i):
        """The piece with the id `i`."""
        return self.processor.id_to_token(i)

    def begins_with_space(self, i):
        """True for a piece that begins with whitespace."""
        return self.decode([i])[:1].isspace()


def without_prefix(rule):
    """A rule of tokenizer.json that puts no blank before a text, and removes none."""
    if isinstance(rule, list):
        rules = [without_prefix(r) for r in rule]
        return [r for r in rules if r is not None]
    if not isinstance(rule, dict):
        return rule
    if rule.get("type") == "Prepend" or (rule.get("type") == "Strip" and "start" in rule):
        return None
    changed = {key: without_prefix(value) for key, value in rule.items()}
    if rule.get("type") == "Metaspace" and rule.get("add_prefix_space", True):
        changed["prepend_scheme"] = "never"  # older files do not have it
    if "add_prefix_space" in rule:
        changed["add_prefix_space"] = False
    return changed


def with_special_ids(model_bytes, path):
    """The bytes of a tokenizer.json with "special_ids", which other files of its folder name.

    Special tokens beyond the model's rows are left out: some versions of transformers added one to
    Baby Llama's. Of a vocab.json, the bytes of the tokenizer.json of a byte-level BPE with the
    merges.txt beside it. Raises `UserError` for files that cannot be read.
    """
    try:
        content, named = json.loads(model_bytes), {}
        is_vocabulary = not isinstance(content.get("model"), dict)  # which may have a piece "model"
        if "special_ids" in content and not is_vocabulary:
            return model_bytes
        for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
            if path.with_name(name).is_file():
                named |= json.loads(path.with_name(name).read_bytes())
        vocabulary = dict(content) if is_vocabulary else dict(content["model"]["vocab"])
        if not is_vocabulary:
            rows = named.get("vocab_size") or LARGEST_VOCABULARY
            added = [t for t in content["added_tokens"] if t["id"] < rows or not t["special"]]
            content["added_tokens"] = added
            vocabulary |= {token["content"]: token["id"] for token in added}
        special_ids = {}
        for role in ("pad", "bos", "eos", "unk"):
            token = named.get(f"{role}_token")
            token = token["content"] if isinstance(token, dict) else token
            i = vocabulary.get(token, named.get(f"{role}_token_id"))
            if i in vocabulary.values():
                special_ids[role] = i
        if is_vocabulary:
            merges = path.with_name("merges.txt")
            if not merges.is_file():
                raise UserError(f"{path}: beside a vocab.json must be its merges.txt")
            content = byte_level_bpe(vocabulary, merges.read_text(encoding="utf-8"), special_ids)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}, or a file beside it, cannot be read: {error}") from error
    return json.dumps(content | {"special_ids": special_ids}).encode()


def byte_level_bpe(vocabulary, merges, special_ids):
    """The content of the tokenizer.json of a GPT-2's {piece: id} and the text of its merges."""
    pieces = {i: piece for piece, i in vocabulary.items()}
    token = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    return {
        "version": "1.0",
        "added_tokens": [token | {"id": i, "content": pieces[i]} for i in sorted(set(special_ids.values()))],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [line.split(" ") for line in lines]},
    }
