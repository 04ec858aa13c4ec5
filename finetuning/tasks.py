"""Tasks of classifying texts: how they are read, scored, and learned.

A task NAME is a folder's NAME.train.jsonl and NAME.valid.jsonl, a JSON object a line: what it is
about, in the fields of one of `FORMS`, and its "label". NAME-mm.valid.jsonl without a train file of
its own, as MNLI's mismatched part is, goes with the train file of NAME.
"""

import hashlib
import json
import string
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import Batch
from loss import IGNORED
from tokenizer import PAD
from training.io import UserError, printable
from training.options import option

MAX_CLASSES, MAX_LABEL = 100, 100  # and characters of a label
MAX_LINE_BYTES = 1 << 20  # of a file of examples: no model here reads as much
RESAMPLES, BOOTSTRAP_SEED = 1000, 2023
# How the files of a task's parts end: here and in 2025, or in the data of 2023.
TRAIN = {".train.jsonl": "", ".train.json": ""}
VALID = {
    ".valid.jsonl": "",
    ".validation.json": "",
    ".validation_matched.json": "",
    ".validation_mismatched.json": "-mm",
}
# Fields become a text, or a pair of texts, as BabyLM's pipelines of 2023 to 2025 make them. The
# first form whose fields are all there is taken.
FORMS = (
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
FIELDS = [{f for part in form for _, f, _, _ in string.Formatter().parse(part) if f} for form in FORMS]
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
# The number by which the challenge compares models; for all others it is the accuracy.
METRICS = {"mrpc": "f1", "qqp": "f1", "cola": "mcc"} | dict.fromkeys(MSGS, "mcc")


# ---- how they are learned


@dataclass(frozen=True)
class Settings:
    """How a task is learned. The defaults are those of the pipeline of 2023.

    That pipeline does not evaluate the last step, as is done here; the one of 2025 leaves out an
    epoch's short last batch, and decays all parameters, biases and norms among them.
    """

    learning_rate: float = option(5e-5, "the peak", minimum=0)
    batch_size: int = option(64, "examples a step", minimum=1)
    epochs: int = option(10, "passes over the examples", minimum=1)
    patience: int = option(
        10, "evaluations in a row without a better one, after which to stop; 0: never", minimum=0
    )
    eval_every: int = option(200, "steps between evaluations; 0: an epoch", minimum=0)
    max_length: int = option(128, "tokens of a text, of which the end is cut off", minimum=3)
    schedule: str = "linear"
    warmup: float = 0.0  # of the steps
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    least_gain: float = 0.001  # a smaller one is none to the patience
    chosen_by: str = "f1"  # what chooses among evaluations; "metric": the task's own


# What Timiryasov and Tastet found for the pipeline of 2023, from the card of their model
# (huggingface.co/timinar/baby-llama-58m). Of the rows of the six ambiguous tasks of MSGS only the
# first rate was readable here: complete them from the card. Other tasks have the pipeline's
# defaults.
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


def settings_of(task, name):
    """The `Settings` of a task in the table of that name."""
    known, others = SETTINGS[name]
    return known.get(task.lower(), others)


# ---- how they are read


@dataclass(frozen=True)
class Examples:
    """The examples of a file: `texts` [(a,) or (a, b)] and the numbers of their classes."""

    texts: list
    labels: list
    words: int
    digest: str


@dataclass(frozen=True)
class Task:
    """A task: its classes' names in order, what to learn from, and {name: what to score}."""

    name: str
    classes: tuple[str, ...]
    form: tuple[str, ...]  # one of `FORMS`, that of the first line
    train: Examples
    valid: dict

    @property
    def digests(self):
        """{file's part: digest}."""
        return {"train": self.train.digest} | {n: e.digest for n, e in self.valid.items()}


def read_tasks(folder, names=None):
    """The `Task`s of a folder, in order of their names, or those of `names` in that order.

    Raises `UserError` where there is none, where one of these lacks a file, and for a line that
    cannot be learned from.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one of NAME.train.jsonl, NAME.valid.jsonl")
    train, valid = _files(folder, TRAIN), _files(folder, VALID)
    if not train:
        raise UserError(f"{folder} holds no NAME.train.jsonl: give a folder of tasks")
    owners = {n: n if n in train else n.removesuffix("-mm") for n in valid}
    for name in names or [*train, *owners.values()]:
        if name not in train and name not in owners.values():
            raise UserError(f"{folder} has no task {name}: choose from {', '.join(train)}")
        if name not in train:
            path = next(valid[n] for n, owner in owners.items() if owner == name)
            raise UserError(f"{path} has no {name}.train.jsonl beside it: add it")
        if name not in owners.values():
            raise UserError(f"{train[name]} has no {name}.valid.jsonl beside it: add it")
    return [
        _read_task(name, train[name], {n: valid[n] for n in valid if owners[n] == name})
        for name in names or train
    ]


def _files(folder, ends):
    """{task: path} of the files of a folder that have one of the ends, by name."""
    found = {}
    for end, suffix in ends.items():
        for path in folder.glob(f"[!.]*{end}"):
            name = path.name.removesuffix(end) + suffix
            if name in found:
                raise UserError(f"{found[name]} and {path} are the same part of a task: remove one")
            found[name] = path
    return dict(sorted(found.items()))


def _read_task(name, train, valid):
    texts, names, digest = _read(train)
    with open(train, "rb") as file:
        form = FORMS[_form(_parsed(next(filter(bytes.strip, file))))]
    counted = Counter(names)
    classes = sorted(counted, key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0, c))
    if len(classes) < 2:
        raise UserError(f"{train} shows the class {classes[0]} alone: there is nothing to learn")
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{train} has {len(classes)} classes, more than {MAX_CLASSES}: mend labels")

    def examples(texts, names, digest):
        words = sum(len(part.split()) for text in texts for part in text)
        return Examples(texts, [numbers[name] for name in names], words, digest)

    numbers = {name: i for i, name in enumerate(classes)}
    scored = {n: examples(*_read(path, train.name, classes)) for n, path in sorted(valid.items())}
    return Task(name, tuple(classes), form, examples(texts, names, digest), scored)


def _read(path, train_name="", classes=None):
    """The texts of a file's lines, the names of their classes, and the file's digest.

    Raises `UserError` for a class that is not in `classes`, those of the train file, if given.
    """
    texts, names, digest = [], [], hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"it has more than {MAX_LINE_BYTES} bytes")
                text, name = _example(_parsed(line))
                if classes and name not in classes:
                    known = ", ".join(classes[:9])
                    raise ValueError(f"the class {name} never occurs in {train_name} ({known})")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}: mend it or remove it") from error
            texts.append(text)
            names.append(sys.intern(name))  # a file has many lines of few classes
    if not texts:
        raise UserError(f"{path} is empty: fill it or remove it")
    return texts, names, digest.hexdigest()


def _parsed(line):
    """What a line of JSON holds. Raises ValueError for what is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError("it is no JSON object") from error


def _example(entry):
    """The texts and the class's name in a line's object. Raises ValueError for any other."""
    if not isinstance(entry, dict) or "label" not in entry:
        raise ValueError('it is no JSON object with a "label"')
    form, fields = FORMS[_form(entry)], FIELDS[_form(entry)]
    if not all(isinstance(entry[field], str) for field in fields):
        raise ValueError(f"{' and '.join(sorted(fields))} must be text")
    if not any(entry[field].strip() for field in fields):
        raise ValueError(f"there is no text: {' and '.join(sorted(fields))} must not be empty")
    texts = tuple(part.format(**entry) for part in form)
    "".join(texts).encode()  # half of a surrogate pair is no character: a UnicodeError
    return texts, _class_name(entry["label"])


def _form(entry):
    """The number of the first form whose fields an object has. Raises ValueError without any."""
    for i, fields in enumerate(FIELDS):
        if fields <= entry.keys():
            return i
    known = "; ".join(", ".join(sorted(fields)) for fields in FIELDS)
    raise ValueError(f"it has none of these sets of fields: {known}")


def _class_name(label):
    """The name of a class, as a text. Raises ValueError for a label that names none."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # how pandas writes whole numbers, once one of them was missing
    name = str(label).strip() if isinstance(label, (str, int)) else ""
    if not 0 < len(name) <= MAX_LABEL or name.startswith("-"):
        shown = repr(label)[:MAX_LABEL]
        raise ValueError(f'the label {shown} is no class: "label" must be a word or a number')
    return printable(name)


# ---- as tokens


def last_places(targets):
    """Where each text ends, (B,): the one place of its row (B, T) that has a target."""
    return (targets >= 0).long().argmax(1)


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as token ids: a list of N lists, and the class of each, (N,) int64."""

    ids: list
    labels: torch.Tensor
    words: int
    cut: int  # examples that were too long

    @property
    def num_tokens(self):
        """Tokens of all examples."""
        return sum(map(len, self.ids))

    def batch(self, chosen):
        """The `Batch` of these examples: padded behind, the class as the last token's target.

        No mask is needed: in a causal model nothing sees what is behind it.
        """
        rows = [torch.tensor(self.ids[i]) for i in chosen]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        targets = torch.full_like(tokens, IGNORED)
        ends = torch.tensor([len(row) - 1 for row in rows])
        targets[torch.arange(len(rows)), ends] = self.labels[chosen]
        return Batch.whole(torch.as_tensor(chosen), tokens, targets)


def encode(examples, tokenizer, max_length):
    """`EncodedExamples` of at most `max_length` tokens each; between two texts is a newline.

    Too long a text loses its end, of a pair the longer one first: what the exported tokenizer does.
    """
    parts = zip(*(tokenizer.encode(list(column)) for column in zip(*examples.texts)))
    between = tokenizer.encode("\n")
    ids, cut = [], 0
    for found in parts:
        whole = sum(map(len, found)) + (len(found) - 1) * len(between)
        cut += whole > max_length
        if len(found) == 1:
            ids.append(found[0][:max_length])
            continue
        room = max_length - len(between)
        least, most = sorted(map(len, found))
        least = min(least, room // 2)
        most = min(most, room - least)
        first, second = (least, most) if len(found[0]) <= len(found[1]) else (most, least)
        ids.append(found[0][:first] + between + found[1][:second])
    return EncodedExamples(ids, torch.tensor(examples.labels), examples.words, cut)


# ---- how they are scored


def confusion(predicted, labels, num_classes):
    """How many examples of each class are predicted as each class: (is, predicted), float64."""
    table = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    ones = torch.ones(len(labels), dtype=torch.float64)
    return table.index_put_((labels, predicted), ones, accumulate=True)


def table_scores(tables):
    """{"accuracy", "mcc"} of confusion tables (..., C, C), and "f1" of class 1 if C is 2: (...).

    Matthews' correlation, for any C (Gorodkin 2004), is 0 where all are of one class, or all are
    predicted to be; F1 is 0 where class 1 is never right.
    """
    are, said = tables.sum(-1), tables.sum(-2)  # (..., C)
    total, right = are.sum(-1), tables.diagonal(dim1=-2, dim2=-1).sum(-1)
    covariance = right * total - (are * said).sum(-1)
    variances = (total**2 - (are**2).sum(-1)) * (total**2 - (said**2).sum(-1))
    found = {"accuracy": right / total, "mcc": covariance / variances.sqrt().clamp(min=1e-300)}
    if tables.shape[-1] == 2:
        found["f1"] = 2 * tables[..., 1, 1] / (are[..., 1] + said[..., 1]).clamp(min=1)
    return found


def scores(predicted, labels, num_classes):
    """`table_scores` of predicted classes and those that are, both (N,), as numbers."""
    table = confusion(predicted, labels, num_classes)
    return {name: value.item() for name, value in table_scores(table).items()}


def text_interval(predicted, labels, num_classes, metric):
    """The 95 % interval (low, high) of a score over texts that might have been drawn instead.

    A bootstrap: examples are drawn with replacement, which draws the cells of their confusion table
    from a multinomial distribution.
    """
    cells = confusion(predicted, labels, num_classes).flatten().numpy()
    there = np.flatnonzero(cells)
    drawn = np.zeros((RESAMPLES, len(cells)))
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    drawn[:, there] = generator.multinomial(len(labels), cells[there] / len(labels), RESAMPLES)
    tables = torch.from_numpy(drawn).view(-1, num_classes, num_classes)
    low, high = np.quantile(table_scores(tables)[metric].numpy(), (0.025, 0.975))
    return float(low), float(high)


def metric_of(name):
    """The name of the number by which models are compared on a task."""
    return METRICS.get(name.lower().removesuffix("-mm"), "accuracy")


def majority_scores(task, name):
    """The `scores` of who always says the class that is most frequent in the train file."""
    labels = torch.tensor(task.valid[name].labels)
    most = Counter(task.train.labels).most_common(1)[0][0]
    return scores(torch.full_like(labels, most), labels, len(task.classes))
