"""The mean of the weights over the last steps of a run (--average-last)."""

import contextlib
import math

import torch


class WeightAverage:
    """The mean of parameters, {name: tensor}, over all steps from step `first` on.

    Training goes on with the weights themselves. Evaluations, best.pt and marks have the mean as soon
    as there is one: `count`, its number of steps, is then not 0 (Izmailov et al., arXiv 1803.05407).
    """

    def __init__(self, parameters=None, first=math.inf):
        self.parameters, self.first, self.count = parameters or {}, first, 0
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step):
        """Adds the weights after `step`."""
        if step >= self.first:
            self.count += 1
            for name, parameter in self.parameters.items():
                self.mean[name].lerp_(parameter, 1 / self.count)

    @torch.no_grad()
    def _exchange(self):
        for name, parameter in self.parameters.items() if self.count else ():
            weights = parameter.clone()
            parameter.copy_(self.mean[name])
            self.mean[name].copy_(weights)

    @contextlib.contextmanager
    def applied(self):
        """A context in which the model has the mean, if there is one."""
        self._exchange()
        yield
        self._exchange()

    def finish(self):
        """Gives the model the mean, if there is one, for good."""
        self._exchange()
        self.count = 0
