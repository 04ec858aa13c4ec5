"""Text classification tasks: how they are read, encoded, scored, and with which settings they are learned.

A task NAME is a folder's NAME.train.jsonl and NAME.valid.jsonl: a JSON object on each line, with the
fields of one of `TEMPLATES` and a "label". NAME-mm.valid.jsonl without a train file of its own, such as
MNLI's mismatched part, is scored with the model of NAME.
"""

import functools
import json
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from data import Batch
from loss import IGNORED
from training.io import UserError, printable, sha256

MAX_CLASSES = 100  # more are a sign of labels that are no classes
BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 1000, 2023
# File name endings of this project and of the data of 2025, then those of 2023, with what each adds to
# the name of the task.
TRAIN_ENDINGS = {".train.jsonl": "", ".train.json": ""}
VALID_ENDINGS = {
    ".valid.jsonl": "",
    ".validation.json": "",
    ".validation_matched.json": "",
    ".validation_mismatched.json": "-mm",
}
# How fields become a text or a pair of texts, as in BabyLM's pipelines of 2023 to 2025. The first
# template whose fields a line has is taken, and all lines of a task must have the same one.
TEMPLATES = (
    ("Question: {question} Answer: {answer}", "{paragraph}"),  # MultiRC
    ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"),  # WSC
    ("{sentence1}", "{sentence2}"),  # MRPC, RTE
    ("{question1}", "{question2}"),  # QQP
    ("{premise}", "{hypothesis}"),  # MNLI
    ("{question}", "{passage}"),  # BoolQ
    ("{question}", "{sentence}"),  # QNLI
    ("{text_a}", "{text_b}"),
    ("{sentence}",),  # CoLA, SST-2, MSGS
    ("{text}",),
)
# Fields that identify or describe an example and take no part in the question.
HARMLESS_FIELDS = re.compile(
    r"idx|index|id|u?uid|guid|(pair|prompt)id|genre|span[12]_index"
    r"|(linguistic|surface)_feature\w*|control_paradigm|template|condition",  # of MSGS
    re.IGNORECASE,
)
MSGS = (
    "main_verb_control",
    "control_raising_control",
    "syntactic_category_control",
    "lexical_content_the_control",
    "relative_position_control",
    "main_verb_lexical_content_the",
    "main_verb_relative_token_position",
    "control_raising_lexical_content_the",
    "control_raising_relative_token_position",
    "syntactic_category_lexical_content_the",
    "syntactic_category_relative_position",
)
# The metric by which the challenge compares models; for all other tasks it is the accuracy.
METRICS = {"mrpc": "f1", "qqp": "f1", "cola": "mcc"} | dict.fromkeys(MSGS, "mcc")
# Names of the class whose F1 counts, which GLUE numbers 1, where they are not the last in the alphabet.
POSITIVE_LABELS = {"mrpc": "equivalent", "qqp": "duplicate", "cola": "acceptable"}


# ---- settings


@dataclass(frozen=True)
class Settings:
    """How a task is learned. The defaults are those of the pipeline of 2023.

    Two differences to the pipelines: that of 2023 does not evaluate after the last step; that of 2025
    leaves out the short last batch of an epoch, and decays all parameters, biases and norms too.
    """

    learning_rate: float = 5e-5  # the peak
    batch_size: int = 64
    epochs: int = 10
    patience: int = 10  # evaluations in a row without improvement; 0: never stop early
    eval_every: int = 200  # steps; 0: after each epoch
    max_length: int = 128  # tokens; the end of a longer example is cut
    schedule: str = "linear"
    warmup: float = 0.0  # share of the steps
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    least_gain: float = 0.001  # smallest improvement that resets the patience
    chosen_by: str = "f1"  # the score that chooses best.pt; "metric": the task's own


# Timiryasov and Tastet's settings for the pipeline of 2023, from the card of their model
# (huggingface.co/timinar/baby-llama-58m). Of the rows of MSGS's six ambiguous tasks only the first
# learning rate was readable here. Tasks without a row have the pipeline's defaults.
AUTHORS = {
    "cola": Settings(4e-5, epochs=3, eval_every=20),
    "sst2": Settings(epochs=6),
    "mrpc": Settings(3e-5, epochs=3, eval_every=20),
    "qqp": Settings(4e-5, eval_every=1000),
    "mnli": Settings(epochs=6),
    "qnli": Settings(epochs=6),
    "rte": Settings(epochs=6),
    "boolq": Settings(3e-4, 16, eval_every=10),
    "multirc": Settings(1e-4, epochs=7, eval_every=1000),
    "wsc": Settings(5e-7, 1, patience=1000, eval_every=2000),
    "control_raising_control": Settings(eval_every=100),
    "control_raising_lexical_content_the": Settings(1e-3),
    "lexical_content_the_control": Settings(1e-3, epochs=1, patience=2, eval_every=10),
    "main_verb_control": Settings(epochs=6),
    "relative_position_control": Settings(1e-3, epochs=1, eval_every=10),
    "syntactic_category_control": Settings(1e-3, epochs=2, eval_every=10),
}
OF_2025 = Settings(
    3e-5,
    32,
    patience=0,
    eval_every=0,
    max_length=512,
    schedule="cosine",
    warmup=0.06,
    min_lr_ratio=0.1,
    weight_decay=0.01,
    clip=0.0,
    chosen_by="metric",
)
SETTINGS = {  # {name: ({task: Settings}, those of all other tasks)}
    "authors": (AUTHORS, Settings()),
    "2023": ({}, Settings()),
    "2025": (
        {
            "wsc": replace(OF_2025, epochs=30),
            **dict.fromkeys(("boolq", "multirc"), replace(OF_2025, batch_size=16)),
        },
        OF_2025,
    ),
}


def settings_of(task, table):
    """Returns the `Settings` of a task in one of the tables of `SETTINGS`."""
    by_task, others = SETTINGS[table]
    return by_task.get(task.lower(), others)


# ---- reading


class Examples(NamedTuple):
    """The examples of a file: `texts` [(a,) or (a, b)], and `labels`, the index of each one's class."""

    texts: list
    labels: list
    words: int
    digest: str
    unused_fields: frozenset | set = frozenset()  # that are no part of the texts


@dataclass(frozen=True, eq=False)
class Task:
    """A task: the names of its classes in order, what to learn from, and {name: what to score}."""

    name: str
    classes: tuple[str, ...]
    positive: int  # index of the class whose F1 is reported, if there are two
    template: tuple[str, ...]  # one of `TEMPLATES`
    train: Examples
    valid: dict

    @property
    def digests(self):
        """{"train" or the name of a valid file: digest}."""
        return {"train": self.train.digest} | {name: e.digest for name, e in self.valid.items()}

    def confusion(self, name, predictions):
        """Returns the `confusion` table of predicted classes (N,) for the valid file of that name."""
        return confusion(predictions, torch.tensor(self.valid[name].labels), len(self.classes))

    def scores(self, name, predictions):
        """Returns the `scores` of predicted classes (N,) for the valid file of that name."""
        return scores(self.confusion(name, predictions), self.positive)

    @property
    def unused_fields(self):
        """Names of fields that are not part of the texts, and not known to be harmless."""
        names = set().union(*(e.unused_fields for e in (self.train, *self.valid.values())))
        return sorted(name for name in names if not HARMLESS_FIELDS.fullmatch(name))


def read_tasks(folder, names=None):
    """Returns the `Task`s of a folder in the order of their names, or those of `names` in that order.

    Raises `UserError` if there is none, a task lacks a file, or a line is not a labelled example.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one of NAME.train.jsonl, NAME.valid.jsonl")
    train, valid = _list_files(folder, TRAIN_ENDINGS), _list_files(folder, VALID_ENDINGS)
    parts = {name: {} for name in train}  # {task: {name of a valid file: its path}}
    for name, path in valid.items():
        parts.setdefault(name if name in train else name.removesuffix("-mm"), {})[name] = path
    names = list(dict.fromkeys(names or parts))
    for name in names or ["NAME"]:
        for part, exists in (("train", name in train), ("valid", parts.get(name))):
            if not exists:
                others = ", ".join(sorted(parts.keys() - {name})) or "no other task"
                raise UserError(f"{folder} holds no {name}.{part}.jsonl: add it ({others} in the folder)")
    return [_read_task(name, train[name], parts[name]) for name in names]


def unread_files(folder):
    """Returns the names of the folder's files that are no part of a task, in order."""
    endings = (*TRAIN_ENDINGS, *VALID_ENDINGS)
    return sorted(
        p.name for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(endings)
    )


def _list_files(folder, endings):
    """Returns {name: path}, by name, of the folder's files with one of these endings."""
    paths = {}
    for ending, suffix in endings.items():
        for path in folder.glob(f"[!.]*{ending}"):
            name = path.name.removesuffix(ending) + suffix
            if name in paths:
                raise UserError(f"{paths[name]} and {path} are the same part of a task: remove one")
            if not path.is_file():
                raise UserError(f"{path} is not a file, or a link to nothing: mend or remove it")
            paths[name] = path
    return dict(sorted(paths.items()))


def _read_task(name, train_path, valid_paths):
    template, train = _read_examples(train_path)
    classes, positive = _read_classes(name, set(train.labels), train_path)

    def numbered(examples):
        return examples._replace(labels=[classes.index(label) for label in examples.labels])

    valid = {part: numbered(_read_examples(path, template, classes)[1]) for part, path in valid_paths.items()}
    return Task(name, classes, positive, template, numbered(train), valid)


def _read_examples(path, template=None, classes=None):
    """Returns the template of a file's lines, and its `Examples` with names of classes as labels.

    Raises `UserError` for a line of another template, by default than the first, or another class.
    """
    content = path.read_bytes()
    texts, labels, unused = [], [], set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
            template = template or _template_of(entry)
            texts.append(_fill(template, entry))
            labels.append(_class_name(entry["label"]))
            if classes and labels[-1] not in classes:
                known = ", ".join(classes[:9])
                raise ValueError(f"the class {labels[-1]} never occurs in the train file ({known})")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}: mend it or remove it") from error
        unused |= entry.keys() - _fields(template) - {"label"}
    if not texts:
        raise UserError(f"{path} is empty: fill it or remove it")
    words = sum(len(part.split()) for text in texts for part in text)
    return template, Examples(texts, labels, words, sha256(content), unused)


def _parse(line):
    """Returns the object of a line of JSON. Raises ValueError for anything else."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError:
        entry = None
    if not isinstance(entry, dict) or "label" not in entry:
        raise ValueError('it is no JSON object with a "label"')
    spans = entry.get("target")
    if isinstance(spans, dict):  # SuperGLUE's own files of WSC nest the spans in it
        entry = {field: value for field, value in entry.items() if field != "target"} | spans
    return entry


@functools.cache  # a file has many lines of few templates
def _fields(template):
    """Returns the names of the fields that a template puts into its texts."""
    return frozenset(f for part in template for _, f, _, _ in string.Formatter().parse(part) if f)


def _template_of(entry):
    """Returns the first template whose fields an object has. Raises ValueError if there is none."""
    for template in TEMPLATES:
        if _fields(template) <= entry.keys():
            return template
    known = "; ".join(", ".join(sorted(_fields(template))) for template in TEMPLATES)
    raise ValueError(f"it has none of these sets of fields: {known}")


def _fill(template, entry):
    """Returns the texts of an object. Raises ValueError unless `template` is its own."""
    own, fields = sorted(_fields(_template_of(entry))), sorted(_fields(template))
    if own != fields:
        raise ValueError(f"it has {', '.join(own)}, and the task's first line has {', '.join(fields)}")
    values = [entry[field] for field in fields]
    if not all(isinstance(value, str) for value in values) or not "".join(values).strip():
        raise ValueError(f"{' and '.join(fields)} must be text, and not empty")
    texts = tuple(part.format(**entry) for part in template)
    "".join(texts).encode()  # raises for half of a surrogate pair, which is no character
    return texts


def _class_name(label):
    """Returns the name of a class as text. Raises ValueError for a label that names none."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes whole numbers so once one of them was missing
    name = str(label).strip() if isinstance(label, (str, int)) else ""
    if not name or name.startswith("-"):
        raise ValueError(f'the label {label!r:.99} is no class: "label" must be a word or a number')
    return printable(name)


def _read_classes(task, names, path):
    """Returns the names of classes in order, numbers first, and the index of the positive one.

    Raises `UserError` if they are too few or too many, or the task's F1 is of none of them.
    """
    classes = tuple(sorted(names, key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0, c)))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise UserError(f"{path} has {len(classes)} classes, and 2 to {MAX_CLASSES} can be learned")
    name = POSITIVE_LABELS.get(task.lower())
    positive = next((i for i, label in enumerate(classes) if label.lower() == name), 1)
    if metric_of(task) == "f1" and (
        len(classes) > 2 or classes[positive].lower() not in (name, "1", "true", "yes")
    ):
        raise UserError(
            f'{path}: the F1 of {task} is that of "{name}", 1, true or yes against one other class, and its '
            f"classes are {', '.join(classes[:9])}: rename the labels or the task"
        )
    return classes, positive


# ---- encoding


def last_positions(targets):
    """Returns the position (B,) of each text's last token, the only one of a row (B, T) with a target."""
    return (targets >= 0).long().argmax(1)


@dataclass(frozen=True, eq=False)
class EncodedExamples:
    """Examples as token ids: a list of N lists, and the class of each, (N,) int64."""

    ids: list
    labels: torch.Tensor
    words: int
    num_cut: int  # examples that lost their ends

    @property
    def num_tokens(self):
        """Tokens of all examples."""
        return sum(map(len, self.ids))

    def batch(self, indices):
        """Returns the `Batch` of these examples: padded behind, the class as the last token's target.

        In a causal model nothing sees what is behind it, so that the padding needs no mask and may be
        any id.
        """
        rows = [torch.tensor(self.ids[i]) for i in indices]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)  # (B, T)
        targets = torch.full_like(tokens, IGNORED)
        ends = torch.tensor([len(row) - 1 for row in rows])
        targets[torch.arange(len(rows)), ends] = self.labels[indices]
        return Batch.whole(torch.as_tensor(indices), tokens, targets)


def encode_examples(examples, tokenizer, max_length):
    """Returns `EncodedExamples` of at most `max_length` tokens; between the texts of a pair is a newline.

    Too long a text loses its end, of a pair the longer one first, as in the exported tokenizer.
    """
    columns = [tokenizer.encode(list(column)) for column in zip(*examples.texts)]
    newline = tokenizer.encode("\n")
    ids, num_cut = [], 0
    for first, *rest in zip(*columns):
        if not rest:
            num_cut += len(first) > max_length
            ids.append(first[:max_length])
            continue
        (second,) = rest
        room = max_length - len(newline)
        num_cut += len(first) + len(second) > room
        # The shorter one keeps up to half of the room, the longer one the rest of it.
        shorter = min(len(first), len(second), room // 2)
        longer = room - shorter
        first_size, second_size = (shorter, longer) if len(first) <= len(second) else (longer, shorter)
        ids.append(first[:first_size] + newline + second[:second_size])
    return EncodedExamples(ids, torch.tensor(examples.labels), examples.words, num_cut)


# ---- scores


def confusion(predictions, labels, num_classes):
    """Returns how many examples of each class are predicted as each: (label, prediction), float64."""
    table = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    ones = torch.ones(len(labels), dtype=torch.float64)
    return table.index_put_((labels, predictions), ones, accumulate=True)


def table_scores(tables, positive=1):
    """Returns {"accuracy", "mcc"} of confusion tables (..., C, C), and the positive class's "f1" if C is 2.

    Matthews' correlation, for any C (Gorodkin 2004), is 0 if all labels or all predictions are of one
    class; F1 is 0 if the positive class is never predicted rightly.
    """
    labels, predictions = tables.sum(-1), tables.sum(-2)  # counts of each class, (..., C)
    total, correct = labels.sum(-1), tables.diagonal(dim1=-2, dim2=-1).sum(-1)
    covariance = correct * total - (labels * predictions).sum(-1)
    variances = (total**2 - (labels**2).sum(-1)) * (total**2 - (predictions**2).sum(-1))
    result = {"accuracy": correct / total, "mcc": covariance / variances.sqrt().clamp(min=1e-300)}
    if tables.shape[-1] == 2:
        counts = labels[..., positive] + predictions[..., positive]
        result["f1"] = 2 * tables[..., positive, positive] / counts.clamp(min=1)
    return result


def scores(table, positive=1):
    """Returns `table_scores` of one confusion table, as numbers."""
    return {name: value.item() for name, value in table_scores(table, positive).items()}


def bootstrap_interval(table, metric, positive=1):
    """Returns the 95 % bootstrap interval (low, high) of a score over the texts of a confusion table.

    Drawing texts with replacement draws the table's cells from a multinomial distribution.
    """
    cells = table.flatten().numpy()
    filled = np.flatnonzero(cells)
    resamples = np.zeros((BOOTSTRAP_RESAMPLES, len(cells)))
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    num_texts = int(cells.sum())
    resamples[:, filled] = generator.multinomial(num_texts, cells[filled] / num_texts, BOOTSTRAP_RESAMPLES)
    tables = torch.from_numpy(resamples).view(-1, *table.shape)
    low, high = np.quantile(table_scores(tables, positive)[metric].numpy(), (0.025, 0.975))
    return float(low), float(high)


def metric_of(name):
    """Returns the name of the metric by which models are compared on a task."""
    return METRICS.get(name.lower().removesuffix("-mm"), "accuracy")


def majority_scores(task, name):
    """Returns the `scores` of always predicting the class that is most frequent in the train file."""
    most_frequent = Counter(task.train.labels).most_common(1)[0][0]
    return task.scores(name, torch.full((len(task.valid[name].labels),), most_frequent))
