"""Where and how to compute: device, precision, compiled layers, recomputed activations, memory."""

import contextlib
import dataclasses
import functools
import re
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from training import distributed
from training.io import UserError, log, warn

GRAPH_FLOPS = 5e12  # of a step: up to this number, some 10 ms on an H200, a CUDA graph is the default
# Dense bf16 products with sums in float32, by data sheet; the first pattern in a GPU's name counts.
PEAK_FLOPS = {
    r"\bB200\b": 2250e12,
    r"\bH100 PCIe": 756e12,
    r"\bH100 NVL": 835e12,
    r"\b(H100|H200|GH200)\b": 989e12,
    r"\bL40S\b": 362e12,
    r"\bA100\b": 312e12,
    r"RTX 4090$": 165e12,
    r"RTX 3090$": 71e12,
}
# Of a model's layers, with and without gradient, for a full batch and a smaller one, and one to compare.
GRAPHS_OF_A_MODEL = 5
ROUNDING = 1e-3  # of a compiled layer in float32, relative to the largest number of a tensor


def choose_device(name):
    """Returns the torch device of that name; `auto` takes CUDA, else MPS, else the CPU.

    Under torchrun each process takes the GPU of its local rank. Raises `UserError` if the device
    does not exist. A GPU becomes this process's current device, and attention by cuDNN is switched
    off for all that follows: in torch 2.11 some of its kernels round the dropout probability to
    sixteenths (pytorch PR 174245).
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if name == "cuda" and distributed.is_torchrun():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: choose auto, cuda, mps or cpu") from error
    if not available.get(device.type):
        raise UserError(f"--device {name}: this machine has none; try --device auto")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
        torch.backends.cuda.enable_cudnn_sdp(False)
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are made on the current device
    return device


def choose_precision(name, device):
    """Returns fp32 or bf16; `auto` takes bf16 if the hardware has it, because emulation is slow.

    Matrix products have that precision; parameters and the residual stream stay in float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
        native = device.type == "cpu" and any(check() for check in checks)
    return "bf16" if native else "fp32"


def autocast_for(device, precision):
    """Returns the autocast context of that precision."""
    context = CPUAutocast if (device.type, precision) == ("cpu", "bf16") else torch.autocast
    return context(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclasses.dataclass(frozen=True)
class Compute:
    """A device and the precision of its matrix products."""

    device: torch.device
    precision: str

    def __str__(self):
        return f"{self.device}, {self.precision}"

    @property
    def autocast(self):
        """A new context in which matrix products have that precision."""
        return autocast_for(self.device, self.precision)


def choose_compute(device, precision="auto"):
    """Returns the `Compute` of --device and --precision."""
    device = choose_device(device)
    return Compute(device, choose_precision(precision, device))


def peak_flops(compute):
    """Returns the operations per second of a GPU's products in bf16; None if unknown, or for others."""
    if compute.device.type != "cuda" or compute.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(compute.device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)


class CPUAutocast(torch.autocast):
    """Autocast in which attention is two bfloat16 products and a softmax between them.

    The CPU's flash kernel takes three times as long for 128 positions: it multiplies in float32 to
    save memory for scores, which are small here.
    """

    def __enter__(self):
        self.allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, also for the CPU
        self.kernel = sdpa_kernel(SDPBackend.MATH)
        self.kernel.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.kernel.__exit__(*error)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.allowed)
        return super().__exit__(*error)


def compile_blocks(objective):
    """Compiles the layers (`blocks`) of all the objective's models, and lets it compile its loss.

    The layers of a model share their graphs, one for each shape of the input. Changes settings of
    torch._dynamo for the whole process, and drops what it has compiled before.
    """
    objective.compiled = True
    models = [module for module in objective.modules() if hasattr(module, "blocks")]
    torch._dynamo.reset()
    warnings.filterwarnings("ignore", "TensorFloat32")  # products in float32 are meant to be exact
    config = torch._dynamo.config
    config.optimize_ddp = False  # it would cut layers, which are graphs already
    # Models of one architecture share a limit, beyond which torch warns and goes on without compiling.
    config.recompile_limit = max(config.recompile_limit, GRAPHS_OF_A_MODEL * len(models) + 1)
    # On a CPU dropout is drawn as by eager code: the same masks, and faster than compiled ones.
    options = {"fallback_random": next(objective.parameters()).device.type == "cpu"}
    # A symbolic batch size makes slower kernels.
    compile = functools.partial(torch.compile, options=options, dynamic=False)
    for block in (block for model in models for block in model.blocks):
        forward = block.forward
        if isinstance(forward, functools.partial):  # of `checkpoint_activations`
            # Torch must not compile the checkpoint itself: in 2.13 the recomputation can then draw
            # other dropout masks (pytorch issue 198333).
            block.forward = functools.partial(checkpoint, compile(forward.args[0]), **forward.keywords)
        else:
            block.forward = compile(forward)


def compile_and_check_blocks(objective, tokens, compute):
    """Compiles as `compile_blocks` does. If a compiled layer is wrong or fails: warns, keeps eager layers.

    The trained model's first layer is compared with the eager one on `tokens` (B, T), in value and
    gradients. A layer that is sharded is not compared.
    """
    blocks = [block for module in objective.modules() if hasattr(module, "blocks") for block in module.blocks]
    eager = [block.forward for block in blocks]
    compile_blocks(objective)
    problem = "a compiled layer differs from an eager one by more than rounding"
    try:
        if distributed.is_sharded(objective) or _compiled_layer_agrees(objective.model, tokens, compute):
            return
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as the lack of a C compiler
        problem = str(error).strip().partition("\n")[0]
    warn(f"training goes on without torch.compile, and slower: {problem}")
    objective.compiled = False
    for block, forward in zip(blocks, eager):
        block.forward = forward


class _LayerInputs(Exception):
    """Carries the inputs of a layer out of a forward pass."""


def _compiled_layer_agrees(model, tokens, compute):
    """True if the compiled first layer has at most four times the error of the eager one.

    Both run in the training's precision. The error is the largest difference to eager float32 in a
    tensor: the output, or any gradient.
    """
    block = model.blocks[0]

    def stop(_block, inputs):
        raise _LayerInputs(*inputs)

    def outcome(forward, autocast):
        with autocast:
            output = forward(x, *others)
        return [output.float(), *torch.autograd.grad(output, [x, *parameters], direction)]

    hook, training = block.register_forward_pre_hook(stop), block.training
    with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
        try:
            model.hidden_states(tokens.to(compute.device))
        except _LayerInputs as inputs:
            x, *others = inputs.args
        finally:
            hook.remove()
        x, parameters = x.detach().requires_grad_(), [p for p in block.parameters() if p.requires_grad]
        direction = torch.randn_like(x)
        block.train(training and not model.config.dropout)  # a compiled layer has other masks
        eager = functools.partial(type(block).forward, block)
        runs = (eager, contextlib.nullcontext()), (eager, compute.autocast), (block.forward, compute.autocast)
        try:
            tensors = zip(*(outcome(*run) for run in runs))
        finally:
            block.train(training)

    def agree(exact, eager, compiled):
        allowed = 4 * (eager - exact).abs().max() + ROUNDING * exact.abs().max()
        return bool((compiled - exact).abs().max() <= allowed)  # false for NaN

    return all(agree(*versions) for versions in tensors)


def checkpoint_activations(model, compute):
    """Makes the model's layers keep only their input, and recompute the rest in the backward pass.

    Dropout draws the same masks again.
    """

    def contexts():  # of the forward pass, and of the recomputation
        # Torch restores autocast for the recomputation, but not the choice of an attention kernel.
        return contextlib.nullcontext(), compute.autocast

    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def skips_on_device(optimizer):
    """Returns True if `found_inf` on the device makes the optimizer skip a step."""
    # Fused SGD skips too, but starts its momentum from uninitialised memory.
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


def largest_micro_batch(objective, batch, compute, shard=False):
    """Returns the largest micro-batch size of a rank that fits in memory, found by trying.

    A trial is a forward and a backward pass of the first sequences of `batch`, with gradients and
    AdamW's two moments in memory, before the objective is wrapped or compiled. It is repeated with
    half of the sequences until it fits. Weights and random state do not change. Raises `UserError`
    if one sequence does not fit.
    """
    if compute.device.type != "cuda":
        warn("--micro-batch-size auto: only a GPU says when its memory is full; else give a number")
    size = -(-batch.num_sequences // distributed.world_size())
    while size and not _fits(objective, batch.split(size)[0], compute, shard):
        size //= 2
    size = min(distributed.all_gather(size))  # nothing before waits for another rank, which may fail
    if not size:
        raise UserError("--micro-batch-size auto: one sequence does not fit: try --checkpoint-activations")
    log(f"memory     {size} sequences at a time fit (--micro-batch-size {size})")
    return size


def _fits(objective, batch, compute, shard):
    """Returns True if a forward and a backward pass of the batch fit in memory."""
    device, moments = compute.device, []
    batch = dataclasses.replace(batch, chunk_ids=None)  # so that no teacher cache is filled
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            objective.to(device)
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    numbers = 2 * parameter.numel() // (distributed.world_size() if shard else 1)
                    moments.append(torch.empty(numbers, device=device))
            with compute.autocast:
                terms = objective(objective.prepare(batch.to(device)))
            terms["loss"].backward()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            objective.zero_grad(set_to_none=True)


def should_capture(config, compute, optimizers, flops):
    """Returns True if the steps of a run, of `flops` operations, are replayed as a CUDA graph.

    By default a graph is used on CUDA for steps that take longer to launch than to compute, but not
    with --checkpoint-activations, which reads the random state. Raises `UserError` if a graph is
    asked for and not possible.
    """
    choice = config.cuda_graph
    on_cuda, is_alone = compute.device.type == "cuda", not distributed.is_torchrun()
    possible = on_cuda and is_alone and all(map(skips_on_device, optimizers))
    if choice and not possible:
        raise UserError(
            "--cuda-graph needs a GPU of CUDA, one process without torchrun, and --optimizer adamw: "
            "leave it out"
        )
    if choice is None:
        choice = flops <= GRAPH_FLOPS and not config.checkpoint_activations
    return possible and choice
