"""Where and how to compute: device, precision, compiled layers, a step as one CUDA graph."""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from harness import parallel
from harness.files import UserError, say, warn

GRAPH_WARM_UP = 3  # plain steps before a CUDA graph is captured: what is made once is then made
LONG_RUN = 1e14  # operations: a quarter of an hour of two CPU cores
GRAPH_TOKENS = 8192  # of a step, up to which one is captured unless --no-cuda-graph is given
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
    if name == "cuda" and parallel.is_launched():
        name = f"cuda:{parallel.local_rank()}"
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
        say("a run as long as this is faster with --compile, which takes about a minute at first")
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


def prepare_layers(objective, config, compute, operations):
    """What --checkpoint-activations and --compile do to an objective's layers."""
    if config.checkpoint_activations:
        checkpoint_blocks(objective.model)
    if compiles(config.compile, compute, operations):
        compile_blocks(objective)


def checkpoint_blocks(model):
    """Makes the model's layers compute their inner activations again in the backward pass.

    What is kept of a layer is its input. Dropout draws the same masks again.
    """
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class GraphedStep:
    """Calls a train step whose update is captured once as a CUDA graph and then replayed.

    A student's step on few tokens is some hundreds of short kernels, which take longer to launch
    one by one than to run. `train_step.prepare(batch)`, where the teachers are run or read from the
    cache, stays outside of the graph: live teachers are long kernels anyway. A graph reads the
    memory that it was captured with, so batch and learning rates are copied to fixed places, and it
    keeps the memory of its activations. Numbers that are no tensors stay as captured: all batches
    must have one shape and the same counts.

    Where no graph can be captured, or its first replay does not do what a plain step does, the
    plain step is taken from then on, with a warning.
    """

    def __init__(self, train_step):
        self.train_step = train_step
        self.device = train_step.nonfinite_steps.device
        for group in train_step.groups:
            group["lr"], group["capturable"] = torch.zeros((), device=self.device), True
        self.cuda_stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.warm_up, self.parts = GRAPH_WARM_UP, None
        self.replay = None  # a function without arguments, once a graph is captured and verified

    def __call__(self, batch, learning_rate):
        if self.warm_up == 0:  # with the input of the step before: it is verified with another
            self.replay = self.tried(self.capture)
        self.load(batch, learning_rate)
        if self.warm_up == 0 and self.replay and not self.tried(self.agrees):
            self.replay = None
        self.warm_up -= 1
        return self.replay() if self.replay else self.update()

    def tried(self, attempt):
        """What `attempt()` returns, or False, with a warning, where it fails."""
        problem = "a replayed step is not what a plain one is"
        try:
            if found := attempt():
                return found
        except RuntimeError as error:  # any of CUDA's, and memory that does not suffice
            problem = str(error).partition("\n")[0]
            for optimizer in self.train_step.optimizers:
                optimizer.zero_grad(set_to_none=True)
        warn(f"training goes on without a CUDA graph: {problem}")
        return False

    def load(self, batch, learning_rate):
        """Puts a step's input where `update` reads it."""
        parts = self.train_step.prepare(batch)
        if self.parts is None:
            self.parts = [part.clone() for part in parts]
        for mine, new in zip(self.parts, parts, strict=True):
            if mine.counts() != new.counts():
                raise ValueError(f"a batch of {new.counts()} after one of {mine.counts()}")
            for place, value in zip(mine.tensors(), new.tensors(), strict=True):
                place.copy_(value)
        for group, ratio in zip(self.train_step.groups, self.train_step.rate_ratios):
            group["lr"].fill_(learning_rate * ratio)

    def update(self):
        """The plain step, on the stream on which the graph is captured."""
        if not self.cuda_stream:
            return self.train_step.update(self.parts)
        self.cuda_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.cuda_stream):
            terms = self.train_step.update(self.parts)
        torch.cuda.current_stream().wait_stream(self.cuda_stream)
        return terms

    def capture(self):
        """Captures the update, which is not executed by that; a function that replays it."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture leaves its own
                torch.cuda.graph(graph, pool=pool, stream=self.cuda_stream),
            ):
                terms = self.train_step.update(self.parts)
        except RuntimeError:
            forget_capture(torch.cuda.current_device(), pool)
            raise

        def replay():
            graph.replay()
            return terms

        return replay

    def agrees(self):
        """Whether a replayed step ends where a plain one does. All is left as it was.

        To the bit, tensor by tensor, where a plain step repeats its own bits; else the difference
        is to be of the size of that between two plain steps: atomic additions come in any order.
        """
        before = [tensor.clone() for tensor in self.state()]

        def outcome(step):
            try:
                with torch.random.fork_rng([self.device] if self.cuda_stream else []):
                    step()
                return [tensor.clone() for tensor in self.state()]
            finally:  # also where memory does not suffice for a copy
                for tensor, value in zip(self.state(), before):
                    tensor.copy_(value)

        def distances(some, others):
            return [(a - b).abs().max().item() if a.numel() else 0 for a, b in zip(some, others)]

        plain = outcome(self.update)
        allowed = [4 * distance for distance in distances(outcome(self.update), plain)]
        found = distances(outcome(self.replay), plain)
        if self.cuda_stream:
            torch.cuda.empty_cache()  # the copies' memory
        return all(a <= b for a, b in zip(found, allowed))

    def state(self):
        """All tensors that an update changes."""
        step = self.train_step
        kept = [value for o in step.optimizers for s in o.state.values() for value in s.values()]
        counters = [step.nonfinite_in_a_row, step.nonfinite_steps]
        kept += [*counters, *step.parameters.values(), *step.objective.buffers()]
        return [value.detach() for value in kept if isinstance(value, torch.Tensor)]


def forget_capture(device, pool):
    """Ends a capture that failed, where torch leaves generator and allocator in its midst.

    In torch 2.11 dropout would raise after it, as would the end of memory.
    """
    generator = torch.cuda.default_generators[device]
    with contextlib.suppress(RuntimeError, AttributeError):
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)


def skips_on_device(optimizer):
    """Whether the optimizer reads `found_inf` on the device and then changes nothing.

    Fused SGD does too, but makes its first momentum of what was in memory.
    """
    return bool(optimizer.defaults.get("fused")) and isinstance(
        optimizer, (torch.optim.Adam, torch.optim.AdamW)
    )


def wants_graph(choice, compute, optimizers, tokens):
    """Whether steps of so many tokens are to be replayed as a CUDA graph.

    `choice` is that of --cuda-graph. None takes one on CUDA where a step has few tokens, so that
    launching its kernels takes longer than executing them. Raises `UserError` where a graph is
    asked for and cannot be had.
    """
    on_cuda, skipping = compute.device.type == "cuda", all(map(skips_on_device, optimizers))
    alone = not parallel.is_launched()
    if choice is None:
        return on_cuda and skipping and alone and tokens <= GRAPH_TOKENS
    if choice and not alone:
        raise UserError("--cuda-graph is not for torchrun's processes: leave it out")
    if choice and not on_cuda:
        raise UserError(
            f"--cuda-graph needs a GPU of CUDA; training is on {compute.device}: leave it out"
        )
    if choice and not skipping:
        raise UserError(
            "--cuda-graph needs an optimizer that skips a step on the device, as --optimizer adamw "
            "does: leave one of the two out"
        )
    return choice
