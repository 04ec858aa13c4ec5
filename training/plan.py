"""The arithmetic of a run: steps, epochs, words, word marks, memory and disk space."""

import dataclasses
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from training import distributed
from training.io import GIB, UserError, log, warn

MILLION = 1_000_000
UNITS = {"": 1, "k": 1000, "M": MILLION}
SHORT_AVERAGE = 0.3  # epochs; models that learn from the text did best with 0.76 or more (docs/presets.md)


@dataclass(frozen=True)
class Plan:
    """A run of `steps` steps over epochs of `num_chunks` chunks that hold `words` words.

    `sequence_length` is the mean number of tokens of a chunk. `marks` is {file name: words}: after so
    many words of training the weights are kept under that name. Dev is evaluated at the end of each
    epoch, if `eval_epochs`, and every `eval_every` steps, unless that is 0. The weights of the last
    `averaged_steps` steps are averaged.
    """

    steps: int
    batch_size: int
    sequence_length: float
    num_chunks: int
    words: int
    marks: dict
    eval_every: int
    eval_epochs: bool = True
    averaged_steps: int = 0

    def epochs(self, step):
        """Returns the passes over the data after `step` steps."""
        return step * self.batch_size / self.num_chunks

    def words_seen(self, step):
        """Returns the number of words in `step` steps, as if all chunks had the same number of words."""
        return round(self.epochs(step) * self.words)

    def tokens_seen(self, step):
        """Returns the number of targets in `step` steps."""
        return round(step * self.batch_size * self.sequence_length)

    def averaging_time(self, config):
        """Returns over how many epochs the weights average their updates, or None without weight decay.

        1 / (learning rate x weight decay x steps an epoch), for AdamW and Muon at the peak rate (Wang
        and Aitchison 2024, arXiv 2405.13698).
        """
        decay = config.learning_rate * config.weight_decay * self.num_chunks / self.batch_size
        return 1 / decay if decay else None

    def evaluates_at(self, step):
        """Returns whether dev is evaluated after that step."""
        epoch_ends = int(self.epochs(step)) > int(self.epochs(step - 1))
        return (self.eval_epochs and epoch_ends) or bool(self.eval_every and step % self.eval_every == 0)

    def marks_passed(self, step, since=None):
        """Returns the file names of the marks passed after step `since`, by default the one before."""
        before, now = self.words_seen(step - 1 if since is None else since), self.words_seen(step)
        return [name for name, words in self.marks.items() if before < words <= now]


def plan_run(config, num_chunks, words, num_tokens=math.inf):
    """Returns the plan of a config over epochs of `num_chunks` chunks with `words` words.

    A run has --steps steps, or round(num_chunks x epochs / batch size). `num_tokens` is only needed
    if chunks have different lengths. Raises `UserError` if a rank would have no sequence of a batch.
    """
    if config.batch_size < distributed.world_size():
        raise UserError(
            f"--batch-size {config.batch_size}: {distributed.world_size()} processes need a sequence each"
        )
    steps = config.steps or max(1, round(num_chunks * config.epochs / config.batch_size))
    total_words = round(steps * config.batch_size / num_chunks * words)
    return Plan(
        steps=steps,
        batch_size=config.batch_size,
        sequence_length=min(config.sequence_length, num_tokens / num_chunks),
        num_chunks=num_chunks,
        words=words,
        marks=word_marks(config.save_at_words, total_words),
        eval_every=config.eval_every,
        eval_epochs=not config.eval_only_every,
        averaged_steps=math.ceil(config.average_last * steps),
    )


def word_marks(names, total_words):
    """Returns {file name: words} of --save-at-words; babylm's go to the words of the run, at least 1M.

    A mark of babylm that is less than a tenth beyond the end of the run is written at its end: the
    text of a track has a little less than its number of words. Raises `UserError` if a name is no
    number of words.
    """
    marks = {}
    for name in names or ():
        number = re.fullmatch(r"(\d{1,15})([kM]?)", name, re.ASCII)
        if name == "babylm":  # the rules: every 1M to 10M, every 10M to 100M, every 100M to 1B
            rules = {n * unit * MILLION for unit in (1, 10, 100) for n in range(1, 11)}
            near = {words for words in rules if words <= 1.1 * total_words}
            marks |= {words: min(words, total_words) for words in near} or {MILLION: MILLION}
        elif number and int(number[1]):
            words = int(number[1]) * UNITS[number[2]]
            marks[words] = words
        else:
            raise UserError(f"--save-at-words {name}: give babylm, or numbers such as 500k or 1M")

    def label(words):
        unit = next(unit for unit in ("M", "k", "") if words % UNITS[unit] == 0)
        return f"{words // UNITS[unit]}{unit}"

    return {f"chck_{label(words)}.pt": marks[words] for words in sorted(marks)}


def print_plan(plan, out, provenance, objective, num_tokens, compute):
    """Prints what a run will do and need. Raises `UserError` if the disk of `out` is too small.

    `num_tokens` is the length of the training data.
    """
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = [p for p in objective.parameters() if not p.requires_grad]
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    shape = ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(provenance.shape).items())
    length, tokens = f"{round(plan.sequence_length, 1):g}", plan.tokens_seen(1)
    epochs = plan.epochs(plan.steps)
    moments = 3 if plan.averaged_steps else 2  # two of the optimizer, and the mean weights
    state = (8 + 4 * moments) * trained + sum(p.nbytes for p in frozen)  # with gradients
    log(f"model      {provenance.name}: {trained:,} parameters; {compute}{processes}")
    log(f"shape      {shape}")
    if frozen:
        log(f"frozen     {sum(p.numel() for p in frozen):,} parameters")
    log(f"data       {num_tokens:,} tokens, {plan.words:,} words")
    log(f"step       {plan.batch_size} sequences x {length} = {tokens:,} tokens")
    log(f"run        {plan.steps:,} steps = {epochs:.2f} epochs of {plan.num_chunks:,} chunks")
    if plan.averaged_steps:
        log(f"average    the weights of the last {plan.averaged_steps:,} steps")
    reached = plan.marks_passed(plan.steps, since=0)
    if late := [name for name in plan.marks if name not in reached]:
        warn(f"--save-at-words: {', '.join(late)}: the run sees only {plan.words_seen(plan.steps):,} words")
    if reached:
        at_end = plan.marks[reached[-1]] == plan.words_seen(plan.steps)
        log(f"marks      {', '.join(reached)}{' (the last one at the end of the run)' * at_end}")
    log(f"memory     {state / GIB:.2f} GiB of state, plus activations")
    check_disk(plan, out, trained)


def log_averaging_time(plan, config):
    """Prints the averaging time of the weights, with a warning if it is short."""
    if (time := plan.averaging_time(config)) is None:
        return
    log(f"decay      the weights average their updates over {time:.2g} epochs")
    if time < SHORT_AVERAGE:
        warn(
            f"--weight-decay {config.weight_decay:g} is strong: weights forget within {time:.2g} epochs. "
            "Models that learn from the text did best here with 0.76 or more"
        )


def check_disk(plan, out, trained):
    """Prints the bytes that a run with `trained` parameters writes. Raises `UserError` without room."""
    # Two full states and a third while it is written; best.pt and the marks are weights alone.
    total = (3 * (16 if plan.averaged_steps else 12) + 4 * (1 + len(plan.marks))) * trained
    written = sum(path.stat().st_size for path in Path(out).glob("*.pt"))  # if the run continues
    needed, free = max(0, total - written), shutil.disk_usage(existing_folder(out)).free
    log(f"disk       {needed / GIB:.2f} GiB in {out}, {free / GIB:.1f} GiB free")
    if needed > free:
        raise UserError(f"{out}: {needed} bytes needed, {free} free: choose another --out")


def existing_folder(path):
    """Returns the first of a path and its parents that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
