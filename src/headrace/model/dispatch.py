"""Bringing tokens to their experts and the results back.

A dispatcher turns N tokens, each with K chosen experts, into rows sorted by expert, and afterwards sums each token's K
rows. `LocalDispatcher` is for one process that holds all experts; expert parallelism hands in another one with the same
two methods. Routing weights travel with the rows and are applied inside the experts, so combining is a plain sum, as in
the report's own kernels. The backward of dispatch is a combine, and the backward of combine is a dispatch.

Tokens are brought into the form that the experts' GEMMs want (`Gemms.rows`) before they are sent, each once: in FP8
that is half the bytes on the way (report, section 3.3.2). `rows_SD` then only carries the gradient; its values are in
`operand`. The gradient comes back in the compute dtype.

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
class Dispatched:
    """Rows as the experts of this process receive them, and what combining needs to know."""

    rows_SD: Tensor  # without memory of its own: only its shape, dtype and gradient count
    operand: Any  # of the experts' GEMMs (`Gemms.rows`)
    weights_S: Tensor  # FP32 routing weight of every row, 0 for rows that only fill up
    counts: list[int]  # rows of each local expert, filling included, in the order of the rows
    token_of_row_S: Tensor  # int64; -1 for rows that only fill up
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
    """All experts in this process: a permutation. `gemms` are those of the experts."""

    def __init__(self, gemms: Gemms) -> None:
        self._gemms = gemms

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched:
        """Sort the N * K (token, expert) pairs by expert, tokens in order within an expert."""
        chosen = routing.experts_NK.shape[1]
        multiple = self._gemms.row_multiple
        filled_E = (routing.counts_E + multiple - 1) // multiple * multiple
        shift_E = (filled_E - routing.counts_E).cumsum(0) - (filled_E - routing.counts_E)
        expert_of_pair = routing.experts_NK.flatten()
        order = torch.argsort(expert_of_pair, stable=True)
        rows = torch.arange(order.numel(), device=order.device) + shift_E[expert_of_pair[order]]
        counts = filled_E.tolist()
        token_of_row_S = order.new_full((sum(counts),), -1).index_copy_(0, rows, order // chosen)
        rows_of_token_NK = torch.empty_like(order).index_copy_(0, order, rows).view(-1, chosen)
        pair_weights = routing.weights_NK.flatten()
        weights_S = pair_weights.new_zeros(sum(counts)).index_put((rows_of_token_NK.flatten(),), pair_weights)
        with torch.no_grad():
            operand = self._gemms.take(self._gemms.rows(x_ND, "dispatched"), token_of_row_S)
        rows_SD: Tensor = _ToRows.apply(x_ND, sum(counts), rows_of_token_NK)  # type: ignore[no-untyped-call]
        return Dispatched(rows_SD, operand, weights_S, counts, token_of_row_S, rows_of_token_NK)

    def combine(self, rows_SD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's rows, [N, D]."""
        result: Tensor = _ToTokens.apply(rows_SD, dispatched.token_of_row_S, dispatched.rows_of_token_NK)  # type: ignore[no-untyped-call]
        return result


def _sum_rows(rows_SD: Tensor, rows_of_token_NK: Tensor) -> Tensor:
    # Gathers and sums in one pass, in FP32 also for BF16 rows, without the [N, K, D] in between.
    return torch.nn.functional.embedding_bag(rows_of_token_NK, rows_SD, mode="sum")


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: int, rows_of_token_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_token_NK)
        return x_ND.new_zeros(()).expand(rows, x_ND.shape[1])

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
        (token_of_row_S,) = ctx.saved_tensors
        drows_SD = dy_ND.index_select(0, token_of_row_S.clamp(min=0))
        drows_SD[token_of_row_S < 0] = 0  # a row that only fills up must not raise the scale of a tile of columns
        return drows_SD, None, None
