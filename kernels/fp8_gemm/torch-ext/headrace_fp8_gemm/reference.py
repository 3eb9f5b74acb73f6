"""The three products in naive PyTorch, on any device: the definition that the kernels are held to.

    dense      y[m, n]      = sum over blocks k:  a_scale[m, k] * b_scale[n // 128, k] * sum over 128 of a * b
    m_grouped  y[s, n]      = the same with the weight of the expert that owns row s
    k_grouped  dW[e][o, i]  = sum over blocks r of expert e:  left_scale[o, r] * right_scale[i, r] * sum over 128 rows

This is the scheme of the DeepSeek-V3 report, section 3.3 (arXiv 2412.19437): the inner sum belongs to the tensor core,
the outer one is promoted to FP32 registers. Products of two E4M3 numbers are exact in FP32, so what a kernel may do
differently is the order of the sums, and on Hopper the width of the inner one (about 14 bits, which is not modelled
here). Not written for speed: it visits every block in Python and decodes whole operands.

Legend: M rows, N outputs, K inputs (contraction), E experts, S rows sorted by expert, O and I outputs and inputs of a
weight. ``sums=torch.float64`` makes both sums practically exact.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .operands import BLOCK, blocks, check_dense, check_k_grouped, check_m_grouped, check_out_dtype


def dense(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    sums: torch.dtype = torch.float32,
) -> torch.Tensor:
    """a [M, K] E4M3 with scales [M, ceil(K/128)] times b [N, K] E4M3 with scales [ceil(N/128), ceil(K/128)]: [M, N].

    Raises ValueError where an operand has the wrong shape, dtype or layout.
    """
    check_dense(a, a_scales, b, b_scales)
    check_out_dtype(out_dtype)
    y_MN = _promoted(a, a_scales, b, _rows_of_tiles(b_scales, b.shape[0]), sums)
    return y_MN.to(torch.float32).to(out_dtype)


def m_grouped(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    sums: torch.dtype = torch.float32,
) -> torch.Tensor:
    """a [S, K] E4M3, of which 128 rows at a time belong to expert group_of_block[s // 128], times b [E, N, K]: [S, N].

    group_of_block is int32 [S/128]; scales as in ``dense``, those of b [E, ceil(N/128), ceil(K/128)].
    Raises ValueError where an operand has the wrong shape, dtype or layout.
    """
    check_m_grouped(a, a_scales, b, b_scales, group_of_block)
    check_out_dtype(out_dtype)
    y_SN = torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype, device=a.device)
    for block, expert in enumerate(group_of_block.tolist()):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        y_SN[rows] = dense(a[rows], a_scales[rows], b[expert], b_scales[expert], out_dtype, sums)
    return y_SN


def k_grouped(
    left_t: torch.Tensor,
    left_scales: torch.Tensor,
    right_t: torch.Tensor,
    right_scales: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
    sums: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight gradient of every expert: left_t [O, S] times right_t [I, S], contracted over the rows of the expert.

    Both are E4M3 with one scale for 128 consecutive rows of a channel, [O, S/128] and [I, S/128]. Expert e owns the
    rows offsets[e] to offsets[e + 1]; offsets is int32 [E + 1], every entry a multiple of 128, rows from offsets[E] on
    belong to nobody. Writes out [E, O, I] in FP32 or, with ``accumulate``, adds to it; an expert without rows gets
    zeros or keeps what it has. Returns out. Raises ValueError where an operand has the wrong shape, dtype or layout.
    """
    check_k_grouped(left_t, left_scales, right_t, right_scales, offsets, out)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        rows, tiles = slice(start, end), slice(start // BLOCK, end // BLOCK)
        gradient_OI = _promoted(
            left_t[:, rows], left_scales[:, tiles], right_t[:, rows], right_scales[:, tiles], sums
        ).to(torch.float32)
        out[expert] = out[expert] + gradient_OI if accumulate else gradient_OI
    return out


def _promoted(
    a_MK: torch.Tensor, a_scales: torch.Tensor, b_NK: torch.Tensor, b_scales: torch.Tensor, sums: torch.dtype
) -> torch.Tensor:
    """a b^T where every row of both has a scale for each block of 128 columns; ``sums`` is the dtype of both sums."""
    y_MN = torch.zeros((a_MK.shape[0], b_NK.shape[0]), dtype=sums, device=a_MK.device)
    for block in range(blocks(a_MK.shape[1])):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        product_MN = a_MK[:, columns].to(sums) @ b_NK[:, columns].to(sums).T
        y_MN += a_scales[:, block, None].to(sums) * b_scales[None, :, block].to(sums) * product_MN
    return y_MN


def _rows_of_tiles(scales: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales of 128x128 tiles, one row for every row of the matrix: [ceil(N/128), .] to [N, .]."""
    return scales.repeat_interleave(BLOCK, dim=0)[:rows]
