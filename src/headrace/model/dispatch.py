"""Bringing tokens to their experts and the results back.

A dispatcher turns N tokens, each with K chosen experts, into rows sorted by expert, and afterwards sums each token's K
rows. Routing weights travel with the rows and are applied inside the experts, so collecting is a plain sum, as in the
report's own kernels. `LocalDispatcher` is for one process that holds all experts; expert parallelism hands in another
one with the same methods.

    send               tokens to rows                        forward
    collect            rows to sums per token                forward
    send_gradient      gradient of the sums to rows          backward of collect
    collect_gradient   gradient of rows to tokens            backward of send

None of them is differentiated, so that a pipeline can run them beside computation, in any thread; `as_rows` and
`as_tokens` tie them into autograd for whoever wants a layer in one piece.

Tokens are brought into the form that the experts' GEMMs want (`Gemms.rows`) before they are sent, each once: in FP8
that is half the bytes on the way (report, section 3.3.2). Gradients on their way to experts (`Gemms.pack_gradient`)
are in FP8 too; sums, and gradients on their way back, travel in the compute dtype (section 3.3.3).

Each expert's rows are filled up to a multiple of `Gemms.row_multiple` with rows of weight 0, which add nothing to
results or gradients: tiles of 128 rows must not mix experts, and in BF16 every new shape costs time.
Shapes: N tokens, K experts per token, S rows received, D model width, E experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headrace.fp8.gemms import Gemms
from headrace.model.router import Routing


@dataclass(frozen=True)
class Received:
    """Rows as the experts of this process receive them, and what the way back needs."""

    operand: Any  # of the experts' GEMMs (`Gemms.rows`)
    weights_S: Tensor  # FP32 routing weight of every row, 0 for rows that only fill up
    counts: list[int]  # rows of each local expert, filling included, in the order of the rows
    way: Any  # the dispatcher's own

    @property
    def rows(self) -> int:
        """S."""
        return sum(self.counts)


class Dispatcher(Protocol):
    """What a mixture-of-experts layer asks of a dispatcher."""

    backend: str  # what tokens travel by, with its version where it has one: recorded with what was trained

    def local_experts(self, experts: int) -> range:
        """Which of a layer's experts this process holds."""
        ...

    def send(self, x_ND: Tensor, routing: Routing) -> Received:
        """Send each token to its experts."""
        ...

    def collect(self, rows_SD: Tensor, received: Received) -> Tensor:
        """Sum each token's rows, [N, D]."""
        ...

    def send_gradient(self, dy_ND: Tensor, received: Received) -> Tensor:
        """The gradient of every row, [S, D]; 0 in rows that only fill up."""
        ...

    def collect_gradient(self, drows_SD: Tensor, dweights_S: Tensor, received: Received) -> tuple[Tensor, Tensor]:
        """The gradients of tokens [N, D] and of their routing weights [N, K]."""
        ...


@dataclass(frozen=True)
class Way:
    """Of the local dispatcher: which token a row came from, -1 where it only fills up, and which rows a token has."""

    token_of_row_S: Tensor
    rows_of_token_NK: Tensor


class LocalDispatcher:
    """All experts in this process: a permutation. `gemms` are those of the experts."""

    backend = "local"

    def __init__(self, gemms: Gemms) -> None:
        self._gemms = gemms

    def local_experts(self, experts: int) -> range:
        """All of them."""
        return range(experts)

    @torch.no_grad()
    def send(self, x_ND: Tensor, routing: Routing) -> Received:
        """Sort the N * K (token, expert) pairs by expert, tokens in order within an expert."""
        way, counts = sorted_by_expert(routing.experts_NK, routing.counts_E, self._gemms.row_multiple)
        weights_S = rows_of_pairs(routing.weights_NK, way)
        operand = self._gemms.take(self._gemms.rows(x_ND, "dispatched"), way.token_of_row_S)
        return Received(operand, weights_S, counts, way)

    @torch.no_grad()
    def collect(self, rows_SD: Tensor, received: Received) -> Tensor:
        """Sum each token's rows, [N, D]."""
        return sum_rows(rows_SD, received.way)

    @torch.no_grad()
    def send_gradient(self, dy_ND: Tensor, received: Received) -> Tensor:
        """[S, D]; 0 in rows that only fill up, which must not raise the scale of a tile of columns."""
        travelled_ND = self._gemms.unpack_gradient(self._gemms.pack_gradient(dy_ND))  # what another rank would get
        return copy_to_rows(travelled_ND, received.way)

    @torch.no_grad()
    def collect_gradient(self, drows_SD: Tensor, dweights_S: Tensor, received: Received) -> tuple[Tensor, Tensor]:
        """[N, D] and [N, K]."""
        return sum_rows(drows_SD.contiguous(), received.way), dweights_S[received.way.rows_of_token_NK]


def sorted_by_expert(experts_NK: Tensor, counts_E: Tensor, multiple: int) -> tuple[Way, list[int]]:
    """Where each (token, expert) pair goes, and the rows of each expert, filled up to a multiple of `multiple`.

    An expert index of -1 stands for no expert: such a pair has no row, and its entry of `rows_of_token_NK` is -1.
    """
    chosen = experts_NK.shape[1]
    filled_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = (filled_E - counts_E).cumsum(0) - (filled_E - counts_E)
    expert_of_pair = experts_NK.flatten()
    order = torch.argsort(expert_of_pair, stable=True)
    missing = order.numel() - int(counts_E.sum())  # pairs without an expert are sorted to the front
    order = order[missing:]
    rows = torch.arange(order.numel(), device=order.device) + shift_E[expert_of_pair[order]]
    counts = filled_E.tolist()
    token_of_row_S = order.new_full((sum(counts),), -1).index_copy_(0, rows, order // chosen)
    rows_of_token_NK = torch.full_like(expert_of_pair, -1).index_copy_(0, order, rows).view(-1, chosen)
    return Way(token_of_row_S, rows_of_token_NK), counts


def rows_of_pairs(values_NK: Tensor, way: Way) -> Tensor:
    """A number per (token, expert) pair as a number per row [S], 0 in rows that only fill up."""
    used = way.rows_of_token_NK >= 0
    values_S = values_NK.new_zeros(way.token_of_row_S.shape[0])
    return values_S.index_put_((way.rows_of_token_NK[used],), values_NK.detach()[used])


def pairs_of_rows(values_S: Tensor, way: Way) -> Tensor:
    """The inverse: a number per row as one per (token, expert) pair [N, K], 0 for pairs that have no row."""
    used = way.rows_of_token_NK >= 0
    values_NK = values_S.new_zeros(used.shape)
    values_NK[used] = values_S[way.rows_of_token_NK[used]]
    return values_NK


def sum_rows(rows_SD: Tensor, way: Way) -> Tensor:
    """Each token's rows summed, [N, D]: in FP32 also for BF16 rows, without the [N, K, D] in between."""
    return torch.nn.functional.embedding_bag(way.rows_of_token_NK, rows_SD, mode="sum")


def copy_to_rows(values_ND: Tensor, way: Way) -> Tensor:
    """Each row's token, [S, D]; 0 in rows that only fill up."""
    rows_SD = values_ND.index_select(0, way.token_of_row_S.clamp(min=0))
    rows_SD[way.token_of_row_S < 0] = 0
    return rows_SD


def carrier(like_ND: Tensor, rows: int) -> Tensor:
    """[rows, D] of zeros without memory of their own: only shape, dtype and gradient count."""
    return like_ND.new_zeros(()).expand(rows, like_ND.shape[1])


def as_rows(dispatcher: Dispatcher, received: Received, x_ND: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """`received` as a differentiable function of tokens and routing weights: rows [S, D] (a carrier), weights [S]."""
    result: tuple[Tensor, Tensor] = _Rows.apply(x_ND, weights_NK, dispatcher, received)  # type: ignore[no-untyped-call]
    return result


def as_tokens(dispatcher: Dispatcher, received: Received, rows_SD: Tensor) -> Tensor:
    """`Dispatcher.collect`, differentiable."""
    result: Tensor = _Tokens.apply(rows_SD, dispatcher, received)  # type: ignore[no-untyped-call]
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_NK: Tensor, dispatcher: Dispatcher, received: Received
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.received = dispatcher, received
        return carrier(x_ND, received.rows), received.weights_S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_SD: Tensor, dweights_S: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_ND, dweights_NK = ctx.dispatcher.collect_gradient(drows_SD, dweights_S, ctx.received)
        return dx_ND, dweights_NK, None, None


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, dispatcher: Dispatcher, received: Received) -> Tensor:
        ctx.dispatcher, ctx.received = dispatcher, received
        return dispatcher.collect(rows_SD, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dispatcher.send_gradient(dy_ND, ctx.received), None, None
