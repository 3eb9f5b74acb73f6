"""Grouped GEMMs: rows sorted by group, each group with its own weight.

`groups` says how the rows are divided: (group, first row, row after the last), empty groups left out. Results are
written into one output, and the weight gradient goes straight into its slice of the FP32 gradient. Indexing `W[e]`
under autograd instead would make a gradient of zeros as large as all experts for every expert, four times slower
overall (measured). One group holding every row is an ordinary GEMM, so dense layers use the same code.

Shapes: S rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from headrace.fp8.weight_gradients import WeightGradientStore, add_product

Group = tuple[int, int, int]


def groups_of(counts: Sequence[int]) -> list[Group]:
    """Rows per group, in order, to (group, start, end) of those that are not empty."""
    groups, start = [], 0
    for group, count in enumerate(counts):
        if count:
            groups.append((group, start, start + count))
        start += count
    return groups


def forward(x_SI: Tensor, weight_EOI: Tensor, groups: Sequence[Group]) -> Tensor:
    """y[s] = W[group of s] x[s], shape [S, O]."""
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])
    for group, start, end in groups:
        torch.mm(x_SI[start:end], weight_EOI[group].T, out=y_SO[start:end])
    return y_SO


def input_gradient(dy_SO: Tensor, weight_EOI: Tensor, groups: Sequence[Group], add_to: Tensor | None = None) -> Tensor:
    """dx[s] = W[group of s]^T dy[s], shape [S, I]; added to `add_to` in place where given."""
    dx_SI = dy_SO.new_empty(dy_SO.shape[0], weight_EOI.shape[2]) if add_to is None else add_to
    for group, start, end in groups:
        if add_to is None:
            torch.mm(dy_SO[start:end], weight_EOI[group], out=dx_SI[start:end])
        else:
            dx_SI[start:end].addmm_(dy_SO[start:end], weight_EOI[group])
    return dx_SI


def put_weight_gradient(
    store: WeightGradientStore, weight: Parameter, dy_SO: Tensor, x_SI: Tensor, groups: Sequence[Group]
) -> None:
    """Hand weight.grad[e] += dy_e^T x_e to the store; weight [E, O, I], or [O, I] for a single group."""

    def work() -> None:
        gradient, fresh = store.gradient(weight)
        gradient_EOI = gradient.view(-1, *weight.shape[-2:])
        if fresh:
            used = {group for group, _, _ in groups}
            for group in range(gradient_EOI.shape[0]):
                if group not in used:
                    gradient_EOI[group].zero_()
        for group, start, end in groups:
            add_product(gradient_EOI[group], fresh, dy_SO[start:end], x_SI[start:end])

    store.put(work)
