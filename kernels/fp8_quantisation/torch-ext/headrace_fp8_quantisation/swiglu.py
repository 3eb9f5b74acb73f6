"""SwiGLU and its gradient, fused with quantisation: what lies between the GEMMs of an expert is read and written once.

    hidden = silu(gate) * up * w          silu(g) = g * sigmoid(g)
    dup = dhidden * w * silu(gate)        dgate = dhidden * w * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dw = sum over F of dhidden * silu(gate) * up

The routing weight w of a row is applied here, on the narrow side of the expert, so that combining is a plain sum.
`hidden` never reaches memory in BF16: the backward pass makes it again from gate and up (DeepSeek-V3 report, section
3.2.3, "recomputation of RMSNorm and MLA up-projection" and 3.3.3, "low-precision activation").
All is FP32 between the load and the code. Gradients leave as rows (for the input gradient) and, transposed, as columns
(for the weight gradient).

Shapes: S rows sorted by expert, F width of the intermediate activations.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import load_square, store_columns, store_rows
from .storage import check_matrix, empty_codes, empty_scales, tiles
from .tile import quantise_rows_of

BLOCK_ROWS = 32
FORWARD_WARPS = 4
BACKWARD_WARPS = 16


class SwigluGradients(NamedTuple):
    """Quantised gradients: rows [S, F] with scales [S, F/128], columns [F, S] with power-of-two scales [F, S/128]."""

    dgate: Tensor
    dgate_scales: Tensor
    dgate_t: Tensor
    dgate_t_scales: Tensor
    dup: Tensor
    dup_scales: Tensor
    dup_t: Tensor
    dup_t_scales: Tensor
    dweights: Tensor | None  # FP32 [S]


@triton.jit
def forward_kernel(
    gate,
    up,
    weights,
    codes,
    scales,
    S,
    F,
    gate_stride,
    up_stride,
    scales_stride,
    BLOCK_ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: BLOCK_ROWS tiles of 1x128, under each other. Grid: (F / 128, S / BLOCK_ROWS)."""
    column_block, first_row = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    rows, columns = tl.arange(0, BLOCK_ROWS), column_block * 128 + tl.arange(0, 128)
    inside_rows = rows < S - tl.program_id(1) * BLOCK_ROWS
    inside = inside_rows[:, None] & (columns < F)[None, :]
    gate_at = first_row * gate_stride + (rows[:, None] * gate_stride + columns[None, :])
    up_at = first_row * up_stride + (rows[:, None] * up_stride + columns[None, :])
    g = tl.load(gate + gate_at, mask=inside, other=0.0).to(tl.float32)
    hidden = g * tl.sigmoid(g) * tl.load(up + up_at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        hidden *= tl.load(weights + first_row + rows, mask=inside_rows, other=0.0)[:, None]
    row_codes, row_scales = quantise_rows_of(hidden, POWER_OF_TWO)
    tl.store(codes + first_row * F + (rows[:, None] * F + columns[None, :]), row_codes, mask=inside)
    tl.store(scales + column_block.to(tl.int64) * scales_stride + first_row + rows, row_scales, mask=inside_rows)


@triton.jit
def backward_kernel(
    dhidden,
    gate,
    up,
    weights,
    dgate,
    dgate_scales,
    dgate_t,
    dgate_t_scales,
    dup,
    dup_scales,
    dup_t,
    dup_t_scales,
    dweights,
    S,
    F,
    dhidden_stride,
    gate_stride,
    up_stride,
    scales_stride,
    scales_t_stride,
    WEIGHTED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: a square of 128 x 128 of one gradient. Grid: (2, F / 128, S / 128).

    The pair of programs that share a square run at the same time, and the second to load it finds it in the cache.
    One program for both would hold more than registers can.
    """
    column_block, row_block = tl.program_id(1), tl.program_id(2)
    first_row, rows = row_block.to(tl.int64) * 128, tl.arange(0, 128)
    inside_rows = rows < S - row_block * 128
    gradient = load_square(dhidden, S, F, dhidden_stride, column_block, row_block)
    routing = 1.0
    if WEIGHTED:
        routing = tl.load(weights + first_row + rows, mask=inside_rows, other=0.0)[:, None]
    if tl.program_id(0) == 0:
        g = load_square(gate, S, F, gate_stride, column_block, row_block)
        gradient *= g * tl.sigmoid(g) * routing
        store_rows(gradient, dup, dup_scales, S, F, scales_stride, column_block, row_block, POWER_OF_TWO)
        store_columns(gradient, dup_t, dup_t_scales, S, F, scales_t_stride, column_block, row_block, True)
    else:
        gradient *= load_square(up, S, F, up_stride, column_block, row_block)
        g = load_square(gate, S, F, gate_stride, column_block, row_block)
        sigmoid = tl.sigmoid(g)
        if WEIGHTED:
            part = tl.sum(gradient * (g * sigmoid), 1)
            tl.store(dweights + column_block.to(tl.int64) * S + first_row + rows, part, mask=inside_rows)
        gradient *= sigmoid * (1.0 + g * (1.0 - sigmoid)) * routing
        store_rows(gradient, dgate, dgate_scales, S, F, scales_stride, column_block, row_block, POWER_OF_TWO)
        store_columns(gradient, dgate_t, dgate_t_scales, S, F, scales_t_stride, column_block, row_block, True)


def swiglu_quantise(
    gate: Tensor, up: Tensor, weights: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up * weights in 1x128 tiles: codes E4M3 [S, F], scales FP32 [S, ceil(F/128)], MN-major.

    gate and up [S, F] in BF16 or FP32 (rows contiguous; halves of one tensor are welcome); weights FP32 [S], or None
    for 1. Raises ValueError where shapes or dtypes do not fit.
    """
    _check(gate, up, weights)
    S, F = gate.shape
    codes, scales = empty_codes(gate, S, F), empty_scales(gate, S, tiles(F))
    if gate.numel():
        strides = gate.stride(0), up.stride(0), scales.stride(1)
        choices = BLOCK_ROWS, weights is not None, power_of_two
        with torch.cuda.device_of(gate):
            forward_kernel[(tiles(F), triton.cdiv(S, BLOCK_ROWS))](
                gate, up, weights, codes, scales, S, F, *strides, *choices, num_warps=FORWARD_WARPS
            )
    return codes, scales


def swiglu_backward_quantise(
    dhidden: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None = None, power_of_two: bool = False
) -> SwigluGradients:
    """Gradients of gate and up in 1x128 tiles and, transposed, in 128x1 tiles, and that of the routing weights.

    dhidden, gate and up [S, F] in BF16 or FP32; weights FP32 [S], or None for 1 (then dweights is None).
    `power_of_two` speaks of the rows. dweights is summed in a fixed order. Raises ValueError like `swiglu_quantise`.
    """
    _check(gate, up, weights)
    check_matrix(dhidden, "dhidden", like=gate)
    S, F = gate.shape
    gradients = [
        (
            empty_codes(gate, S, F),
            empty_scales(gate, S, tiles(F)),
            empty_codes(gate, F, S),
            empty_scales(gate, F, tiles(S)),
        )
        for _ in ("dgate", "dup")
    ]
    parts = None if weights is None else weights.new_empty(tiles(F), S)
    if gate.numel():
        scales, scales_t = gradients[0][1], gradients[0][3]
        strides = dhidden.stride(0), gate.stride(0), up.stride(0), scales.stride(1), scales_t.stride(1)
        outputs = *gradients[0], *gradients[1], parts
        with torch.cuda.device_of(gate):
            backward_kernel[(2, tiles(F), tiles(S))](
                dhidden, gate, up, weights, *outputs, S, F, *strides, weights is not None, power_of_two,
                num_warps=BACKWARD_WARPS,
            )  # fmt: skip
    return SwigluGradients(*gradients[0], *gradients[1], None if parts is None else parts.sum(0))


def _check(gate: Tensor, up: Tensor, weights: Tensor | None) -> None:
    check_matrix(gate, "gate")
    check_matrix(up, "up", like=gate)
    if weights is None:
        return
    if weights.shape != gate.shape[:1] or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise ValueError(f"weights are {weights.dtype} {tuple(weights.shape)}: give contiguous FP32 [{gate.shape[0]}]")
