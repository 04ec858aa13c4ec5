"""Trains a GPT-2 or a LLaMA on token shards: the one training loop of this project.

    python train.py --model llama-58m                 its recipe comes with it
    python train.py --model llama-58m --dry-run       the arithmetic, and nothing else

The run's folder holds checkpoint.pt (full state), previous.pt (the one before), best.pt (weights at
the best dev cross-entropy) and log.jsonl. The same command continues a run that was stopped.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import model as models
from data import BatchStream, Tokenizer, TokenShard, dev_subset
from files import UserError, locked, run, say, write_text
from loss import fused_cross_entropy

CLIP_NORM = 1.0  # Hugging Face's default, active in every run of the original
GRAPH_WARM_UP = 3  # steps before a CUDA graph is captured: what is made once is then made
NONFINITE_LIMIT = 10  # steps in a row without a finite gradient, after which a run gives up
EVAL_BATCH_SIZE = 32  # sequences
GIB = 1 << 30


# ---- configuration: each default beside its help, the command line generated from both


def option(default, help, **details):
    """A dataclass field that is also a command-line option; None means: decided later, see help."""
    return dataclasses.field(default=default, metadata={"help": help, **details})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    model: str = option("llama-58m", "preset, from the list below")
    init: str | None = option(
        None, "start from this checkpoint's weights and shape; --model then names the recipe alone"
    )
    data: str = option("data/babylm", "folder of train.bin, dev.bin and tokenizer.model")
    out: str | None = option(
        None, "folder of the run; default: runs/ and the preset's name (of a student, distilled-)"
    )
    epochs: float | None = option(
        None, "passes over the data; default: the preset's", either=True, above=0
    )
    steps: int | None = option(None, "optimizer steps, not --epochs", either=True, minimum=1)
    batch_size: int | None = option(None, "sequences a step; default: the preset's", minimum=1)
    micro_batch_size: int | None = option(
        None, "sequences at a time, to bound memory; default: the whole batch", minimum=1
    )
    sequence_length: int = option(128, "tokens of a chunk", minimum=1)
    random_offset: bool = option(False, "start each chunk up to a length later, anew each epoch")
    learning_rate: float | None = option(
        None, "peak of the schedule; default: the preset's", minimum=0
    )
    weight_decay: float | None = option(
        None, "AdamW's decoupled decay; default: the preset's", minimum=0
    )
    warmup_steps: int | None = option(
        None, "steps to the peak, at most a tenth of all; default: the preset's", minimum=0
    )
    seed: int = option(0, "of initialisation, order and dropout", minimum=0)
    resume: str = option("auto", "auto: continue if there is a run; never; or a checkpoint's path")
    save_every: int = option(500, "steps between checkpoints; the last has one", minimum=1)
    save_at_words: list[str] | None = option(
        None,
        "write the weights as chck_1M.pt and so on when that many words have been seen: numbers "
        "such as 500k or 1M, or babylm (1M to 10M by 1M, then every 10M)",
    )
    log_every: int = option(20, "steps between lines of log.jsonl", minimum=1)
    eval_every: int = option(
        0, "steps between dev evaluations besides each epoch's; 0: none", minimum=0
    )
    eval_sequences: int = option(1024, "dev chunks of an evaluation, the same always", minimum=1)
    stop_after: float | None = option(
        None, "minutes after which to save and stop; default: never", minimum=0
    )
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: str = option(
        "auto", "of matrix products; auto: bf16 where native", choices=("auto", "fp32", "bf16")
    )
    compile: bool | None = option(None, "torch.compile the layers; default: on CUDA only")
    cuda_graph: bool = option(False, "replay the student's step as one CUDA graph")
    dry_run: bool = option(False, "print the arithmetic of the run and stop")


# What may differ when a run is continued; data and teachers are compared by content instead.
MAY_CHANGE = {
    *(
        "out",
        "resume",
        "save_every",
        "save_at_words",
        "log_every",
        "stop_after",
        "micro_batch_size",
    ),
    *("device", "compile", "cuda_graph", "dry_run", "data", "init", "teachers", "cache_teachers"),
}


def parse(config_class, description, argv=None, check=lambda config: None):
    """The config that the command line describes; wrong usage ends the program with exit code 2.

    `check(config)` returns what is wrong with options that are right one by one, or None.
    """
    listing = ", ".join(models.PRESETS)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"presets: {listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    either = parser.add_mutually_exclusive_group()
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        help = field.metadata["help"].replace("%", "%%")
        required = field.default is dataclasses.MISSING
        if not required and field.default is not None and kind is not bool:
            help += f" (default: {field.default})"
        details = {"help": help, "required": required}
        if not required:
            details["default"] = field.default
        if kind is bool:
            undecided = field.default is None
            details["action"] = argparse.BooleanOptionalAction if undecided else "store_true"
        elif typing.get_origin(kind) in (list, tuple):
            details |= {"nargs": "+", "type": typing.get_args(kind)[0]}
        else:
            details |= {"type": kind, "choices": field.metadata.get("choices")}
        if kind is not bool:
            details["metavar"] = field.name.upper() if not details.get("choices") else None
        place = either if "either" in field.metadata else parser
        place.add_argument("--" + field.name.replace("_", "-"), **details)
    config = config_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(config):
        problem = _out_of_range(getattr(config, field.name), **field.metadata)
        if problem:
            parser.error(f"--{field.name.replace('_', '-')} must be {problem}")
    if problem := check(config):
        parser.error(problem)
    return config


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


def with_recipe(config, out_prefix=""):
    """`config` with what was left open taken from its preset's recipe."""
    recipe = dataclasses.asdict(models.preset(config.model).recipe)
    if config.steps is not None:
        recipe.pop("epochs")
    values = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    if config.out is None:
        values["out"] = f"runs/{out_prefix}{config.model}"
    return dataclasses.replace(config, **values)


# ---- the objective, the optimizer, the step


class CrossEntropyObjective(nn.Module):
    """-log p(next token), the mean over the step's targets: what a model trains on alone."""

    teachers_identity = ()
    compiled = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def prepare(self, batch):
        """What `forward` reads of the batch: nothing more than is there."""
        return batch

    def forward(self, batch):
        hidden = self.model.hidden_states(batch.tokens)
        loss = fused_cross_entropy(
            hidden, self.model.head, batch.targets, batch.num_targets, compiled=self.compiled
        )
        return {"loss": loss, "cross_entropy": loss.detach()}


def learning_rate(step, steps, peak, warmup_steps):
    """Of step 0, 1, ...: linear from 0 to `peak` at `warmup_steps`, then a cosine to 0 at `steps`.

    The schedule as the original ran it: the first step of a warm-up has a rate of 0.
    """
    warmup_steps = min(warmup_steps, steps // 10)
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def build_optimizer(model, weight_decay):
    """AdamW, 0.9 / 0.999 / 1e-8, decaying all but biases and LayerNorm.

    RMSNorm gains and embeddings decay: the version that the paper ran with exempted `nn.LayerNorm`
    alone (transformers 4.29.1, `ALL_LAYERNORM_LAYERS`).
    """
    exempt = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name == "bias"
    }
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n not in exempt], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n in exempt], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


class TrainStep:
    """`train_step(batch, learning_rate)`: forward, backward, clip, AdamW, all on the device.

    Returns the objective's terms and the gradient's norm before clipping, as tensors on the device.
    A gradient that is not finite changes nothing; such steps are counted, in a row and in all.
    """

    def __init__(self, objective, optimizer, autocast, micro_batch_size=None):
        self.objective, self.optimizer, self.autocast = objective, optimizer, autocast
        self.micro_batch_size = micro_batch_size
        self.parameters = list(objective.model.parameters())
        self.nonfinite_in_a_row = torch.zeros((), device=self.parameters[0].device)
        self.nonfinite_steps = torch.zeros((), device=self.parameters[0].device)

    def __call__(self, batch, learning_rate):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return self.update(self.prepare(batch))

    def prepare(self, batch):
        """The micro-batches of a step, each with what its teachers say."""
        parts = batch.split(self.micro_batch_size or len(batch.tokens))
        with self.autocast:
            return [self.objective.prepare(part) for part in parts]

    def update(self, parts):
        """The step itself, once its input is there: the same work on the same memory each time."""
        sums = {}
        for part in parts:
            with self.autocast:
                terms = self.objective(part)
            terms["loss"].backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        nonfinite = (~torch.isfinite(norm)).float()
        self.nonfinite_in_a_row.add_(1).mul_(nonfinite)
        self.nonfinite_steps.add_(nonfinite)
        # Fused AdamW reads this on the device and leaves weights, moments and count as they are.
        self.optimizer.found_inf = nonfinite
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**sums, "gradient_norm": norm, "nonfinite_steps": self.nonfinite_steps}


class GraphedTrainStep(TrainStep):
    """`TrainStep` whose update becomes one CUDA graph, captured once and then replayed.

    A student's step on few tokens is some hundreds of short kernels: launched one by one, they take
    longer to launch than to run. The teachers stay outside: theirs are long, or they are cached.
    A graph reads where it was captured to read, so the batch and the rate are copied to one place,
    and keeps the memory of its activations. What is no tensor is as it was captured: all batches
    have one shape and the same counts.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rate = torch.zeros((), device=self.parameters[0].device)
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True
        self.warm_up, self.stream = GRAPH_WARM_UP, None
        self.parts = self.graph = self.terms = None

    def __call__(self, batch, learning_rate):
        self.load(batch, learning_rate)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        if self.warm_up:
            self.warm_up -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                terms = self.update(self.parts)
            torch.cuda.current_stream().wait_stream(self.stream)
            return terms
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.terms = self.update(self.parts)
        self.graph.replay()
        return self.terms

    def load(self, batch, learning_rate):
        """Puts a step's input where `update` reads it."""
        parts = self.prepare(batch)
        if self.parts is None:
            self.parts = [part.clone() for part in parts]
        for mine, new in zip(self.parts, parts, strict=True):
            if mine.counts() != new.counts():
                raise ValueError(f"a batch of {new.counts()} after one of {mine.counts()}")
            for place, value in zip(mine.tensors(), new.tensors(), strict=True):
                place.copy_(value)
        self.rate.fill_(learning_rate)


@torch.no_grad()
def dev_cross_entropy(model, shard, starts, sequence_length, autocast):
    """Mean nats per token of the dev chunks that begin at `starts`."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(starts), EVAL_BATCH_SIZE):
        tokens, targets = shard.chunks(starts[i : i + EVAL_BATCH_SIZE], sequence_length)
        with autocast:
            hidden = model.hidden_states(tokens.to(device))
            total += fused_cross_entropy(hidden, model.head, targets.to(device), 1).item()
    model.train(training)
    return total / (len(starts) * sequence_length)


def compile_blocks(objective):
    """Compiles the layers of the model and its teachers, which are alike, and the loss's rows."""
    objective.compiled = True
    # On a CPU dropout is drawn as eager code does: the same masks, and quicker than compiled ones.
    options = {"fallback_random": next(objective.parameters()).device.type == "cpu"}
    for module in objective.modules():
        for block in getattr(module, "blocks", ()):
            block.compile(options=options)


# ---- where and how to compute


def choose_precision(name, device):
    """fp32 or bf16; of `auto`, bf16 where the chip multiplies it natively: elsewhere it is slow."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, c)() for c in checks)
    return "bf16" if native else "fp32"


def autocast_for(device, precision):
    """The autocast context of that precision."""
    kind = CPUAutocast if (device.type, precision) == ("cpu", "bf16") else torch.autocast
    return kind(device.type, torch.bfloat16, enabled=precision == "bf16")


class CPUAutocast(torch.autocast):
    """Autocast in which attention is two bfloat16 products and a softmax between them.

    The CPU's flash kernel takes three times as long for the short sequences here: it saves the
    memory of scores that are small at 128 positions, and multiplies in float32.
    """

    def __enter__(self):
        self.allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # it rules the CPU's too
        self.kernel = sdpa_kernel(SDPBackend.MATH)
        self.kernel.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.kernel.__exit__(*error)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.allowed)
        return super().__exit__(*error)


@dataclasses.dataclass(frozen=True)
class Data:
    train: TokenShard
    dev: TokenShard
    tokenizer: Tokenizer


def open_data(config):
    """The run's shards and tokenizer. `UserError` if one is missing, damaged, or of another kin."""
    folder = Path(config.data)
    data = Data(
        TokenShard(folder / "train.bin"),
        TokenShard(folder / "dev.bin"),
        Tokenizer.load(folder / "tokenizer.model"),
    )
    for shard in (data.train, data.dev):
        if shard.tokenizer != data.tokenizer.identity:
            raise UserError(
                f"{shard.path} was not made with {folder / 'tokenizer.model'}: "
                "run tokenize_corpus.py again"
            )
    return data


def load_compatible(path, config, data):
    """`load_checkpoint`, but `UserError` unless the data were made with the model's tokenizer."""
    model, checkpoint = models.load_checkpoint(path)
    theirs = checkpoint["tokenizer"]["identity"]
    if theirs != data.tokenizer.identity:
        raise UserError(
            f"{path} was trained with another tokenizer ({theirs[:12]}) than {config.data} "
            f"({data.tokenizer.identity[:12]}): encode the data with that of the checkpoint, "
            "which export_hf.py writes as tokenizer.model (tokenize_corpus.py --tokenizer)"
        )
    if model.config.vocab_size != data.tokenizer.vocabulary_size:
        raise UserError(
            f"{path} has {model.config.vocab_size} logits, the tokenizer of {config.data} "
            f"{data.tokenizer.vocabulary_size} pieces: use a model trained on this data"
        )
    return model, checkpoint


def initial_model(config, data):
    """The model to train and where it is from: drawn from the seed, or as --init has it.

    Its origin is {"name", "digest"}: what checkpoints call it, and what a run is compared by.
    """
    torch.manual_seed(config.seed)
    if config.init is not None:
        model, checkpoint = load_compatible(config.init, config, data)
        return model, {"name": checkpoint["model"]["name"], "digest": checkpoint["digest"]}
    model = models.build_model(config.model, data.train.vocabulary_size)
    return model, {"name": config.model, "digest": None}


def word_marks(names, total_words):
    """{file name: words} of --save-at-words, as far as the run goes. `UserError` for no number."""
    million, marks = 1_000_000, []
    for name in names or ():
        number, unit = (name[:-1], name[-1]) if name[-1:] in ("k", "M") else (name, "")
        if name == "babylm":
            marks += [*range(million, 10 * million, million)]
            marks += range(10 * million, total_words + 1, 10 * million)
        elif number.isascii() and number.isdigit() and len(number) < 16 and int(number):
            marks.append(int(number) * {"": 1, "k": 1000, "M": million}[unit])
        else:
            raise UserError(f"--save-at-words {name}: give babylm, or numbers such as 500k or 1M")

    def label(mark):
        for unit, size in (("M", million), ("k", 1000)):
            if mark % size == 0:
                return f"{mark // size}{unit}"
        return str(mark)

    return {f"chck_{label(mark)}.pt": mark for mark in sorted(set(marks)) if mark <= total_words}


# ---- state that outlives the process


def training_state(step):
    """What resuming needs besides weights: moments by parameter name, and random states."""
    named, state = step.objective.model.named_parameters(), step.optimizer.state
    cuda = step.parameters[0].is_cuda
    return {
        "optimizer": {name: dict(state[p]) for name, p in named if p in state},
        "nonfinite": [step.nonfinite_in_a_row.item(), step.nonfinite_steps.item()],
        "random": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(step.parameters[0].device) if cuda else None,
        },
    }


def restore(step, checkpoint, path):
    """Puts a full checkpoint's weights, moments and random states in place.

    Raises `UserError` if they are not of this model: a fused optimizer trusts the sizes it is told.
    """
    model, state = step.objective.model, checkpoint["training"]
    device = step.parameters[0].device
    try:
        model.load_state_dict(checkpoint["weights"])
        for name, parameter in model.named_parameters():
            moments = state["optimizer"][name]
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"{name} has other moments")
            for key, value in moments.items():
                shape = () if key == "step" else parameter.shape
                if (value.shape, value.dtype) != (shape, parameter.dtype):
                    raise ValueError(f"{key} of {name} has another shape")
        in_a_row, in_all = state.get("nonfinite", (0, 0))  # of checkpoints before it was counted
        step.nonfinite_in_a_row.fill_(in_a_row)
        step.nonfinite_steps.fill_(in_all)
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], device)
    except Exception as error:  # what someone made up may raise anything at all
        raise UserError(f"{path} holds no state of this run's model: use another") from error
    for name, parameter in model.named_parameters():
        step.optimizer.state[parameter] = {
            key: value.to(device) for key, value in state["optimizer"][name].items()
        }


STATES = ("checkpoint.pt", "checkpoint.new", "previous.pt")  # the newest first


def find_checkpoint(config, identity):
    """The checkpoint that the run starts from and its path, or (None, None) for a new run.

    Raises `UserError` if --resume forbids it, or what there is cannot be continued.
    """
    out = Path(config.out)
    present = [out / name for name in STATES if (out / name).exists()]
    if config.resume == "never" and (present or (out / "log.jsonl").exists()):
        raise UserError(
            f"{out} holds a run: continue it with --resume auto, or choose another --out"
        )
    for path in present:
        try:
            checkpoint = models.read_checkpoint(path)
        except UserError as error:
            if path == present[-1]:
                raise UserError(
                    f"{out} holds no state that can be read ({path.name} is damaged too): delete "
                    "it, or choose another --out"
                ) from error
            print(f"warning: {path} is damaged; falling back to an older state", file=sys.stderr)
            continue
        check_continues(checkpoint, identity, path)
        progress, best = checkpoint["progress"], out / "best.pt"
        if progress["step"] < progress["steps"] and progress["best_step"]:
            try:
                models.read_checkpoint(best)
            except UserError as error:
                print(f"warning: {error}; the next evaluation writes it anew", file=sys.stderr)
                progress.update(best_dev_cross_entropy=math.inf, best_step=0)
        return checkpoint, path
    if config.resume not in ("auto", "never"):
        checkpoint = models.read_checkpoint(config.resume)
        check_continues(checkpoint, identity, config.resume)
        progress = checkpoint["progress"]
        if progress["step"] >= progress["steps"]:
            raise UserError(f"{config.resume} is of a finished run: there is nothing to continue")
        # The new folder is to have a best.pt of its own.
        progress.update(best_dev_cross_entropy=math.inf, best_step=0)
        return checkpoint, Path(config.resume)
    if (out / "best.pt").exists():  # of a run that was killed before its first checkpoint
        check_continues(
            models.read_checkpoint(out / "best.pt"), identity, out / "best.pt", state=False
        )
    return None, None


def check_continues(checkpoint, identity, path, state=True):
    """Raises `UserError`, listing what differs, unless the checkpoint is of this very run."""
    progress = checkpoint["progress"]
    counts = [progress.get(key) for key in ("step", "steps", "best_step")]
    whole = "best_dev_cross_entropy" in progress and all(type(n) is int and n >= 0 for n in counts)
    if state and not (checkpoint["training"] and whole):
        raise UserError(f"{path} holds weights only: resume from a checkpoint.pt")
    saved = checkpoint["config"]
    keys = sorted((saved.keys() | identity.keys()) - MAY_CHANGE)
    differing = []
    for key in keys:
        there, now = saved.get(key), identity.get(key)
        if there != now:
            short = max(len(str(there)), len(str(now))) < 40  # a digest says nothing to a reader
            differing.append(f"{key} ({there} there, {now} now)" if short else key)
    if differing:
        raise UserError(
            f"{path} is of another run: {', '.join(differing)}; give the same options, or another "
            "--out for a new run"
        )


class RunLog:
    """log.jsonl: one JSON object a line; of a run that continues, what came after is dropped."""

    def __init__(self, path, first, from_step):
        kept = []
        if from_step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with_step = json.loads(line) if line.endswith("}") else {"step": math.inf}
                if with_step.get("step", 0) <= from_step:
                    kept.append(line)
        write_text(path, "\n".join([*kept, json.dumps(first)]) + "\n")
        self.file = open(path, "a", encoding="utf-8")

    def write(self, entry):
        """Appends one object; numbers that JSON does not have become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        try:
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}") from error


class StopSignal:
    """Remembers SIGTERM and SIGINT: the step is finished first; a second one acts at once."""

    def __init__(self):
        self.number = None
        self.previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for number in self.previous:
            signal.signal(number, self.receive)

    def receive(self, number, _frame):
        self.number = number
        self.restore()

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def commit():
    """The project's git commit, "-dirty" where files other than results differ, or "unknown"."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    except OSError:
        return "unknown"
    return found + ("-dirty" if changed else "") if found else "unknown"


def print_arithmetic(objective, config, stream, steps, marks, device, precision):
    """One block that says what the run will do and need; `UserError` if the disk is too small."""
    parameters = models.count_parameters(objective.model)
    frozen = models.count_parameters(objective) - parameters
    tokens = config.batch_size * config.sequence_length
    # Two full states and a third on its way; best.pt and the word marks are weights alone.
    disk = (3 * 12 + 4 * (1 + len(marks))) * parameters + (64 << 20)
    out = Path(config.out)
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    written = [out / name for name in (*STATES, "best.pt", *marks)]
    there = sum(path.stat().st_size for path in written if path.exists())
    free = shutil.disk_usage(folder).free
    epochs = steps * config.batch_size / stream.num_chunks
    say(f"model      {config.model}: {parameters:,} parameters; {device}, {precision}")
    if frozen:
        say(f"teachers   {frozen:,} parameters, frozen")
    say(f"data       {len(stream.shard.tokens):,} tokens, {stream.shard.words:,} words")
    say(f"step       {config.batch_size} sequences x {config.sequence_length} = {tokens:,} tokens")
    say(f"run        {steps:,} steps = {epochs:.2f} epochs of {stream.num_chunks:,} chunks")
    if marks:
        say(f"marks      {', '.join(marks)}")
    say(f"memory     {(16 * parameters + 4 * frozen) / GIB:.2f} GiB of state, plus activations")
    say(f"disk       {disk / GIB:.2f} GiB in {config.out}, {free / GIB:.1f} GiB free")
    if disk - there > free:
        raise UserError(f"{out}: {disk - there} bytes needed, {free} free: choose another --out")


# ---- the loop


def fit(objective, config, origin=None):
    """Trains `objective.model`, and returns its progress: step, steps, dev cross-entropies, ...

    `objective(batch)` returns a dict of tensors: `loss`, and whatever else is to be logged. The
    config is complete (`with_recipe`). "stopped_by" in the result is the signal that ended the run
    early. Raises `UserError` before the first step for all that can be known before it.
    """
    data = open_data(config)
    device = models.choose_device(config.device)
    precision = choose_precision(config.precision, device)
    autocast = autocast_for(device, precision)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where streams and graphs are made
    if config.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU of CUDA; training is on {device}: leave it out")
    if config.sequence_length > objective.model.config.max_position_embeddings:
        longest = objective.model.config.max_position_embeddings
        raise UserError(f"--sequence-length {config.sequence_length}: {config.model} has {longest}")
    stream = BatchStream(
        data.train, config.batch_size, config.sequence_length, config.seed, config.random_offset,
        device,
    )  # fmt: skip
    dev_starts = dev_subset(data.dev, config.sequence_length, config.eval_sequences)
    steps = config.steps or max(1, round(stream.num_chunks * config.epochs / config.batch_size))
    words = steps * config.batch_size / stream.num_chunks * data.train.words
    marks = word_marks(config.save_at_words, round(words))
    print_arithmetic(objective, config, stream, steps, marks, device, precision)
    if config.dry_run:
        return {"step": 0, "steps": steps}

    origin = origin or {"name": config.model, "digest": None}
    identity = run_identity(objective, config, data) | {"init_digest": origin["digest"]}
    checkpoint, found = find_checkpoint(config, identity)
    objective.to(device).train()
    optimizer = build_optimizer(objective.model, config.weight_decay)
    kind = GraphedTrainStep if config.cuda_graph else TrainStep
    train_step = kind(objective, optimizer, autocast, config.micro_batch_size)
    progress = {"step": 0, "steps": steps, "best_dev_cross_entropy": math.inf, "best_step": 0}
    if checkpoint:
        restore(train_step, checkpoint, found)
        progress = checkpoint["progress"]
        if progress["step"] >= steps:
            say(f"{config.out} is finished at {steps} steps; a new run needs another --out")
            return progress
        say(f"continuing after step {progress['step']} of {found}")
    compile_layers = device.type == "cuda" if config.compile is None else config.compile
    if compile_layers:
        compile_blocks(objective)

    with locked(config.out):
        recorder = Recorder(train_step, config, identity, origin, data, progress, marks, found)
        bar = tqdm(total=steps, initial=progress["step"], unit="step", disable=None)
        signals, started = StopSignal(), time.monotonic()
        try:
            for i in range(progress["step"], steps):
                rate = learning_rate(i, steps, config.learning_rate, config.warmup_steps)
                terms = train_step(stream(i).to(device), rate)
                step = progress["step"] = i + 1
                epochs_before, epochs = (
                    n * config.batch_size / stream.num_chunks for n in (i, step)
                )
                recorder.count_words(epochs)
                bar.update()
                last = step == steps
                if step % config.log_every == 0 or last:
                    recorder.log_step(terms, rate, epochs, bar)
                epoch_ends = int(epochs) > int(epochs_before)
                if epoch_ends or last or (config.eval_every and step % config.eval_every == 0):
                    recorder.evaluate(dev_starts)
                minutes = (time.monotonic() - started) / 60
                late = config.stop_after is not None and minutes > config.stop_after
                if last or step % config.save_every == 0 or signals.number or late:
                    recorder.save()
                if (signals.number or late) and not last:
                    say(f"stopped after step {step} of {steps}: the same command continues")
                    return progress | {"stopped_by": signals.number}
        finally:
            bar.close()
            signals.restore()
        best = f"dev cross-entropy {progress['best_dev_cross_entropy']:.4f}"
        say(f"finished: {Path(config.out) / 'best.pt'} is of step {progress['best_step']}, {best}")
        return progress


def run_identity(objective, config, data):
    """What makes a run this run: its options, and the digests of what it reads."""
    return dataclasses.asdict(config) | {
        "train_shard": data.train.identity,
        "dev_shard": data.dev.identity,
        "shape": dataclasses.asdict(objective.model.config),
        "teacher_digests": [t["digest"] for t in objective.teachers_identity],
    }


class Recorder:
    """All that a run writes: log lines, dev evaluations, checkpoints; and the clock of training."""

    def __init__(self, train_step, config, identity, origin, data, progress, marks, found):
        self.train_step, self.config, self.identity = train_step, config, identity
        self.name = origin["name"]
        self.data, self.progress, self.marks = data, progress, marks
        self.model, self.out = train_step.objective.model, Path(config.out)
        self.current = self.out / "checkpoint.pt"
        for debris in self.out.glob("*.tmp"):  # of a write during which the process was killed
            debris.unlink()
        self.current_is_whole = found == self.current
        self.commit = commit()
        first = {
            "config": identity,
            "model": config.model,
            "parameters": models.count_parameters(self.model),
            "tokenizer": data.tokenizer.identity,
            "commit": self.commit,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "device": str(train_step.parameters[0].device),
        }
        self.log = RunLog(self.out / "log.jsonl", first, progress["step"])
        self.clock, self.clock_step = time.perf_counter(), progress["step"]

    def log_step(self, terms, rate, epochs, bar):
        """One line of the log; the only place where a step waits for the device."""
        values = {key: value.item() for key, value in terms.items()}
        step, config = self.progress["step"], self.config
        sequences = step * config.batch_size
        elapsed = time.perf_counter() - self.clock
        tokens = (step - self.clock_step) * config.batch_size * config.sequence_length
        self.clock, self.clock_step = time.perf_counter(), step
        entry = {
            "step": step,
            "epoch": round(epochs, 4),
            "tokens": sequences * config.sequence_length,
            "words": self.progress["words"],
            **values,
            "learning_rate": rate,
            "tokens_per_second": round(tokens / elapsed, 1),
        }
        self.log.write(entry)
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s"
        )
        if bar.disable:
            say(
                f"step {step}/{self.progress['steps']}  epoch {epochs:.2f}  "
                f"loss {values['loss']:.4f}  cross-entropy {values['cross_entropy']:.4f}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s"
            )
        if self.train_step.nonfinite_in_a_row.item() >= NONFINITE_LIMIT:
            raise UserError(
                f"no finite gradient in the last {NONFINITE_LIMIT} steps; "
                f"{self.last_good()} holds the weights as they were: "
                "lower --learning-rate or use --precision fp32"
            )

    def last_good(self):
        """The newest state on disk."""
        present = [self.out / name for name in STATES if (self.out / name).exists()]
        return present[0] if present else "nothing saved yet"

    def evaluate(self, starts):
        """Dev cross-entropy, logged; best.pt where it is the lowest so far."""
        paused = time.perf_counter()
        value = dev_cross_entropy(
            self.model, self.data.dev, starts, self.config.sequence_length, self.train_step.autocast
        )
        progress = self.progress
        progress["dev_cross_entropy"] = value
        self.log.write({"step": progress["step"], "dev_cross_entropy": value})
        self.clock += time.perf_counter() - paused
        with tqdm.external_write_mode():
            say(f"step {progress['step']}: dev cross-entropy {value:.4f} nats per token")
        if value < progress["best_dev_cross_entropy"]:
            progress["best_dev_cross_entropy"], progress["best_step"] = value, progress["step"]
            self._write("best.pt")

    def count_words(self, epochs):
        """Words seen; the weights go into a file of their own where a mark has been passed."""
        before = self.progress.get("words", 0)
        self.progress["words"] = round(epochs * self.data.train.words)
        for name, mark in self.marks.items():
            if before < mark <= self.progress["words"]:
                self._write(name)

    def save(self):
        """checkpoint.pt; the one before it, unless it was found damaged, becomes previous.pt."""
        self._write("checkpoint.new", training_state(self.train_step))
        if self.current_is_whole:
            os.replace(self.current, self.out / "previous.pt")
        os.replace(self.out / "checkpoint.new", self.current)
        self.current_is_whole = True

    def _write(self, name, training=None):
        paused = time.perf_counter()
        models.save_checkpoint(
            self.out / name,
            name=self.name,
            model=self.model,
            config=self.identity,
            tokenizer=self.data.tokenizer,
            progress=dict(self.progress),
            teachers=self.train_step.objective.teachers_identity,
            commit=self.commit,
            training=training,
        )
        self.clock += time.perf_counter() - paused


def exit_code(progress):
    """0, or 143 / 130 where a signal ended the run."""
    return 128 + progress["stopped_by"] if progress.get("stopped_by") else 0


def main(argv=None):
    config = with_recipe(parse(TrainConfig, __doc__, argv))
    data = open_data(config)
    model, origin = initial_model(config, data)
    return exit_code(fit(CrossEntropyObjective(model), config, origin))


if __name__ == "__main__":
    sys.exit(run(main))
