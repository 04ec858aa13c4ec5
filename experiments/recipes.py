"""A recipe of a reproduction: which models are trained, on what, with which options.

A recipe is a JSON file, one of `recipes/` or a user's own, which `reproduce.py --recipe` takes:

    about              what it is for
    like               another recipe, a name or a file, from which it takes whatever it does not
                       say itself, single options and models too; null takes one of them back
    corpus             "toy": the invented corpus; without it --train and --dev name folders
    clean              how the text is cleaned, as tokenize_corpus.py --clean (default: light)
    vocabulary_size    pieces of the tokenizer
    words, dev_words   of training text, and of each half of the dev text, to sample; else all
    whole_epochs       true: an epoch has only whole batches, as the original's trainer counts steps
    precision          in which models are scored: fp32 (default), bf16, or auto
    scored             the checkpoint that is scored: best.pt (default) or checkpoint.pt, the last
    options            options of train.py and distill.py for all models
    finetune           options of finetune.py, where models are fine-tuned (default: none)
    models             {name: entry}, in the order of training
    control, student   the names of the two that the report compares first
    least_seeds        with fewer seeds the report decides nothing (default: 2)
    control_gain       nats by which another tuning of the control was found to be better: taken
                       off every student's lead on it (default: 0.0)

An entry has the options of its run, with underscores (`weight_decay`), and besides them `model`
(a preset), `teachers` (names of entries above it: then it is distilled), `like` (another entry,
from which it takes everything that it does not say itself), `title` (for tables) and `seed_offset`
(added to the seed, for a model that differs from another in nothing but its seed). An option that
is null or false is as if it had not been given, so that an entry can take back what `like` gives.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch

import finetune
import model as models
from corpus.cleaning import CLEANERS
from data import count_chunks
from distill import DistillConfig, check_cache
from tokenizer import VOCABULARY_SIZE
from train import TrainConfig
from training.io import UserError
from training.options import Strict, may_change, parse
from training.plan import plan_run

FOLDER = Path(__file__).parent / "recipes"
FIELDS = {
    "about": str,
    "like": str,
    "corpus": str,
    "clean": str,
    "vocabulary_size": int,
    "words": int,
    "dev_words": int,
    "scored": str,
    "precision": str,
    "options": dict,
    "models": dict,
    "control": str,
    "student": str,
    "whole_epochs": bool,
    "finetune": dict,
    "least_seeds": int,
    "control_gain": float,
}
FINETUNE = ("settings", "head", "dropout", "only", "seeds", *finetune.OPTIONS)
UNDECIDED = ("compile", "cuda_graph")  # switches that are neither on nor off by default
OURS = {"data", "out", "resume", "seed", "device", "init", "stop_after", "dry_run"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of a recipe; `options` are complete, those of all models among them."""

    name: str
    title: str
    preset: str
    teachers: tuple[str, ...]
    seed_offset: int
    options: dict

    def config(self):
        """The config of its run, with the preset's recipe, and without what a run adds to it."""
        arguments = self.arguments()
        if self.teachers:
            arguments += ["--teachers", *self.teachers]
            config = parse(DistillConfig, "", arguments, check=check_cache, parser_class=Strict)
        else:
            config = parse(TrainConfig, "", arguments, parser_class=Strict)
        return models.with_hyperparameters(config)

    @property
    def taught_by(self):
        """Who taught it, as one: a teacher's name, that of an ensemble, or None."""
        return ensemble_name(self.teachers, self.options.get("teacher_weights")) or None

    def conditions(self):
        """All that its weights depend on but for text, seed and teachers: the config as used.

        Some may change when a run is continued, which gives another model all the same.
        """
        config = self.config()
        kept = {f.name for f in dataclasses.fields(config)} - may_change(type(config))
        kept |= {"dropout", "patience", "least_gain", "eval_every", "eval_only_every"}
        return {name: getattr(config, name) for name in sorted(kept - OURS)}

    def whole_steps(self, num_tokens):
        """Its steps on so many tokens if each epoch, a last part too, has its whole batches."""
        config = self.config()
        if config.steps is not None:
            return config.steps
        chunks = count_chunks(num_tokens, config.sequence_length, config.random_offset)
        return math.ceil(config.epochs) * max(chunks // config.batch_size, 1)

    def arguments(self, steps=None):
        """Its options as train.py or distill.py take them, but for the teachers.

        `steps`, if given, stands for its epochs.
        """
        changes = {} if steps is None else {"epochs": None, "steps": steps}
        return ["--model", self.preset, *arguments_of(self.options | changes)]


def ensemble_name(teachers, weights):
    """The name of teachers as one, with their weights where these differ."""
    weights = weights if weights and len(set(weights)) > 1 else ()
    return "&".join(map(str, (*teachers, *weights)))


def arguments_of(options):
    """A table of options as the programs take them."""
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value is False and name not in UNDECIDED):
            continue  # as if it had not been given
        if isinstance(value, bool):
            arguments += [flag if value else flag.replace("--", "--no-")]
        else:
            arguments += [flag, *map(str, value if isinstance(value, list) else [value])]
    return arguments


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe that was read; `entries` is {name: Entry}, in the order of training."""

    name: str
    entries: dict
    control: str
    student: str
    vocabulary_size: int = VOCABULARY_SIZE
    corpus: str | None = None
    clean: str = "light"
    words: int | None = None
    dev_words: int | None = None
    scored: str = "best.pt"
    precision: str = "fp32"
    whole_epochs: bool = False
    finetune: dict = dataclasses.field(default_factory=dict)
    least_seeds: int = 2
    control_gain: float = 0.0  # nats by which another tuning of the control was found to be better
    about: str = ""
    teaching: frozenset = frozenset()  # the names of all teachers, those that `only` leaves out too

    def ensembles(self):
        """{name: (entries of its members, their weights or None)} of whoever teaches together."""
        return {
            entry.taught_by: (
                [self.entries[teacher] for teacher in entry.teachers],
                entry.options.get("teacher_weights"),
            )
            for entry in self.entries.values()
            if len(entry.teachers) > 1
        }

    def all_scored(self):
        """[(name, entries, their weights or None)] of all that is scored, ensembles at the end."""
        alone = [(name, [entry], None) for name, entry in self.entries.items()]
        return alone + [(name, *members) for name, members in self.ensembles().items()]

    def only(self, names):
        """The experiment with these models, and whom they learn from, alone."""
        if unknown := set(names) - set(self.entries):
            raise UserError(
                f"no model of recipe {self.name} is called {sorted(unknown)[0]}: choose from "
                f"{', '.join(self.entries)}"
            )
        wanted = set(names)
        while more := {t for name in wanted for t in self.entries[name].teachers} - wanted:
            wanted |= more
        entries = {name: e for name, e in self.entries.items() if name in wanted}
        return dataclasses.replace(self, entries=entries)


def recipe_names():
    """The names of the recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_experiment(recipe, vary=()):
    """The `Experiment` of a recipe: a name from `recipe_names`, or the path of a JSON file.

    `vary` are texts "MODEL.OPTION=a,b,c": for each value, one more model like that one. Raises
    `UserError` for what is not a recipe, or has an option that the programs do not have.
    """
    path = _path(recipe)
    try:
        return _experiment(path.stem, _read_table(path), vary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _path(recipe):
    return FOLDER / f"{recipe}.json" if recipe in recipe_names() else Path(recipe)


def _read_table(path, seen=()):
    """The object in a recipe's file, with what it takes from the recipe that it is like."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{error.strerror}: choose {', '.join(recipe_names())} or give a JSON file such as "
            "those in recipes/"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("models"), dict):
        raise UserError('a recipe is a JSON object with "models"')
    for key, value in table.items():
        if key not in FIELDS:
            raise UserError(f"a recipe has no {key!r}: choose from {', '.join(FIELDS)}")
        if type(value) is not FIELDS[key] or (FIELDS[key] is int and value < 1):
            raise UserError(f"{key} cannot be {value!r}")
    if (like := table.pop("like", None)) is None:
        return table
    if (other_path := _path(like)) in (path, *seen):
        raise UserError(f"it cannot be like {like}")
    try:
        other = _read_table(other_path, (path, *seen))
    except UserError as error:
        raise UserError(f"like {like}: {error}") from error
    for key in ("options", "models"):
        table[key] = {**other.get(key, {}), **table.get(key, {})}
    table["models"] = {name: entry for name, entry in table["models"].items() if entry is not None}
    return {**other, **table}


def _experiment(name, table, vary):
    known = dict(table["models"])
    for text in vary:
        known |= _variations(known, text)
    entries = {}
    for key, entry in known.items():
        entries[key] = _entry(key, entry, known, entries, table.get("options", {}))
    found = {key: table[key] for key in FIELDS if key in table and key not in ("options", "models")}
    for key in ("control", "student"):
        if found.get(key) not in entries:
            raise UserError(f'"{key}" must be the name of a model')
    if not entries[found["student"]].teachers:
        raise UserError("the student has no teachers")
    if found.get("clean", "light") not in CLEANERS:
        raise UserError(f'"clean" must be one of {", ".join(CLEANERS)}')
    if found.get("scored", "best.pt") not in ("best.pt", "checkpoint.pt"):
        raise UserError('"scored" must be best.pt or checkpoint.pt')
    if found.get("precision", "fp32") not in ("fp32", "bf16", "auto"):
        raise UserError('"precision" must be fp32, bf16 or auto')
    if wrong := set(found.get("finetune", {})) - set(FINETUNE):
        raise UserError(f'"finetune" has no {sorted(wrong)[0]}: choose from {", ".join(FINETUNE)}')
    given = ["-", "--tasks", "-", *arguments_of(found.get("finetune", {}))]
    finetune.parse_arguments(given, Strict)  # for what is wrong with a value
    if found.get("corpus", "toy") != "toy":
        raise UserError('"corpus" can only be toy: other text is given by --train and --dev')
    teaching = frozenset(teacher for entry in entries.values() for teacher in entry.teachers)
    return Experiment(name, entries, teaching=teaching, **found)


def _variations(known, text):
    """{name: entry} of one --vary."""
    place, _, values = text.partition("=")
    role, _, option = place.rpartition(".")
    if role not in known or not option or not values:
        raise UserError(f"--vary {text}: give MODEL.OPTION=a,b,c with one of {', '.join(known)}")
    try:
        found = json.loads(values) if values.startswith("[") else values.split(",")
    except ValueError as error:
        raise UserError(f"--vary {text}: {values} is no list in JSON") from error
    return {
        f"{role}.{option}={value if isinstance(value, str) else json.dumps(value)}": {
            "like": role,
            option.replace("-", "_"): _value(value) if isinstance(value, str) else value,
        }
        for value in found
    }


def _value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _entry(name, entry, known, entries, shared):
    """The `Entry` of a table's model; `entries` are those above it."""
    merged = _merged(name, known, {name})
    title = entry.get("title", name)  # the one thing besides `like` that is not taken over
    for key in ("like", "title"):
        merged.pop(key, None)
    preset, teachers = merged.pop("model", None), merged.pop("teachers", [])
    offset = merged.pop("seed_offset", 0)
    if not name.strip() or name != Path(name).name or name.startswith(".") or "&" in name:
        raise UserError(f"{name!r} cannot be the name of a model: it names a folder, without &")
    if not isinstance(teachers, list) or not set(map(str, teachers)) <= set(entries):
        raise UserError(f"{name}: its teachers must be models above it in the table")
    if type(offset) is not int or offset < 0 or not isinstance(title, str):
        raise UserError(f"{name}: seed_offset must be a whole number, title a text")
    options = {**shared, **merged}
    if wrong := OURS & set(options):
        raise UserError(f"{name}: {sorted(wrong)[0]} is not for a recipe to say")
    found = Entry(name, title, preset, tuple(teachers), offset, options)
    try:
        found.config()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return found


def _merged(name, known, seen):
    """A table's model with what it takes from those that it is like."""
    entry = known.get(name)
    if not isinstance(entry, dict):
        raise UserError(f"{name}: a model is an object, {{option: value}}")
    like = entry.get("like")
    if like is None:
        return dict(entry)
    if not isinstance(like, str) or like not in known or like in seen:
        raise UserError(f"{name}: it cannot be like {like}")
    return {**_merged(like, known, seen | {like}), **entry}


# ---- the arithmetic, before anything is trained


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model will take."""

    parameters: int
    epochs: float
    tokens: int  # trained on
    flops: float
    disk: int  # bytes of its folder
    memory: int  # bytes of weights, moments, gradients and of its teachers, without activations


def costs(experiment, num_tokens, words):
    """{name: Cost} of a recipe's models on a training text of so many tokens and words.

    A pass over a token costs 6 FLOPs for each parameter that it meets in training (all but the
    embeddings), and 2 in a teacher (Kaplan et al., arXiv 2001.08361). A cached teacher's layers are
    run once, its head at every step, and its states are kept in two bytes a value.
    """
    found, bodies, heads, widths = {}, {}, {}, {}
    for name, entry in experiment.entries.items():
        config = entry.config()
        changes = models.parse_shape(config.shape)
        if config.dropout is not None:
            changes |= {"dropout": config.dropout}
        shape = models.with_overrides(models.preset(entry.preset).config, changes)
        with torch.device("meta"):
            model = models.build(dataclasses.replace(shape, vocab_size=experiment.vocabulary_size))
        parameters = models.count_parameters(model)
        bodies[name] = sum(p.numel() for b in model.blocks for p in b.parameters())
        heads[name], widths[name] = model.head.numel(), shape.hidden_size
        chunks = count_chunks(num_tokens, config.sequence_length, config.random_offset)
        plan = plan_run(config, max(chunks, 1), words)
        tokens = plan.tokens_seen(plan.steps)
        cached = getattr(config, "cache_teachers", "off") != "off"
        taught = min(tokens, num_tokens) if cached else tokens
        flops = 6 * (bodies[name] + heads[name]) * tokens
        flops += sum(2 * bodies[t] * taught + 2 * heads[t] * tokens for t in entry.teachers)
        memory = 16 * parameters + sum(4 * found[t].parameters for t in entry.teachers)
        memory += cached * 2 * num_tokens * sum(widths[t] for t in entry.teachers)
        found[name] = Cost(parameters, plan.epochs(plan.steps), tokens, flops, 40 * parameters, memory)
    return found
