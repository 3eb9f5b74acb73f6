"""Bringing tokens to their experts and the results back.

A dispatcher turns N tokens, each with K chosen experts, into rows sorted by expert, and afterwards sums each token's K
rows. `LocalDispatcher` is for one process that holds all experts; expert parallelism hands in another one with the same
two methods. Routing weights travel with the rows and are applied inside the experts, so combining is a plain sum, as in
the report's own kernels. The backward of dispatch is a combine, and the backward of combine is a dispatch.

In BF16 each expert's rows are filled up to a multiple of `_BF16_ROWS` with rows of weight 0, which add nothing to
results or gradients: a BF16 GEMM on the CPU is compiled for each new shape, which takes longer than running it, and
token counts would be a new shape every time (5x slower, measured; FP32 is indifferent).
Shapes: N tokens, K experts per
token, S rows received, D model width, E experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headrace.model.router import Routing

_BF16_ROWS = 32


@dataclass(frozen=True)
class Dispatched:
    """Rows as the experts of this process receive them, and what combining needs to know."""

    rows_SD: Tensor
    weights_S: Tensor  # FP32 routing weight of every row, 0 for rows that only fill up
    counts: list[int]  # rows of each local expert, filling included, in the order of the rows
    token_of_row_S: Tensor  # int64; any token for rows that only fill up
    rows_of_token_NK: Tensor  # int64


class Dispatcher(Protocol):
    """What a mixture-of-experts layer asks of a dispatcher."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched:
        """Send each token to its experts."""
        ...

    def combine(self, rows_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's rows, [N, D]."""
        ...


class LocalDispatcher:
    """All experts in this process: a permutation."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched:
        """Sort the N * K (token, expert) pairs by expert, tokens in order within an expert."""
        chosen = routing.experts_NK.shape[1]
        multiple = _BF16_ROWS if x_ND.dtype == torch.bfloat16 else 1
        filled_E = (routing.counts_E + multiple - 1) // multiple * multiple
        shift_E = (filled_E - routing.counts_E).cumsum(0) - (filled_E - routing.counts_E)
        expert_of_pair = routing.experts_NK.flatten()
        order = torch.argsort(expert_of_pair, stable=True)
        rows = torch.arange(order.numel(), device=order.device) + shift_E[expert_of_pair[order]]
        counts = filled_E.tolist()
        token_of_row_S = order.new_zeros(sum(counts)).index_copy_(0, rows, order // chosen)
        rows_of_token_NK = torch.empty_like(order).index_copy_(0, order, rows).view(-1, chosen)
        pair_weights = routing.weights_NK.flatten()
        weights_S = pair_weights.new_zeros(sum(counts)).index_put((rows_of_token_NK.flatten(),), pair_weights)
        rows_SD: Tensor = _ToRows.apply(x_ND, token_of_row_S, rows_of_token_NK)  # type: ignore[no-untyped-call]
        return Dispatched(rows_SD, weights_S, counts, token_of_row_S, rows_of_token_NK)

    def combine(self, rows_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's rows, [N, D]."""
        result: Tensor = _ToTokens.apply(rows_SD, dispatched.token_of_row_S, dispatched.rows_of_token_NK)  # type: ignore[no-untyped-call]
        return result


def _sum_rows(rows_SD: Tensor, rows_of_token_NK: Tensor) -> Tensor:
    # Gathers and sums in one pass, in FP32 also for BF16 rows, without the [N, K, D] in between.
    return torch.nn.functional.embedding_bag(rows_of_token_NK, rows_SD, mode="sum")


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_of_row_S: Tensor, rows_of_token_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_token_NK)
        return x_ND.index_select(0, token_of_row_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_SD: Tensor) -> tuple[Tensor, None, None]:
        return _sum_rows(drows_SD.contiguous(), *ctx.saved_tensors), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, token_of_row_S: Tensor, rows_of_token_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row_S)
        return _sum_rows(rows_SD, rows_of_token_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        return dy_ND.index_select(0, *ctx.saved_tensors), None, None
