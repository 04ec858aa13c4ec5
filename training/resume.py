"""State that outlives the process: what resuming needs, and which state a run continues from."""

import dataclasses
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from training import distributed, options
from training.checkpoint import DamagedFile, read_checkpoint
from training.io import UserError, fsync_folder, log, warn

PATH_OPTIONS = {"data", "out", "init", "teachers", "cache_teachers", "resume", "device"}  # options
CHECKPOINT_NAMES = ("checkpoint.new", "checkpoint.pt", "previous.pt")  # the newest first


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint says of its origin, besides the options.

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
        """The checkpoint's section of that name."""
        shape = dataclasses.asdict(self.shape)
        return {"name": self.name, "architecture": self.architecture, "shape": shape}

    def conditions(self, config):
        """What makes a run this run, as checkpoints and the log keep it: options and digests."""
        return dataclasses.asdict(config) | {
            **self.digests,
            "shape": self.model["shape"],
            "teacher_digests": [teacher["digest"] for teacher in self.teachers],
        }


# ---- what is saved and put back


def trained_parameters(objective):
    """{name: parameter} of all that require gradients, in the objective's order.

    Those of `objective.model` have their names in the model, others begin with "objective.".
    """
    return {
        name.removeprefix("model.") if name.startswith("model.") else f"objective.{name}": parameter
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }


def on_host(tensor):
    """The whole of a tensor on the CPU; None on all processes but the first, which writes it."""
    tensor = distributed.full_tensor(tensor.detach())
    return None if distributed.rank() else tensor.cpu().contiguous()


def training_state(train_step):
    """What resuming needs besides the model's weights.

    The optimizers' states and the objective's own parameters by parameter name; random states, the
    first process's and those of the others. All of it is on the CPU: what is digested and then
    written is copied from a GPU once.
    """
    parameters, device = train_step.parameters, train_step.nonfinite_steps.device
    own, *others = distributed.all_gather(_random_state(device))
    states = {name: {} for name in parameters}
    for optimizer in train_step.optimizers:
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                is_tensor = isinstance(value, torch.Tensor)
                states[name][key] = on_host(value) if is_tensor else value
    return {
        "optimizer": states,
        "objective": {name: on_host(p) for name, p in _own(parameters).items()},
        "nonfinite": [train_step.nonfinite_in_a_row.item(), train_step.nonfinite_steps.item()],
        "random": own | ({"others": others} if others else {}),
    }


def _random_state(device):
    """The states of the generators that dropout draws from."""
    on_cuda = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
    }


def _restore_random_state(state, device, seed, step):
    """Each process takes what it had; one that was not there before draws from a seed of its own.

    So it is in a new run, where `state` is None and the first process goes on as it is.
    """
    rank = distributed.rank()
    found = [] if state is None else [state, *state.get("others", [])]
    if rank < len(found):
        torch.set_rng_state(found[rank]["cpu"])
        if device.type == "cuda" and found[rank]["cuda"] is not None:
            torch.cuda.set_rng_state(found[rank]["cuda"], device)
    elif rank:
        mixed = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:4]
        torch.manual_seed(int.from_bytes(mixed, "little"))


def _own(parameters):
    """The parameters that belong to the objective and not to its model."""
    return {name: p for name, p in parameters.items() if name.startswith("objective.")}


def restore(train_step, checkpoint, path):
    """Puts a full checkpoint's weights, optimizer states and random states in place.

    Raises `UserError` if they are not of this objective and these optimizers: a fused optimizer
    trusts the sizes that it is told.
    """
    state, device = checkpoint["training"], train_step.nonfinite_steps.device
    _take_an_empty_step(train_step)
    try:
        weights = train_step.objective.model.state_dict()
        if weights.keys() != checkpoint["weights"].keys():
            raise ValueError("the model has other weights")
        own = _own(train_step.parameters)
        saved = state.get("objective", {})  # older checkpoints have none
        if saved.keys() != own.keys():
            raise ValueError("the objective has other parameters")
        with torch.no_grad():
            for name, weight in weights.items():
                _copy(checkpoint["weights"][name], weight)
            for name, parameter in own.items():
                _copy(saved[name], parameter)
        _restore_optimizers(train_step, state["optimizer"])
        in_a_row, in_all = state.get("nonfinite", (0, 0))  # older checkpoints did not count them
        train_step.nonfinite_in_a_row.fill_(in_a_row)
        train_step.nonfinite_steps.fill_(in_all)
        seed, step = checkpoint["config"].get("seed", 0), checkpoint["progress"]["step"]
        _restore_random_state(state["random"], device, seed, step)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what someone made up may raise anything at all
        raise UserError(f"{path} holds no state of this run's model: use another") from error


def _take_an_empty_step(train_step):
    """A step with gradients of zero: the optimizers show which state they keep, in which sizes.

    What it does to the weights does not matter: they are overwritten.
    """
    for parameter in train_step.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in train_step.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _restore_optimizers(train_step, saved):
    """Fills the optimizers' states from {parameter name: {key: tensor or number}}."""
    if saved.keys() != train_step.parameters.keys():
        raise ValueError("there are other parameters")
    names = {parameter: name for name, parameter in train_step.parameters.items()}
    for optimizer in train_step.optimizers:
        for parameter, state in optimizer.state.items():
            found = saved[names[parameter]]
            if not found:  # it had never had a gradient
                state.clear()
            elif found.keys() != state.keys():
                raise ValueError(f"{names[parameter]} has another state")
            for key, value in found.items():
                if isinstance(state[key], torch.Tensor):
                    _copy(value, state[key])
                elif type(value) is type(state[key]):
                    state[key] = value
                else:
                    raise ValueError(f"{key} of {names[parameter]} has another type")


def _copy(value, place):
    if (value.shape, value.dtype) != (place.shape, place.dtype):
        raise ValueError("a tensor has another shape or type")
    distributed.copy_to(place, value)


# ---- which state a run continues from


def new_progress(steps):
    """The progress of a run that has not begun."""
    return {"step": 0, "steps": steps, "best_dev_cross_entropy": math.inf, "best_step": 0}


def is_finished(progress, patience=0):
    """Whether a run has taken its steps, or its patience with evaluations is at an end."""
    waited = progress.get("evaluations_since_best", 0)
    return progress["step"] >= progress["steps"] or 0 < patience <= waited


def start_or_resume(train_step, config, provenance, steps):
    """The progress that a run starts with, and the path of its state or None for a new run.

    A state that is found is put in place. Raises `UserError` where processes that train together
    find different ones.
    """
    checkpoint, found = distributed.rank_zero_first(
        lambda: find_checkpoint(config, provenance), distributed.rank() == 0
    )
    progress = checkpoint["progress"] if checkpoint else new_progress(steps)
    distributed.check_same_on_all_ranks({"state to continue from": progress["step"]})
    if not checkpoint:
        _restore_random_state(None, train_step.nonfinite_steps.device, config.seed, 0)
        return progress, None
    restore(train_step, checkpoint, found)
    if is_finished(progress, config.patience):
        step = progress["step"]
        log(f"{config.out} is finished at {step} steps; a new run needs another --out")
        if not (Path(config.out) / "best.pt").exists():
            warn(f"its best.pt is gone: {found} has the weights of the last step")
    else:
        log(f"continuing after step {progress['step']} of {found}")
    return progress, found


def check_start(config, provenance):
    """Raises `UserError` where --resume names a checkpoint that is not there.

    Also where processes that train together were given different things. Where things are may
    differ between machines; all else says what they do together.
    """
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        raise UserError(f"--resume {config.resume}: there is no such checkpoint")
    conditions = provenance.conditions(config).items()
    distributed.check_same_on_all_ranks({key: value for key, value in conditions if key not in PATH_OPTIONS})


def find_checkpoint(config, provenance):
    """The checkpoint that the run starts from and its path, or (None, None) for a new run.

    The folder must be locked: a save that a kill interrupted is completed here. Raises `UserError`
    if --resume forbids it, or if what there is cannot be continued.
    """
    out = Path(config.out)
    present = [out / name for name in CHECKPOINT_NAMES if (out / name).exists()]
    if config.resume == "never" and (present or (out / "log.jsonl").exists()):
        raise UserError(f"{out} holds a run: continue it with --resume auto, or choose another --out")
    for path in present:
        try:
            checkpoint = read_checkpoint(path)
        except DamagedFile as error:
            if path == present[-1]:
                raise UserError(
                    f"{out} holds no state that can be read ({path.name} is damaged too): delete "
                    "it, or choose another --out"
                ) from error
            warn(f"{path} is damaged; falling back to an older state")
            continue
        check_same_run(checkpoint, config, provenance, path)
        if path.name == "checkpoint.new":  # a kill came between a save's renames
            path = out / "checkpoint.pt"
            promote(out, rotate=path.exists() and _is_whole(path))
        if not is_finished(checkpoint["progress"], config.patience):
            _check_best(checkpoint["progress"], out / "best.pt")
        return checkpoint, path
    if config.resume not in ("auto", "never"):
        checkpoint = read_checkpoint(config.resume)
        check_same_run(checkpoint, config, provenance, config.resume)
        progress = checkpoint["progress"]
        if is_finished(progress, config.patience):
            raise UserError(f"{config.resume} is of a finished run: there is nothing to continue")
        _forget_best(progress)  # the new folder is to have a best.pt of its own
        return checkpoint, Path(config.resume)
    best = out / "best.pt"
    if best.exists():  # left by a run that was killed before its first checkpoint
        check_same_run(read_checkpoint(best), config, provenance, best, full=False)
    return None, None


def promote(out, rotate):
    """The last stage of a save: checkpoint.new becomes checkpoint.pt.

    With `rotate` what was checkpoint.pt becomes previous.pt; a damaged one must not. Where the
    file system has hard links there is a checkpoint.pt at every moment, if there was one before.
    """
    current, previous = out / "checkpoint.pt", out / "previous.pt"
    if rotate and not (previous.exists() and os.path.samefile(current, previous)):
        second_name = out / "previous.pt.tmp"
        second_name.unlink(missing_ok=True)
        try:
            os.link(current, second_name)
        except OSError:  # a file system without hard links
            second_name = current
        os.replace(second_name, previous)
    os.replace(out / "checkpoint.new", current)
    fsync_folder(out)


def _is_whole(path):
    try:
        read_checkpoint(path)
    except DamagedFile:
        return False
    return True


def _check_best(progress, best):
    """Forgets the best evaluation of an unfinished run whose best.pt is damaged or gone."""
    if progress["best_step"]:
        try:
            read_checkpoint(best)
        except UserError as error:
            warn(f"{error}; the next evaluation writes it anew")
            _forget_best(progress)


def _forget_best(progress):
    progress.update(best_dev_cross_entropy=math.inf, best_step=0)
    progress.pop("best_score", None)


def check_same_run(checkpoint, config, provenance, path, full=True):
    """Raises `UserError`, listing what differs, unless the checkpoint is of this very run.

    An option or a field of the shape that it does not have means what was so before it existed:
    the default. `full` asks for a state that can be resumed, and not for weights alone.
    """
    progress = checkpoint["progress"]
    counts = [progress.get(key) for key in ("step", "steps", "best_step")]
    whole = "best_dev_cross_entropy" in progress and all(type(n) is int and n >= 0 for n in counts)
    if full and not (checkpoint["training"] and whole):
        raise UserError(f"{path} holds weights only: resume from a checkpoint.pt")
    saved = options.defaults(type(config)) | checkpoint["config"]
    if isinstance(saved.get("shape"), dict):
        saved["shape"] = options.defaults(type(provenance.shape)) | saved["shape"]
    differing = differences(saved, provenance.conditions(config), options.may_change(type(config)))
    if differing:
        finished = whole and is_finished(progress, config.patience)
        longer = finished and {text.split(":")[0] for text in differing} <= {"steps", "epochs"}
        more = f", with --init {path} to train these weights on" if longer else ""
        raise UserError(
            f"{path} is of another run ({', '.join(differing)}): give the same options, or another "
            f"--out for a new run{more}"
        )


def differences(saved, current, ignore=()):
    """One short text, "key: saved -> current", for each setting that differs between two runs.

    Dicts and lists of dicts are compared key by key: "shape.hidden_size: 64 -> 128". A key that
    `current` lacks is an option that no longer exists: it differs unless its saved value is empty.
    A key that `saved` lacks counts as None. `ignore` holds keys of the outermost dict.
    """
    texts = []
    for key in sorted((saved.keys() | current.keys()) - set(ignore), key=str):
        before, now = saved.get(key), current.get(key)
        if key in current or before:
            texts += _value_differences(key, before, now)
    return texts


def _value_differences(key, before, now):
    before, now = (list(value) if isinstance(value, tuple) else value for value in (before, now))
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [f"{key}.{text}" for text in differences(before, now)]
    if isinstance(before, list) and isinstance(now, list):
        if sorted(map(str, before)) == sorted(map(str, now)):
            return [f"{key}: the same in another order"]
        if len(before) == len(now) and all(isinstance(value, dict) for value in before + now):
            pairs = enumerate(zip(before, now))
            return [f"{key}[{i}].{text}" for i, pair in pairs for text in differences(*pair)]
    if max(len(str(before)), len(str(now))) > 40:  # a digest says nothing to a reader
        return [f"{key} changed"]
    return [f"{key}: {before} -> {now}"]
