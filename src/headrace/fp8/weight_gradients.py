"""Where weight gradients go: computed at once, or put aside so that a pipeline can run them later.

The backward pass of a linear layer has two halves: the gradient of its input, which the layer before waits for, and the
gradient of its weight, which nobody waits for until the optimizer. Zero-bubble pipelines (arXiv 2401.10241) and
DualPipe (report, section 3.2.1) fill idle time with the second half. So layers never return weight gradients to
autograd: they hand a closure to this store, which runs it now or later and adds into `parameter.grad`, always in FP32.

Autograd therefore does not see these gradients: `torch.autograd.grad` on such a weight finds nothing, hooks on it do
not fire, and reducing gradients over ranks is the caller's business.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

Work = Callable[[], None]


class WeightGradientStore:
    """Runs weight-gradient work immediately, or collects it inside `deferred()` until `flush()`."""

    def __init__(self) -> None:
        self.generation = 0  # rises whenever weights may be about to change; casts of weights are keyed by it
        self._queue: list[Work] = []
        self.recomputing = False  # inside a backward pass no weight has changed since its forward pass
        self._deferring = False
        self._accumulating = False
        self._spare: dict[int, Tensor] = {}

    def put(self, work: Work) -> None:
        """Run `work` now, or queue it inside `deferred()`."""
        if self._deferring:
            self._queue.append(work)
            return
        with torch.no_grad():
            work()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context `put` only queues; the work runs at the next `flush()`."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    def take(self) -> list[Work]:
        """What was queued, in the order it was put, for the caller to `do` later."""
        queue, self._queue = self._queue, []
        return queue

    @torch.no_grad()
    def do(self, works: Iterable[Work]) -> None:
        """Run what was taken."""
        for work in works:
            work()

    def flush(self) -> None:
        """Run what was queued, in the order it was put."""
        self.do(self.take())

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """A promise that no weight changes within: around the microbatches of one optimizer step.

        Outside, every gradient is taken as a sign that the optimizer comes next, and weights are cast again for the
        next forward pass. (The weight's version counter would be the natural sign, but PyTorch's fused optimizers do
        not raise it.)
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before
            self.generation += 1

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Around what a backward pass computes again: gradients written meanwhile announce no optimizer step."""
        before, self.recomputing = self.recomputing, True
        try:
            yield
        finally:
            self.recomputing = before

    def recycle(self, parameters: Iterable[Parameter]) -> None:
        """`zero_grad` that keeps the memory: gradients become None, and their buffers are overwritten by the next
        backward.

        Fresh memory is expensive to touch for the first time (page faults, some 20 ms per 64 MB measured), and a
        training step needs gradients of the same shapes as the step before. Whoever still holds an old `.grad` tensor
        will see it change; use plain `zero_grad` where that matters.
        """
        assert not self._queue, "weight gradients are still deferred: flush() before recycle()"
        for parameter in parameters:
            if parameter.grad is not None:
                self._spare[id(parameter)] = parameter.grad
                parameter.grad = None

    def gradient(self, parameter: Parameter) -> tuple[Tensor, bool]:
        """The FP32 gradient buffer of `parameter`, and whether it is fresh: then its content is to be overwritten."""
        if not self._accumulating:
            self.generation += 1
        if parameter.grad is not None:
            return parameter.grad, False
        spare = self._spare.pop(id(parameter), None)
        fits = spare is not None and spare.shape == parameter.shape and spare.device == parameter.device
        parameter.grad = spare if fits else torch.empty_like(parameter)
        assert parameter.grad is not None
        return parameter.grad, True
