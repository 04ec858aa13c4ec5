"""Text -> tokenizer.model, train.bin, dev.bin: cleans, trains the tokenizer, encodes.

    python tokenize_corpus.py --train babylm_10M --dev babylm_dev --out data/babylm
    python tokenize_corpus.py --dev essays --tokenizer data/babylm/tokenizer.model --out data/essays

A folder holds one file per sub-corpus, as BabyLM has them: aochildes.train, qed.dev, or any *.txt.
The tokenizer sees the training split alone. Nothing is written before everything has succeeded.
"""

import argparse
import codecs
import functools
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from cleaning import CLEANERS, VERSIONS, clean
from data import BOS, EOS, PAD, UNK, Tokenizer, write_shard
from harness.files import UserError, atomic_write, fsync_folder, locked, run_program, warn
from model import VOCABULARY_SIZE

SUFFIXES = {".train", ".dev", ".test", ".txt"}
SMALLEST_VOCABULARY = 260  # 256 bytes; pad, bos, eos, unk
MAX_TRAINING_BYTES = 4000  # SentencePiece silently skips training lines of more than 4192 bytes
CALL_CHARACTERS = 4000  # SentencePiece's time per character grows with the string
BLOCK_CHARACTERS = 1 << 18  # what one process is handed at a time
SPACE_PIECE = "\u2581"  # how SentencePiece spells a space: in text, it cannot be told from one


# ---- reading


def text_files(folder):
    """The text files of a folder, sorted by name. Raises `UserError` if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one of *.train, *.dev, *.test or *.txt")
    paths = sorted(p for p in folder.glob("[!.]*") if p.suffix in SUFFIXES and p.is_file())
    inner = sorted({p.parent.name for p in folder.glob("*/[!.]*") if p.suffix in SUFFIXES})
    if inner:
        warn(f"{folder}: text in its folders ({', '.join(inner)}) is not read: move it up")
    if not paths:
        raise UserError(f"{folder} holds no text: files named *.train, *.dev, *.test or *.txt")
    return paths


def read_folder(folder, how="light", keep_cr=False):
    """The cleaned texts of a folder, {sub-corpus: text}, in the order of the file names.

    Raises `UserError` if there is no such folder, no text in it, or a file that cannot be used.
    """
    texts, sources = {}, {}
    for path in text_files(folder):
        if path.stem in sources:
            raise UserError(
                f"{folder} holds both {sources[path.stem].name} and {path.name}: "
                "give each split a folder of its own"
            )
        sources[path.stem] = path
        texts[path.stem] = clean(path.stem, read_text(path, how != "none", keep_cr), how)
        if not texts[path.stem]:
            raise UserError(
                f"nothing is left of {path} after cleaning: remove it or use --clean none"
            )
    return texts


def read_text(path, windows=True, keep_cr=False):
    """The text of a file, every character as it is but for what Windows adds to a text.

    With `windows` a byte-order mark goes, and line ends become newlines unless `keep_cr`; both are
    told. Raises `UserError` if the file is empty or not UTF-8.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}: convert it, "
            f"for example with iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if windows and text.startswith("\ufeff"):
        warn(f"{path}: its byte-order mark is left out")
        text = text[1:]
    if windows and "\r\n" in text and not keep_cr:
        warn(f"{path}: its line ends are those of Windows, and are read as newlines (--keep-cr)")
        text = text.replace("\r\n", "\n")
    if not text:
        raise UserError(f"{path} is empty: remove it or fill it")
    if "\0" in text:
        warn(f"{path} holds NULs, as UTF-16 does: convert it with iconv -f utf-16le -t utf-8")
    if count := text.count(SPACE_PIECE):
        warn(f"{path}: {count} characters U+2581 will become spaces")
    return text


# ---- the tokenizer


def train_tokenizer(texts, vocab_size=VOCABULARY_SIZE):
    """The bytes of a SentencePiece BPE model of `texts` that gives every text back exactly.

    One departure from the paper, which has NFKC and byte-level BPE: text is not normalised, and
    only characters outside the alphabet are spelt in bytes. Raises `UserError` if the texts do not
    yield `vocab_size` pieces, or if so few cannot hold the alphabet.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in training_pieces(text)),
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
            f"add text, or lower it to at most --vocab-size {size}"
        )
    return model.getvalue()


def _training_failure(error, vocab_size):
    needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return UserError(
            f"{vocab_size} pieces cannot hold 256 bytes and the alphabet of the training text: "
            f"raise it to at least --vocab-size {needed[1]}"
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


@functools.cache
def _tokenizer(model_bytes):
    return Tokenizer(model_bytes)


def _encode_block(task):
    model_bytes, block = task
    tokenizer = _tokenizer(model_bytes)
    ids = encode(tokenizer, block)
    return ids, tokenizer.decode(ids) == block.replace(SPACE_PIECE, " ")


def encode_split(tokenizer, texts, pool, split):
    """The entries of `write_shard` for {name: text}: (name, ids, words, bytes) of each.

    Warns if the tokenizer does not give the text back: one that this program trained always does.
    """
    blocks = {name: list(line_blocks(text, BLOCK_CHARACTERS)) for name, text in texts.items()}
    tasks = [(tokenizer.model_bytes, block) for name in texts for block in blocks[name]]
    results = pool.imap(_encode_block, tasks)
    total = sum(len(text) for text in texts.values())
    entries, altered = [], 0
    with tqdm(total=total, desc=split, unit="char", unit_scale=True, disable=None) as progress:
        for name, text in texts.items():
            ids = []
            for block in blocks[name]:
                block_ids, exact = next(results)
                ids.append(block_ids)
                altered += not exact
                progress.update(len(block))
            entries.append((name, np.concatenate(ids), len(text.split()), len(text.encode())))
    if altered:
        warn(
            f"the tokenizer does not give the {split} text back exactly: "
            f"{altered} of {len(tasks)} blocks differ"
        )
    return entries


# ---- the program


def print_table(entries):
    """Prints words, bytes, tokens and tokens per word of each file, each split and all."""
    rows = []
    for split, files in entries.items():
        counts = [(words, size, len(ids)) for _, ids, words, size in files]
        rows += [(split, name, count) for (name, *_), count in zip(files, counts)]
        rows.append((split, "total", tuple(map(sum, zip(*counts)))))
    if len(entries) > 1:
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
        "--clean", choices=CLEANERS, default="light",
        help="light: drop what is no text; paper: exactly what the original does, which also glues "
        "lines; none: take every character as it is (default: light)",
    )  # fmt: skip
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


def write_corpus(out, entries, tokenizer, cleaning):
    """Writes the shards {split: entries} and their tokenizer: all of them, or none.

    They are written into a folder within `out` and then moved: a full disk is met before that. A
    kill between the moves leaves a folder without train.bin, which the same command completes.
    """
    new = out / "new.tmp"
    with locked(new):
        for left_by_a_kill in new.iterdir():
            left_by_a_kill.unlink()
        try:
            for split, files in entries.items():
                write_shard(new / f"{split}.bin", files, tokenizer, cleaning)
            with atomic_write(new / "tokenizer.model") as file:
                file.write(tokenizer.model_bytes)
            if "train" in entries:  # until the new one comes, last of all, the folder is refused
                (out / "train.bin").unlink(missing_ok=True)
            for path in sorted(new.iterdir()):
                os.replace(path, out / path.name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    fsync_folder(out)


def main(argv=None):
    """Reads, trains, encodes, then writes. Raises `UserError` before it has written anything."""
    args = parse_arguments(argv)
    out = Path(args.out)
    if not args.train and not args.tokenizer:
        raise UserError("--train is missing: only with --tokenizer FILE is there nothing to train")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder: name another")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    folders = {"train": args.train, "dev": args.dev}
    splits = {
        split: read_folder(folder, args.clean, args.keep_cr)
        for split, folder in folders.items()
        if folder
    }
    trained_on = set(splits.get("train", {}).values())
    if same := [name for name, text in splits.get("dev", {}).items() if text in trained_on]:
        raise UserError(f"train and dev have the same text in {', '.join(same)}: give others")
    if tokenizer is None:
        print("training the tokenizer", file=sys.stderr)
        size = args.vocab_size or VOCABULARY_SIZE
        tokenizer = Tokenizer(train_tokenizer(splits["train"].values(), size))
    characters = sum(len(text) for texts in splits.values() for text in texts.values())
    processes = min(os.cpu_count() or 1, 1 + characters // BLOCK_CHARACTERS)
    # Ctrl-C is the parent's to handle: it ends the pool.
    with multiprocessing.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        entries = {s: encode_split(tokenizer, texts, pool, s) for s, texts in splits.items()}

    write_corpus(out, entries, tokenizer, VERSIONS[args.clean])
    print_table(entries)
    print(
        f"wrote {', '.join([*(f'{s}.bin' for s in entries), 'tokenizer.model'])} to {out}{os.sep}"
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
