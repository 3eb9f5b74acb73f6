"""FP8 matrix products with fine-grained scales, in portable Triton: `dense`, `m_grouped`, `k_grouped` (triton_wgrad).

The scheme is that of the DeepSeek-V3 report, section 3.3 (arXiv 2412.19437). An operand is E4M3 codes and one FP32
scale for every 128 elements of the contraction. The product of one block of 128 goes into a fresh accumulator of the
tensor core, is multiplied by the scales of the block and added to FP32 registers. This serves two ends: scales differ
from block to block and have to be applied before blocks are added, and Hopper's tensor core, which keeps about 14 bits
while it sums FP8 products, never sums more than 128 of them. `tl.dot(a, b, acc)` would do neither, and its
`max_num_imprecise_acc`, which promotes as often, knows no scales.

    dense       [M, K] x [N, K]     activations 1x128, weights 128x128; the input gradient takes the transposed weight
    m_grouped   [S, K] x [E, N, K]  the same for experts; the rows of an expert fill whole blocks of 128
    k_grouped   [O, S] x [I, S]     the weight gradient of every expert

This is the portable back end and the oracle of the Gluon one: plain pointers copied by cp.async, any M, N and K,
nothing shared with TMA and its tensor maps. It does not quantise (headrace_fp8_quantisation does) and does not choose a
back end.

Legend: M rows, N outputs, K inputs (contraction), E experts, S rows sorted by expert, O and I outputs and inputs of a
weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .operands import BLOCK, blocks, check_dense, check_m_grouped, check_out_dtype
from .tiles import BAND, OPTIONS, rows_inside, tile_of_program
from .triton_wgrad import k_grouped

__all__ = ["dense", "k_grouped", "m_grouped"]


@triton.jit
def rows_kernel(
    a_ptr,
    a_scales_ptr,
    b_ptr,
    b_scales_ptr,
    y_ptr,
    group_of_block_ptr,
    M,
    N,
    K,
    a_scales_stride_m,
    a_scales_stride_k,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BAND: tl.constexpr,
):
    """One 128x128 tile of y = a b^T: a 1x128-scaled, b 128x128-scaled; GROUPED takes b of the expert of these rows."""
    tiles_n = tl.cdiv(N, BLOCK)
    blocks_k = tl.cdiv(K, BLOCK)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(M, BLOCK), tiles_n, BAND)
    if GROUPED:
        expert = tl.load(group_of_block_ptr + tile_m).to(tl.int64)
        b_ptr += expert * N * K
        b_scales_ptr += expert * tiles_n * blocks_k

    a_ptr += tile_m.to(tl.int64) * BLOCK * K
    b_ptr += tile_n.to(tl.int64) * BLOCK * K
    b_scales_ptr += tile_n * blocks_k
    a_rows = rows_inside(tile_m, M, BLOCK)
    b_rows = rows_inside(tile_n, N, BLOCK)
    k = tl.arange(0, BLOCK)
    a_scale = tl.minimum(tile_m * BLOCK + k, M - 1) * a_scales_stride_m
    a_tile = a_rows[:, None] * K + k[None, :]
    b_tile = b_rows[None, :] * K + k[:, None]

    y = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for block in range(blocks_k):
        if EVEN_K:
            a = tl.load(a_ptr + a_tile)
            b = tl.load(b_ptr + b_tile)
        else:
            a = tl.load(a_ptr + a_tile, mask=k[None, :] < K - block * BLOCK, other=0.0)
            b = tl.load(b_ptr + b_tile, mask=k[:, None] < K - block * BLOCK, other=0.0)
        scale = tl.load(a_scales_ptr + a_scale) * tl.load(b_scales_ptr)
        y += tl.dot(a, b) * scale[:, None]
        a_ptr += BLOCK
        b_ptr += BLOCK
        a_scales_ptr += a_scales_stride_k
        b_scales_ptr += 1

    rows = tile_m * BLOCK + tl.arange(0, BLOCK)
    columns = tile_n * BLOCK + tl.arange(0, BLOCK)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


def dense(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [M, K] E4M3 with scales [M, ceil(K/128)] times b [N, K] E4M3 with scales [ceil(N/128), ceil(K/128)]: [M, N].

    The scales of a are fastest with stride 1 along M. Raises ValueError where an operand has the wrong shape or dtype.
    """
    check_dense(a, a_scales, b, b_scales)
    return _multiply_rows(a, a_scales, b, b_scales, None, out_dtype)


def m_grouped(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [S, K] E4M3, of which 128 rows at a time belong to expert group_of_block[s // 128], times b [E, N, K]: [S, N].

    group_of_block is int32 [S/128]; scales as in ``dense``, those of b [E, ceil(N/128), ceil(K/128)].
    Raises ValueError where an operand has the wrong shape or dtype.
    """
    check_m_grouped(a, a_scales, b, b_scales, group_of_block)
    return _multiply_rows(a, a_scales, b, b_scales, group_of_block, out_dtype)


def _multiply_rows(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_out_dtype(out_dtype)
    (M, K), N = a.shape, b.shape[-2]
    y_MN = torch.empty((M, N), dtype=out_dtype, device=a.device)
    rows_kernel[(blocks(M) * blocks(N),)](
        a,
        a_scales,
        b,
        b_scales.contiguous(),
        y_MN,
        group_of_block,
        M,
        N,
        K,
        a_scales.stride(0),
        a_scales.stride(1),
        GROUPED=group_of_block is not None,
        EVEN_K=K % BLOCK == 0,
        BLOCK=BLOCK,
        BAND=BAND,
        **OPTIONS,
    )
    return y_MN
