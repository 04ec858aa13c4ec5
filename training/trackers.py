"""TensorBoard and Weights & Biases: they get the numbers of log.jsonl."""

import os
import secrets

from training.io import UserError, write_text


class TensorBoard:
    """Event files in OUT/tensorboard. Raises `UserError` without the package."""

    def __init__(self, out, from_step):
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, because it is an optional extra
        except ImportError as error:
            raise UserError("--tensorboard needs its package: pip install tensorboard") from error
        # Numbers that an earlier part of the run wrote after its last checkpoint are taken back.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=from_step + 1 if from_step else None)

    def write(self, numbers, step):
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of the project "baby-llama" on Weights & Biases; its environment variables say otherwise.

    OUT/wandb/id names it, so that a run that continues is one run there. Raises `UserError` without
    the package, or if it cannot start.
    """

    def __init__(self, out, from_step, config):
        try:
            import wandb  # here, because it is an optional extra
        except ImportError as error:
            raise UserError("--wandb needs its package: pip install wandb") from error
        path = out / "wandb" / "id"
        if not (from_step and path.exists()):
            write_text(path, secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "baby-llama"),
                name=os.environ.get("WANDB_NAME", out.name),
                id=path.read_text("utf-8").strip(),
                resume="allow",
                dir=out,
                config=config,
            )
        except wandb.Error as error:
            raise UserError(f"--wandb: {error}; WANDB_MODE=offline needs no account") from error

    def write(self, numbers, step):
        self.run.log(numbers, step=step)

    def close(self):
        self.run.finish()
