"""The tokenizer: a SentencePiece model, identified by its pieces."""

import hashlib
import json
from pathlib import Path

import sentencepiece

from training.io import UserError

VOCABULARY_SIZE = 16_000  # the paper's; a model in training takes its tokenizer's
PAD, BOS, EOS, UNK = 0, 1, 2, 3  # ids in tokenizers that we train: three as in the paper, and unk


class Tokenizer:
    """A SentencePiece model.

    `identity` is the SHA-256 of its pieces, types and scores: it is equal for two files with the
    same pieces, and different for two tokenizers that only have the same size. `pad_id`, `bos_id`,
    `eos_id` and `unk_id` are None if it has no such piece. `special_ids` is the set of ids that
    are not text: control, unknown and unused pieces.
    """

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

    def _identity(self):
        flags = ("is_control", "is_unknown", "is_byte", "is_unused")
        digest = hashlib.sha256()
        for i in range(self.vocabulary_size):
            properties = [int(getattr(self.processor, flag)(i)) for flag in flags]
            piece = [self.processor.id_to_piece(i), properties, repr(self.processor.get_score(i))]
            digest.update(json.dumps(piece).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, path):
        """The tokenizer in the file `path`. Raises `UserError` if there is none."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: make it with python tokenize_corpus.py")
        return cls(path.read_bytes(), str(path))

    @classmethod
    def of_checkpoint(cls, checkpoint, path):
        """The tokenizer in a checkpoint that was read from `path`.

        Raises `UserError` if it is damaged, has another identity, or has more pieces than logits.
        """
        saved = checkpoint["tokenizer"]
        tokenizer = cls(saved["model"].numpy(), f"the tokenizer in {path}")
        fits = tokenizer.vocabulary_size <= checkpoint["model"]["shape"]["vocab_size"]
        if not fits or tokenizer.identity != saved["identity"]:
            raise UserError(f"the tokenizer in {path} is not that of its model: use another")
        return tokenizer

    def encode(self, text):
        """The ids of `text`. No special token is added, and no text is encoded as one."""
        return self.processor.encode(text)

    def decode(self, ids):
        """The text of `ids`: exactly the encoded text, except that U+2581 becomes a space."""
        return self.processor.decode([int(i) for i in ids])
