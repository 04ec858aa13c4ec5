"""Where and how to compute: device, precision, compiled layers, a step as one CUDA graph."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.files import UserError

GRAPH_WARM_UP = 3  # plain steps before a CUDA graph is captured: what is made once is then made


def choose_device(name):
    """The torch device of that name; `auto` takes CUDA, else MPS, else the CPU.

    Raises `UserError` if it is not there. On CUDA, attention by cuDNN is switched off: in torch
    2.11 some of its kernels round the dropout probability to sixteenths (pytorch PR 174245).
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
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


def compile_blocks(objective):
    """Compiles the layers of all the objective's models (their `blocks`), and the loss's rows.

    The layers of a model are alike, so that each model is compiled once. `objective.compiled` tells
    the objective to compile what is its own.
    """
    objective.compiled = True
    # On a CPU dropout is drawn as eager code does: the same masks, and quicker than compiled ones.
    options = {"fallback_random": next(objective.parameters()).device.type == "cpu"}
    for module in objective.modules():
        for block in getattr(module, "blocks", ()):
            block.compile(options=options)


class GraphedStep:
    """Calls a train step whose update is captured once as a CUDA graph and then replayed.

    A student's step on few tokens is some hundreds of short kernels, which take longer to launch
    one by one than to run. `train_step.prepare(batch)`, where the teachers are run or read from the
    cache, stays outside of the graph: live teachers are long kernels anyway. A graph reads the
    memory that it was captured with, so batch and learning rates are copied to fixed places, and it
    keeps the memory of its activations. Numbers that are no tensors stay as captured: all batches
    must have one shape and the same counts.
    """

    def __init__(self, train_step):
        self.train_step = train_step
        device = train_step.nonfinite_steps.device
        for group in train_step.groups:
            group["lr"], group["capturable"] = torch.zeros((), device=device), True
        self.warm_up, self.cuda_stream = GRAPH_WARM_UP, None
        self.parts = self.graph = self.terms = None

    def __call__(self, batch, learning_rate):
        self.load(batch, learning_rate)
        if self.cuda_stream is None:
            self.cuda_stream = torch.cuda.Stream()
        if self.warm_up:
            self.warm_up -= 1
            self.cuda_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.cuda_stream):
                terms = self.train_step.update(self.parts)
            torch.cuda.current_stream().wait_stream(self.cuda_stream)
            return terms
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.cuda_stream):
                self.terms = self.train_step.update(self.parts)
        self.graph.replay()
        return self.terms

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


def skips_on_device(optimizer):
    """Whether the optimizer reads `found_inf` on the device and then changes nothing.

    Fused SGD does too, but makes its first momentum of what was in memory.
    """
    return bool(optimizer.defaults.get("fused")) and isinstance(
        optimizer, (torch.optim.Adam, torch.optim.AdamW)
    )


def check_graph(wanted, device, optimizers):
    """Raises `UserError` where --cuda-graph is asked for and cannot be had."""
    if wanted and device.type != "cuda":
        raise UserError(f"--cuda-graph needs a GPU of CUDA; training is on {device}: leave it out")
    if wanted and not all(map(skips_on_device, optimizers)):
        raise UserError(
            "--cuda-graph needs an optimizer that skips a step on the device, as --optimizer adamw "
            "does: leave one of the two out"
        )
