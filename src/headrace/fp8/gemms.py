"""The three GEMMs of a linear layer as one interface, and its plain implementation in FP32 or BF16.

    forward           y  = x W^T        rows of x        times the weight
    input gradient    dx = dy W         rows of dy       times the weight
    weight gradient   dW = dy^T x       columns of dy    times columns of x, contracted over rows

FP8 gives each operand another form (tiles run along the contraction, report section 3.3.2), and keeps inputs for the
backward pass in a third one. So layers never touch operands themselves: they ask a `Gemms` for them. Everything is
grouped: rows sorted by group, each group with its own weight; `groups` lists (group, first row, row after the last),
empty groups left out. One group that holds every row is an ordinary linear layer.

Results are written into one output, and the weight gradient goes straight into its slice of the FP32 gradient. Indexing
`W[e]` under autograd instead would make a gradient of zeros as large as all experts for every expert, four times slower
overall (measured).

Shapes: S rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headrace.fp8.products import add_mm, mm

Compute = Literal["fp32", "bf16", "fp64"]  # fp64 is for tests; no configuration offers it
Group = tuple[int, int, int]
Role = Literal["hidden", "latent", "attention", "dispatched", "swiglu"]
"""Where a linear layer's input comes from: a norm (`hidden`, or `latent` inside MLA), the attention core, the
dispatcher, or SwiGLU. Scales and caches may differ by role."""

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def dtype_of(compute: Compute) -> torch.dtype:
    """The torch dtype of activations under `compute`."""
    return _DTYPES[compute]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of arithmetic that is FP32 whatever the compute dtype: FP32, and FP64 where that is FP64."""
    return torch.promote_types(dtype, torch.float32)


def groups_of(counts: Sequence[int]) -> list[Group]:
    """Rows per group, in order, to (group, start, end) of those that are not empty."""
    groups, start = [], 0
    for group, count in enumerate(counts):
        if count:
            groups.append((group, start, start + count))
        start += count
    return groups


class Gemms(Protocol):
    """How linear layers multiply. Operands are opaque to the caller: what one method makes another one takes."""

    dtype: torch.dtype  # of activations
    row_multiple: int  # every group's rows are filled up to a multiple of this

    def weight(self, master: Tensor, old: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Operand of the FP32 weight [O, I] or [E, O, I], for forward and input gradient; `old` may be overwritten."""
        ...

    def rows(self, x_SI: Tensor, role: Role) -> Any:
        """Operand of a forward GEMM."""
        ...

    def take(self, rows: Any, index_S: Tensor) -> Any:
        """Rows of an operand in another order; index -1 stands for a row of zeros."""
        ...

    def pack(self, rows: Any) -> Tensor:
        """An operand of `dispatched` rows as bytes [S, B] (uint8), each row by itself, to be sent to another rank.

        Raises `UserError` where a row's operand depends on other rows.
        """
        ...

    def unpack(self, packed_SB: Tensor) -> Any:
        """The operand that was packed, to the bit; rows may have been taken in another order or from other packs."""
        ...

    def pack_gradient(self, dy_SO: Tensor) -> Tensor:
        """Gradients of experts' outputs as bytes [S, B] (uint8), each row by itself, to be sent to experts."""
        ...

    def unpack_gradient(self, packed_SB: Tensor) -> Tensor:
        """The gradients that were packed, in the compute dtype; in FP8 rounded once."""
        ...

    def keep(self, x_SI: Tensor, rows: Any, role: Role) -> tuple[Tensor, ...]:
        """What the backward pass keeps of an input for `columns`."""
        ...

    def columns(self, kept: tuple[Tensor, ...], role: Role) -> Any:
        """Operand of a weight gradient, from what was kept."""
        ...

    def gradient(self, dy_SO: Tensor, role: Role) -> tuple[Any, Any]:
        """Operands of an output gradient: rows for the input gradient, columns for the weight gradient.

        `role` is that of the layer's input.
        """
        ...

    def keep_elementwise(self, x_SI: Tensor) -> tuple[Tensor, ...]:
        """What is kept of an input of SwiGLU; `restore_elementwise` gives it back."""
        ...

    def restore_elementwise(self, kept: tuple[Tensor, ...]) -> Tensor:
        """[S, I] in the compute dtype."""
        ...

    def forward(self, rows: Any, weight: tuple[Tensor, ...], groups: Sequence[Group]) -> Tensor:
        """y[s] = W[group of s] x[s]: [S, O] in the compute dtype."""
        ...

    def input_gradient(
        self, rows: Any, weight: tuple[Tensor, ...], groups: Sequence[Group], add_to: Tensor | None = None
    ) -> Tensor:
        """dx[s] = W[group of s]^T dy[s]: [S, I]; added to `add_to` in place where given."""
        ...

    def weight_gradient(self, gradient_EOI: Tensor, fresh: bool, dy: Any, x: Any, groups: Sequence[Group]) -> None:
        """gradient[e] += dy_e^T x_e for every group listed, or = where `fresh`; FP32."""
        ...


class PlainGemms:
    """Every operand is the tensor itself in the compute dtype."""

    def __init__(self, compute: Compute) -> None:
        self.dtype = dtype_of(compute)
        # A BF16 GEMM on the CPU is compiled for each new shape, which takes longer than running it, and token counts
        # would be a new shape every time (5x slower, measured; FP32 is indifferent).
        self.row_multiple = 32 if compute == "bf16" else 1

    def weight(self, master: Tensor, old: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        if self.dtype == master.dtype:
            return (master,)
        return (master.to(self.dtype),) if old is None else (old[0].copy_(master),)

    def rows(self, x_SI: Tensor, role: Role) -> Tensor:
        return x_SI

    def take(self, rows: Tensor, index_S: Tensor) -> Tensor:
        return rows.index_select(0, index_S.clamp(min=0))  # rows that only fill up have weight 0: any will do

    def pack(self, rows: Tensor) -> Tensor:
        return rows.contiguous().view(torch.uint8)

    def unpack(self, packed_SB: Tensor) -> Tensor:
        return packed_SB.view(self.dtype)

    def pack_gradient(self, dy_SO: Tensor) -> Tensor:
        return self.pack(dy_SO)

    def unpack_gradient(self, packed_SB: Tensor) -> Tensor:
        return self.unpack(packed_SB)

    def keep(self, x_SI: Tensor, rows: Tensor, role: Role) -> tuple[Tensor, ...]:
        return (rows,)

    def columns(self, kept: tuple[Tensor, ...], role: Role) -> Tensor:
        return kept[0]

    def gradient(self, dy_SO: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        return dy_SO, dy_SO

    def keep_elementwise(self, x_SI: Tensor) -> tuple[Tensor, ...]:
        return (x_SI,)

    def restore_elementwise(self, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0]

    def forward(self, rows: Tensor, weight: tuple[Tensor, ...], groups: Sequence[Group]) -> Tensor:
        return multiply_rows(rows, stacked(weight[0]), groups)

    def input_gradient(
        self, rows: Tensor, weight: tuple[Tensor, ...], groups: Sequence[Group], add_to: Tensor | None = None
    ) -> Tensor:
        return multiply_rows(rows, stacked(weight[0]).transpose(1, 2), groups, add_to)

    def weight_gradient(
        self, gradient_EOI: Tensor, fresh: bool, dy: Tensor, x: Tensor, groups: Sequence[Group]
    ) -> None:
        for group, start, end in groups:
            add_product(gradient_EOI[group], fresh, dy[start:end], x[start:end])


def stacked(weight: Tensor) -> Tensor:
    """[E, O, I] of a weight [E, O, I] or [O, I]."""
    return weight if weight.dim() == 3 else weight[None]


def multiply_rows(x_SI: Tensor, weight_EOI: Tensor, groups: Sequence[Group], add_to: Tensor | None = None) -> Tensor:
    """x[s] W[group of s]^T, [S, O]; added to `add_to` in place where given. Rows of no group are undefined."""
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1]) if add_to is None else add_to
    for group, start, end in groups:
        if add_to is None:
            mm(x_SI[start:end], weight_EOI[group].T, out=y_SO[start:end])
        else:
            add_mm(y_SO[start:end], x_SI[start:end], weight_EOI[group].T)
    return y_SO


def add_product(gradient: Tensor, fresh: bool, left_SO: Tensor, right_SI: Tensor) -> None:
    """gradient [O, I] (FP32) += left^T right, or = where `fresh`; left and right in the compute dtype.

    BF16 products come out of the GEMM in FP32 on CUDA. The CPU has no such GEMM: there the product of one call is
    rounded to BF16 once, and the accumulation over calls is FP32.
    """
    if left_SO.dtype == gradient.dtype:
        if fresh:
            torch.mm(left_SO.T, right_SI, out=gradient)
        else:
            gradient.addmm_(left_SO.T, right_SI)
        return
    product = torch.mm(left_SO.T, right_SI, out_dtype=torch.float32) if left_SO.is_cuda else mm(left_SO.T, right_SI)
    if fresh:
        gradient.copy_(product)
    else:
        gradient.add_(product)
