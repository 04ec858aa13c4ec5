"""Text to token shards: OUT/tokenizer.model, OUT/train.bin, OUT/dev.bin.

    python tokenize_corpus.py --train babylm_10M --dev babylm_dev --out data/babylm
    python tokenize_corpus.py --dev new_text --tokenizer data/babylm/tokenizer.model --out data/new

A folder holds files in the BabyLM layout (aochildes.train, qed.dev, ...) or any *.txt; they are
joined in sorted order, without any special token. Sub-corpora known by name are cleaned as the
paper's were. The tokenizer is a SentencePiece BPE trained on the training split alone; it is
lossless: decoding gives back the cleaned text, byte for byte.
"""

import argparse
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from data import BOS, EOS, PAD, UNK, Tokenizer, write_shard
from files import UserError, atomic_write, run

SUFFIXES = (".train", ".dev", ".test", ".txt")
CLEANING_VERSION = "1"
MAX_PIECE_BYTES = 4000  # SentencePiece drops lines of more than 4,192 bytes without a word
BLOCK_LINES = 20_000
SPACE_SYMBOL = "\u2581"  # SentencePiece's own mark for a space, the one character that is not kept


# ---- cleaning, one function a sub-corpus
#
# What the original did, written anew from its description and its character counts. Sub-corpora
# that are not listed are left as they are.


def clean_aochildes(text):
    """No space before the mark that ends an utterance: "hm hm ." → "hm hm."."""
    return re.sub(r" ([.?!])$", r"\1", text, flags=re.MULTILINE)


def clean_bnc_spoken(text):
    """No runs of spaces and no blank lines."""
    return _without_blank_lines(_single_spaces(text))


def clean_cbt(text):
    """Tokenised text joined again: "the queen 's head , and" → "the queen's head, and"."""
    text = re.sub(r" ('(?:s|re|ve|ll|d|m|em)\b|n't\b)", r"\1", text)
    text = re.sub(r" ([.,;:!?])", r"\1", text)
    text = re.sub(r"(?m)(^|[ (])` ", r"\1`", text)  # an opening quote stands at its word
    return text.replace("-LRB- ", "(").replace(" -RRB-", ")")


def clean_open_subtitles(text):
    """Without the lines that only credit who made or synchronised the subtitles."""
    maker = r"(?:sub(?:title)?s?|sync(?:hro)?|corrections?|translat(?:ion|ed)|resync)"
    credit = rf"(?:<[^>]*>|[=~ -])*{maker}(?:,? \w+)?(?:,? \w+)? ?(?:by|:)[^\n]{{0,60}}"
    site = r"[^\n]{0,60}(?:www\.|addic7ed|opensubtitles)[^\n]{0,60}"
    return re.sub(rf"(?mi)^(?:{credit}|{site})\n", "", text)


def clean_qed(text):
    """Lines shouted in capitals in sentence case, l and I repaired, no runs of spaces."""
    lines = [_unshouted(line) for line in _single_spaces(text).split("\n")]
    return re.sub(r"\bl(?='(?:m|ve|ll|d)\b|\b(?= [a-z]))", "I", "\n".join(lines))


def _unshouted(line):
    words = re.findall(r"[^\W\d_]{2,}", line)
    # An l among capitals is an I that was misread: "THlS" was "THIS".
    if len(words) < 3 or not all(word.replace("l", "I").isupper() for word in words):
        return line
    lowered = line.replace("l", "I").lower()
    lowered = re.sub(r"\bi\b", "I", lowered)
    return re.sub(r"(^[^a-z]*|[.?!] +)([a-z])", lambda m: m[1] + m[2].upper(), lowered)


def clean_simple_wikipedia(text):
    """No headings ("= = = Title = = =") and no blank lines."""
    text = re.sub(r"(?m)^ *=[^\n]*= *$", "", text)
    return _without_blank_lines(text)


def clean_wikipedia(text):
    """As `clean_simple_wikipedia`."""
    return clean_simple_wikipedia(text)


def _single_spaces(text):
    return re.sub(r" {2,}", " ", text)


def _without_blank_lines(text):
    return re.sub(r"\n(?:[ \t]*\n)+", "\n", text).lstrip("\n")


CLEANERS = {
    "aochildes": clean_aochildes,
    "bnc_spoken": clean_bnc_spoken,
    "cbt": clean_cbt,
    "open_subtitles": clean_open_subtitles,
    "qed": clean_qed,
    "simple_wikipedia": clean_simple_wikipedia,
    "wikipedia": clean_wikipedia,
}


def clean(name, text):
    """The text of the sub-corpus `name`, cleaned as the paper's was."""
    return CLEANERS[name](text) if name in CLEANERS else text


# ---- reading


def text_files(folder):
    """The text files of a folder, sorted by name. Raises `UserError` if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the one that holds the text files")
    paths = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder} holds no text: expected files ending in {', '.join(SUFFIXES)}")
    return paths


def read_texts(folder, cleaned=True):
    """{sub-corpus: text} of a folder. Raises `UserError` for a file that is empty or not UTF-8."""
    texts = {}
    for path in text_files(folder):
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 at byte {error.start}: convert it, or take it out"
            ) from error
        if not text.strip():
            raise UserError(f"{path} is empty: take it out")
        if path.stem in texts:
            raise UserError(f"{folder} holds two files called {path.stem}: keep one")
        texts[path.stem] = clean(path.stem, text) if cleaned else text
    return texts


# ---- tokenizer


def training_pieces(texts):
    """The lines of the texts, cut at spaces into pieces of at most 4,000 bytes of UTF-8."""
    for text in texts:
        for line in text.split("\n"):
            while len(line.encode()) > MAX_PIECE_BYTES:
                room = len(line.encode()[:MAX_PIECE_BYTES].decode("utf-8", "ignore"))
                cut = line.rfind(" ", 1, room)
                cut = cut if cut > 0 else room
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def train_tokenizer(texts, vocabulary_size):
    """The bytes of a SentencePiece BPE model trained on the texts; same texts, same bytes.

    Raises `UserError`, naming the largest size that fits, if the texts cannot fill the vocabulary.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_pieces(texts),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocabulary_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9999,  # rarer characters are spelt in bytes
            split_digits=True,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,  # it has no effect on speed, but it is written into the file
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\.? *\d+ vs (\d+)", str(error))
        if largest:
            raise UserError(
                f"the corpus is too small for {vocabulary_size} pieces: "
                f"--vocab-size {largest[1]} is the largest that fits"
            ) from error
        if least:
            raise UserError(
                f"{vocabulary_size} pieces are too few: --vocab-size {int(least[1]) + 1} at least"
            ) from error
        raise UserError(f"SentencePiece cannot train on this text: {error}") from error
    return written.getvalue()


def encode(tokenizer, text, progress=lambda num_bytes: None):
    """The ids (N,) of a text. Line by line: no piece spans a newline, so that this is exact."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    blocks = []
    for i in range(0, len(lines), BLOCK_LINES):
        block = lines[i : i + BLOCK_LINES]
        ids = tokenizer.processor.encode(block, num_threads=os.cpu_count() or 1)
        blocks.append(np.fromiter((i for line in ids for i in line), dtype=np.uint32))
        progress(sum(map(len, block)))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint32)


# ---- the program


def encode_split(tokenizer, texts, split):
    """The texts as `write_shard` takes them: [(name, ids, words, bytes)]."""
    entries = []
    total = sum(map(len, texts.values()))
    with tqdm(total=total, desc=split, unit="char", unit_scale=True, disable=None) as bar:
        for name, text in texts.items():
            ids = encode(tokenizer, text, bar.update)
            entries.append((name, ids, len(text.split()), len(text.encode())))
    return entries


def summary(splits):
    """The lines of a table: words, bytes, tokens, tokens per word of each file and together."""
    lines = [f"{'':32}{'words':>12}{'bytes':>13}{'tokens':>12}{'tokens/word':>13}"]
    for split, entries in splits.items():
        rows = [(f"{split} {name}", words, size, len(ids)) for name, ids, words, size in entries]
        rows.append((f"{split} together", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        lines += [
            f"{name:32}{words:12,}{size:13,}{tokens:12,}{tokens / max(words, 1):13.3f}"
            for name, words, size, tokens in rows
        ]
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", metavar="DIR", help="training text; needed without --tokenizer")
    parser.add_argument("--dev", metavar="DIR", required=True, help="dev text")
    parser.add_argument(
        "--out", metavar="DIR", default="data/babylm", help="(default: data/babylm)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=16_000, metavar="N", help="pieces (default: 16000)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer, train none")
    parser.add_argument("--no-clean", action="store_true", help="leave the text as it is")
    args = parser.parse_args(argv)
    if args.train is None and args.tokenizer is None:
        parser.error("--train is needed to train a tokenizer; or give --tokenizer FILE")

    folders = {"train": args.train, "dev": args.dev}
    splits = {s: read_texts(f, not args.no_clean) for s, f in folders.items() if f is not None}
    symbols = sum(text.count(SPACE_SYMBOL) for texts in splits.values() for text in texts.values())
    if symbols:
        print(f"warning: {symbols} characters U+2581 will become spaces", file=sys.stderr)
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer)
    else:
        print(f"training a tokenizer of {args.vocab_size} pieces", flush=True)
        tokenizer = Tokenizer(train_tokenizer(splits["train"].values(), args.vocab_size))
    cleaning = "none" if args.no_clean else CLEANING_VERSION
    encoded = {split: encode_split(tokenizer, texts, split) for split, texts in splits.items()}
    out = Path(args.out)
    with atomic_write(out / "tokenizer.model") as file:
        file.write(tokenizer.model_bytes)
    for split, entries in encoded.items():
        write_shard(out / f"{split}.bin", entries, tokenizer, cleaning)
    print("\n".join(summary(encoded)))


if __name__ == "__main__":
    sys.exit(run(main))
