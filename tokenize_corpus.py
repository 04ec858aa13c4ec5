"""Text -> tokenizer.model, train.bin, dev.bin: cleans, trains the tokenizer, encodes.

    python tokenize_corpus.py --train babylm_10M --dev babylm_dev --out data/babylm
    python tokenize_corpus.py --dev essays --tokenizer data/babylm/tokenizer.model --out data/essays

A folder holds one file per sub-corpus, as BabyLM has them: aochildes.train, qed.dev, or any *.txt,
or *.jsonl, whose lines are objects with a "text"; each may be compressed, with .gz after its name.
The tokenizer sees the training split alone, and of a large one a sample of its lines.

Text is streamed: it is read, cleaned and encoded block by block, and no file is ever held whole. A
split is there once all of it is. Of one of several shards, those that are finished are kept when
the program is stopped, and the same command goes on with the next.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from corpus import token_shards
from corpus.cleaning import CLEANERS, VERSIONS, clean_blocks
from corpus.text_files import SPACE_PIECE, sub_corpora, text_blocks
from corpus.token_shards import finished_shards, split_header, write_split
from tokenizer import BOS, EOS, PAD, UNK, VOCABULARY_SIZE, Tokenizer
from training.io import (
    UserError,
    atomic_write,
    fsync_folder,
    locked,
    run_program,
    warn,
    write_json,
)

SMALLEST_VOCABULARY = 260  # 256 bytes; pad, bos, eos, unk
TRAINING_BYTES = 64_000_000  # of text that the tokenizer is trained on: SentencePiece holds it all
SAMPLE_SEED = 0
MAX_TRAINING_BYTES = 4000  # SentencePiece silently skips training lines of more than 4192 bytes
CALL_CHARACTERS = 4000  # SentencePiece's time per character grows with the string
BLOCK_CHARACTERS = 1 << 18  # what one process is handed at a time
BLOCKS_AHEAD = 2  # blocks of each process that may wait for it, or for what comes before them
MADE_FROM = "made-from.json"  # beside finished shards: what they are shards of


# ---- reading


@dataclass(frozen=True)
class Source:
    """One text of a split, cleaned as it is read."""

    name: str
    path: Path
    how: str = "light"
    keep_cr: bool = False

    def blocks(self, tell=False):
        """Yields the cleaned text in blocks of whole lines, as `line_blocks` would of all of it.

        With `tell`, what is peculiar about the file is told. Raises `UserError` if it cannot be
        used, or nothing is left of it.
        """
        raw, rest, empty = text_blocks(self.path, self.how != "none", self.keep_cr, tell), "", True
        for piece in clean_blocks(self.name, raw, self.how):
            whole = list(line_blocks(rest + piece, BLOCK_CHARACTERS))
            rest = whole.pop() if whole else ""  # the last line may go on
            empty = empty and not whole
            yield from whole
        if rest:
            yield rest
        elif empty:
            raise UserError(f"nothing is left of {self.path} after cleaning: remove it or use --clean none")


def read_folder(folder, how="light", keep_cr=False):
    """The sources of a folder, {sub-corpus: Source}, in the order of the file names.

    Raises `UserError` if there is no such folder, no text in it, or two files of one name.
    """
    return {name: Source(name, path, how, keep_cr) for name, path in sub_corpora(folder).items()}


@dataclass(frozen=True)
class Size:
    """What one reading of a text tells of it: characters, UTF-8 bytes, and their digest."""

    characters: int
    bytes: int
    digest: str


def measure(source):
    """Reads a source once, and tells what is peculiar about it. Returns its `Size`."""
    characters, num_bytes, digest = 0, 0, hashlib.sha256()
    for block in source.blocks(tell=True):
        encoded = block.encode()
        characters, num_bytes = characters + len(block), num_bytes + len(encoded)
        digest.update(encoded)
    return Size(characters, num_bytes, digest.hexdigest())


# ---- the tokenizer


def train_tokenizer(texts, vocab_size=VOCABULARY_SIZE, share=1.0):
    """The bytes of a SentencePiece BPE model of `texts` that gives every text back exactly.

    `texts` is an iterable of texts of whole lines; with a `share` below 1 it is trained on a sample
    of their lines, always the same one. One departure from the paper, which has NFKC and byte-level
    BPE: text is not normalised, and only characters outside the alphabet are spelt in bytes. Raises
    `UserError` if the texts do not yield `vocab_size` pieces, or so few cannot hold the alphabet.
    """
    model, generator = io.BytesIO(), random.Random(SAMPLE_SEED)
    pieces = (piece for text in texts for piece in training_pieces(text))
    if share < 1:
        pieces = (piece for piece in pieces if generator.random() < share)
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
            split_digits=True,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,  # does not matter for BPE, but is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_failure(error, vocab_size) from error
    size = Tokenizer(model.getvalue()).vocabulary_size
    if size < vocab_size:
        raise UserError(
            f"the training text is too small for {vocab_size} pieces: "
            f"add text, or lower it (in a recipe vocabulary_size) to at most --vocab-size {size}"
        )
    return model.getvalue()


def _training_failure(error, vocab_size):
    needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return UserError(
            f"{vocab_size} pieces cannot hold 256 bytes and the alphabet of the training text: "
            f"raise it (in a recipe vocabulary_size) to at least --vocab-size {needed[1]}"
        )
    return UserError(f"SentencePiece finds nothing to learn in the training text: {error}")


def training_pieces(text):
    """The lines of `text`, cut before a space wherever one exceeds `MAX_TRAINING_BYTES`."""
    for line in text.split("\n"):
        rest = line.encode()
        while len(rest) > MAX_TRAINING_BYTES:
            cut = rest.rfind(b" ", 1, MAX_TRAINING_BYTES)
            if cut < 0:  # one word: cut it, though never inside a character
                cut = MAX_TRAINING_BYTES
                while rest[cut] & 0xC0 == 0x80:
                    cut -= 1
            yield rest[:cut].decode()
            rest = rest[cut:]
        if rest:
            yield rest.decode()


# ---- encoding


def encode(tokenizer, text):
    """The ids (N,), int32, of `text`: those of its lines, newlines kept, one after another."""
    blocks = line_blocks(text, CALL_CHARACTERS)
    ids = [tokenizer.processor.encode(block, return_type="numpy") for block in blocks]
    return np.concatenate(ids or [np.zeros(0, np.int32)])


def line_blocks(text, characters):
    """`text` in blocks of whole lines, each block as few lines as give it `characters`.

    A newline is never inside a piece, so blocks have the ids that the whole text has.
    """
    start = 0
    while start < len(text):
        stop = text.find("\n", start + characters - 1) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _begin_encoding(model_bytes):
    """What each process of the pool does first. Ctrl-C is the parent's to handle."""
    global _tokenizer  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tokenizer = Tokenizer(model_bytes)


def _encode_block(block):
    """A block's ids, words and bytes, and whether its ids give it back."""
    ids = encode(_tokenizer, block)
    exact = _tokenizer.decode(ids) == block.replace(SPACE_PIECE, " ")
    dtype = np.uint16 if _tokenizer.vocabulary_size <= 1 << 16 else np.int32
    return ids.astype(dtype), len(block.split()), len(block.encode()), exact


@contextlib.contextmanager
def encoding_pool(tokenizer, characters):
    """Yields a function that encodes [(name, block)] in processes, as many as the text needs.

    It yields (name, characters, what `_encode_block` returns) of each, in order, and takes no more
    blocks than the processes have before them: what waits is held in memory.
    """
    processes = min(os.cpu_count() or 1, 1 + characters // BLOCK_CHARACTERS)
    with multiprocessing.Pool(processes, _begin_encoding, (tokenizer.model_bytes,)) as pool:

        def encode_all(blocks):
            waiting = collections.deque()
            for name, block in blocks:
                result = pool.apply_async(_encode_block, (block,))
                waiting.append((name, len(block), result))
                if len(waiting) > BLOCKS_AHEAD * processes:
                    *task, result = waiting.popleft()
                    yield *task, result.get()
            for *task, result in waiting:
                yield *task, result.get()

        yield encode_all


def encode_split(path, sources, sizes, tokenizer, cleaning, encode_all):
    """Writes {name: Source} as the split `path`, after the shards of it that are finished.

    `sizes` are {name: Size} of the sources. Returns the header of the shard, or of the index. Warns
    if the tokenizer does not give the text back: one that this program trained always does.
    """
    if path.is_file():
        return split_header(path)
    finished = finished_shards(path)
    if finished:
        print(f"{path.name}: {len(finished)} shards are there already", file=sys.stderr)
    blocks = ((name, block) for name, source in sources.items() for block in source.blocks())
    counts = [0, 0]  # blocks, and those that do not come back

    def texts():
        total = sum(size.characters for size in sizes.values())
        bar = tqdm(total=total, desc=path.stem, unit="char", unit_scale=True, disable=None)
        with bar as progress:
            rest = without_first(blocks, sum(header["bytes"] for header, _ in finished), progress)
            for name, characters, (ids, words, num_bytes, exact) in encode_all(rest):
                counts[0], counts[1] = counts[0] + 1, counts[1] + (not exact)
                progress.update(characters)
                yield name, ids, words, num_bytes

    header = write_split(path, texts(), tokenizer, cleaning, finished)
    if header["bytes"] != sum(size.bytes for size in sizes.values()):
        raise UserError(f"the {path.stem} text changed while it was read: start again")
    if counts[1]:
        warn(
            f"the tokenizer does not give the {path.stem} text back exactly: "
            f"{counts[1]} of {counts[0]} blocks differ"
        )
    return header


def without_first(blocks, num_bytes, progress):
    """[(name, block)] without the first ones, of so many bytes in all."""
    for name, block in blocks:
        if num_bytes > 0:
            num_bytes -= len(block.encode())
            progress.update(len(block))
        else:
            yield name, block


# ---- the program


def print_table(headers):
    """Prints words, bytes, tokens and tokens per word of each file, each split and all.

    `headers` are {split: header of its shard, or of its index}.
    """
    rows = []
    for split, header in headers.items():
        counts = [(f["words"], f["bytes"], f["stop"] - f["start"]) for f in header["files"]]
        rows += [(split, f["name"], count) for f, count in zip(header["files"], counts)]
        rows.append((split, "total", tuple(map(sum, zip(*counts)))))
    if len(headers) > 1:
        totals = [count for _, name, count in rows if name == "total"]
        rows.append(("all", "total", tuple(map(sum, zip(*totals)))))
    width = max(len(name) for _, name, _ in rows)
    print(f"split  {'file':{width}} {'words':>12} {'bytes':>13} {'tokens':>12}  tokens/word")
    for split, name, (words, size, tokens) in rows:
        ratio = tokens / max(words, 1)
        print(f"{split:5}  {name:{width}} {words:12,} {size:13,} {tokens:12,} {ratio:12.3f}")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", metavar="DIR", help="training text; needed without --tokenizer")
    parser.add_argument("--dev", metavar="DIR", required=True, help="dev text")
    parser.add_argument("--out", metavar="DIR", default="data/babylm", help="default: %(default)s")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"pieces of the tokenizer (default: {VOCABULARY_SIZE})",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="encode with this one, train none")
    parser.add_argument(
        "--clean",
        choices=CLEANERS,
        default="light",
        help="light: drop what is no text; paper: exactly what the original does, which also glues "
        "lines; none: take every character as it is (default: light)",
    )
    parser.add_argument(
        "--keep-cr", action="store_true", help="keep the carriage returns of Windows' line ends"
    )
    parser.add_argument(
        "--no-clean", action="store_const", const="none", dest="clean", help="same as --clean none"
    )
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab_size is not None:
        parser.error("--vocab-size has no effect with --tokenizer")
    if args.vocab_size is not None and args.vocab_size <= SMALLEST_VOCABULARY:
        parser.error(f"--vocab-size must exceed {SMALLEST_VOCABULARY}: bytes and special pieces")
    return args


def continues(folder, made_from):
    """Whether `folder` holds the beginning of what is made from `made_from`."""
    try:
        found = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return found == made_from and (folder / "tokenizer.model").is_file()


@contextlib.contextmanager
def unfinished(out, made_from, tokenizer):
    """Holds a folder within `out` for what is being written, and yields its path.

    It has what an earlier run left of the same, with the same tokenizer, or nothing. When the run
    fails or is stopped it goes, but for finished shards, from which the same command goes on.
    """
    folder = out / "new.tmp"
    with locked(folder):
        model = folder / "tokenizer.model"
        if not continues(folder, made_from) or model.read_bytes() != tokenizer.model_bytes:
            (folder / MADE_FROM).unlink(missing_ok=True)
            for left_by_a_kill in folder.iterdir():
                left_by_a_kill.unlink()
            with atomic_write(model) as file:
                file.write(tokenizer.model_bytes)
            write_json(folder / MADE_FROM, made_from)
        try:
            yield folder
        finally:
            if not (continues(folder, made_from) and any(shards_within(folder))):
                shutil.rmtree(folder, ignore_errors=True)
    fsync_folder(out)


def shards_within(folder, split="*"):
    """The shards of a split of several that are in a folder."""
    return folder.glob(f"{split}-{'[0-9]' * 5}.bin")


def publish(folder, out, splits):
    """Moves what is in `folder` to `out`: the splits, and their tokenizer.

    A full disk is met before that. A kill between the moves leaves a folder without train.bin,
    which the same command completes.
    """
    (folder / MADE_FROM).unlink()  # from here on, `folder` is no beginning that can be continued
    if "train" in splits:  # until the new one comes, last of all, the folder is refused
        (out / "train.bin").unlink(missing_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        os.replace(folder / name, out / name)
    for split in splits:
        for of_an_older_split in shards_within(out, split):
            if of_an_older_split.name not in names:
                of_an_older_split.unlink()


def check_different(sizes):
    """Raises `UserError` if train and dev, of {split: {name: Size}}, have the same text."""
    trained_on = {size.digest for size in sizes.get("train", {}).values()}
    if same := [name for name, size in sizes["dev"].items() if size.digest in trained_on]:
        raise UserError(f"train and dev have the same text in {', '.join(same)}: give others")


def trained_tokenizer(sources, sizes, vocabulary_size):
    """The tokenizer of the texts of a training split, {name: Source}, or of a sample of them."""
    share = min(1.0, TRAINING_BYTES / sum(size.bytes for size in sizes.values()))
    sample = f" on {share:.1%} of the lines" if share < 1 else ""
    print(f"training the tokenizer{sample}", file=sys.stderr)
    texts = (block for source in sources.values() for block in source.blocks())
    return Tokenizer(train_tokenizer(texts, vocabulary_size, share))


def main(argv=None):
    """Reads, trains, encodes. Raises `UserError` before it has changed any corpus."""
    args = parse_arguments(argv)
    out = Path(args.out)
    if not args.train and not args.tokenizer:
        raise UserError("--train is missing: only with --tokenizer FILE is there nothing to train")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder: name another")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    folders = {"train": args.train, "dev": args.dev}
    splits = {s: read_folder(f, args.clean, args.keep_cr) for s, f in folders.items() if f}
    sizes = {s: {n: measure(t) for n, t in sources.items()} for s, sources in splits.items()}
    check_different(sizes)
    vocabulary_size = args.vocab_size or VOCABULARY_SIZE
    made_from = {
        "texts": {s: {n: size.digest for n, size in found.items()} for s, found in sizes.items()},
        "cleaning": VERSIONS[args.clean],
        "tokenizer": tokenizer.identity if tokenizer else vocabulary_size,
        "blocks": [TRAINING_BYTES, BLOCK_CHARACTERS, token_shards.SHARD_TOKENS],
    }
    if tokenizer is None and continues(out / "new.tmp", made_from):
        tokenizer = Tokenizer.load(out / "new.tmp" / "tokenizer.model")
    elif tokenizer is None:
        tokenizer = trained_tokenizer(splits["train"], sizes["train"], vocabulary_size)
    characters = sum(size.characters for found in sizes.values() for size in found.values())
    with (
        encoding_pool(tokenizer, characters) as encode_all,  # before the lock, which is inherited
        unfinished(out, made_from, tokenizer) as folder,
    ):
        headers = {
            split: encode_split(
                folder / f"{split}.bin",
                sources,
                sizes[split],
                tokenizer,
                VERSIONS[args.clean],
                encode_all,
            )
            for split, sources in splits.items()
        }
        publish(folder, out, splits)
    print_table(headers)
    written = ", ".join([*(f"{split}.bin" for split in headers), "tokenizer.model"])
    print(f"wrote {written} to {out}{os.sep}")


if __name__ == "__main__":
    sys.exit(run_program(main))
