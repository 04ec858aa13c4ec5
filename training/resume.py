"""Resuming: what a checkpoint holds besides weights, and the checkpoint that a run continues from."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from training import distributed, options
from training.checkpoint import DamagedFile, read_checkpoint
from training.io import UserError, log, warn

PATH_OPTIONS = {"data", "out", "init", "teachers", "cache_teachers", "resume", "device"}
# The newest first. Earlier versions wrote checkpoint.new, which a kill may have left.
CHECKPOINT_NAMES = ("checkpoint.new", "checkpoint.pt", "previous.pt")


@dataclass(frozen=True)
class Provenance:
    """The origin of a model: what its checkpoints say of it besides the options.

    `shape` is the model's config, a dataclass; `tokenizer` has `identity` and `model_bytes`;
    `digests` are those of the data and of --init; `teachers` [{"name", "digest"}].
    """

    name: str
    architecture: str
    shape: object
    tokenizer: object
    digests: dict
    teachers: tuple = ()

    @property
    def model(self):
        """The checkpoint's section "model"."""
        shape = dataclasses.asdict(self.shape)
        return {"name": self.name, "architecture": self.architecture, "shape": shape}

    def run_settings(self, config):
        """The settings that identify a run: its options, its shape and the digests of its inputs."""
        return dataclasses.asdict(config) | {
            **self.digests,
            "shape": self.model["shape"],
            "teacher_digests": [teacher["digest"] for teacher in self.teachers],
        }


# ---- training state


def trained_parameters(objective):
    """{name: parameter} of all parameters that require gradients, in the objective's order.

    The names are those in `objective.model`; those of other parameters begin with "objective.".
    """
    return {
        name.removeprefix("model.") if name.startswith("model.") else f"objective.{name}": parameter
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }


def gather_on_rank_zero(tensor):
    """The full tensor on the CPU of rank 0, which writes it; None on other ranks. All must call it."""
    tensor = distributed.full_tensor(tensor.detach())
    return None if distributed.rank() else tensor.cpu().contiguous()


def training_state(train_step):
    """The section "training" of a checkpoint, all on the CPU.

    Optimizer state and the objective's own parameters by parameter name, counts of non-finite
    steps, random state of rank 0 and of the others, the mean weights once there are some.
    """
    parameters, device = train_step.parameters, train_step.nonfinite_steps.device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    rank_zero, *others = distributed.all_gather({"cpu": torch.get_rng_state(), "cuda": cuda})
    optimizer_state = {name: {} for name in parameters}
    for optimizer in train_step.optimizers:
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                is_tensor = isinstance(value, torch.Tensor)
                optimizer_state[name][key] = gather_on_rank_zero(value) if is_tensor else value
    average = train_step.average
    mean = {name: gather_on_rank_zero(w) for name, w in average.mean.items()} if average.count else {}
    return {
        "optimizer": optimizer_state,
        "average": {"count": average.count, "mean": mean},
        "objective": {name: gather_on_rank_zero(p) for name, p in _outside_model(parameters).items()},
        "nonfinite": [train_step.nonfinite_in_a_row.item(), train_step.nonfinite_steps.item()],
        "random": rank_zero | ({"others": others} if others else {}),
    }


def _outside_model(parameters):
    """The parameters that belong to the objective and not to its model."""
    return {name: p for name, p in parameters.items() if name.startswith("objective.")}


def _restore_random_state(saved, device, seed, step):
    """Restores each rank's random state. A rank without a saved state gets its own seed.

    In a new run `saved` is None, and rank 0 keeps its current state.
    """
    rank = distributed.rank()
    states = [] if saved is None else [saved, *saved.get("others", [])]
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and states[rank]["cuda"] is not None:
            torch.cuda.set_rng_state(states[rank]["cuda"], device)
    elif rank:
        digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "little"))


def restore(train_step, checkpoint, path):
    """Copies a full checkpoint's weights, optimizer state and random state into `train_step`.

    Raises `UserError` if a name, shape or type differs from those of this model, objective and
    optimizers. Without this check a fused optimizer would write beyond the end of a smaller tensor.
    """
    saved, device = checkpoint["training"], train_step.nonfinite_steps.device
    try:
        _restore_optimizers(train_step, saved["optimizer"])
        targets = train_step.objective.model.state_dict() | _outside_model(train_step.parameters)
        weights = checkpoint["weights"] | saved.get("objective", {})  # older checkpoints have none
        if weights.keys() != targets.keys():
            raise ValueError("weights have other names")
        with torch.no_grad():
            for name, target in targets.items():
                _copy(weights[name], target)
        average = saved.get("average", {"count": 0, "mean": {}})  # older checkpoints have none
        train_step.average.count = average["count"]
        for name, value in average["mean"].items():
            _copy(value, train_step.average.mean[name])
        in_a_row, total = saved.get("nonfinite", (0, 0))  # older checkpoints did not count them
        train_step.nonfinite_in_a_row.fill_(in_a_row)
        train_step.nonfinite_steps.fill_(total)
        seed, step = checkpoint["config"].get("seed", 0), checkpoint["progress"]["step"]
        _restore_random_state(saved["random"], device, seed, step)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no state of this run's model: use another checkpoint") from error


def _restore_optimizers(train_step, saved):
    """Copies {parameter name: {key: tensor or number}} into the state of the optimizers."""
    if saved.keys() != train_step.parameters.keys():
        raise ValueError("parameters have other names")
    names = {parameter: name for name, parameter in train_step.parameters.items()}
    # A step with zero gradients makes an optimizer create its state, in the sizes that it needs.
    # It may decay the weights, which are overwritten next. (torch.distributed.checkpoint does the
    # same, but compares no shapes and refuses a parameter that has no state.)
    for parameter in names:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in train_step.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for parameter, state in optimizer.state.items():
            values = saved[names[parameter]]
            if not values:  # it has never had a gradient
                state.clear()
            elif values.keys() != state.keys():
                raise ValueError(f"{names[parameter]} has another state")
            for key, value in values.items():
                if isinstance(state[key], torch.Tensor):
                    _copy(value, state[key])
                else:
                    state[key] = type(state[key])(value)


def _copy(value, target):
    if (value.shape, value.dtype) != (target.shape, target.dtype):
        raise ValueError("a tensor has another shape or type")
    distributed.copy_to(target, value)


# ---- the checkpoint that a run continues from


def new_progress(steps):
    """The progress of a run that has not begun."""
    return {"step": 0, "steps": steps, "best_dev_cross_entropy": math.inf, "best_step": 0}


def is_finished(progress, patience=0):
    """True if a run has taken all its steps, or early stopping has ended it."""
    waited = progress.get("evaluations_since_best", 0)
    return progress["step"] >= progress["steps"] or 0 < patience <= waited


def check_settings(config, provenance):
    """Raises `UserError` if --resume names no file, or if the ranks' settings differ other than in paths."""
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        raise UserError(f"--resume {config.resume}: there is no such checkpoint")
    settings = provenance.run_settings(config).items()
    distributed.check_same_on_all_ranks({key: value for key, value in settings if key not in PATH_OPTIONS})


def check_diverged(progress, out):
    """Raises `UserError` if the last evaluation of a finished run was not finite."""
    if math.isfinite(progress.get("dev_cross_entropy", 0.0)):
        return
    best = Path(out) / "best.pt"
    state = f"{best} has step {progress['best_step']}" if progress["best_step"] else f"there is no {best}"
    raise UserError(
        f"the run diverged: its last dev cross-entropy is not finite, {state}; lower --learning-rate or "
        "use --precision fp32, and choose another --out"
    )


def start_or_resume(train_step, config, provenance, steps):
    """The progress of a new run, or of the checkpoint of `find_checkpoint`, copied into `train_step`.

    Raises `UserError` as `find_checkpoint` does, or if ranks find different checkpoints.
    """
    checkpoint, path = distributed.rank_zero_first(
        lambda: find_checkpoint(config, provenance), distributed.rank() == 0
    )
    progress = checkpoint["progress"] if checkpoint else new_progress(steps)
    distributed.check_same_on_all_ranks({"state to continue from": progress["step"]})
    if not checkpoint:
        _restore_random_state(None, train_step.nonfinite_steps.device, config.seed, 0)
        return progress
    restore(train_step, checkpoint, path)
    has_best = path.parent == Path(config.out) and (path.parent / "best.pt").exists()
    if is_finished(progress, config.patience):
        check_diverged(progress, config.out)
        log(f"{config.out} is finished at {progress['step']} steps; a new run needs another --out")
        if not has_best:
            warn(f"its best.pt is gone: {path} has the weights of the last step")
        return progress
    log(f"continuing after step {progress['step']} of {path}")
    if not has_best:  # with --resume PATH the new folder gets one of its own
        progress |= {"best_dev_cross_entropy": math.inf, "best_step": 0}
        progress.pop("best_score", None)
    return progress


def find_checkpoint(config, provenance):
    """The checkpoint that the run starts from and its path, or (None, None) for a new run.

    The folder must be locked: a checkpoint of another name becomes checkpoint.pt here. Raises
    `UserError` if --resume forbids it, or if the run in the folder cannot be continued.
    """
    out = Path(config.out)
    paths = [out / name for name in CHECKPOINT_NAMES if (out / name).exists()]
    if config.resume == "never" and (paths or (out / "log.jsonl").exists()):
        raise UserError(f"{out} holds a run: continue it with --resume auto, or choose another --out")
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except DamagedFile as error:
            if path == paths[-1]:
                raise UserError(
                    f"{out} holds no checkpoint that can be read ({path.name} is damaged too): delete "
                    "it, or choose another --out"
                ) from error
            warn(f"{path} is damaged; falling back to an older checkpoint")
            continue
        check_same_run(checkpoint, config, provenance, path)
        if path.name != "checkpoint.pt":
            path = path.replace(out / "checkpoint.pt")
        return checkpoint, path
    if config.resume not in ("auto", "never"):
        checkpoint = read_checkpoint(config.resume)
        check_same_run(checkpoint, config, provenance, config.resume)
        if is_finished(checkpoint["progress"], config.patience):
            raise UserError(f"{config.resume} is of a finished run: there is nothing to continue")
        return checkpoint, Path(config.resume)
    best = out / "best.pt"
    if best.exists():  # left by a run that was killed before its first checkpoint
        check_same_run(read_checkpoint(best), config, provenance, best, full=False)
    return None, None


# ---- is it the same run?


def check_same_run(checkpoint, config, provenance, path, full=True):
    """Raises `UserError`, with a list of differences, if the checkpoint is of another run.

    An option or a field of the shape that an older checkpoint lacks has its default. If `full`, the
    checkpoint must also have the state to resume from, not weights only.
    """
    if full and not checkpoint["training"]:
        raise UserError(f"{path} holds weights only: resume from a checkpoint.pt")
    saved = options.defaults(type(config)) | checkpoint["config"]
    if isinstance(saved.get("shape"), dict):
        saved["shape"] = options.defaults(type(provenance.shape)) | saved["shape"]
    texts = differences(saved, provenance.run_settings(config), options.may_change(type(config)))
    if texts:
        only_length_differs = {text.split(":")[0] for text in texts} <= {"steps", "epochs"}
        finished = full and is_finished(checkpoint["progress"], config.patience)
        hint = f", with --init {path} to train these weights on" if finished and only_length_differs else ""
        raise UserError(
            f"{path} is of another run ({', '.join(texts)}): give the same options, or another "
            f"--out for a new run{hint}"
        )


def differences(saved, current, ignore=()):
    """One short text, "key: saved -> current", for each setting that differs between two runs.

    Dicts and lists are compared entry by entry: "shape.hidden_size: 64 -> 128". A key that `current`
    lacks is an option that no longer exists: it differs unless its saved value is empty. A key that
    `saved` lacks counts as None. `ignore` holds keys of the outermost dict.
    """
    texts = []
    for key in sorted((saved.keys() | current.keys()) - set(ignore), key=str):
        pair = saved.get(key), current.get(key)
        before, now = (dict(enumerate(v)) if isinstance(v, (list, tuple)) else v for v in pair)
        if before == now or (key not in current and not before):
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            texts += [f"{key}.{text}" for text in differences(before, now)]
        elif max(len(str(before)), len(str(now))) > 40:  # a digest says nothing to a reader
            texts.append(f"{key} changed")
        else:
            texts.append(f"{key}: {before} -> {now}")
    return texts
