"""Tokens to experts on other ranks and back: expert parallelism with node-limited dispatch.

The E experts of a layer are split over the P ranks of an expert group in contiguous blocks. Links between nodes are
slow and those inside a node fast (3.2 times in the report, section 3.2.2), so a token travels in two hops:

    across nodes    once to each node that has one of its experts, to the rank with the same place in its node
    inside a node   from there once to each rank that has one of its experts

The router limits a token to `topk_group` groups of experts; where each node holds whole groups, it therefore crosses
to at most so many nodes, however many experts it has there. The way back is the same in reverse, and sums as early as
it can: a token's rows on the experts' rank, then over the ranks of a node, then over nodes at home. With one node the
first hop falls away, with one rank per node the second.

A hop is one all-to-all of counts and one of payload, all as bytes:

    the token as its experts' GEMMs want it (`Gemms.pack`) | expert ids int16 | routing weights | home rank int16

In FP8 the row is quantised before it travels, the same bytes as quantised afterwards; so is a gradient on its way to
experts (`Gemms.pack_gradient`). What is summed travels in the compute dtype (BF16 in the report's system); each sum
accumulates in FP32, in a fixed order. No token is dropped.

On the experts' rank rows are sorted by expert, then by home rank, then by token: the order that one process would give
them if it held the whole group's tokens. So experts multiply the same matrices under any layout and node size.

It does not overlap anything: `channel.py` runs these methods beside computation.
Shapes: N tokens here, K experts per token, R rows that travel, X targets of a hop, T tokens received by an experts'
rank, S rows of experts, D model width, E experts, B bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from headrace.config.schema import ParallelConfig
from headrace.errors import UserError
from headrace.fp8.gemms import Gemms
from headrace.model.dispatch import (
    Dispatcher,
    LocalDispatcher,
    Received,
    Way,
    copy_to_rows,
    pairs_of_rows,
    rows_of_pairs,
    sorted_by_expert,
)
from headrace.model.router import Routing
from headrace.parallel import deepep
from headrace.parallel.experts import Sums, experts_of
from headrace.parallel.mesh import Groups, Mesh

_ID = torch.int16  # of experts and of ranks within an expert group


@dataclass(frozen=True)
class Link:
    """One hop: `size` targets, of which the one at place (place in the expert group) // stride % size is meant."""

    group: distributed.ProcessGroup
    size: int
    stride: int


@dataclass(frozen=True)
class Crossing:
    """What one hop did with one microbatch: the rows sent, by target, and how many went and came per target."""

    token_of_row_R: Tensor
    sums: Sums
    sent: list[int]
    arrived: list[int]


@dataclass(frozen=True)
class Journey:
    """The way of one microbatch: through the hops in order, then to rows of experts."""

    crossings: list[Crossing]
    way: Way  # of the T tokens received
    sums: Sums


class ExpertParallelDispatcher:
    """`Dispatcher` over an expert group of `ranks` ranks, this one at `place`; `gemms` are those of the experts.

    Every method is a collective of the group: all its ranks call the same ones in the same order, also those without
    tokens. `links` are the hops, outermost first.
    """

    backend = "all_to_all"

    def __init__(self, gemms: Gemms, links: Sequence[Link], ranks: int, place: int) -> None:
        self._gemms, self._links, self._ranks, self._place = gemms, links, ranks, place

    def local_experts(self, experts: int) -> range:
        """The block of this rank. Raises `UserError` where the ranks cannot share evenly."""
        return experts_of(self._place, self._ranks, experts)

    @torch.no_grad()
    def send(self, x_ND: Tensor, routing: Routing) -> Received:
        """Send each token to the ranks of its experts."""
        mine = self.local_experts(routing.counts_E.numel())
        ids_NK, home_N1 = routing.experts_NK.to(_ID), torch.full_like(routing.experts_NK[:, :1], self._place, dtype=_ID)
        parts = [self._gemms.pack(self._gemms.rows(x_ND, "dispatched")), ids_NK, routing.weights_NK.detach(), home_N1]
        crossings = []
        for link in self._links:
            parts, crossing = _cross(link, parts, len(mine))
            crossings.append(crossing)
        packed_TB, ids_TK, weights_TK, home_T1 = parts
        way, counts = self._sorted(ids_TK, home_T1, mine)
        operand = self._gemms.take(self._gemms.unpack(packed_TB), way.token_of_row_S)
        journey = Journey(crossings, way, Sums.of(way.rows_of_token_NK))
        return Received(operand, rows_of_pairs(weights_TK, way), counts, journey)

    @torch.no_grad()
    def collect(self, rows_SD: Tensor, received: Received) -> Tensor:
        """Sum each token's rows on its way home, [N, D]."""
        journey: Journey = received.way
        values = journey.sums(rows_SD)
        for link, crossing in zip(reversed(self._links), reversed(journey.crossings), strict=True):
            values = crossing.sums(_exchange(link, values, crossing.arrived, crossing.sent))
        return values

    @torch.no_grad()
    def send_gradient(self, dy_ND: Tensor, received: Received) -> Tensor:
        """[S, D], on the way that the tokens took; 0 in rows that only fill up."""
        journey: Journey = received.way
        packed = self._gemms.pack_gradient(dy_ND)
        for link, crossing in zip(self._links, journey.crossings, strict=True):
            packed = _exchange(link, packed[crossing.token_of_row_R], crossing.sent, crossing.arrived)
        return copy_to_rows(self._gemms.unpack_gradient(packed), journey.way)

    @torch.no_grad()
    def collect_gradient(self, drows_SD: Tensor, dweights_S: Tensor, received: Received) -> tuple[Tensor, Tensor]:
        """[N, D], summed as in `collect`, and [N, K], each from the one rank that has the expert."""
        journey: Journey = received.way
        parts = [journey.sums(drows_SD), pairs_of_rows(dweights_S, journey.way)]
        for link, crossing in zip(reversed(self._links), reversed(journey.crossings), strict=True):
            arrived = _exchange(link, _joined(parts), crossing.arrived, crossing.sent)
            parts = [crossing.sums(part) for part in _parted(arrived, parts)]
        return parts[0], parts[1]

    def _sorted(self, ids_TK: Tensor, home_T1: Tensor, mine: range) -> tuple[Way, list[int]]:
        """Rows by expert, within an expert by home rank and token; the tokens numbered as they were received."""
        local_TK = torch.where(ids_TK >= 0, ids_TK - mine.start, -1).long()
        order_T = torch.argsort(home_T1[:, 0], stable=True)  # a home's tokens all come by one way, in order
        counts = torch.bincount(local_TK[local_TK >= 0], minlength=len(mine))
        way, filled = sorted_by_expert(local_TK[order_T], counts, self._gemms.row_multiple)
        used_S = way.token_of_row_S >= 0
        token_of_row_S = torch.full_like(way.token_of_row_S, -1)
        token_of_row_S[used_S] = order_T[way.token_of_row_S[used_S]]
        rows_of_token_TK = torch.empty_like(way.rows_of_token_NK)
        rows_of_token_TK[order_T] = way.rows_of_token_NK
        return Way(token_of_row_S, rows_of_token_TK), filled


def make_dispatcher(mesh: Mesh, groups: Groups, gemms: Gemms, config: ParallelConfig) -> Dispatcher:
    """The dispatcher of this rank, for all its layers. Opens process groups: every rank of the world calls it once.

    Raises `UserError` for a back end that is missing or cannot run here, and where expert groups cut nodes.
    """
    deep_ep = deepep.library() if config.dispatch == "deepep" else None
    ranks, near = mesh.expert, min(mesh.expert, mesh.node_size)
    if ranks == 1:
        return LocalDispatcher(gemms)
    if ranks % near or mesh.node_size % near:
        raise UserError(
            f"parallel.expert={ranks} ranks and parallel.node_size={mesh.node_size} ranks per node: one must divide "
            "the other, so that expert groups fill nodes or lie within one; change either"
        )
    if deep_ep is not None:
        sets = [tuple(range(first, first + ranks)) for first in range(0, mesh.world, ranks)]
        groups.open("dispatch", sets)
        group = groups.get("dispatch", mesh.expert_group())
        assert group is not None
        return deepep.DeepEpDispatcher(deep_ep, gemms, group, mesh.expert_rank)
    return ExpertParallelDispatcher(gemms, _links(mesh, groups, near), ranks, mesh.expert_rank)


def _links(mesh: Mesh, groups: Groups, near: int) -> list[Link]:
    """The hops between `near` ranks of a node and the nodes that an expert group spans, where there are any."""
    expert_groups = [range(first, first + mesh.expert) for first in range(0, mesh.world, mesh.expert)]
    nodes = [tuple(ranks[node : node + near]) for ranks in expert_groups for node in range(0, mesh.expert, near)]
    peers = [tuple(ranks[place::near]) for ranks in expert_groups for place in range(near)]
    links = []
    for purpose, sets, stride in (("dispatch across nodes", peers, near), ("dispatch inside a node", nodes, 1)):
        groups.open(purpose, sets)
        ranks = next(ranks for ranks in sets if mesh.rank in ranks)
        group = groups.get(purpose, ranks)
        if group is not None:
            links.append(Link(group, len(ranks), stride))
    return links


def _cross(link: Link, parts: list[Tensor], experts_per_rank: int) -> tuple[list[Tensor], Crossing]:
    """One hop with tokens (packed rows, expert ids, weights, home); at the target an id of another target is -1."""
    packed, ids_NK, weights_NK, home = parts
    target_NK = torch.where(ids_NK >= 0, ids_NK // (experts_per_rank * link.stride) % link.size, -1)
    targets_X = torch.arange(link.size, device=ids_NK.device)
    reached_NX = (target_NK[:, :, None] == targets_X).any(1)
    counts_X = reached_NX.sum(0)
    way, sent = sorted_by_expert(torch.where(reached_NX, targets_X, -1), counts_X, 1)
    arrived_X = _exchange(link, counts_X, [1] * link.size, [1] * link.size)
    crossing = Crossing(way.token_of_row_S, Sums.of(way.rows_of_token_NK), sent, arrived_X.tolist())
    token_R, target_R1 = way.token_of_row_S, targets_X.repeat_interleave(counts_X)[:, None]
    ids_RK = torch.where(target_NK[token_R] == target_R1, ids_NK[token_R], -1)
    payload = _joined([packed[token_R], ids_RK, weights_NK[token_R], home[token_R]])
    return _parted(_exchange(link, payload, sent, crossing.arrived), parts), crossing


def _exchange(link: Link, rows: Tensor, sent: list[int], arrived: list[int]) -> Tensor:
    """Rows to the targets, so many to each, for rows from them, so many from each."""
    out = rows.new_empty(sum(arrived), *rows.shape[1:])
    distributed.all_to_all_single(out, rows.contiguous(), arrived, sent, group=link.group)
    return out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of the same number of rows side by side, as bytes [R, B]."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def _parted(joined_RB: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse, for matrices of the widths and dtypes of `like`."""
    widths = [part.shape[1] * part.element_size() for part in like]
    pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in torch.split(joined_RB, widths, dim=1)]
    return [piece.view(part.dtype) for piece, part in zip(pieces, like, strict=True)]  # in place they may lie unaligned
