"""Who sends what where between the GPUs of one node: arithmetic, and the same exchange on plain tensors.

Every rank holds ``experts_per_rank`` consecutive experts and one buffer that the other ranks write to and read from
directly. A token has the slot (its rank, its number) in every buffer, used on those ranks that hold one of its experts:
no counts have to be exchanged, and the result of a token is found where its row was sent. The price is memory for the
worst case, all tokens of all ranks: with 4,096 tokens of 7,168 columns on 8 ranks 470 MB for rows and as much for
results.

    dispatch   rows (BF16, or E4M3 codes with scales), experts and weights to the buffers of the experts' ranks
    (each rank: lay_out of the received experts, permute, its experts, combine into ``results``)
    combine    each token's results from those ranks, added in FP32 in the order of the ranks, rounded to BF16

The gradient takes the same roads: that of a combine is a dispatch, that of a dispatch a combine, and the gradients of
the routing weights come back beside the rows.

``PlainExchange`` is the reference: the CUDA movers (movers.py) have to leave the same bytes in the same places.

Legend: R ranks, M tokens that a rank may have (capacity), N tokens that it has, K experts per token, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGNMENT = 256  # bytes; regions begin at multiples of it
_MAX_RANKS = 8  # kMaxRanks of movers.h


@dataclass(frozen=True)
class Received:
    """What the ranks' tokens sent here, R * M slots; those of ranks without enough tokens name the expert -1."""

    rows: torch.Tensor  # [R * M, D], undefined in slots whose token has no expert here
    scales: torch.Tensor | None  # FP32 [R * M, T], likewise
    experts: torch.Tensor  # int32 [R * M, K], numbered over all ranks
    weights: torch.Tensor  # FP32 [R * M, K]


@dataclass(frozen=True)
class BufferPlan:
    """The shape of an exchange, the same on all ranks."""

    ranks: int
    capacity: int  # tokens of one rank
    columns: int
    chosen: int
    experts_per_rank: int

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= _MAX_RANKS:
            raise ValueError(f"{self.ranks} ranks: between 1 and {_MAX_RANKS} GPUs of a node reach each other's memory")
        if self.columns % 512 or self.columns < 512:
            raise ValueError(f"{self.columns} columns: multiples of 512 make codes and scales whole pieces of 16 bytes")
        if not 1 <= self.chosen <= min(32, self.ranks * self.experts_per_rank) or self.capacity < 1:
            raise ValueError(f"{self.chosen} of {self.ranks * self.experts_per_rank} experts, {self.capacity} tokens")

    @property
    def sizes(self) -> list[int]:
        """Bytes of each region, in the order of ``Regions`` in movers.h; rows have room for BF16."""
        slots = self.ranks * self.capacity
        choices = slots * self.chosen * 4
        rows = slots * self.columns * 2
        return [rows, slots * self.columns // 128 * 4, choices, choices, rows, choices, 8 * _MAX_RANKS, 4]

    @property
    def offsets(self) -> list[int]:
        """Where each region begins."""
        begins = [0]
        for size in self.sizes:
            begins.append(begins[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        return begins[:-1]

    @property
    def bytes(self) -> int:
        """Size of a buffer."""
        return self.offsets[-1] + _ALIGNMENT

    def slots(self, rank: int, tokens: int) -> slice:
        """The slots of the first ``tokens`` tokens of ``rank``."""
        if tokens > self.capacity:
            raise ValueError(f"{tokens} tokens: the buffers were planned for {self.capacity} of a rank")
        return slice(rank * self.capacity, rank * self.capacity + tokens)

    def destinations(self, experts: torch.Tensor) -> torch.Tensor:
        """Which ranks each token goes to, bool [N, R]; ``experts`` int [N, K], negative ones are nowhere."""
        owner = torch.where(experts < 0, -1, experts // self.experts_per_rank)
        return (owner[:, :, None] == torch.arange(self.ranks, device=experts.device)).any(dim=1)

    def received(self, buffer: torch.Tensor, dtype: torch.dtype) -> Received:
        """The received part of a uint8 buffer, as tensors that share its memory."""
        rows = self._region(buffer, 0, dtype, self.columns)
        scales = self._region(buffer, 1, torch.float32, self.columns // 128) if dtype.itemsize == 1 else None
        experts = self._region(buffer, 2, torch.int32, self.chosen)
        return Received(rows, scales, experts, self._region(buffer, 3, torch.float32, self.chosen))

    def results(self, buffer: torch.Tensor) -> torch.Tensor:
        """Where this rank leaves its experts' results for other ranks to read, BF16 [R * M, D]."""
        return self._region(buffer, 4, torch.bfloat16, self.columns)

    def result_weights(self, buffer: torch.Tensor) -> torch.Tensor:
        """Where it leaves the gradients of the routing weights, FP32 [R * M, K]."""
        return self._region(buffer, 5, torch.float32, self.chosen)

    def _region(self, buffer: torch.Tensor, index: int, dtype: torch.dtype, width: int) -> torch.Tensor:
        count = self.ranks * self.capacity * width * dtype.itemsize
        begin = self.offsets[index]
        return buffer[begin : begin + count].view(dtype).view(-1, width)


class PlainExchange:
    """The reference: one rank's side of an exchange, on uint8 buffers that all ranks' objects share."""

    def __init__(self, plan: BufferPlan, rank: int, buffers: list[torch.Tensor]) -> None:
        self.plan, self.rank, self.buffers = plan, rank, buffers

    def push(
        self, rows: torch.Tensor, scales: torch.Tensor | None, experts: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Write this rank's tokens, [N, .] each, to the buffers of the ranks that hold their experts."""
        mine = self.plan.slots(self.rank, len(experts))
        for rank, goes in enumerate(self.plan.destinations(experts).unbind(1)):
            there = self.plan.received(self.buffers[rank], rows.dtype)
            _bytes(there.rows)[mine][goes] = _bytes(rows)[goes]
            if scales is not None and there.scales is not None:
                there.scales[mine][goes] = scales[goes]
            there.experts[self.plan.slots(self.rank, self.plan.capacity)] = -1
            there.weights[self.plan.slots(self.rank, self.plan.capacity)] = 0
            there.experts[mine], there.weights[mine] = experts, weights

    def pull(self, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum this rank's tokens' results, BF16 [N, D], and fetch the weights' gradients, FP32 [N, K]."""
        mine = self.plan.slots(self.rank, len(experts))
        total = torch.zeros((len(experts), self.plan.columns), dtype=torch.float32, device=experts.device)
        weights = torch.zeros(experts.shape, dtype=torch.float32, device=experts.device)
        for rank, went in enumerate(self.plan.destinations(experts).unbind(1)):
            total[went] += self.plan.results(self.buffers[rank])[mine][went].float()
            here = (experts >= 0) & (experts // self.plan.experts_per_rank == rank)
            weights = torch.where(here, self.plan.result_weights(self.buffers[rank])[mine], weights)
        return total.bfloat16(), weights


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.uint8)
