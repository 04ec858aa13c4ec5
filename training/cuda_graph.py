"""A training step as one CUDA graph."""

import contextlib

import torch

from training import distributed
from training.device import skips_on_device
from training.io import UserError, warn

GRAPH_WARM_UP = 3  # plain steps before a CUDA graph is captured: what is made once is then made
GRAPH_TOKENS = 8192  # of a step, up to which one is captured unless --no-cuda-graph is given


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
            end_failed_capture(torch.cuda.current_device(), pool)
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


def end_failed_capture(device, pool):
    """Ends a capture that failed, where torch leaves generator and allocator in its midst.

    In torch 2.11 dropout would raise after it, as would the end of memory.
    """
    generator = torch.cuda.default_generators[device]
    with contextlib.suppress(RuntimeError, AttributeError):
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)


def should_capture(choice, compute, optimizers, tokens):
    """Whether steps of so many tokens are to be replayed as a CUDA graph.

    `choice` is that of --cuda-graph. None takes one on CUDA where a step has few tokens, so that
    launching its kernels takes longer than executing them. Raises `UserError` where a graph is
    asked for and cannot be had.
    """
    on_cuda, skipping = compute.device.type == "cuda", all(map(skips_on_device, optimizers))
    alone = not distributed.is_torchrun()
    if choice is None:
        return on_cuda and skipping and alone and tokens <= GRAPH_TOKENS
    if choice and not alone:
        raise UserError("--cuda-graph is not for torchrun's processes: leave it out")
    if choice and not on_cuda:
        raise UserError(f"--cuda-graph needs a GPU of CUDA; training is on {compute.device}: leave it out")
    if choice and not skipping:
        raise UserError(
            "--cuda-graph needs an optimizer that skips a step on the device, as --optimizer adamw "
            "does: leave one of the two out"
        )
    return choice
