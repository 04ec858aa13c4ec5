"""The arithmetic of a run, in one place: steps, epochs, words, marks, memory, disk."""

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from training import distributed
from training.io import GIB, UserError, log, warn
from training.resume import CHECKPOINT_NAMES

MILLION = 1_000_000
SPARE_BYTES = 64 << 20  # at most: room on the disk for what is small, such as log and tokenizer


@dataclass(frozen=True)
class Plan:
    """A run of `steps` steps over epochs of `num_chunks` chunks that hold `words` words.

    `marks` is {file name: words seen after which the weights are kept under that name}; dev is
    evaluated where an epoch ends, if `eval_epochs`, and unless it is 0, every `eval_every` steps.
    """

    steps: int
    batch_size: int
    sequence_length: float  # tokens of a chunk, on average
    num_chunks: int
    words: int
    marks: dict
    eval_every: int
    eval_epochs: bool = True

    def epochs(self, step):
        """Passes over the data after `step` steps."""
        return step * self.batch_size / self.num_chunks

    def words_seen(self, step):
        """Chunks seen times the words of an average chunk."""
        return round(self.epochs(step) * self.words)

    def tokens_seen(self, step):
        """Targets that were trained on after `step` steps."""
        return round(step * self.batch_size * self.sequence_length)

    def operations(self, objective):
        """Floating-point operations of the run, about: 6 for each trained parameter and token."""
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        return 6 * trained * self.tokens_seen(self.steps)

    def evaluates_at(self, step):
        """Whether dev is evaluated after that step."""
        epoch_ends = int(self.epochs(step)) > int(self.epochs(step - 1))
        return (self.eval_epochs and epoch_ends) or bool(self.eval_every and step % self.eval_every == 0)

    def marks_passed(self, step):
        """The marks that are reached with that step."""
        before, now = self.words_seen(step - 1), self.words_seen(step)
        return [name for name, words in self.marks.items() if before < words <= now]


def plan_run(config, num_chunks, words, num_tokens=math.inf):
    """The plan of a config over data of so many chunks, words and tokens an epoch.

    Where chunks are of different lengths, `num_tokens` tells the average.

    Its number of steps is that of --steps, or round(num_chunks x epochs / batch size). Raises
    `UserError` where there are more processes than sequences in a batch.
    """
    if config.batch_size < distributed.world_size():
        raise UserError(
            f"--batch-size {config.batch_size}: {distributed.world_size()} processes need a sequence each"
        )
    steps = config.steps or max(1, round(num_chunks * config.epochs / config.batch_size))
    total_words = round(steps * config.batch_size / num_chunks * words)
    marks = word_marks(config.save_at_words, total_words)
    length = min(config.sequence_length, num_tokens / num_chunks)
    return Plan(
        steps,
        config.batch_size,
        length,
        num_chunks,
        words,
        marks,
        config.eval_every,
        not config.eval_only_every,
    )


def word_marks(names, total_words):
    """{file name: words} of --save-at-words, as far as the run goes.

    Raises `UserError` for what is no number of words.
    """
    marks = []
    for name in names or ():
        number, unit = (name[:-1], name[-1]) if name[-1:] in ("k", "M") else (name, "")
        if name == "babylm":
            marks += [*range(MILLION, 10 * MILLION, MILLION)]
            marks += range(10 * MILLION, total_words + 1, 10 * MILLION)
        elif number.isascii() and number.isdigit() and len(number) < 16 and int(number):
            marks.append(int(number) * {"": 1, "k": 1000, "M": MILLION}[unit])
        else:
            raise UserError(f"--save-at-words {name}: give babylm, or numbers such as 500k or 1M")

    def label(mark):
        for unit, size in (("M", MILLION), ("k", 1000)):
            if mark % size == 0:
                return f"{mark // size}{unit}"
        return str(mark)

    if late := [label(mark) for mark in sorted(set(marks)) if mark > total_words]:
        warn(f"--save-at-words: the run sees {total_words:,} words and not {', '.join(late)}")
    return {f"chck_{label(mark)}.pt": mark for mark in sorted(set(marks)) if mark <= total_words}


def print_plan(plan, out, provenance, objective, num_tokens, compute):
    """Prints what a run will do and need. Raises `UserError` where the disk of `out` is too small.

    `num_tokens` is the length of the training data.
    """
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    tokens = plan.tokens_seen(1)
    together = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    log(f"model      {provenance.name}: {trained:,} parameters; {compute}{together}")
    shape = dataclasses.asdict(provenance.shape)
    log(f"shape      {', '.join(f'{key}={value}' for key, value in shape.items())}")
    if frozen:
        log(f"frozen     {frozen:,} parameters")
    log(f"data       {num_tokens:,} tokens, {plan.words:,} words")
    length = f"{round(plan.sequence_length, 1):g}"
    log(f"step       {plan.batch_size} sequences x {length} = {tokens:,} tokens")
    epochs = f"{plan.epochs(plan.steps):.2f} epochs of {plan.num_chunks:,} chunks"
    log(f"run        {plan.steps:,} steps = {epochs}")
    if plan.marks:
        log(f"marks      {', '.join(plan.marks)}")
    kept = sum(p.nbytes for p in objective.parameters() if not p.requires_grad)
    log(f"memory     {(16 * trained + kept) / GIB:.2f} GiB of state, plus activations")
    check_disk(plan, Path(out), trained)


def check_disk(plan, out, trained):
    """Prints how many bytes a run of `trained` parameters writes. `UserError` without room."""
    # Two full states and a third on its way; best.pt and the word marks are weights alone.
    needed = (3 * 12 + 4 * (1 + len(plan.marks))) * trained
    needed += min(needed, SPARE_BYTES)
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    written = [out / name for name in (*CHECKPOINT_NAMES, "best.pt", *plan.marks)]
    there = sum(path.stat().st_size for path in written if path.exists())
    free = shutil.disk_usage(folder).free
    log(f"disk       {needed / GIB:.2f} GiB in {out}, {free / GIB:.1f} GiB free")
    if needed - there > free:
        raise UserError(f"{out}: {needed - there} bytes needed, {free} free: choose another --out")
