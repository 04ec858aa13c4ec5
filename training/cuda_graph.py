"""A training step as one CUDA graph."""

import contextlib
import copy

import torch

from training.io import warn

GRAPH_WARM_UP = 3  # plain steps before the capture, in which optimizer states and buffers are made


class GraphedStep:
    """Calls a train step whose `update` is captured once as a CUDA graph, and replayed from then on.

    A student's step on few tokens is hundreds of short kernels, which take longer to launch one by
    one than to run. Teachers and their cache are in `prepare`, outside of the graph.

    A graph reads and writes the memory of its capture. So batch and learning rates are copied to
    fixed tensors, and all batches must have one shape and the same counts, which are captured as
    numbers. Where the capture fails, or the first replay differs from a plain step, training goes on
    with plain steps after a warning.
    """

    def __init__(self, train_step):
        self.train_step = train_step
        self.device = train_step.nonfinite_steps.device
        for group in train_step.groups:
            group["lr"], group["capturable"] = torch.zeros((), device=self.device), True
        self.cuda_stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.warm_up = GRAPH_WARM_UP  # plain steps that are left; negative later
        self.micro_batches = None  # the input of the graph
        self.replay = None  # a function without arguments, once the graph is captured

    def __call__(self, batch, learning_rate):
        if self.warm_up == 0:  # with the last input, so that the comparison below has another one
            self.replay = self.attempt(self.capture)
        self.load(batch, learning_rate)
        if self.warm_up == 0 and self.replay and not self.attempt(self.replay_equals_update):
            self.replay = None
        self.warm_up -= 1
        return self.replay() if self.replay else self.update()

    def attempt(self, function):
        """Returns `function()`, or None after a warning if it fails or returns nothing."""
        problem = "a replayed step differs from a plain one"
        try:
            if result := function():
                return result
        except RuntimeError as error:  # CUDA's errors, the lack of memory among them
            problem = str(error).partition("\n")[0]
            for optimizer in self.train_step.optimizers:
                optimizer.zero_grad(set_to_none=True)
        warn(f"training goes on without a CUDA graph: {problem}")
        return None

    def load(self, batch, learning_rate):
        """Copies a step's input to the tensors that `update` reads."""
        micro_batches = self.train_step.prepare(batch)
        if self.micro_batches is None:
            self.micro_batches = copy.deepcopy(micro_batches)
        for target, source in zip(self.micro_batches, micro_batches, strict=True):
            if target.counts() != source.counts():
                raise ValueError(f"a batch of {source.counts()} after one of {target.counts()}")
            for fixed, new in zip(target.tensors(), source.tensors(), strict=True):
                fixed.copy_(new)
        for group, ratio in zip(self.train_step.groups, self.train_step.rate_ratios):
            group["lr"].fill_(learning_rate * ratio)

    def update(self):
        """Takes a plain step, on the stream of the capture, and returns its terms."""
        if not self.cuda_stream:
            return self.train_step.update(self.micro_batches)
        self.cuda_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.cuda_stream):
            terms = self.train_step.update(self.micro_batches)
        torch.cuda.current_stream().wait_stream(self.cuda_stream)
        return terms

    def capture(self):
        """Captures the update without executing it; returns a function that replays it."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # restored after a failed capture
                torch.cuda.graph(graph, pool=pool, stream=self.cuda_stream),
            ):
                terms = self.train_step.update(self.micro_batches)
        except RuntimeError:
            end_failed_capture(torch.cuda.current_device(), pool)
            raise

        def replay():
            graph.replay()
            return terms

        return replay

    def replay_equals_update(self):
        """Returns whether a replay ends in the state of a plain step; the state is put back.

        Bits are compared if three plain steps end in the same bits. Otherwise atomic additions come in
        any order, and a tensor may differ by four times as much as between plain steps, or by a
        thousandth of its largest number: even there some of the tensors repeat their bits by chance.
        """
        before = [tensor.clone() for tensor in self.state()]

        def outcome(step):
            try:
                with torch.random.fork_rng([self.device] if self.cuda_stream else []):
                    step()
                return [tensor.clone() for tensor in self.state()]
            finally:
                for tensor, value in zip(self.state(), before):
                    tensor.copy_(value)

        def distances(tensors, others):
            return [(a - b).abs().max().item() if a.numel() else 0 for a, b in zip(tensors, others)]

        plain = outcome(self.update)
        noise = [max(pair) for pair in zip(*(distances(outcome(self.update), plain) for _ in range(2)))]
        least = 1e-3 if any(noise) else 0
        sizes = distances(plain, [torch.zeros_like(tensor) for tensor in plain])
        allowed = [max(4 * distance, least * size) for distance, size in zip(noise, sizes)]
        differences = distances(outcome(self.replay), plain)
        if self.cuda_stream:
            torch.cuda.empty_cache()  # the memory of the copies
        return all(difference <= limit for difference, limit in zip(differences, allowed))

    def state(self):
        """Returns all tensors that an update changes."""
        step = self.train_step
        states = [state for optimizer in step.optimizers for state in optimizer.state.values()]
        values = [value for state in states for value in state.values()]
        values += [step.nonfinite_in_a_row, step.nonfinite_steps]
        values += [*step.parameters.values(), *step.objective.buffers()]
        return [value.detach() for value in values if isinstance(value, torch.Tensor)]


def end_failed_capture(device, pool):
    """Ends a capture that failed, which torch 2.11 leaves half open.

    Without this, dropout raises an error later, and so does a lack of memory.
    """
    generator = torch.cuda.default_generators[device]
    with contextlib.suppress(RuntimeError, AttributeError):
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
