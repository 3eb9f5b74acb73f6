"""Summing gradients over the copies of a parameter, and giving every copy the updated values.

Copies of a parameter see different microbatches: data ranks, the two directions of DualPipe, both ends of the pipeline
for a shared embedding. One step is

    start(stage)     as soon as a stage's last backward pass ended: send its gradients to their owners, which add them
    finish()         start what is left, wait for all
    norm(), clip()   over what this rank owns; the norm is that of all ranks
    (the optimizer)  updates `pieces`, what this rank owns (see `shards`)
    share()          owners send the new values to the other copies

Buckets are reduced to each owner and broadcast from it, plain sums in FP32 (the loss is already divided by microbatches
and data ranks). With two copies the sum is a + b, whoever owns it. Gradients are written into the flat memory of their
bucket by the weight-gradient store, and parameters lie in flat memory too, so nothing is copied before it is sent.
Where no other rank holds a parameter it is its own piece and nothing here costs anything.

Who holds what is told once, at the beginning; afterwards every rank knows all buckets and starts those of one group in
one order (the last stages first), whatever the order of its calls: so no two ranks wait for each other.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.graph import increment_version
from torch.linalg import vector_norm
from torch.nn import Parameter

from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.parallel.assembly import exchange
from headrace.parallel.mesh import Groups, Mesh
from headrace.parallel.shards import Bucket, Claim, Piece, Whole, plan

_PURPOSE = "gradients"
_ROW = 2048  # elements whose squares are added in FP32; their sums are added in FP64


@dataclass(frozen=True)
class Held:
    """A parameter of a pipeline stage on this rank: its name in the whole model, and all ranks that hold the same.

    Routed experts are the stack [E/expert, ...] of this rank's place in its expert group.
    """

    name: str
    parameter: Parameter
    stage: int
    copies: tuple[int, ...]
    experts: bool = False

    def claim(self, mesh: Mesh) -> Claim:
        """The same for other ranks to read."""
        shape, groups = self.parameter.shape, mesh.expert if self.experts else 1
        size = self.parameter.numel()
        start = size * (mesh.expert_rank % groups)
        return Claim(self.name, self.stage, self.copies, start, size, (shape[0] * groups, *shape[1:]))


class GradientReduction:
    """Reduces the gradients of `held`, the parameters of all stages on this rank. Made by all ranks at the same time.

    A name may be held by two stages of one rank; the two then share memory, and their gradients are added in the order
    of the stages. Parameters that other ranks hold too are moved into flat memory: hold on to the `Parameter`, not to
    its `data`. Copies must be equal before the first step; `share()` makes them so.
    """

    def __init__(
        self,
        held: Sequence[Held],
        mesh: Mesh,
        groups: Groups,
        store: WeightGradientStore,
        whole: Whole,
        device: torch.device,
    ) -> None:
        claims = [one.claim(mesh) for one in held]
        said = exchange([asdict(claim) for claim in claims], mesh, device)
        buckets = plan({rank: [_claim(entry) for entry in entries] for rank, entries in enumerate(said)}, whole)
        everyone = tuple(range(mesh.world))
        groups.open(_PURPOSE, [*(bucket.copies for bucket in buckets), everyone])
        self._everyone = groups.get(_PURPOSE, everyone)
        self._device, self._stages, self._ended = device, {one.stage for one in held}, set[int]()

        ordered = sorted(zip(claims, held, strict=True), key=lambda pair: pair[1].stage)
        parameters: dict[tuple[str, int], list[Parameter]] = {}
        for claim, one in ordered:
            parameters.setdefault((claim.name, claim.start), []).append(one.parameter)
        self._memories = [
            _Memory(bucket, [parameters[part.name, part.start] for part in bucket.parts], mesh.rank, groups, store)
            for bucket in buckets
            if mesh.rank in bucket.copies
        ]
        self._waiting, self._works = list(self._memories), list[distributed.Work]()
        self.pieces = [piece for memory in self._memories for piece in memory.pieces]
        """What this rank owns; `.grad` is the reduced gradient between `finish()` and the next step."""
        self.everything = [piece for memory in self._memories for piece in memory.everything]
        """All that this rank holds, to be loaded into."""
        self.replicas = [memory.everything for memory in self._memories if len(memory.bucket.copies) > 1]
        """By bucket what other ranks hold too, and should hold alike; their lists are the same."""
        self._units, self._measured = _measured(buckets, self.pieces)

    def start(self, stage: int) -> None:
        """Begin to sum the gradients of `stage`, which are complete; does not wait."""
        assert stage in self._stages - self._ended, f"stage {stage} is not here, or was already started"
        self._ended.add(stage)
        blocked: set[tuple[int, ...]] = set()  # groups whose next bucket is not complete yet
        waiting, self._waiting = self._waiting, []
        for memory in waiting:
            copies = memory.bucket.copies
            if copies in blocked or not self._ended.issuperset(self._stages.intersection(memory.bucket.stages)):
                blocked.add(copies)
                self._waiting.append(memory)
            else:
                self._works += memory.reduce()

    def finish(self) -> None:
        """Sum the gradients of the stages that were not started, and wait for all sums."""
        for stage in sorted(self._stages - self._ended, reverse=True):
            self.start(stage)
        assert not self._waiting
        self._wait()
        self._ended.clear()
        self._waiting = list(self._memories)

    def norm(self) -> Tensor:
        """The norm of the whole model's gradient, FP64, on every rank the same bits; after `finish()`, on all ranks.

        Every element counts once, in its owner's sum. Sums of units are exchanged, not sums of ranks, and added in the
        order of names and elements: so neither stages, nor cuts, nor expert groups change a bit of it on a CPU.
        """
        norms = torch.zeros(self._units, dtype=torch.float64, device=self._device)
        for at in self._measured:
            assert at.tensor.grad is not None
            rows = vector_norm(at.tensor.grad.reshape(-1, at.row), dim=1).view(-1, at.unit // at.row)
            norms[at.first : at.first + len(rows)] = vector_norm(rows, dim=1, dtype=torch.float64)
        if self._everyone:
            distributed.all_reduce(norms, group=self._everyone)  # one rank has a number, the others have zeros
        total: Tensor = vector_norm(norms)
        return total

    def clip(self, limit: float, norm: Tensor) -> None:
        """Scale the gradients of what this rank owns so that the norm, `norm` now, is at most `limit`."""
        torch.nn.utils.clip_grads_with_norm_([piece.tensor for piece in self.pieces], limit, norm.float())

    def share(self) -> None:
        """Give every copy its owner's values; called by all ranks after the optimizer."""
        for memory in self._memories:
            self._works += memory.broadcast()
        self._wait()

    def _wait(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()


class _Memory:
    """A bucket on this rank: its parameters (by part, in the order of stages) and, with several copies, flat memory."""

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[list[Parameter]],
        rank: int,
        groups: Groups,
        store: WeightGradientStore,
    ) -> None:
        self.bucket, self._parameters, self._store = bucket, parameters, store
        self._group = groups.get(_PURPOSE, bucket.copies)
        firsts = [parameter for parameter, *_ in parameters]
        pieces = [Piece(part.name, p, part.shape, part.start) for part, p in zip(bucket.parts, firsts, strict=True)]
        self.everything = pieces
        if self._group:
            self._values = torch.zeros(bucket.size, dtype=firsts[0].dtype, device=firsts[0].device)
            self._sums = torch.zeros_like(self._values)
            self._move(firsts)
            pieces = self._owned(rank)
        self.pieces = pieces
        for first, *others in parameters:
            for other in others:
                other.data = first.data

    def reduce(self) -> list[distributed.Work]:
        """Begin to send the gradients to their owners; what got none counts as zero."""
        for index, (first, *others) in enumerate(self._parameters):
            gradient = self._gradient(index)
            if first.grad is None:
                gradient.zero_()
            elif first.grad.data_ptr() != gradient.data_ptr():  # made by autograd: norms, the router
                gradient.copy_(first.grad)
            first.grad = gradient
            for other in others:
                if other.grad is not None:
                    gradient.add_(other.grad)
        if not self._group:
            return []
        runs = self._runs(self._sums)
        return [distributed.reduce(run, owner, group=self._group, async_op=True) for owner, run in runs]

    def broadcast(self) -> list[distributed.Work]:
        """Begin to send the values from their owners to all copies."""
        if not self._group:
            return []
        increment_version([parameter for parameters in self._parameters for parameter in parameters])
        runs = self._runs(self._values)
        return [distributed.broadcast(run, owner, group=self._group, async_op=True) for owner, run in runs]

    def _runs(self, flat: Tensor) -> list[tuple[int, Tensor]]:
        ends = zip(self.bucket.copies, pairwise(self.bucket.cuts), strict=True)
        return [(owner, flat[begin:end]) for owner, (begin, end) in ends if begin < end]

    def _move(self, parameters: Sequence[Parameter]) -> None:
        for index, parameter in enumerate(parameters):
            values = self._of_part(self._values, index).view(parameter.shape)
            values.copy_(parameter.detach())
            parameter.data = values
            parameter.grad = self._gradient(index)
        self._store.recycle(parameters)  # so that it writes into the flat memory

    def _gradient(self, index: int) -> Tensor:
        first = self._parameters[index][0]
        if self._group:
            return self._of_part(self._sums, index).view(first.shape)
        return first.grad if first.grad is not None else torch.empty_like(first)

    def _of_part(self, flat: Tensor, index: int) -> Tensor:
        offset, part = self.bucket.offsets[index], self.bucket.parts[index]
        return flat[offset : offset + part.size]

    def _owned(self, rank: int) -> list[Piece]:
        pieces = []
        for index, part in enumerate(self.bucket.parts):
            begin, end = self.bucket.owned(part, rank)
            shape: tuple[int, ...] = (-1,)
            if end - begin == part.size:
                shape = tuple(self._parameters[index][0].shape)
            elif part.unit == prod(part.shape[-2:]):
                shape = (-1, *part.shape[-2:])  # some experts of a stack
            if begin < end:
                tensor = self._of_part(self._values, index)[begin:end].view(shape)
                tensor.grad = self._of_part(self._sums, index)[begin:end].view(shape)
                pieces.append(Piece(part.name, tensor, part.shape, part.start + begin))
        return pieces


@dataclass(frozen=True)
class _Measured:
    """A tensor whose gradient counts in the norm, and where the norms of its units go."""

    tensor: Tensor
    unit: int
    row: int
    first: int


def _measured(buckets: Sequence[Bucket], pieces: Sequence[Piece]) -> tuple[int, list[_Measured]]:
    """The number of units of the whole model, and the places of those that are here."""
    units: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for part in (part for bucket in buckets for part in bucket.parts):
        units[part.name], sizes[part.name] = part.unit, prod(part.shape)
    first, places = 0, dict[str, int]()
    for name in sorted(units):
        places[name] = first
        first += sizes[name] // units[name]
    measured = []
    for piece in pieces:
        unit = units[piece.name]
        row = next(row for row in range(min(unit, _ROW), 0, -1) if unit % row == 0)
        measured.append(_Measured(piece.tensor, unit, row, places[piece.name] + piece.start // unit))
    return first, measured


def _claim(entry: dict[str, Any]) -> Claim:
    return Claim(**{**entry, "copies": tuple(entry["copies"]), "shape": tuple(entry["shape"])})
