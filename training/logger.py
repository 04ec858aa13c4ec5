"""All that a run writes: log lines, dev evaluations, checkpoints; and how it is asked to stop."""

import json
import math
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import torch
from tqdm import tqdm

from training import distributed
from training.checkpoint import make_checkpoint, write_checkpoint
from training.io import UserError, log, warn, write_text
from training.resume import CHECKPOINT_NAMES, on_host, promote, training_state

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
AGREE_SECONDS = 2  # after which processes tell each other whether they were asked to stop, and
AGREE_STEPS = 8  # the most steps: torchrun kills what has not ended 30 seconds after a signal
PROFILE_AFTER = 10  # steps: by then all is compiled, and what is made once is made
NONFINITE_LIMIT = 10  # steps in a row without a finite gradient, after which a run gives up


def commit():
    """The project's git commit, "-dirty" where files other than results differ, or "unknown".

    The environment variable BABYLLAMA_COMMIT stands for it where .git was left behind.
    """
    unknown = os.environ.get("BABYLLAMA_COMMIT", "unknown")

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    except OSError:
        return unknown
    return found + ("-dirty" if changed else "") if found else unknown


def machine(device):
    """What the numbers were measured on: the GPU's name, or the number of CPU cores."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    flags = "/proc/cpuinfo"
    bf16 = os.path.exists(flags) and "avx512_bf16" in Path(flags).read_text()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}{', avx512_bf16' if bf16 else ''})"


class StopSignal:
    """Within its `with`, SIGTERM, SIGINT and SIGHUP are remembered: a step can be finished first.

    `number` is the signal's, or None. A second signal acts at once, but for one of several
    processes. A SIGHUP that is ignored, as nohup has it, stays so.
    """

    def __enter__(self):
        self.number = None
        self.previous = {s: signal.getsignal(s) for s in STOPPING}
        if self.previous[signal.SIGHUP] == signal.SIG_IGN:
            del self.previous[signal.SIGHUP]
        for number in self.previous:
            signal.signal(number, self.receive)
        return self

    def receive(self, number, _frame):
        self.number = number
        if distributed.world_size() == 1:  # torchrun may pass one on that its processes also got themselves
            self.__exit__()

    def __exit__(self, *_error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def exit_code(progress):
    """The exit code of a run that ended with this progress: 0, or 143, 130, 129 after a signal.

    Of several processes each may leave the others now.
    """
    distributed.destroy_when_done()
    return 128 + progress["stopped_by"] if progress.get("stopped_by") else 0


class JSONLog:
    """log.jsonl: one JSON object a line, the run first, then training and evaluation lines.

    Where `path` is None nothing is written. With `tensorboard`, a folder, TensorBoard gets the same
    numbers: each value under its name, at its step.
    """

    def __init__(self, path, first, from_step, tensorboard=None):
        """Continues the log in `path` after a step; lines of later steps and damage are dropped."""
        self.file = self.board = None
        if path is None:
            return
        kept = _lines_until(path, from_step) if from_step and path.exists() else []
        write_text(path, "\n".join([*kept, json.dumps(first)]) + "\n")
        self.file = open(path, "a", encoding="utf-8")
        if tensorboard:
            self.board = summary_writer(tensorboard, from_step)

    def write(self, entry):
        """Appends one object; numbers that JSON does not have become null."""
        if not self.file:
            return
        for key, value in entry.items() if self.board else ():
            if key != "step":
                self.board.add_scalar(key, value, entry["step"])
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        try:
            print(json.dumps(finite), file=self.file, flush=True)
        except OSError as error:
            raise UserError(
                f"cannot write {self.file.name}: {error.strerror}; make room, and the same command continues"
            ) from error

    def close(self):
        """Ends the log."""
        for written in (self.file, self.board):
            if written:
                written.close()


def summary_writer(folder, from_step):
    """TensorBoard's writer, which continues the run in `folder` after a step.

    Raises `UserError` where tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because it is an optional extra
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)


def profiler(steps, path):
    """A torch.profiler that writes a trace of so many steps, after ten, to `path`."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(
            skip_first=PROFILE_AFTER - 1, wait=0, warmup=1, active=steps, repeat=1
        ),
        on_trace_ready=lambda found: found.export_chrome_trace(str(path)),
    )


def _lines_until(path, last_step):
    """The lines of a log that are whole and of no later step than that, as text."""
    kept, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            text = line.decode("utf-8")
            entry = json.loads(text) if text else None
            step = 0 if entry is None else entry.get("step", 0)
        except (ValueError, AttributeError, RecursionError):
            step = None
        if type(step) is not int:
            damaged += 1
        elif step <= last_step and text:
            kept.append(text)
    if damaged:
        warn(f"{path}: {damaged} damaged lines are left out")
    return kept


class TrainingLogger:
    """Writes a run's log and checkpoints, keeps its progress, and stops the clock meanwhile.

    Of several processes each has one, and the first alone writes.
    """

    def __init__(self, train_step, config, plan, provenance, progress, found):
        """`progress` is a dict that this object keeps up to date; `found` the state's path."""
        self.train_step, self.config, self.plan = train_step, config, plan
        self.provenance, self.progress, self.out = provenance, progress, Path(config.out)
        self.conditions = provenance.conditions(config)
        self.model = train_step.objective.model
        self.writes = distributed.rank() == 0
        if self.writes:
            for debris in self.out.glob("*.tmp"):  # left by a write that a kill interrupted
                debris.unlink()
        self.current_is_whole = found == self.out / "checkpoint.pt"
        self.commit = commit()
        first = {
            "config": self.conditions,
            "model": provenance.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokenizer": provenance.tokenizer.identity,
            "commit": self.commit,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "device": str(train_step.nonfinite_steps.device),
            "processes": distributed.world_size(),
        }
        fields = self._fields()
        if self.writes:
            make_checkpoint(**fields)  # what cannot be saved is to be known before training
        log = self.out / "log.jsonl" if self.writes else None
        board = self.out / "tensorboard" if config.tensorboard else None
        self.log = JSONLog(log, first, progress["step"], board)
        self.profiler = None
        if config.profile and self.writes:
            self.profiler = profiler(config.profile, self.out / "trace.json")
            self.profiler.start()
        self.bar = tqdm(
            total=plan.steps,
            initial=progress["step"],
            unit="step",
            leave=True,
            disable=None if self.writes else True,
        )
        self.started = self.clock = self.agreed_at = time.perf_counter()
        self.clock_step = self.agreed_step = progress["step"]
        self.agree_next = progress["step"] + 1

    def count(self, step):
        """Notes that a step was taken; where it passes a word mark, the weights are kept."""
        self.progress["step"], self.progress["words"] = step, self.plan.words_seen(step)
        self.bar.update()
        if self.profiler:
            self.profiler.step()
        for name in self.plan.marks_passed(step):
            self._write(name)

    def asked_to_stop(self, stop):
        """Whether a signal came or the minutes of --stop-after are over.

        Several processes agree on it every few steps: all of them learn of it after the same step,
        and of the signal as their own.
        """
        step, seconds = self.progress["step"], time.perf_counter() - self.agreed_at
        limit = self.config.stop_after
        late = limit is not None and (time.perf_counter() - self.started) / 60 > limit
        if distributed.world_size() > 1:
            if step < self.agree_next:
                return False
            found = distributed.all_gather((stop.number, late, seconds / (step - self.agreed_step)))
            numbers, late, seconds = zip(*found)
            stop.number, late = next(filter(None, numbers), None), any(late)
            ahead = max(1, min(AGREE_STEPS, int(AGREE_SECONDS / max(seconds))))
            self.agree_next, self.agreed_step = step + ahead, step
            self.agreed_at = time.perf_counter()
        return bool(stop.number or late)

    def log_step(self, terms, rate):
        """One line of the log; the only place where a step waits for the device."""
        values = {key: value.item() for key, value in terms.items()}
        step, now = self.progress["step"], time.perf_counter()
        tokens = self.plan.tokens_seen(step) - self.plan.tokens_seen(self.clock_step)
        speed = round(tokens / (now - self.clock), 1)
        self.clock, self.clock_step = now, step
        epochs = self.plan.epochs(step)
        self.log.write(
            {
                "step": step,
                "epoch": round(epochs, 4),
                "tokens": self.plan.tokens_seen(step),
                "words": self.progress["words"],
                **values,
                "learning_rate": rate,
                "tokens_per_second": speed,
            }
        )
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s")
        if self.bar.disable:
            shown = [f"step {step}/{self.plan.steps}", f"epoch {epochs:.2f}"]
            for key in ("loss", "cross_entropy"):
                if key in values:
                    shown.append(f"{key.replace('_', '-')} {values[key]:.4f}")
            log("  ".join([*shown, f"{speed:,.0f} tokens/s"]))
        self._check_finite()

    def _check_finite(self):
        """Raises `UserError` where no step has had a finite gradient for long."""
        if self.train_step.nonfinite_in_a_row.item() < NONFINITE_LIMIT:
            return
        present = [self.out / name for name in CHECKPOINT_NAMES if (self.out / name).exists()]
        where = f"{present[0]} holds the weights as they were" if present else "nothing was saved"
        raise UserError(
            f"no finite gradient in the last {NONFINITE_LIMIT} steps; {where}: "
            "lower --learning-rate or use --precision fp32"
        )

    def evaluate(self, evaluate):
        """Logs what `evaluate(model, autocast)` returns: {"dev_cross_entropy": nats a token, ...}.

        best.pt is written where the dev cross-entropy is the lowest so far, or the "score", if
        there is one, the highest.
        """
        paused, progress = time.perf_counter(), self.progress
        with distributed.unsharded(self.train_step.objective):
            found = evaluate(self.model, self.train_step.autocast)
        values = {key: float(value) for key, value in found.items()}
        progress.update(values)
        self.log.write({"step": progress["step"], **values})
        self.clock += time.perf_counter() - paused
        value, score = values["dev_cross_entropy"], values.get("score")
        with tqdm.external_write_mode():
            shown = "nats per token" if score is None else f"nats, score {score:.4f}"
            log(f"step {progress['step']}: dev cross-entropy {value:.4f} {shown}")
        if score is None:
            gain = progress["best_dev_cross_entropy"] - value
        else:
            gain = score - progress.get("best_score", -math.inf)
        better = gain > 0 and math.isfinite(value)
        waited = progress.get("evaluations_since_best", 0) + 1
        progress["evaluations_since_best"] = 0 if gain > self.config.least_gain else waited
        if better:
            progress.update(best_dev_cross_entropy=value, best_step=progress["step"])
            progress |= {} if score is None else {"best_score": score}
            self._write("best.pt")

    def save(self):
        """checkpoint.pt; the one before it, unless it was found damaged, becomes previous.pt."""
        self._write("checkpoint.new", training_state(self.train_step))
        if self.writes:
            promote(self.out, rotate=self.current_is_whole)
        self.current_is_whole = True

    def _write(self, name, training=None):
        paused = time.perf_counter()
        fields = self._fields()
        if self.writes:
            write_checkpoint(self.out / name, training=training, **fields)
        self.clock += time.perf_counter() - paused

    def _fields(self):
        """What all checkpoints of the run hold."""
        return {
            "model": self.provenance.model,
            "weights": {key: on_host(w) for key, w in self.model.state_dict().items()},
            "config": self.conditions,
            "tokenizer": self.provenance.tokenizer,
            "progress": dict(self.progress),
            "teachers": self.provenance.teachers,
            "commit": self.commit,
        }

    def say_finished(self):
        """Says which model is the best. Raises `UserError` where no evaluation was finite."""
        if not self.progress["best_step"]:
            raise UserError(
                f"no dev evaluation was finite, so there is no {self.out / 'best.pt'}: lower "
                "--learning-rate or use --precision fp32, and choose another --out"
            )
        best = f"dev cross-entropy {self.progress['best_dev_cross_entropy']:.4f}"
        where = f"{self.out / 'best.pt'} has step {self.progress['best_step']}"
        log(f"finished: {where}, {best}")

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self.profiler:
            self.profiler.stop()
        self.bar.close()
        self.log.close()
