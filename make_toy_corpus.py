"""Writes a small invented corpus in the layout of BabyLM, and minimal pairs to evaluate on.

    python make_toy_corpus.py --out data/toy-text --words 200000

The folder gets train/ and dev/ with stories, dialogues and an encyclopedia, and pairs/ with minimal
pairs of agreement, anaphora and determiners. The package toy/ is the grammar that writes them, from
a lexicon of a few hundred words. The pairs cannot be known by heart: for every two words it is
settled once whether they meet in the text or in the pairs alone. The same seed gives the same
bytes.
"""

import argparse
import json
import sys
from pathlib import Path

from harness.files import UserError, run_program, write_text
from toy.grammar import Grammar, sentence
from toy.paradigms import PARADIGMS
from toy.registers import REGISTERS

LEAST_WORDS = 1000
LEAST_DEV_WORDS = 2000
PAIRS_PER_PARADIGM = 200


def write_split(folder, split, words, seed):
    """Writes a split of so many words: each register's share of them as FOLDER/REGISTER.SPLIT."""
    for name, (compose, share) in REGISTERS.items():
        grammar = Grammar(seed, f"{split} {name}")
        lines, count = [], 0
        while count < share * words:
            text = compose(grammar)
            count += sum(len(line.split()) for line in text)
            lines += [*text, ""]
        write_text(folder / f"{name}.{split}", "\n".join(lines) + "\n")


def write_pairs(folder, seed):
    """Writes each paradigm's pairs, no sentence twice, in the layout of BLiMP's files."""
    for name, (term, compose) in PARADIGMS.items():
        grammar = Grammar(seed, f"pairs {name}", for_pairs=True)
        pairs = {}
        while len(pairs) < PAIRS_PER_PARADIGM:
            drawn = compose(grammar)
            if drawn and drawn[0] != drawn[1]:  # sheep and deer have one form for both numbers
                good, bad = (sentence(words, mark="") for words in drawn)
                pairs[good] = bad
        lines = [
            json.dumps(
                {
                    "sentence_good": good, "sentence_bad": bad, "field": "toy",
                    "linguistics_term": term, "UID": name, "pair_id": i,
                }
            )
            for i, (good, bad) in enumerate(pairs.items())
        ]  # fmt: skip
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def check_vacant(out):
    """Raises `UserError` if something is in the folder that this program would not overwrite."""
    ours = {f"{name}.{split}" for name in REGISTERS for split in ("train", "dev")}
    ours |= {f"{name}.jsonl" for name in PARADIGMS} | {"train", "dev", "pairs"}
    for folder in (out, out / "train", out / "dev", out / "pairs"):
        for path in folder.glob("*"):
            if path.name not in ours:
                raise UserError(f"{path} is there already: choose an empty --out")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--words", type=int, default=200_000, metavar="N",
        help="number of words of training text; the dev split gets a tenth of it, and at least "
        f"{LEAST_DEV_WORDS} (default: 200000)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.words < LEAST_WORDS:
        raise UserError(f"--words {args.words}: at least {LEAST_WORDS}")
    out = Path(args.out)
    check_vacant(out)
    write_split(out / "train", "train", args.words, args.seed)
    write_split(out / "dev", "dev", max(args.words // 10, LEAST_DEV_WORDS), args.seed)
    write_pairs(out / "pairs", args.seed)
    print(f"written: {args.words:,} words of {', '.join(REGISTERS)}, and pairs, in {out}")


if __name__ == "__main__":
    sys.exit(run_program(main))
