"""Writes a small invented corpus in the layout of BabyLM, with minimal pairs and a task to test on.

    python make_toy_corpus.py --out data/toy-text --words 200000

The folder gets train/ and dev/ with stories, dialogues and an encyclopedia; pairs/ with minimal
pairs of agreement, anaphora and determiners; and tasks/ with one for finetune.py, to tell the
acceptable sentences of such pairs from the others. The package toy/ is the grammar that writes
them, from a lexicon of a few hundred words. The pairs cannot be known by heart: for every two words
it is settled once whether they meet in the text or in the pairs alone. The same seed gives the same
bytes.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from toy.grammar import Grammar, sentence
from toy.paradigms import PARADIGMS
from toy.registers import REGISTERS
from training.io import run_program, write_text
from training.options import Parser

LEAST_DEV_WORDS = 2000
PAIRS_PER_PARADIGM = 200
TASK_PAIRS = {"train": 60, "valid": 20}  # of each paradigm


def write_split(folder, split, words, seed):
    """Writes a split of `words` words: each register's share as FOLDER/REGISTER.SPLIT."""
    for name, (compose, share) in REGISTERS.items():
        grammar = Grammar(seed, f"{split} {name}")
        lines, count = [], 0
        while count < share * words:
            text = compose(grammar)
            count += sum(len(line.split()) for line in text)
            lines += [*text, ""]
        write_text(folder / f"{name}.{split}", "\n".join(lines) + "\n")


def draw_pairs(seed, stream, compose, count):
    """{acceptable sentence: the other one} of `count` pairs."""
    grammar, pairs = Grammar(seed, stream, for_pairs=True), {}
    while len(pairs) < count:
        drawn = compose(grammar)
        if drawn and drawn[0] != drawn[1]:  # sheep and deer have one form for both numbers
            good, bad = (sentence(words, mark="") for words in drawn)
            pairs[good] = bad
    return pairs


def write_json_lines(path, entries):
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def write_pairs(folder, seed):
    """Writes each paradigm's pairs, no sentence twice, in the layout of BLiMP's files."""
    for name, (term, compose) in PARADIGMS.items():
        pairs = draw_pairs(seed, f"pairs {name}", compose, PAIRS_PER_PARADIGM)
        about = {"field": "toy", "linguistics_term": term, "UID": name}
        entries = [
            {"sentence_good": good, "sentence_bad": bad, **about, "pair_id": i}
            for i, (good, bad) in enumerate(pairs.items())
        ]
        write_json_lines(folder / f"{name}.jsonl", entries)


def write_task(folder, seed):
    """Writes the task `acceptable`, in the layout of CoLA: no sentence is in both of its files."""
    entries = {part: [] for part in TASK_PAIRS}
    for name, (_, compose) in PARADIGMS.items():
        pairs = iter(draw_pairs(seed, f"task {name}", compose, sum(TASK_PAIRS.values())).items())
        for part, count in TASK_PAIRS.items():
            for good, bad in islice(pairs, count):
                entries[part] += [{"sentence": good, "label": 1}, {"sentence": bad, "label": 0}]
    for part, of_part in entries.items():
        write_json_lines(folder / f"acceptable.{part}.jsonl", of_part)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder to write into")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    words_help = f"words of training text; dev text has a tenth, at least {LEAST_DEV_WORDS} (default: 200000)"
    add("--words", type=int, default=200_000, metavar="N", help=words_help)
    args = parser.parse_args(argv)
    out = Path(args.out)
    write_split(out / "train", "train", args.words, args.seed)
    write_split(out / "dev", "dev", max(args.words // 10, LEAST_DEV_WORDS), args.seed)
    write_pairs(out / "pairs", args.seed)
    write_task(out / "tasks", args.seed)
    print(f"written: {args.words:,} words of {', '.join(REGISTERS)}, pairs and a task, in {out}")


if __name__ == "__main__":
    sys.exit(run_program(main))
