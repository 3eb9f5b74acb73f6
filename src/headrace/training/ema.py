"""The moving average of the weights, kept in CPU memory beside training (DeepSeek-V3 report, section 3.2.3).

After n updates with weights w_1 .. w_n and decay d the average is

    sum over i of d^(n-i) w_i  *  (1 - d) / (1 - d^n)

so the initial weights have no part in it, however short the run. As a recurrence: e_n = e_(n-1) + (w_n - e_(n-1)) * a
with a = (1 - d) / (1 - d^n). Router biases are averaged with the weights, so that the average is a whole model.

Each rank averages what it owns, in a thread, while the next step computes its gradients. On a CPU the thread reads the
weights themselves, which nobody changes before `wait`; from a GPU they are copied to pinned memory first.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from headrace.parallel.shards import Piece


class Ema:
    """The average of `pieces`, in FP32; everything else waits while `begin`'s work is under way."""

    def __init__(self, pieces: Sequence[Piece], decay: float) -> None:
        self._decay = decay
        self._values = [piece.tensor.detach() for piece in pieces]
        self._averages = [torch.zeros(value.shape, dtype=torch.float32) for value in self._values]
        self._pieces = [piece.of(piece.name, a) for piece, a in zip(pieces, self._averages, strict=True)]
        self._copies = [torch.empty(v.shape, dtype=v.dtype, pin_memory=True) if v.is_cuda else v for v in self._values]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._work: Future[None] | None = None
        self._updates = 0

    def begin(self) -> None:
        """Take in the present weights; they must not change before `wait`."""
        self.wait()
        self._updates += 1
        weight = (1 - self._decay) / (1 - self._decay**self._updates)
        copied = None
        for copy, value in zip(self._copies, self._values, strict=True):
            if value.is_cuda:
                copy.copy_(value, non_blocking=True)
                copied = copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
        if copied:
            copied.record()
        self._work = self._thread.submit(self._average, weight, copied)

    def wait(self) -> None:
        """Until what was begun is done."""
        if self._work is not None:
            work, self._work = self._work, None
            work.result()

    def pieces(self) -> list[Piece]:
        """The averages themselves, not copies, under the names of what they average."""
        self.wait()
        return self._pieces

    def state(self) -> dict[str, Any]:
        """What is no tensor, as JSON."""
        return {"updates": self._updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.wait()
        self._updates = int(state["updates"])

    def reset(self) -> None:
        """Forget what was averaged."""
        self.wait()
        self._updates = 0
        for average in self._averages:
            average.zero_()

    @torch.no_grad()
    def _average(self, weight: float, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for average, value in zip(self._averages, self._copies, strict=True):
            average.lerp_(value, weight)
