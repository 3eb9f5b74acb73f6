"""Who is where: world = pipeline x data ranks, and the process groups among them.

    rank = pipeline rank * data + data rank

so neighbours share a pipeline rank. An expert group is `expert` consecutive data ranks, which hold the experts of their
layers between them; `node_size` consecutive ranks are a node. With expert groups that start at a node, or lie within
one, a token that goes to another rank of its expert group crosses nodes at most once per node (dispatch.py).
It opens groups and nothing else; a process that was not started as a rank is a world of one without any group.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from headrace.config.schema import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The layout and this process' rank in it."""

    pipeline: int
    data: int
    expert: int
    node_size: int
    rank: int

    @staticmethod
    def of(config: ParallelConfig, rank: int) -> "Mesh":
        """The mesh of `config` seen from `rank`."""
        return Mesh(config.pipeline, config.data, config.expert, config.node_size, rank)

    @property
    def world(self) -> int:
        return self.pipeline * self.data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.data

    @property
    def data_rank(self) -> int:
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Position within the expert group."""
        return self.data_rank % self.expert

    def at(self, pipeline_rank: int, data_rank: int) -> int:
        """The rank at these coordinates."""
        return pipeline_rank * self.data + data_rank

    def expert_group(self) -> tuple[int, ...]:
        """The ranks that hold the experts of this rank's layers between them, in the order of their experts."""
        first = self.rank - self.expert_rank
        return tuple(range(first, first + self.expert))

    def copies(self, pipeline_ranks: Iterable[int], experts: bool) -> tuple[int, ...]:
        """The ranks that hold the same parameters of a stage that lies on `pipeline_ranks`, ascending.

        With `experts` those of the same routed experts, which only every `expert`-th data rank holds.
        """
        data = [d for d in range(self.data) if not experts or d % self.expert == self.expert_rank]
        return tuple(sorted(self.at(p, d) for p in pipeline_ranks for d in data))


class Groups:
    """Process groups by their ranks, opened once, and by every rank in the same order.

    torch wants every rank of the world to open every group, members or not, in one order. So `open` is called on all
    ranks with all sets of ranks that any of them needs.
    """

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        self._mesh, self._timeout = mesh, timeout
        self._groups: dict[tuple[str, tuple[int, ...]], distributed.ProcessGroup] = {}

    def open(self, purpose: str, sets: Sequence[tuple[int, ...]]) -> None:
        """Open a group for each set of two or more ranks; one `purpose` never waits for another one's operations."""
        for ranks in sorted({tuple(sorted(ranks)) for ranks in sets if len(ranks) > 1}):
            group = distributed.new_group(list(ranks), timeout=self._timeout)
            if self._mesh.rank in ranks:
                self._groups[purpose, ranks] = group

    def get(self, purpose: str, ranks: tuple[int, ...]) -> distributed.ProcessGroup | None:
        """The group of these ranks; None where this rank is alone."""
        return self._groups[purpose, tuple(sorted(ranks))] if len(ranks) > 1 else None


def backend_of(device: torch.device) -> str:
    """torch.distributed's back end for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"
