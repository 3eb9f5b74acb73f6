"""Hidden states and their gradients between pipeline ranks: sends that never block, receives into few buffers.

A receive takes a buffer from a pool, which grows to the number that is ever needed at once and no further: the number
of live microbatches and a few on their way, where one buffer per microbatch, stage and direction would be 26 GiB at the
size of DeepSeek-V3. `simulate` predicts that number. A buffer is given back when nothing reads it any more.

Between two ranks there is a channel per direction and per kind (hidden states, gradients), each with a process group of
its own, so that messages are matched in their order and no kind waits behind the other.
All hidden states of a step have one shape and dtype; what differs is refused before it is computed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from headrace.parallel.mesh import Groups, Mesh
from headrace.pipeline.schedule import Kind, Schedule


class ShapeError(RuntimeError):
    """A microbatch whose hidden states have another shape than those of the step."""


class ReceivePool:
    """Buffers of one shape; `peak` is how many were in use at once."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make, self._free = make, list[Tensor]()
        self.in_use = self.peak = 0

    def take(self) -> Tensor:
        """A buffer of undefined content."""
        self.in_use += 1
        self.peak = max(self.peak, self.in_use)
        return self._free.pop() if self._free else self._make()

    def give(self, buffer: Tensor) -> None:
        """`buffer` is read no more."""
        self.in_use -= 1
        self._free.append(buffer)


@dataclass
class Receiving:
    """A receive that was posted."""

    buffer: Tensor
    work: distributed.Work
    source: int  # world rank


def open_transfers(groups: Groups, mesh: Mesh, schedules: Iterable[Schedule]) -> None:
    """Open the groups of all channels that the schedules use; called by all ranks, in the same order."""
    pairs = sorted({pair for schedule in schedules for pair in _neighbours(schedule)})
    for forward in (True, False):
        for up in (True, False):
            groups.open(_purpose(forward, up), [_ranks(mesh, a, b, d) for a, b in pairs for d in range(mesh.data)])


class Transfers:
    """This rank's channels, for hidden states of `shape` and `dtype`."""

    def __init__(self, groups: Groups, mesh: Mesh, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._groups, self._mesh, self.shape = groups, mesh, shape
        self.pool = ReceivePool(lambda: torch.empty(shape, dtype=dtype, device=device))
        self._sending: list[tuple[distributed.Work, Tensor]] = []

    def check(self, shape: torch.Size, action: str) -> None:
        """Raise `ShapeError` where a microbatch's hidden states, of `shape`, differ from the step's."""
        if shape != self.shape:
            raise ShapeError(f"{action}: hidden states of {list(shape)} where the step has {list(self.shape)}")

    def send(self, tensor: Tensor, to: int, kind: Kind) -> None:
        """Start to send to pipeline rank `to`; the tensor is held, and must not change, until it has arrived."""
        self._sending = [(work, held) for work, held in self._sending if not work.is_completed()]
        group, other = self._channel(to, kind is Kind.SEND_F, self._mesh.pipeline_rank < to)
        work = distributed.isend(tensor.contiguous(), other, group=group)
        assert work is not None
        self._sending.append((work, tensor))

    def receive(self, source: int, kind: Kind) -> Receiving:
        """Post a receive from pipeline rank `source`."""
        group, other = self._channel(source, kind is Kind.RECV_F, source < self._mesh.pipeline_rank)
        buffer = self.pool.take()
        work = distributed.irecv(buffer, other, group=group)
        assert work is not None
        return Receiving(buffer, work, other)

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        assert self.pool.in_use == 0, "a receive buffer was not given back"

    def _channel(self, other: int, forward: bool, up: bool) -> tuple[distributed.ProcessGroup | None, int]:
        mesh = self._mesh
        ranks = _ranks(mesh, mesh.pipeline_rank, other, mesh.data_rank)
        return self._groups.get(_purpose(forward, up), ranks), mesh.at(other, mesh.data_rank)


def _purpose(forward: bool, up: bool) -> str:
    return f"{'hidden states' if forward else 'gradients'} {'up' if up else 'down'}"


def _ranks(mesh: Mesh, one: int, other: int, data: int) -> tuple[int, ...]:
    return tuple(sorted((mesh.at(one, data), mesh.at(other, data))))


def _neighbours(schedule: Schedule) -> set[tuple[int, int]]:
    pairs = set()
    for microbatch in range(schedule.microbatches):
        for stage in range(1, schedule.stages):
            a, b = schedule.rank_of(stage - 1, microbatch), schedule.rank_of(stage, microbatch)
            if a != b:
                pairs.add((min(a, b), max(a, b)))
    return pairs
