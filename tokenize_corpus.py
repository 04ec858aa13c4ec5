"""Makes tokenizer.model, train.bin and dev.bin of text: cleans it, trains the tokenizer, encodes.

    python tokenize_corpus.py --train babylm_10M --dev babylm_dev --out data/babylm
    python tokenize_corpus.py --dev essays --tokenizer data/babylm/tokenizer.model --out data/essays

A folder holds one file per sub-corpus, as in BabyLM: aochildes.train, qed.dev, or any *.txt, or
*.jsonl, whose lines are objects with a "text". Each may be compressed: *.gz, *.bz2 or *.xz. The
tokenizer is trained on the training split alone, and if that is large, on a sample of its lines.

Text is read, cleaned and encoded block by block, so it may be larger than memory. The files of an
earlier corpus in --out are replaced only when all new ones are ready.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

from corpus.cleaning import CLEANERS, VERSIONS, clean_blocks
from corpus.text_files import SPACE_PIECE, count_unspaced, sub_corpora, text_blocks, warn_of_ignored_files
from corpus.token_shards import TokenShard, write_shard
from tokenizer import BOS, EOS, PAD, UNK, VOCABULARY_SIZE, Tokenizer, import_tokenizers
from training.io import UserError, aligned, atomic_write, run_program, warn
from training.options import Parser

TRAINING_BYTES = 64_000_000  # of text that the tokenizer is trained on: SentencePiece holds it all
SAMPLE_SEED = 0
SPECIAL_PIECES = ["<pad>", "<s>", "</s>"]  # of the paper's tokenizer: the ids PAD, BOS and EOS
MAX_TRAINING_BYTES = 4000  # SentencePiece silently skips training lines of more than 4192 bytes
BLOCK_CHARACTERS = 1 << 18  # encoded at a time, by all cores
CUT = re.compile(r"(?<=\S)\n(?=\n?\S)")


# ---- reading


class TextStats(NamedTuple):
    """The UTF-8 bytes of a cleaned text, their SHA-256, and whether blanks separate its words."""

    bytes: int
    digest: str
    has_words: bool


@dataclass(frozen=True)
class SourceText:
    """One text of a split. `cleaning` is a key of CLEANERS."""

    name: str
    path: Path
    cleaning: str
    keep_cr: bool

    def blocks(self, tell=False):
        """Yields the cleaned text in blocks of whole lines.

        If `tell`, warns of what is unusual in the file. Raises `UserError` if the file cannot be
        used, or cleaning leaves nothing of it.
        """
        raw = text_blocks(self.path, as_is=self.cleaning == "none", keep_cr=self.keep_cr, tell=tell)
        empty = True
        for cleaned in clean_blocks(self.name, raw, self.cleaning):
            for block in line_blocks(cleaned, BLOCK_CHARACTERS):
                empty = False
                yield block
        if empty:
            raise UserError(f"nothing is left of {self.path} after cleaning: remove it or use --clean none")

    @functools.cached_property
    def stats(self):
        """The `TextStats` of the text. It reads the file once, and keeps them."""
        num_bytes, digest, characters, unspaced = 0, hashlib.sha256(), 0, 0
        for block in self.blocks(tell=True):
            encoded = block.encode()
            num_bytes += len(encoded)
            digest.update(encoded)
            characters += len(block)
            unspaced += count_unspaced(block)
        return TextStats(num_bytes, digest.hexdigest(), has_words=2 * unspaced < characters)


def read_folder(folder, cleaning="light", keep_cr=False):
    """The `SourceText`s of a folder, in the order of the file names.

    Warns of all other files in it. Raises `UserError` if there is no such folder, no text in it, or
    two files of one sub-corpus.
    """
    sources = [SourceText(name, path, cleaning, keep_cr) for name, path in sub_corpora(folder).items()]
    warn_of_ignored_files(folder)
    return sources


def line_blocks(text, characters):
    """`text` in blocks of whole lines, of `characters` or a little more.

    The ids of all blocks together are those of the whole text, unless a tokenizer joins several
    newlines as Llama 3's does. No piece of SentencePiece contains a newline. A byte-level BPE may join
    a newline with other blanks: so a block ends where none is beside it, but for an empty line, if such
    a place is within the next `characters`.
    """
    start = 0
    while start < len(text):
        reached = start + characters - 1
        end = CUT.search(text, reached, reached + characters)
        stop = end.end() if end else text.find("\n", reached) + 1 or len(text)
        yield text[start:stop]
        start = stop


# ---- the tokenizer


def train_tokenizer(texts, vocab_size=VOCABULARY_SIZE, fraction=1.0):
    """The bytes of a SentencePiece BPE model of `texts` that gives every text back exactly.

    `texts` is an iterable of texts of whole lines; with a `fraction` below 1 it is trained on a
    sample of their lines, always the same one. One departure from the paper, whose tokenizer
    `train_byte_bpe` makes: text is not normalised, and only characters outside the alphabet are
    spelt in bytes. Raises `UserError` if the texts do not yield `vocab_size` pieces, or so few cannot
    hold the alphabet.
    """
    model = io.BytesIO()
    pieces = sampled((piece for text in texts for piece in training_pieces(text)), fraction)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a smaller model tells how many pieces there are
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9999,  # else 7% of the paper's vocabulary are rare characters
            required_chars=SPACE_PIECE,  # else text without blanks has no piece for one
            split_digits=True,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,  # does not matter for BPE, but is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"{vocab_size} pieces cannot hold 256 bytes and the alphabet of the training text: "
                f"raise it (in a recipe vocabulary_size) to at least --vocab-size {needed[1]}"
            ) from error
        raise UserError(f"SentencePiece finds nothing to learn in the training text: {error}") from error
    check_size(Tokenizer.read(model.getvalue()).vocabulary_size, vocab_size)
    return model.getvalue()


def train_byte_bpe(texts, vocab_size=VOCABULARY_SIZE, fraction=1.0):
    """The bytes of a tokenizer.json as the paper's: byte-level BPE of text in NFKC.

    Arguments and errors are those of `train_tokenizer`. As there, lines are learned with a blank
    before them, and pieces are seen at least twice. All 256 bytes are in its alphabet, so that no
    text is lost; the original has those of its training text. Needs the package `tokenizers`.
    """
    tokenizers = import_tokenizers("--kind byte-bpe needs a package")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    result = tokenizers.Tokenizer(tokenizers.models.BPE())
    result.normalizer = tokenizers.normalizers.NFKC()
    result.pre_tokenizer = byte_level(add_prefix_space=True)
    result.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_PIECES,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    lines = (line for text in texts for line in io.StringIO(text, newline="\n"))
    result.train_from_iterator(sampled(lines, fraction), trainer)
    size = result.get_vocab_size()
    if size > vocab_size:
        raise UserError(
            f"{vocab_size} pieces cannot hold 256 bytes: raise it to at least --vocab-size {size}"
        )
    check_size(size, vocab_size)
    # A line of training text has no blank before it.
    result.pre_tokenizer = byte_level(add_prefix_space=False)
    special_ids = {"pad": PAD, "bos": BOS, "eos": EOS}
    return json.dumps(json.loads(result.to_str()) | {"special_ids": special_ids}).encode()


KINDS = {"sentencepiece": train_tokenizer, "byte-bpe": train_byte_bpe}


def sampled(lines, fraction):
    """Yields a random sample of `lines`, always the same one, or all if `fraction` is 1."""
    generator = random.Random(SAMPLE_SEED)
    return (line for line in lines if fraction == 1 or generator.random() < fraction)


def check_size(size, vocab_size):
    """Raises `UserError` if a tokenizer has fewer pieces than it should."""
    if size < vocab_size:
        raise UserError(
            f"the training text is too small for {vocab_size} pieces: "
            f"add text, or lower it (in a recipe vocabulary_size) to at most --vocab-size {size}"
        )


def training_pieces(text):
    """The lines of `text`, cut before a space wherever one exceeds `MAX_TRAINING_BYTES`."""
    for line in text.split("\n"):
        content, start = line.encode(), 0
        while start < len(content):
            stop = start + MAX_TRAINING_BYTES
            if stop < len(content):
                space = content.rfind(b" ", start + 1, stop)
                stop = space if space > 0 else stop
                while content[stop] & 0xC0 == 0x80:  # never inside a character
                    stop -= 1
            yield content[start:stop].decode()
            start = stop


def trained_tokenizer(sources, vocabulary_size, kind):
    """The `Tokenizer` of a list of `SourceText`s, or of a sample of their lines; `kind` is in KINDS."""
    fraction = min(1.0, TRAINING_BYTES / sum(source.stats.bytes for source in sources))
    sample = f" on {fraction:.1%} of the lines" if fraction < 1 else ""
    print(f"training the tokenizer{sample}", file=sys.stderr)
    texts = (block for source in sources for block in source.blocks())
    return Tokenizer.read(KINDS[kind](texts, vocabulary_size, fraction))


# ---- encoding


def encode(tokenizer, text):
    """The ids (N,), int32, of `text`, newlines included, and whether they give it back exactly."""
    calls = list(line_blocks(text, tokenizer.call_characters))
    ids = tokenizer.encode_batch(calls)
    decoded = "".join(tokenizer.decode_batch([call.tolist() for call in ids]))
    exact = decoded in (text, text.replace(SPACE_PIECE, " "))
    return np.concatenate([np.zeros(0, np.int32), *ids]), exact


def encode_split(file, split, sources, tokenizer):
    """Writes a list of `SourceText`s into a binary file as a shard. Returns the shard's header.

    Warns if decoding does not give the text back. With a SentencePiece model of this program it
    always does.
    """
    exact_blocks = []

    def encoded_texts():
        total = sum(source.stats.bytes for source in sources)
        with tqdm(total=total, desc=split, unit="B", unit_scale=True, disable=None) as progress:
            for source in sources:
                for block in source.blocks():
                    ids, exact = encode(tokenizer, block)
                    exact_blocks.append(exact)
                    words, num_bytes = len(block.split()), len(block.encode())
                    progress.update(num_bytes)
                    yield source.name, ids, words if source.stats.has_words else 0, num_bytes

    header = write_shard(file, encoded_texts(), tokenizer, VERSIONS[sources[0].cleaning])
    if not all(exact_blocks):
        warn(
            f"the tokenizer does not give the {split} text back exactly: "
            f"{exact_blocks.count(False)} of {len(exact_blocks)} blocks differ"
        )
    return header


# ---- the program


def write_corpus(out, splits, tokenizer):
    """Writes `tokenizer` and {split: list of SourceText} into the folder `out`: {split: header}.

    The files get their names when all of them are on the disk, so that a full disk changes nothing. A
    kill or a stop between two renames leaves a folder without train.bin, which is refused until the
    same command has completed it.
    """
    names = [*(f"{split}.bin" for split in splits), "tokenizer.model"]
    with contextlib.ExitStack() as stack:
        # The stack renames them from the last one to the first, which is train.bin.
        files = {n: stack.enter_context(atomic_write(out / n)) for n in sorted(names, reverse=True)}
        headers = {
            split: encode_split(files[f"{split}.bin"], split, sources, tokenizer)
            for split, sources in splits.items()
        }
        files["tokenizer.model"].write(tokenizer.model_bytes)
        for file in files.values():  # a full disk shows here
            file.flush()
            os.fsync(file.fileno())
        if "train" in splits:
            (out / "train.bin").unlink(missing_ok=True)
    return headers


def print_table(headers):
    """Prints words, bytes, tokens and tokens per word of {split: header of its shard}, file by file."""
    table = [["text", "words", "bytes", "tokens", "tokens/word"]]
    for split, header in headers.items():
        rows = [(f["name"], f["words"], f["bytes"], f["stop"] - f["start"]) for f in header["files"]]
        rows.append(("total", header["words"], header["bytes"], header["tokens"]))
        for name, words, num_bytes, tokens in rows:
            per_word = [f"{words:,}", f"{tokens / words:.3f}"] if words else ["-", "-"]
            table.append([f"{split} {name}", per_word[0], f"{num_bytes:,}", f"{tokens:,}", per_word[1]])
    print("\n".join(aligned(table)))
    if any("-" in row for row in table):
        print("-: blanks do not separate the words of this text; bits per byte measure it")


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", metavar="DIR", help="training text; needed without --tokenizer")
    add("--dev", metavar="DIR", required=True, help="validation text")
    add("--out", metavar="DIR", default="data/babylm", help="folder to write (default: %(default)s)")
    add("--vocab-size", type=int, metavar="N", help=f"pieces of the tokenizer (default: {VOCABULARY_SIZE})")
    kind_help = "of the tokenizer; byte-bpe is the paper's, and needs the package tokenizers "
    add("--kind", choices=KINDS, help=kind_help + "(default: sentencepiece)")
    tokenizer_help = "encode with this tokenizer instead of training one: a tokenizer.model, or a published "
    tokenizer_help += "model's tokenizer.json, or vocab.json beside its merges.txt"
    add("--tokenizer", metavar="FILE", help=tokenizer_help)
    clean_help = "light: remove markup and credits; paper: exactly the paper's cleaning, which also joins "
    clean_help += "lines; none: keep every character (default: light)"
    add("--clean", choices=CLEANERS, default="light", help=clean_help)
    add("--keep-cr", action="store_true", help="keep carriage returns that end lines")
    add("--no-clean", action="store_const", const="none", dest="clean", help="same as --clean none")
    args = parser.parse_args(argv)
    if args.tokenizer and (args.vocab_size is not None or args.kind):
        parser.error("--vocab-size and --kind have no effect with --tokenizer")
    if not args.train and not args.tokenizer:
        parser.error("--train is missing: only with --tokenizer FILE is there nothing to train")
    return args


def main(argv=None):
    """Reads, trains, encodes. Raises `UserError` before it has changed any corpus."""
    args = parse_arguments(argv)
    out = Path(args.out)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    path = out / "train.bin"
    if not args.train and path.exists() and TokenShard(path).tokenizer != tokenizer.identity:
        raise UserError(f"{path} was made with another tokenizer: give another --out, or --train too")
    folders = {"train": args.train, "dev": args.dev}
    splits = {split: read_folder(d, args.clean, args.keep_cr) for split, d in folders.items() if d}
    trained_on = {source.stats.digest for source in splits.get("train", [])}
    if same := [source.name for source in splits["dev"] if source.stats.digest in trained_on]:
        raise UserError(f"train and dev have the same text in {', '.join(same)}: give others")
    names = {source.name for sources in splits.values() for source in sources}
    unknown = names - CLEANERS[args.clean].keys()
    if unknown and args.clean != "none":
        print(f"no cleaning rules for {', '.join(sorted(unknown))}: text as it is", file=sys.stderr)
    if tokenizer is None:
        size, kind = args.vocab_size or VOCABULARY_SIZE, args.kind or "sentencepiece"
        tokenizer = trained_tokenizer(splits["train"], size, kind)
    headers = write_corpus(out, splits, tokenizer)
    print_table(headers)
    print(f"wrote {', '.join(f'{split}.bin' for split in headers)}, tokenizer.model to {out}{os.sep}")


if __name__ == "__main__":
    sys.exit(run_program(main))
