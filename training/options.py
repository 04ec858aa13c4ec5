"""A dataclass becomes a command line: each option is a field, with its default beside its help."""

import argparse
import dataclasses
import types
import typing

from training.io import UserError

REQUIRED = dataclasses.MISSING


def option(default, help, **details):
    """A dataclass field that is also a command-line option.

    A default of None means that the value is decided later, as the help says; `REQUIRED` that there
    is none. Details: `minimum`, `maximum` and `above` bound a number, for which `word` may stand;
    `choices` lists the values; options with `exclusive=True` exclude each other; `may_change=True`
    marks what may differ when a run is continued.
    """
    return dataclasses.field(default=default, metadata={"help": help, **details})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options of any run, whatever it trains: where to, how often, on what device."""

    out: str | None = option(
        None, "folder of the run; default: runs/PRESET, or runs/distilled-PRESET", may_change=True
    )
    resume: str = option(
        "auto",
        "auto: continue if there is a run; never; or the path of a checkpoint to continue from",
        may_change=True,
    )
    seed: int = option(0, "random seed for initialisation, batch order and dropout", minimum=0)
    save_every: int = option(
        500, "steps between checkpoints; the last step has one", minimum=1, may_change=True
    )
    save_at_words: list[str] | None = option(
        None,
        "write the weights as chck_1M.pt and so on when that many words have been seen: numbers "
        "such as 500k or 1M, or babylm (1M to 10M by 1M, then every 10M)",
        may_change=True,
    )
    log_every: int = option(20, "steps between lines of log.jsonl", minimum=1, may_change=True)
    eval_every: int = option(0, "steps between dev evaluations besides each epoch's; 0: none", minimum=0)
    eval_only_every: bool = option(False, "leave out the dev evaluation where an epoch ends")
    patience: int = option(
        0,
        "stop after so many evaluations in a row without a better one; 0: never",
        minimum=0,
        may_change=True,
    )
    least_gain: float = option(
        0.0,
        "gain up to which patience counts an evaluation as no better",
        minimum=0,
        may_change=True,
    )
    stop_after: float | None = option(
        None, "minutes after which to save and stop; default: never", minimum=0, may_change=True
    )
    device: str = option("auto", "auto, cuda, mps or cpu", may_change=True)
    precision: str = option(
        "auto",
        "precision of matrix products; auto: bf16 where the chip multiplies it natively",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool | None = option(None, "torch.compile the layers; default: on CUDA only", may_change=True)
    cuda_graph: bool | None = option(
        None,
        "replay the training step as one CUDA graph, once a replay was seen to do what a plain "
        "step does; default: on CUDA, where a step has at most 8,192 tokens",
        may_change=True,
    )
    shard: bool = option(
        False,
        "under torchrun: each process keeps a part of the model in training, of its gradients and "
        "of its moments, instead of all",
        may_change=True,
    )
    checkpoint_activations: bool = option(
        False,
        "keep no layer's inner activations for the backward pass, and compute them again there: "
        "less memory, about a third more time",
        may_change=True,
    )
    profile: int = option(
        0,
        "write a trace of so many steps, after the first ten, as OUT/trace.json; 0: none",
        minimum=0,
        may_change=True,
    )
    tensorboard: bool = option(
        False,
        "write what log.jsonl gets for TensorBoard as well, into OUT/tensorboard",
        may_change=True,
    )
    dry_run: bool = option(False, "print the arithmetic of the run and stop", may_change=True)


def may_change(config_class):
    """The names of the options that may differ when a run is continued."""
    return {f.name for f in dataclasses.fields(config_class) if f.metadata.get("may_change")}


def defaults(config_class):
    """{name: default}: what an option of today means for a run that was written before it."""
    fields = dataclasses.fields(config_class)
    return {f.name: None if f.default is REQUIRED else f.default for f in fields}


class Strict(argparse.ArgumentParser):
    """A parser for options that come from elsewhere: wrong ones raise `UserError`."""

    def __init__(self, **details):
        super().__init__(**details, allow_abbrev=False, add_help=False)

    def error(self, message):
        raise UserError(message)


def parse(
    config_class,
    description,
    argv=None,
    epilog="",
    check=lambda config: None,
    parser_class=argparse.ArgumentParser,
):
    """The config that the command line describes; wrong usage ends the program with exit code 2.

    `check(config)` returns what is wrong with options that are right one by one, or None.
    `parser_class` may be `Strict`.
    """
    parser = parser_class(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exclusive = parser.add_mutually_exclusive_group()
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        place = exclusive if field.metadata.get("exclusive") else parser
        place.add_argument(_flag(field.name), **_argument(field, hints[field.name]))
    config = config_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(config):
        problem = _out_of_range(getattr(config, field.name), **field.metadata)
        if problem:
            parser.error(f"{_flag(field.name)} must be {problem}")
    if problem := check(config):
        parser.error(problem)
    return config


def _flag(name):
    return "--" + name.replace("_", "-")


def _argument(field, hint):
    """How argparse is told of a field whose type is `hint`."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    help = field.metadata["help"].replace("%", "%%")
    if field.default is REQUIRED:
        argument = {"required": True}
    else:
        argument = {"default": field.default}
        if field.default is not None and hint is not bool:
            help += f" (default: {field.default})"
    if hint is bool:
        undecided = field.default is None
        return argument | {
            "help": help,
            "action": argparse.BooleanOptionalAction if undecided else "store_true",
        }
    choices = field.metadata.get("choices")
    argument |= {"help": help, "metavar": None if choices else field.name.upper()}
    if typing.get_origin(hint) in (list, tuple):
        return argument | {"nargs": "+", "type": typing.get_args(hint)[0]}
    if word := field.metadata.get("word"):

        def number(text):
            return word if text == word else hint(text)

        return argument | {"type": number, "metavar": f"N|{word}"}
    return argument | {"type": hint, "choices": choices}


def _out_of_range(value, minimum=None, above=None, maximum=None, **_):
    """What a number must be and is not, or None."""
    if not isinstance(value, (int, float)):
        return None
    if not abs(value) < 1 << 63:
        return "a number of reasonable size"
    if minimum is not None and value < minimum:
        return f"at least {minimum}"
    if above is not None and value <= above:
        return f"above {above}"
    if maximum is not None and value > maximum:
        return f"at most {maximum}"
    return None
