"""Log lines, evaluations and checkpoints that a run writes while it trains, and its stop signal."""

import contextlib
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from training import distributed
from training.checkpoint import make_checkpoint, write_checkpoint
from training.device import choose_compute, peak_flops
from training.io import UserError, atomic_write, log, remove_temporaries, warn, write_text
from training.resume import check_diverged, gather_on_rank_zero, is_finished, training_state

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGREE_SECONDS = 2  # ranks agree on stopping at least this often, or after as many steps:
AGREE_STEPS = 8  # torchrun kills a process that has not ended 30 seconds after a signal
PROFILE_AFTER = 10  # steps: by then all layers are compiled and all buffers are allocated
NONFINITE_LIMIT = 10  # a run ends after so many steps in a row without a finite gradient


# ---- where a result comes from


def commit():
    """The project's git commit, "-dirty" if files other than results differ, or "unknown".

    The environment variable BABYLLAMA_COMMIT stands for it in a copy without .git.
    """
    unknown = os.environ.get("BABYLLAMA_COMMIT", "unknown")

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    except OSError:  # git is not installed
        return unknown
    return head + ("-dirty" if changed else "") if head else unknown


def machine(device):
    """The GPU's name, or the number of CPU cores and their architecture."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    bf16 = ", avx512_bf16" if cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text() else ""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}{bf16})"


# ---- stopping


class StopSignal:
    """A context in which a signal, or the end of `minutes`, asks the run to stop after this step.

    `number` is the signal, SIGTERM, SIGINT or SIGHUP, or None. In a run of one process a second
    signal ends the run at once. If SIGHUP is ignored, as under nohup, it stays ignored.
    """

    def __init__(self, minutes=None):
        self.number = None
        self.agreed_at = time.perf_counter()
        self.deadline = math.inf if minutes is None else self.agreed_at + 60 * minutes
        self.steps_since_agreed, self.steps_to_agree = 0, 1

    def __enter__(self):
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [s for s in STOPPING if s != signal.SIGHUP or not under_nohup]
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def receive(self, number, _frame):
        self.number = number
        if distributed.world_size() == 1:  # a rank may get a signal twice, once from torchrun
            self.__exit__()

    def __exit__(self, *_error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def is_requested(self):
        """True if the run should stop, on all ranks alike. All must call it after each step.

        Several ranks exchange this about once in `AGREE_SECONDS`: each exchange waits for the slowest.
        """
        self.steps_since_agreed += 1
        if self.steps_since_agreed < self.steps_to_agree:
            return False
        now = time.perf_counter()
        step_seconds = (now - self.agreed_at) / self.steps_since_agreed
        answers = distributed.all_gather((self.number, now > self.deadline, step_seconds))
        numbers, late, seconds = zip(*answers)
        self.number = next(filter(None, numbers), None)
        self.steps_since_agreed, self.agreed_at = 0, now
        if distributed.world_size() > 1:
            self.steps_to_agree = max(1, min(AGREE_STEPS, int(AGREE_SECONDS / max(seconds))))
        return self.number is not None or any(late)


def exit_code(progress):
    """The exit code of a run that ended with this progress: 0, or 143, 130, 129 after a signal.

    After this call a rank may exit without waiting for the others.
    """
    distributed.destroy_when_done()
    return 128 + progress["stopped_by"] if progress.get("stopped_by") else 0


# ---- log.jsonl and the terminal


class JSONLog:
    """log.jsonl: one JSON object per line: the run's settings, then training steps and evaluations.

    It continues the log in `path` after `from_step`; later and damaged lines are dropped. Each of
    `trackers`, such as TensorBoard, gets the same numbers.
    """

    def __init__(self, path, first, from_step, trackers=()):
        lines = _lines_until(path, from_step) if from_step and path.exists() else []
        write_text(path, "\n".join([*lines, json.dumps(first)]) + "\n")
        self.path, self.trackers = path, trackers

    def write(self, entry):
        """Appends one object; NaN and infinity, which JSON does not have, become null."""
        numbers = {key: value for key, value in entry.items() if key != "step"}
        for tracker in self.trackers:
            tracker.write(numbers, entry["step"])
        finite = {key: value if math.isfinite(value) else None for key, value in entry.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room, and the same command continues"
            ) from error


def _lines_until(path, last_step):
    """The lines of a log up to a step, as text; lines that hold no JSON object are left out."""
    lines, damaged = [], 0
    for line in filter(None, path.read_text("utf-8", errors="replace").split("\n")):
        try:
            if json.loads(line).get("step", 0) <= last_step:
                lines.append(line)
        except (ValueError, AttributeError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        warn(f"{path}: {damaged} damaged lines are left out")
    return lines


def open_trackers(config, out, first, from_step):
    """The trackers that a run asks for: --tensorboard, --wandb."""
    if not (config.tensorboard or config.wandb):
        return []
    from training import trackers  # here, because most runs have none

    opened = [trackers.TensorBoard(out, from_step)] if config.tensorboard else []
    return [*opened, trackers.WeightsAndBiases(out, from_step, first)] if config.wandb else opened


def profiler(steps, path):
    """A torch.profiler that writes a trace of `steps` steps, after the first ten, to `path`."""

    def export(profile):
        with atomic_write(path) as file:
            profile.export_chrome_trace(file.name)

    schedule = torch.profiler.schedule(skip_first=PROFILE_AFTER - 1, wait=0, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=export)


# ---- a run


def record_evaluation(progress, values, least_gain=0.0):
    """Adds an evaluation to the progress. Returns True if it is the best so far.

    The best has the lowest dev cross-entropy or, if there is a "score", the highest score. Early
    stopping ignores a gain of at most `least_gain`.
    """
    cross_entropy = values["dev_cross_entropy"]
    if "score" in values:
        gain = values["score"] - progress.get("best_score", -math.inf)
    else:
        gain = progress["best_dev_cross_entropy"] - cross_entropy
    waited = progress.get("evaluations_since_best", 0) + 1
    progress |= values | {"evaluations_since_best": 0 if gain > least_gain else waited}
    if not (gain > 0 and math.isfinite(cross_entropy)):
        return False
    progress |= {"best_dev_cross_entropy": cross_entropy, "best_step": progress["step"]}
    if "score" in values:
        progress["best_score"] = values["score"]
    return True


class TrainingLogger:
    """Writes a run's log, evaluations and checkpoints, and keeps its progress, a dict.

    Each rank has one, because all ranks must join the gathering of weights. Only rank 0 writes.
    """

    def __init__(self, train_step, config, plan, provenance, progress):
        self.train_step, self.config, self.plan = train_step, config, plan
        self.provenance, self.progress, self.out = provenance, progress, Path(config.out)
        self.model = train_step.objective.model
        self.writes = distributed.rank() == 0
        self.settings, self.commit = provenance.run_settings(config), commit()
        first = {
            "config": self.settings,
            "model": provenance.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "averaging_epochs": plan.averaging_time(config),
            "tokenizer": provenance.tokenizer.identity,
            "commit": self.commit,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "device": str(train_step.nonfinite_steps.device),
            "processes": distributed.world_size(),
        }
        self.first_step = progress["step"]
        fields, self.log = self._checkpoint_fields(), None
        if self.writes:
            make_checkpoint(**fields)  # an error shows now, and not at the first save
            names = ("checkpoint.pt", "best.pt", "log.jsonl", "trace.json", *plan.marks)
            remove_temporaries(self.out, names)
            trackers = open_trackers(config, self.out, first, self.first_step)
            self.log = JSONLog(self.out / "log.jsonl", first, self.first_step, trackers)
        passed = plan.marks_passed(self.first_step, since=0)
        if missing := [name for name in passed if not (self.out / name).exists()]:
            warn(f"--save-at-words: training is past {', '.join(missing)}, which cannot be written any more")
        self.profiler = None
        if config.profile and self.writes:
            self.profiler = profiler(config.profile, self.out / "trace.json")
            self.profiler.start()
        # On a GPU the host has a copy of its own: training goes on while that is hashed and written.
        self.in_background = train_step.nonfinite_steps.device.type != "cpu"
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.started = self.clock = self.saved_at = time.perf_counter()
        self.clock_step = self.first_step
        self.peak = peak_flops(choose_compute(config.device, config.precision))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        try:
            self.finish_writing()
        finally:
            self.writer.shutdown()
            if self.profiler:
                self.profiler.stop()
                if self.progress["step"] - self.first_step <= PROFILE_AFTER:
                    warn(f"--profile: no trace was written, because it begins after {PROFILE_AFTER} steps")
            for tracker in self.log.trackers if self.log else ():
                tracker.close()

    def count(self, step):
        """Counts a step. At a mark of --save-at-words it saves the weights."""
        self.progress |= {"step": step, "words": self.plan.words_seen(step)}
        if self.profiler:
            self.profiler.step()
        for name in self.plan.marks_passed(step):
            self._write_checkpoint(name)

    def log_step(self, terms, rate):
        """Writes a line of the log. Only here does the host wait for the device.

        Raises `UserError` if no gradient was finite in the last steps.
        """
        values = {key: value.item() for key, value in terms.items()}
        step, now = self.progress["step"], time.perf_counter()
        tokens = self.plan.tokens_seen(step) - self.plan.tokens_seen(self.clock_step)
        speed = round(tokens / (now - self.clock), 1)
        self.clock, self.clock_step = now, step
        entry = {"step": step, "epoch": round(self.plan.epochs(step), 4)}
        entry |= {"tokens": self.plan.tokens_seen(step), "words": self.progress["words"]}
        entry |= {**values, "learning_rate": rate, "tokens_per_second": speed}
        if self.log:
            self.log.write(entry)
        cross_entropy = f"  cross-entropy {values['cross_entropy']:.4f}" if "cross_entropy" in values else ""
        left = (now - self.started) / (step - self.first_step) * (self.plan.steps - step)
        log(
            f"step {step}/{self.plan.steps}  epoch {self.plan.epochs(step):.2f}  "
            f"loss {values['loss']:.4f}{cross_entropy}  {speed:,.0f} tokens/s{self._mfu(speed)}  "
            f"{datetime.timedelta(seconds=round(left))} left"
        )
        if self.train_step.nonfinite_in_a_row.item() >= NONFINITE_LIMIT:
            raise UserError(
                f"no finite gradient in the last {NONFINITE_LIMIT} steps: lower --learning-rate or "
                f"use --precision fp32; {self.out} keeps the checkpoints of earlier steps"
            )

    def _mfu(self, tokens_per_second):
        """Returns "  MFU n%": model FLOPs per second as a share of the GPUs' peak, or "" if that is unknown.

        6 FLOPs are counted per token and parameter of the trained model's layers and head, none for
        attention scores or teachers.
        """
        if self.peak is None:
            return ""
        matrices = [p for block in self.model.blocks for p in block.parameters()] + [self.model.head]
        flops = 6 * sum(p.numel() for p in matrices) * tokens_per_second
        return f"  MFU {flops / (self.peak * distributed.world_size()):.1%}"

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count for the tokens per second."""
        paused_at = time.perf_counter()
        yield
        self.clock += time.perf_counter() - paused_at

    def evaluate(self, evaluate):
        """Logs the result of `evaluate(model, autocast)`: {"dev_cross_entropy": nats per token, ...}.

        Writes best.pt if this evaluation is the best so far.
        """
        average, objective = self.train_step.average, self.train_step.objective
        with self.paused(), average.applied(), distributed.unsharded(objective):
            result = evaluate(self.model, self.train_step.autocast)
        values = {key: float(value) for key, value in result.items()}
        if self.log:
            self.log.write({"step": self.progress["step"], **values})
        score = f", score {values['score']:.4f}" if "score" in values else ""
        dev = f"dev cross-entropy {values['dev_cross_entropy']:.4f} nats per token"
        log(f"step {self.progress['step']}: {dev}{score}")
        if record_evaluation(self.progress, values, self.config.least_gain):
            self._write_checkpoint("best.pt")

    def is_save_due(self):
        """True if a checkpoint is due after this step. All ranks must call it.

        Several ranks exchange their minutes after logged steps alone, where they wait anyway.
        """
        minutes, step = self.config.save_every_minutes, self.progress["step"]
        if minutes is None:
            return step % self.config.save_every == 0
        if distributed.world_size() > 1 and step % self.config.log_every:
            return False
        return any(distributed.all_gather(time.perf_counter() - self.saved_at >= 60 * minutes))

    def save(self):
        """Writes checkpoint.pt; the one before it becomes previous.pt."""
        if is_finished(self.progress, self.config.patience):
            self.train_step.average.finish()
        self.saved_at = time.perf_counter()
        training = training_state(self.train_step)
        self._write_checkpoint("checkpoint.pt", previous=self.out / "previous.pt", training=training)

    def _write_checkpoint(self, name, **details):
        applied = contextlib.nullcontext() if "training" in details else self.train_step.average.applied()
        with self.paused(), applied:
            self.finish_writing()
            fields = self._checkpoint_fields()
            if self.writes and self.in_background:
                self.writing = self.writer.submit(write_checkpoint, self.out / name, **fields, **details)
            elif self.writes:
                write_checkpoint(self.out / name, **fields, **details)

    def finish_writing(self):
        """Waits for the last checkpoint. Raises what its writing has raised, such as `UserError`."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _checkpoint_fields(self):
        """The fields that all checkpoints of the run have. All ranks must call it, to gather weights."""
        return {
            "model": self.provenance.model,
            "weights": {key: gather_on_rank_zero(w) for key, w in self.model.state_dict().items()},
            "config": self.settings,
            "tokenizer": self.provenance.tokenizer,
            "progress": dict(self.progress),
            "teachers": self.provenance.teachers,
            "commit": self.commit,
        }

    def log_finished(self):
        """Prints which checkpoint is best. Raises `UserError` if the run has diverged."""
        check_diverged(self.progress, self.out)
        best = f"dev cross-entropy {self.progress['best_dev_cross_entropy']:.4f}"
        log(f"finished: {self.out / 'best.pt'} has step {self.progress['best_step']}, {best}")
