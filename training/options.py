"""A dataclass becomes a command line: each field is an option, with its default and help beside it."""

import argparse
import dataclasses
import difflib
import re
import shlex
import sys
import types
import typing
from pathlib import Path

from training.io import UserError

REQUIRED = dataclasses.MISSING
LARGEST = (1 << 63) - 1  # of a number that is given
# The groups of --help, in the order in which a user needs them.
GROUPS = ("what to train", "recipe", "distillation", "evaluate and save", "speed and memory")
GROUPS += ("several GPUs", "stop and inspect")
TRAIN, RECIPE, DISTILL, SAVE, SPEED, GPUS, STOP = GROUPS


def option(default, help, group=TRAIN, **details):
    """Returns a dataclass field that is also a command-line option, listed under `group` in --help.

    A default of None means that the program chooses the value later. `REQUIRED` means that the user
    must give it. Details: `alias` is a second name, such as "--lr"; `metavar` stands for a value in
    --help; `minimum` and `maximum` bound a number, and `word` may be given instead of it;
    `choices` lists the values; options of a group with `exclusive=True` exclude each other; one with
    `positional=True` has no flag. When a run is continued, options of the groups from "evaluate and
    save" on may have another value; `may_change` says so for a single one.
    """
    metadata = {"may_change": GROUPS.index(group) >= GROUPS.index(SAVE), "help": help, "group": group}
    return dataclasses.field(default=default, metadata=metadata | details)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options that any run has, whatever it trains."""

    # These two are options of fine-tuning only (finetune.py).
    eval_only_every = False  # skip the evaluation at the end of each epoch
    least_gain = 0.0  # smallest improvement that resets the patience

    out: str | None = option(
        None, "folder of the run (default: runs/PRESET, or runs/distilled-PRESET)", may_change=True
    )
    seed: int = option(0, "random seed of initialisation, batch order and dropout", RECIPE, minimum=0)
    eval_every: int = option(
        0, "steps between further evaluations within an epoch; 0: none", SAVE, minimum=0, may_change=False
    )
    log_every: int = option(20, "steps between lines of log.jsonl", SAVE, minimum=1)
    save_every: int = option(500, "steps between checkpoints", SAVE, minimum=1)
    save_every_minutes: float | None = option(
        None, "minutes between checkpoints, in place of --save-every", SAVE, minimum=0
    )
    save_at_words: list[str] | None = option(
        None,
        "also keep the weights after this many words of training, as chck_1M.pt and so on: numbers such "
        "as 500k or 1M, or babylm for the numbers that the BabyLM rules ask for",
        SAVE,
        metavar="WORDS",
    )
    tensorboard: bool = option(False, "also log for TensorBoard, to OUT/tensorboard", SAVE)
    wandb: bool = option(False, "also log to Weights & Biases; its WANDB_... variables apply", SAVE)
    device: str = option("auto", "auto, cuda, mps or cpu", SPEED)
    precision: str = option(
        "auto",
        "precision of matrix products; auto: bf16 where the hardware has it, else fp32",
        SPEED,
        choices=("auto", "fp32", "bf16"),
        may_change=False,
    )
    compile: bool | None = option(
        None, "compile the layers with torch.compile (default: on CUDA only)", SPEED
    )
    cuda_graph: bool | None = option(
        None,
        "replay each training step as one CUDA graph, after checking it against a plain step "
        "(default: on CUDA, for steps of at most 5e12 FLOPs, such as 4,096 tokens of llama-58m)",
        SPEED,
    )
    checkpoint_activations: bool = option(
        False, "recompute activations in the backward pass: less memory, a third more time", SPEED
    )
    shard: bool = option(
        False, "FSDP: shard parameters, gradients and optimizer state over processes", GPUS, alias="--fsdp"
    )
    resume: str = option(
        "auto",
        "auto: continue the run in --out if there is one; never: exit if there is one; or the path of a "
        "checkpoint to continue from",
        STOP,
    )
    stop_after: float | None = option(None, "save and stop after this many minutes", STOP, minimum=0)
    patience: int = option(
        0, "early stopping: after this many evaluations without improvement; 0: never", STOP, minimum=0
    )
    profile: int = option(
        0,
        "write a torch.profiler trace of this many steps, after the first ten, to OUT/trace.json; 0: none",
        STOP,
        minimum=0,
    )
    dry_run: bool = option(False, "print the run's steps, words, memory and disk space, and stop", STOP)


def may_change(config_class):
    """Returns the names of the options that may have another value when a run is continued."""
    return {f.name for f in dataclasses.fields(config_class) if f.metadata.get("may_change")}


def defaults(config_class):
    """Returns {name: default}: the values of a run from before an option existed."""
    fields = dataclasses.fields(config_class)
    return {f.name: None if f.default is REQUIRED else f.default for f in fields}


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest option for an unknown one.

    An argument @FILE stands for the words in that file, quoted as in a shell. A # at the start of a line
    or after a blank begins a comment. What comes later on the command line wins. `reads_files` is False
    where an argument may begin with @.
    """

    reads_files = True

    def parse_args(self, args=None, namespace=None):
        known = [name for action in self._actions for name in action.option_strings]
        args = sys.argv[1:] if args is None else args
        if self.reads_files:
            args = [word for argument in args for word in self._words(argument)]
        for argument in args:
            name = argument.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                nearest = difflib.get_close_matches(name, known, n=1)
                suggestion = f"did you mean {nearest[0]}?" if nearest else "--help lists all options"
                self.error(f"unknown option {name}: {suggestion}")
        return super().parse_args(args, namespace)

    def _words(self, argument):
        """Returns the words that an argument stands for: those of its file if it is @FILE."""
        if not argument.startswith("@"):
            return [argument]
        try:
            return shlex.split(re.sub(r"(?m)(^|\s)#.*", "", Path(argument[1:]).read_text("utf-8")))
        except (OSError, ValueError) as error:  # ValueError: a quote without its end, or no UTF-8
            return self.error(f"{argument}: {getattr(error, 'strerror', None) or error}")

    def format_help(self):
        if callable(self.epilog):
            self.epilog = self.epilog()
        return super().format_help()


class Strict(Parser):
    """A parser for options that do not come from the command line: it raises `UserError`."""

    reads_files = False

    def __init__(self, **details):
        super().__init__(**details, allow_abbrev=False, add_help=False)

    def error(self, message):
        raise UserError(message)


def parse(config_class, description, argv=None, epilog="", check=None, parser_class=Parser):
    """Returns the config that the command line describes; wrong usage exits with code 2.

    `epilog` may be a function that returns it, called for --help alone.
    `check(config)` returns an error message, or None, for options that do not go together.
    `parser_class` may be `Strict`.
    """
    hints = typing.get_type_hints(config_class)
    of_any_run = {field.name for field in dataclasses.fields(RunConfig)}  # last in their group
    fields = sorted(dataclasses.fields(config_class), key=lambda field: field.name in of_any_run)
    required = [" ".join([*_names(f), f.name.upper()]) for f in fields if f.default is REQUIRED]
    parser = parser_class(
        usage=" ".join(["%(prog)s", *required, "[options, or @FILE with some]"]),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group)
        exclusive = section.add_mutually_exclusive_group()
        for field in fields:
            if field.metadata["group"] == group:
                target = exclusive if field.metadata.get("exclusive") else section
                target.add_argument(*_names(field), **_argument(field, hints[field.name]))
    config = config_class(**vars(parser.parse_args(argv)))
    if check and (problem := check(config)):
        parser.error(problem)
    return config


def _names(field):
    """Returns the names of an option on the command line: none of its own for a positional one."""
    if field.metadata.get("positional"):
        return []
    flag = "--" + field.name.replace("_", "-")
    return [name for name in (flag, field.metadata.get("alias")) if name]


def _argument(field, hint):
    """Returns the keywords of argparse's `add_argument` for a field of the type `hint`."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    argument = {"help": field.metadata["help"].replace("%", "%%")}
    if field.metadata.get("positional"):
        argument["dest"] = field.name
    elif field.default is REQUIRED:
        argument["required"] = True
    else:
        argument["default"] = field.default
    if hint is bool:
        undecided = field.default is None
        return argument | {"action": argparse.BooleanOptionalAction if undecided else "store_true"}
    if field.default not in (None, REQUIRED):
        argument["help"] += f" (default: {field.default})"
    if choices := field.metadata.get("choices"):
        return argument | {"choices": choices}
    metavar = {int: "N", float: "X"}.get(hint, field.name.upper())
    argument["metavar"] = field.metadata.get("metavar", metavar)
    if typing.get_origin(hint) is list:
        return argument | {"nargs": "+", "type": typing.get_args(hint)[0]}
    if word := field.metadata.get("word"):
        argument["metavar"] = f"N|{word}"
    return argument | {"type": hint if hint is str else _number(hint, **field.metadata)}


def _number(hint, word=None, minimum=-LARGEST, maximum=LARGEST, **_):
    """Returns the function that reads an int or a float within bounds; `word` may be given instead."""

    def number(text):
        if text == word:
            return word
        value = hint(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        if not value <= maximum:  # NaN too
            raise argparse.ArgumentTypeError(f"must be at most {maximum}")
        return value

    return number
