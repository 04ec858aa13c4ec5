"""Where and how to compute: device, precision, compiled layers."""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from training import distributed
from training.io import UserError, log

LONG_RUN = 1e14  # operations: a quarter of an hour of two CPU cores
GRAPHS_OF_A_MODEL = 4  # its layers, with and without gradient, for a whole batch and a ragged one


def choose_device(name):
    """The torch device of that name; `auto` takes CUDA, else MPS, else the CPU.

    Of several processes on a machine each has a GPU of its own. Raises `UserError` if it is not
    there. On CUDA, attention by cuDNN is switched off: in torch 2.11 some of its kernels round the
    dropout probability to sixteenths (pytorch PR 174245).
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and distributed.is_torchrun():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: choose auto, cuda, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: choose auto, cuda, mps or cpu")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise UserError(f"--device {name}: this machine has none; try --device auto")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
        torch.backends.cuda.enable_cudnn_sdp(False)
        if device.index is not None:
            torch.cuda.set_device(device)  # where streams and graphs are made
    return device


def choose_precision(name, device):
    """fp32 or bf16; `auto` takes bf16 where the chip multiplies it natively: elsewhere it is slow.

    Matrix products are in that precision; parameters and the residual stream stay in float32.
    """
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
    context = CPUAutocast if (device.type, precision) == ("cpu", "bf16") else torch.autocast
    return context(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes: its device, its precision, and the autocast of both."""

    device: torch.device
    precision: str

    def __str__(self):
        return f"{self.device}, {self.precision}"

    @property
    def autocast(self):
        """A context in which matrix products are in that precision."""
        return autocast_for(self.device, self.precision)


def choose_compute(device, precision="auto"):
    """The `Compute` that --device and --precision ask for."""
    device = choose_device(device)
    return Compute(device, choose_precision(precision, device))


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


def compiles(choice, compute, operations=0):
    """Whether layers are compiled: as --compile says, else on CUDA alone.

    A run of so many operations on a CPU is advised to ask for it.
    """
    if choice is None and compute.device.type == "cpu" and operations > LONG_RUN:
        log("a run as long as this is faster with --compile, which takes about a minute at first")
    return compute.device.type == "cuda" if choice is None else choice


def compile_blocks(objective):
    """Compiles the layers of all the objective's models (their `blocks`), and the loss's rows.

    The layers of a model are alike, so that each model is compiled once for each shape of its
    input. Shapes are static: a symbolic batch size makes slower kernels. What earlier runs of this
    process compiled is dropped, and the limit is raised beyond which torch would go on eagerly,
    with a warning only: models of one architecture share it. `objective.compiled` tells the
    objective to compile what is its own.
    """
    objective.compiled = True
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = False  # it would cut layers, which are graphs already
    compiled = [module for module in objective.modules() if hasattr(module, "blocks")]
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, GRAPHS_OF_A_MODEL * len(compiled) + 1)
    # On a CPU dropout is drawn as eager code does: the same masks, and quicker than compiled ones.
    options = {"fallback_random": next(objective.parameters()).device.type == "cpu"}
    for module in compiled:
        for block in module.blocks:
            block.compile(options=options, dynamic=False)


def checkpoint_activations(model, compute):
    """Makes the model's layers keep only their input, and recompute the rest in the backward pass.

    Dropout draws the same masks again.
    """

    def contexts():  # for the forward pass, and for the recomputation
        # Torch restores autocast for the recomputation, but not the choice of an attention kernel.
        return contextlib.nullcontext(), compute.autocast

    def checkpointed(forward, *inputs):
        # torch.compile recomputes within its graph, and takes no contexts.
        options = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    for block in model.blocks:
        block.forward = functools.partial(checkpointed, block.forward)


def largest_micro_batch(objective, batch, compute, shard=False):
    """Returns the most sequences of a rank's part of `batch` that a step can take at a time.

    Tries it before the objective is wrapped: one forward and backward pass beside gradients and
    AdamW's two moments, with half of the sequences each time that memory runs out. Layers are not
    compiled yet, which takes more memory than later; a sharded model is tried whole. Weights and random state
    stay as they are. Raises `UserError` if not even one sequence fits.
    """
    sequences = -(-batch.num_sequences // distributed.world_size())
    while sequences and not _fits(objective, batch.split(sequences)[0], compute, shard):
        sequences //= 2
    # No rank waits for another before all have tried.
    sequences = min(distributed.all_gather(sequences))
    if not sequences:
        raise UserError(
            "--micro-batch-size auto: one sequence does not fit in memory: choose a smaller model, or try "
            "--checkpoint-activations"
        )
    log(f"memory     {sequences} sequences at a time fit (--micro-batch-size {sequences})")
    return sequences


def _fits(objective, batch, compute, shard):
    """Returns whether a step's forward and backward pass of `batch` fit in memory."""
    device = compute.device
    batch = dataclasses.replace(batch, chunk_ids=None)  # no teacher cache keeps these states
    moments = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            objective.to(device)
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    size = 2 * parameter.numel() // (distributed.world_size() if shard else 1)
                    moments.append(torch.empty(size, device=device))
            with compute.autocast:
                terms = objective(objective.prepare(batch.to(device)))
            terms["loss"].backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            objective.zero_grad(set_to_none=True)


def skips_on_device(optimizer):
    """Whether the optimizer reads `found_inf` on the device and then changes nothing.

    Fused SGD does too, but makes its first momentum of what was in memory.
    """
    return bool(optimizer.defaults.get("fused")) and isinstance(
        optimizer, (torch.optim.Adam, torch.optim.AdamW)
    )
