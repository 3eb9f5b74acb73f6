"""Dispatch through DeepEP, whose kernels use NVLink inside nodes and RDMA between them: on GPUs only.

DeepEP's `Buffer` (the interface of its version 1, which version 2 keeps beside its own) takes a token once to every
rank that has one of its experts, across nodes by way of the rank with the same place there. It sums what comes back
over the ranks of a node, then over nodes, in ascending order, in FP32 and rounded to BF16 each time. Those are the hops
of `dispatch.py` for nodes of 8 ranks, and for up to 8 ranks in one node. So both give the same bits:

    dispatch    copies rows without looking into them: here the bytes of `Gemms.pack`
    received    are tokens by home rank, then in their order; sorted by expert they are the rows of `dispatch.py`
    combine     gets the BF16 sum of each received token's rows
    backward    of combine is a dispatch on the way of the forward (its handle), of dispatch a combine

Its kernels run on a stream of their own, which waits for the caller's and makes it wait: to `channel.py` they are like
any other work. A dispatch makes the host wait for the number of tokens to come.

It has run against a stand-in with DeepEP's signatures, order and sums (tests/stand_ins), never on GPUs.
Shapes: as in `dispatch.py`.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed

from headrace.errors import UserError
from headrace.fp8.gemms import Gemms
from headrace.model.dispatch import Received, Way, copy_to_rows, pairs_of_rows, rows_of_pairs, sorted_by_expert
from headrace.model.router import Routing
from headrace.parallel.experts import Sums, experts_of

_COPIED = 32  # rows to copy are a multiple of so many bytes: two halves of 16
_SUMMED = 512  # and rows to sum, of 32 lanes of 16 bytes


def library() -> ModuleType:
    """`deep_ep`. Raises `UserError` where it is missing or does not load, and where there is no GPU."""
    key = "parallel.dispatch=deepep"
    if find_spec("deep_ep") is None:
        raise UserError(f"{key}: the Python package deep_ep is not installed; use all_to_all")
    if not torch.cuda.is_available():
        raise UserError(f"{key}: runs on GPUs only, and torch sees none; use all_to_all")
    try:
        return import_module("deep_ep")
    except ImportError as error:
        raise UserError(f"{key}: the Python package deep_ep does not load ({error}); use all_to_all") from error


@dataclass(frozen=True)
class Journey:
    """The way of one microbatch: DeepEP's, then to rows of experts."""

    handle: Any
    way: Way  # of the T tokens received
    sums: Sums


class DeepEpDispatcher:
    """`Dispatcher` over the ranks of `group`, this one at `place`; `gemms` are those of the experts.

    Every method is a collective of the group, as those of `ExpertParallelDispatcher` are. Raises `UserError` for a
    compute dtype other than BF16, which is all that DeepEP sums, and for a number of ranks that it has no settings for.
    """

    def __init__(self, deep_ep: ModuleType, gemms: Gemms, group: distributed.ProcessGroup, place: int) -> None:
        self._gemms, self._group, self._ranks, self._place = gemms, group, group.size(), place
        if gemms.dtype != torch.bfloat16:
            raise UserError("parallel.dispatch=deepep sums in BF16 only; use precision.compute=bf16 or all_to_all")
        self._make = deep_ep.Buffer
        try:
            self._settings = self._make.get_dispatch_config(self._ranks), self._make.get_combine_config(self._ranks)
        except AssertionError as error:
            raise UserError(
                f"parallel.dispatch=deepep: DeepEP {deep_ep.__version__} has no settings for "
                f"parallel.expert={self._ranks}; change it or use all_to_all"
            ) from error
        self.backend = f"deepep {deep_ep.__version__}"
        self._id = getattr(deep_ep, "topk_idx_t", torch.int64)  # which older ones do not name
        self._buffer: Any = None

    def local_experts(self, experts: int) -> range:
        """The block of this rank. Raises `UserError` where the ranks cannot share evenly."""
        return experts_of(self._place, self._ranks, experts)

    @torch.no_grad()
    def send(self, x_ND: Tensor, routing: Routing) -> Received:
        """Send each token to the ranks of its experts."""
        packed_NB = self._gemms.pack(self._gemms.rows(x_ND, "dispatched"))
        rows = _filled(packed_NB, _COPIED)
        self._open(max(2 * rows.shape[1], -(-2 * x_ND.shape[1] // _SUMMED) * _SUMMED))
        ids_NK = routing.experts_NK.to(self._id).contiguous()
        layout = self._buffer.get_dispatch_layout(ids_NK, routing.counts_E.numel())
        per_rank, per_node, per_expert, reached, _ = layout
        arrived, local_TK, weights_TK, counts, handle, _ = self._buffer.dispatch(
            rows,
            topk_idx=ids_NK,
            topk_weights=routing.weights_NK.detach().contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=reached,
        )
        counts_E = torch.tensor(counts, device=local_TK.device)
        way, filled = sorted_by_expert(local_TK.long(), counts_E, self._gemms.row_multiple)
        operand = self._gemms.take(self._gemms.unpack(_bytes(arrived, packed_NB.shape[1])), way.token_of_row_S)
        journey = Journey(handle, way, Sums.of(way.rows_of_token_NK))
        return Received(operand, rows_of_pairs(weights_TK, way), filled, journey)

    @torch.no_grad()
    def collect(self, rows_SD: Tensor, received: Received) -> Tensor:
        """Sum each token's rows on its way home, [N, D]."""
        journey: Journey = received.way
        values, _, _ = self._buffer.combine(_filled(journey.sums(rows_SD), _SUMMED), journey.handle)
        return _cut(values, rows_SD)

    @torch.no_grad()
    def send_gradient(self, dy_ND: Tensor, received: Received) -> Tensor:
        """[S, D], on the way that the tokens took; 0 in rows that only fill up."""
        journey: Journey = received.way
        packed_NB = self._gemms.pack_gradient(dy_ND)
        arrived, *_ = self._buffer.dispatch(_filled(packed_NB, _COPIED), handle=journey.handle)
        return copy_to_rows(self._gemms.unpack_gradient(_bytes(arrived, packed_NB.shape[1])), journey.way)

    @torch.no_grad()
    def collect_gradient(self, drows_SD: Tensor, dweights_S: Tensor, received: Received) -> tuple[Tensor, Tensor]:
        """[N, D], summed as in `collect`, and [N, K], each from the one rank that has the expert."""
        journey: Journey = received.way
        values, dweights_NK, _ = self._buffer.combine(
            _filled(journey.sums(drows_SD), _SUMMED),
            journey.handle,
            topk_weights=pairs_of_rows(dweights_S, journey.way),
        )
        return _cut(values, drows_SD), dweights_NK

    def _open(self, row_bytes: int) -> None:
        """DeepEP's buffers, once the width of rows is known; a collective."""
        if self._buffer is None:
            nvlink = max(each.get_nvl_buffer_size_hint(row_bytes, self._ranks) for each in self._settings)
            rdma = max(each.get_rdma_buffer_size_hint(row_bytes, self._ranks) for each in self._settings)
            self._buffer = self._make(self._group, nvlink, rdma)


def _filled(rows: Tensor, multiple: int) -> Tensor:
    """The bytes of rows as BF16, with zeros up to a multiple of `multiple` bytes."""
    rows_RB = rows.contiguous().view(torch.uint8)
    if short := -rows_RB.shape[1] % multiple:
        rows_RB = torch.nn.functional.pad(rows_RB, (0, short))
    return rows_RB.view(torch.bfloat16)


def _bytes(rows: Tensor, width: int) -> Tensor:
    """The first `width` bytes of each row."""
    return rows.view(torch.uint8)[:, :width].contiguous()


def _cut(rows: Tensor, like_SD: Tensor) -> Tensor:
    return rows[:, : like_SD.shape[1]].contiguous()
