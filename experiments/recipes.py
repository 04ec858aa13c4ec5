"""Reads the recipe of an experiment: which models are trained, on what, with which options.

A recipe is a JSON file, one of `recipes/` or a user's own, for `reproduce.py --recipe`:

    about              its purpose
    like               another recipe, a name or a file: gives whatever this one does not say, down
                       to single options and models; a model that is null here is left out
    corpus             "toy": the invented corpus; otherwise --train and --dev name folders
    clean              cleaning, as tokenize_corpus.py --clean (default: light)
    tokenizer          "byte-bpe", the paper's; otherwise SentencePiece
    vocabulary_size    pieces of the tokenizer
    words, dev_words   words to sample of the training text, and of each half of the dev text
                       (default: all)
    whole_epochs       true: an epoch has only whole batches, as the paper's code counts steps
    precision          of scoring: fp32 (default), bf16, or auto
    scored             the checkpoint that is scored: best.pt (default) or checkpoint.pt, the last
    options            options of train.py and distill.py for all models
    finetune           options of finetune.py for --finetune (default: none)
    models             {name: table}, in the order of training
    control, student   the names of the two models that the report compares first
    least_seeds        seeds that a verdict needs (default: 2)
    control_gain       nats that a better tuned control gained, found after the seeds: they are
                       taken off each student's lead on the control (default: 0.0)

The table of a model has the options of its run, with underscores (`weight_decay`), and besides:
`model` (a preset), `teachers` (names of models above it: then it is distilled), `like` (another
model, which gives all options that this one does not say), `title` (its name in the report) and
`seed_offset` (added to the seed, to train the same model with another seed). An option that is null
or false counts as not given: so a table can undo an option of `like`.
"""

import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path

import torch

import finetune
import model as models
from corpus.cleaning import CLEANERS
from data import count_chunks
from distill import DistillConfig, check_cache
from experiments.results import has_form, is_file_name
from tokenizer import VOCABULARY_SIZE
from train import TrainConfig
from training.io import UserError, printable
from training.options import Strict, may_change, parse
from training.plan import plan_run

FOLDER = Path(__file__).parent / "recipes"
CHOICES = {
    "clean": tuple(CLEANERS),
    "scored": ("best.pt", "checkpoint.pt"),
    "precision": ("fp32", "bf16", "auto"),
    "corpus": ("toy",),
    "tokenizer": ("byte-bpe",),
}
FINETUNE_OPTIONS = ("settings", "head", "dropout", "only", "seeds", *finetune.OPTIONS)
SWITCHES_WITHOUT_DEFAULT = ("compile", "cuda_graph")  # false is not the same as not given
# Options that reproduce.py sets itself or cannot use, and those of the table of a single model.
RESERVED = {"data", "out", "resume", "seed", "device", "init", "stop_after", "dry_run", "shard"}
MODEL = {"model": str, "teachers?": [str], "title": str, "seed_offset?": int}  # besides its options
OF_ONE_MODEL = {"model", "teachers", "like", "title", "seed_offset"}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model of a recipe; `options` are complete, with those of all models."""

    name: str
    title: str
    preset: str
    teachers: tuple[str, ...]
    seed_offset: int
    options: dict

    @functools.cached_property
    def config(self):
        """The config of its run, with the preset's hyperparameters. Raises `UserError` for bad options."""
        try:
            arguments = self.arguments()
            if self.teachers:
                arguments += ["--teachers", *self.teachers]
                config = parse(DistillConfig, "", arguments, check=check_cache, parser_class=Strict)
            else:
                config = parse(TrainConfig, "", arguments, parser_class=Strict)
            return models.with_hyperparameters(config)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    @property
    def teacher_or_ensemble(self):
        """The name of its teacher, or of its teachers' ensemble: the members, and weights that differ."""
        weights = self.options.get("teacher_weights") or ()
        return "&".join(map(str, (*self.teachers, *(weights if len(set(weights)) > 1 else ()))))

    def network(self, vocabulary_size):
        """Its network on the meta device: with sizes, without weights."""
        return _build_on_meta(
            dataclasses.replace(models.preset_shape(self.config), vocab_size=vocabulary_size)
        )

    def conditions(self):
        """All options that decide its weights, besides text, seed and teachers.

        Some of them may change when a run is continued, but they lead to another model.
        """
        config = self.config
        names = {field.name for field in dataclasses.fields(config)}
        deciding = (names - may_change(type(config))) | (names & {"dropout", "patience", "eval_every"})
        return {name: getattr(config, name) for name in sorted(deciding - RESERVED)}

    def whole_steps(self, num_tokens):
        """Its steps on `num_tokens` tokens if each epoch has its whole batches alone."""
        config = self.config
        if config.steps is not None:
            return config.steps
        chunks = count_chunks(num_tokens, config.sequence_length, config.random_offset)
        return math.ceil(config.epochs) * max(chunks // config.batch_size, 1)

    def arguments(self, steps=None):
        """Its options for train.py or distill.py without the teachers; `steps` replaces epochs."""
        changes = {} if steps is None else {"epochs": None, "steps": steps}
        return ["--model", self.preset, *arguments_of(self.options | changes)]


@functools.cache  # students and control share one shape, and building takes a while
def _build_on_meta(shape):
    with torch.device("meta"):
        return models.build(shape)


def arguments_of(options):
    """A dict of options as command-line arguments.

    Raises `UserError` for a value that is no number or printable text, or that would be an option.
    """
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value is False and name not in SWITCHES_WITHOUT_DEFAULT):
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-"))
            continue
        values = value if isinstance(value, list) else [value]
        texts = [str(element) for element in values if has_form(element, (str, float))]
        is_option = any(str(element).startswith("-") for element in values if isinstance(element, str))
        if len(texts) < len(values) or is_option or texts != list(map(printable, texts)):
            raise UserError(f"{name} cannot be {value!r}")
        arguments += [flag, *texts]
    return arguments


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe; `specs` is {name: ModelSpec}, in the order of training."""

    name: str
    specs: dict
    control: str
    student: str
    about: str = ""
    corpus: str = None
    clean: str = "light"
    tokenizer: str = None
    vocabulary_size: int = VOCABULARY_SIZE
    words: int = None
    dev_words: int = None
    whole_epochs: bool = False
    precision: str = "fp32"
    scored: str = "best.pt"
    finetune: dict = dataclasses.field(default_factory=dict)
    least_seeds: int = 2
    control_gain: float = 0.0
    teaching: frozenset = frozenset()  # the names of all teachers, of models that `only` drops too

    def ensembles(self):
        """{name: (specs of its members, their weights or None)} of all sets of several teachers."""
        return {
            spec.teacher_or_ensemble: (
                [self.specs[teacher] for teacher in spec.teachers],
                spec.options.get("teacher_weights"),
            )
            for spec in self.specs.values()
            if len(spec.teachers) > 1
        }

    def all_scored(self):
        """{name: (specs, weights or None)} of all that is scored, the ensembles last."""
        return {name: ([spec], None) for name, spec in self.specs.items()} | self.ensembles()

    def only(self, names):
        """The experiment with these models and their teachers alone."""
        if unknown := set(names) - set(self.specs):
            raise UserError(
                f"no model of recipe {self.name} is called {sorted(unknown)[0]}: choose from "
                f"{', '.join(self.specs)}"
            )
        chosen = set(names)
        while teachers := {t for name in chosen for t in self.specs[name].teachers} - chosen:
            chosen |= teachers
        specs = {name: spec for name, spec in self.specs.items() if name in chosen}
        return dataclasses.replace(self, specs=specs)


# ---- reading

RECIPE_FIELDS = {"like": str, "options": dict, "models": dict}  # of a recipe, with their types
RECIPE_FIELDS |= {
    f.name: f.type for f in dataclasses.fields(Experiment) if f.name not in ("name", "specs", "teaching")
}


def recipe_names():
    """The names of the recipes that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_experiment(recipe, vary=()):
    """The `Experiment` of a recipe: a name from `recipe_names`, or the path of a JSON file.

    Each text "MODEL.OPTION=a,b,c" in `vary` adds, for each value, a model like MODEL. Raises
    `UserError` for anything but a recipe, or an option that the programs do not have.
    """
    path = _path(recipe)
    try:
        return _experiment(path.stem, _read_table(path), vary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _path(recipe):
    return FOLDER / f"{recipe}.json" if recipe in recipe_names() else Path(recipe)


def _unique_keys(pairs):
    """The dict of a JSON object. Raises `UserError` if a key appears twice."""
    names = [key for key, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{sorted(twice)[0]!r} is there twice: one would be lost")
    return dict(pairs)


def _read_table(path, seen=()):
    """The JSON object of a recipe, merged with the recipe that it is `like`."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
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
        if key not in RECIPE_FIELDS:
            raise UserError(f"a recipe has no {key!r}: choose from {', '.join(RECIPE_FIELDS)}")
        form, choices = RECIPE_FIELDS[key], CHOICES.get(key)
        is_small = has_form(value, float) and value < (1 if form is int else 0)
        if not has_form(value, form) or is_small or (choices and value not in choices):
            hint = f": choose from {', '.join(choices)}" if choices else ""
            raise UserError(f"{key} cannot be {value!r}{hint}")
    if (like := table.pop("like", None)) is None:
        return table
    if (base_path := _path(like)) in (path, *seen):
        raise UserError(f"it cannot be like {like}")
    try:
        base = _read_table(base_path, (path, *seen))
    except UserError as error:
        raise UserError(f"like {like}: {error}") from error
    for key in ("options", "models"):
        table[key] = {**base.get(key, {}), **table.get(key, {})}
    table["models"] = {name: entry for name, entry in table["models"].items() if entry is not None}
    return {**base, **table}


def _experiment(name, table, vary):
    tables = dict(table["models"])
    for text in vary:
        for variation, entry in _variations(tables, text):
            if variation in tables:
                raise UserError(f"--vary {text}: {variation} is there twice")
            tables[variation] = entry
    if wrong := OF_ONE_MODEL & table.get("options", {}).keys():
        raise UserError(f'"options" cannot have {sorted(wrong)[0]}: give it to single models')
    specs = {}
    for model in tables:
        specs[model] = _model_spec(model, tables, specs, table.get("options", {}))
    fields = {key: table[key] for key in RECIPE_FIELDS if key in table and key not in ("options", "models")}
    for key in ("control", "student"):
        if fields.get(key) not in specs:
            raise UserError(f'"{key}" must be the name of a model')
    if not specs[fields["student"]].teachers:
        raise UserError("the student has no teachers")
    if wrong := set(fields.get("finetune", {})) - set(FINETUNE_OPTIONS):
        raise UserError(f'"finetune" has no {sorted(wrong)[0]}: choose from {", ".join(FINETUNE_OPTIONS)}')
    finetune.parse_arguments(["-", "--tasks", "-", *arguments_of(fields.get("finetune", {}))], Strict)
    teaching = frozenset(teacher for spec in specs.values() for teacher in spec.teachers)
    return Experiment(name, specs, teaching=teaching, **fields)


def _variations(tables, text):
    """[(name, table)] of the models that one --vary adds."""
    target, _, values = text.partition("=")
    name, _, option = target.rpartition(".")
    if name not in tables or not option or not values:
        raise UserError(f"--vary {text}: give MODEL.OPTION=a,b,c with one of {', '.join(tables)}")
    if option == "shape" and not values.startswith("["):
        raise UserError(f"--vary {text}: a shape has commas itself: give a list in JSON")
    try:
        choices = json.loads(values) if values.startswith("[") else values.split(",")
    except ValueError as error:
        raise UserError(f"--vary {text}: {values} is no list in JSON") from error
    variations = []
    for value in choices:
        label = value if isinstance(value, str) else json.dumps(value)
        with contextlib.suppress(ValueError):  # a number, true, false or null; else a text
            value = json.loads(label)
        variations.append((f"{target}={label}", {"like": name, option.replace("-", "_"): value}))
    return variations


def _model_spec(name, tables, specs, shared_options):
    """The `ModelSpec` of a table; `specs` are those of the tables above it."""
    if not is_file_name(name) or "&" in name:
        raise UserError(f"{name!r} cannot be the name of a model: it names a folder, without &")
    table = _merged_table(name, tables)
    table["title"] = tables[name].get("title", name)  # `like` does not give its title
    if not has_form(table, MODEL) or table.get("seed_offset", 0) < 0:
        raise UserError(
            f"{name}: its model must be a preset ({', '.join(models.PRESETS)}), its teachers a list of "
            "names, its title a text, its seed_offset a number of 0 or more"
        )
    preset, title = table.pop("model"), table.pop("title")
    teachers, offset = table.pop("teachers", []), table.pop("seed_offset", 0)
    if not set(teachers) <= set(specs) or len(set(teachers)) < len(teachers):
        raise UserError(f"{name}: its teachers must be models above it in the table, each once")
    options = {**shared_options, **table}
    if wrong := RESERVED & set(options):
        raise UserError(f"{name}: a recipe cannot set {sorted(wrong)[0]}")
    spec = ModelSpec(name, title, preset, tuple(teachers), offset, options)
    spec.conditions()  # raises for options that the programs do not have
    return spec


def _merged_table(name, tables):
    """The table of a model, with what it takes from those that it is `like`."""
    merged, seen, like = {}, set(), name
    while like is not None:
        if not isinstance(like, str) or like not in tables or like in seen:
            raise UserError(f"{name}: it cannot be like {like}")
        if not isinstance(tables[like], dict):
            raise UserError(f"{like}: a model is an object, {{option: value}}")
        seen.add(like)
        merged = {**tables[like], **merged}
        like = tables[like].get("like")
    merged.pop("like", None)
    return merged


# ---- arithmetic before training

# Of an H200 in operations per second: 40 % of bf16 products by data sheet, and products in float32.
CARD_FLOPS, CARD_FLOPS_FP32 = 0.4 * 989e12, 50e12


@dataclasses.dataclass(frozen=True)
class Cost:
    """The size of a model and of its training."""

    parameters: int
    epochs: float
    tokens: int  # trained on
    flops: float


def costs(experiment, num_tokens, words):
    """{name: Cost} of a recipe's models on a training text of so many tokens and words.

    A pass over a token costs 6 FLOPs for each parameter that it meets in training (all but the
    embeddings), and 2 in a teacher (Kaplan et al., arXiv 2001.08361). A cached teacher's layers are
    run once, its head at every step.
    """
    result, layers, head = {}, {}, {}  # parameters of the layers and of the head
    for name, spec in experiment.specs.items():
        config, network = spec.config, spec.network(experiment.vocabulary_size)
        layers[name] = sum(p.numel() for block in network.blocks for p in block.parameters())
        head[name] = network.head.numel()
        chunks = count_chunks(num_tokens, config.sequence_length, config.random_offset)
        plan = plan_run(config, max(chunks, 1), words)
        tokens = plan.tokens_seen(plan.steps)
        cached = getattr(config, "cache_teachers", "off") != "off"
        teacher_tokens = min(tokens, num_tokens) if cached else tokens
        flops = 6 * (layers[name] + head[name]) * tokens
        flops += sum(2 * layers[t] * teacher_tokens + 2 * head[t] * tokens for t in spec.teachers)
        result[name] = Cost(models.count_parameters(network), plan.epochs(plan.steps), tokens, flops)
    return result


def card_minutes(experiment, costs, scored_tokens):
    """{part: minutes on an H200}, by arithmetic: each training, and the scoring of everything.

    `costs` are those of `costs`, and each model and ensemble is scored on `scored_tokens` tokens.
    Saves, compiling and the launches of small models come on top.
    """
    minutes = {name: cost.flops / CARD_FLOPS / 60 for name, cost in costs.items()}
    sizes = [costs[spec.name].parameters for specs, _ in experiment.all_scored().values() for spec in specs]
    speed = CARD_FLOPS_FP32 if experiment.precision == "fp32" else CARD_FLOPS
    return minutes | {"scoring": 2 * sum(sizes) * scored_tokens / speed / 60}
