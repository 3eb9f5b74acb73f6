"""The FP8 weight gradient of all experts in one launch, in portable Triton.

dW[e] = dy_e^T x_e contracts over the rows of expert e. Along them both operands have a scale for every 128 elements, so
both were quantised again to 128x1 tiles (DeepSeek-V3 report, sections 3.3 and 3.5.2, arXiv 2412.19437) and stored
transposed, rows last, as the tensor core wants FP8. A block of 128 rows never belongs to two experts. The result is
FP32 and can be added to the gradient that is already there, as microbatches ask for.

Against `dense` the promotion costs a multiplication more for every element, of the two scales. It does not need the
product and is issued while the tensor core works.

Legend: O and I outputs and inputs of the weight, S rows sorted by expert, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .operands import BLOCK, blocks, check_k_grouped
from .tiles import BAND, OPTIONS, rows_inside, tile_of_program


@triton.jit
def weight_gradient_kernel(
    left_ptr,
    left_scales_ptr,
    right_ptr,
    right_scales_ptr,
    offsets_ptr,
    out_ptr,
    O,  # noqa: E741
    I,  # noqa: E741
    S,
    left_scales_stride_o,
    left_scales_stride_s,
    right_scales_stride_i,
    right_scales_stride_s,
    ACCUMULATE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BAND: tl.constexpr,
):
    """One 128x128 tile of one expert's dW = left right^T, contracted over the expert's rows; both 128x1-scaled."""
    tile_o, tile_i = tile_of_program(tl.program_id(0), tl.cdiv(O, BLOCK), tl.cdiv(I, BLOCK), BAND)
    expert = tl.program_id(1)
    # Told that the first row is a multiple of 128, the compiler can copy 16 bytes at a time, asynchronously.
    # Untold it loads bytes through registers, and spills.
    start = tl.multiple_of(tl.load(offsets_ptr + expert), BLOCK)
    blocks_s = (tl.load(offsets_ptr + expert + 1) - start) // BLOCK

    left_ptr += tile_o.to(tl.int64) * BLOCK * S + start
    right_ptr += tile_i.to(tl.int64) * BLOCK * S + start
    left_scales_ptr += (start // BLOCK).to(tl.int64) * left_scales_stride_s
    right_scales_ptr += (start // BLOCK).to(tl.int64) * right_scales_stride_s
    s = tl.arange(0, BLOCK)
    left_tile = rows_inside(tile_o, O, BLOCK)[:, None] * S + s[None, :]
    right_tile = rows_inside(tile_i, I, BLOCK)[None, :] * S + s[:, None]
    rows = tile_o * BLOCK + tl.arange(0, BLOCK)
    columns = tile_i * BLOCK + tl.arange(0, BLOCK)
    left_scales = rows * left_scales_stride_o
    right_scales = columns * right_scales_stride_i

    gradient = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(blocks_s):
        product = tl.dot(tl.load(left_ptr + left_tile), tl.load(right_ptr + right_tile))
        # A thread needs the scales of 32 columns. Masks, unlike repeated rows, keep them adjacent: 16 loads of two.
        if EVEN:
            row_scales = tl.load(left_scales_ptr + left_scales)
            column_scales = tl.load(right_scales_ptr + right_scales)
        else:
            row_scales = tl.load(left_scales_ptr + left_scales, mask=rows < O, other=0.0)
            column_scales = tl.load(right_scales_ptr + right_scales, mask=columns < I, other=0.0)
        gradient += product * (row_scales[:, None] * column_scales[None, :])
        left_ptr += BLOCK
        right_ptr += BLOCK
        left_scales_ptr += left_scales_stride_s
        right_scales_ptr += right_scales_stride_s

    out_tile = out_ptr + (expert.to(tl.int64) * O + rows[:, None]) * I + columns[None, :]
    inside = (rows[:, None] < O) & (columns[None, :] < I)
    if ACCUMULATE:
        gradient += tl.load(out_tile, mask=inside, other=0.0)
    tl.store(out_tile, gradient, mask=inside)


def k_grouped(
    left_t: torch.Tensor,
    left_scales: torch.Tensor,
    right_t: torch.Tensor,
    right_scales: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
) -> torch.Tensor:
    """The weight gradient of every expert: left_t [O, S] times right_t [I, S], contracted over the rows of the expert.

    Both are E4M3 with one scale for 128 consecutive rows of a channel, [O, S/128] and [I, S/128]. Expert e owns the
    rows offsets[e] to offsets[e + 1]; offsets is int32 [E + 1], every entry a multiple of 128, rows from offsets[E] on
    belong to nobody. Writes out [E, O, I] in FP32 or, with ``accumulate``, adds to it; an expert without rows gets
    zeros or keeps what it has. Returns out. Raises ValueError where an operand has the wrong shape, dtype or layout.
    """
    check_k_grouped(left_t, left_scales, right_t, right_scales, offsets, out)
    E, O, I = out.shape  # noqa: E741
    weight_gradient_kernel[(blocks(O) * blocks(I), E)](
        left_t,
        left_scales,
        right_t,
        right_scales,
        offsets,
        out,
        O,
        I,
        left_t.shape[1],
        left_scales.stride(0),
        left_scales.stride(1),
        right_scales.stride(0),
        right_scales.stride(1),
        ACCUMULATE=accumulate,
        EVEN=O % BLOCK == 0 and I % BLOCK == 0,
        BLOCK=BLOCK,
        BAND=BAND,
        **OPTIONS,
    )
    return out
