"""Activations and gradients to 1x128 tiles along the contraction, and in the same pass to 128x1 tiles, transposed.

The forward pass and the input gradient contract along a row, the weight gradient along the tokens. A tensor that both
will read is loaded once and written twice: codes [M, K] with a scale per 1x128, and codes [K, M] with a scale per
128x1, the latter always a power of two (DeepSeek-V3 report, section 3.3.3).

Shapes: M rows (tokens), K columns (channels). Edges that are no multiples of 128 are smaller tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import check_matrix, empty_codes, empty_scales, tiles
from .tile import quantise_columns_of, quantise_rows_of

BLOCK_ROWS = 32
ROW_WARPS = 4
COLUMN_WARPS = 8
COLUMN_REGISTERS = 128  # so that two programs share a multiprocessor: one computes while the other waits


@triton.jit
def rows_kernel(x, codes, scales, M, K, x_stride, scales_stride, BLOCK_ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """One program: BLOCK_ROWS tiles of 1x128, under each other. Grid: (K / 128, M / BLOCK_ROWS)."""
    column_block, first_row = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    rows, columns = tl.arange(0, BLOCK_ROWS), column_block * 128 + tl.arange(0, 128)
    inside_rows = rows < M - tl.program_id(1) * BLOCK_ROWS
    inside = inside_rows[:, None] & (columns < K)[None, :]
    values = tl.load(x + first_row * x_stride + (rows[:, None] * x_stride + columns[None, :]), mask=inside, other=0.0)
    row_codes, row_scales = quantise_rows_of(values.to(tl.float32), POWER_OF_TWO)
    tl.store(codes + first_row * K + (rows[:, None] * K + columns[None, :]), row_codes, mask=inside)
    tl.store(scales + column_block.to(tl.int64) * scales_stride + first_row + rows, row_scales, mask=inside_rows)


@triton.jit
def rows_and_columns_kernel(
    x,
    codes,
    scales,
    codes_t,
    scales_t,
    M,
    K,
    x_stride,
    scales_stride,
    scales_t_stride,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: a square of 128 x 128: 128 tiles of 1x128 and as many of 128x1. Grid: (K / 128, M / 128)."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    values = load_square(x, M, K, x_stride, column_block, row_block)
    store_rows(values, codes, scales, M, K, scales_stride, column_block, row_block, POWER_OF_TWO)
    # again, from the cache: holding the values would cost registers, and with them occupancy
    values = load_square(x, M, K, x_stride, column_block, row_block)
    store_columns(values, codes_t, scales_t, M, K, scales_t_stride, column_block, row_block, True)


@triton.jit
def load_square(x, M, K, x_stride, column_block, row_block):
    """A square of 128 x 128 of x in FP32, zeros outside."""
    rows, columns = tl.arange(0, 128), column_block * 128 + tl.arange(0, 128)
    inside = (rows < M - row_block * 128)[:, None] & (columns < K)[None, :]
    at = x + row_block.to(tl.int64) * 128 * x_stride + (rows[:, None] * x_stride + columns[None, :])
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(values, codes, scales, M, K, scales_stride, column_block, row_block, POWER_OF_TWO: tl.constexpr):
    """Quantise a square of 128 x 128 by rows and store it."""
    first_row = row_block.to(tl.int64) * 128
    rows, columns = tl.arange(0, 128), column_block * 128 + tl.arange(0, 128)
    inside_rows = rows < M - row_block * 128
    row_codes, row_scales = quantise_rows_of(values, POWER_OF_TWO)
    at = codes + first_row * K + (rows[:, None] * K + columns[None, :])
    tl.store(at, row_codes, mask=inside_rows[:, None] & (columns < K)[None, :])
    tl.store(scales + column_block.to(tl.int64) * scales_stride + first_row + rows, row_scales, mask=inside_rows)


@triton.jit
def store_columns(
    values, codes_t, scales_t, M, K, scales_t_stride, column_block, row_block, POWER_OF_TWO: tl.constexpr
):
    """Quantise a square of 128 x 128 by columns and store it transposed."""
    first_column, first_row = column_block.to(tl.int64) * 128, row_block * 128
    rows, columns = first_row + tl.arange(0, 128), tl.arange(0, 128)
    inside_columns = columns < K - column_block * 128
    column_codes, column_scales = quantise_columns_of(values, POWER_OF_TWO)
    at = codes_t + first_column * M + (columns[:, None] * M + rows[None, :])
    tl.store(at, tl.trans(column_codes), mask=inside_columns[:, None] & (rows < M)[None, :])
    scales_at = scales_t + row_block.to(tl.int64) * scales_t_stride + first_column + columns
    tl.store(scales_at, column_scales, mask=inside_columns)


@triton.jit
def requantise_kernel(
    codes,
    scales,
    codes_t,
    scales_t,
    M,
    K,
    scales_row_stride,
    scales_block_stride,
    scales_t_stride,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: a square of 128 x 128 decoded, transposed and encoded again. Grid: (K / 128, M / 128)."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    values = load_square(codes, M, K, K, column_block, row_block)
    rows = tl.arange(0, 128)
    scale_at = (row_block.to(tl.int64) * 128 + rows) * scales_row_stride
    scale_at += column_block.to(tl.int64) * scales_block_stride
    values *= tl.load(scales + scale_at, mask=rows < M - row_block * 128, other=1.0)[:, None]
    store_columns(values, codes_t, scales_t, M, K, scales_t_stride, column_block, row_block, POWER_OF_TWO)


def quantise_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes E4M3 [M, K] and scales FP32 [M, ceil(K/128)], MN-major, of x [M, K], BF16 or FP32.

    Raises ValueError for anything but a matrix whose rows are contiguous.
    """
    check_matrix(x, "x")
    M, K = x.shape
    codes, scales = empty_codes(x, M, K), empty_scales(x, M, tiles(K))
    if x.numel():
        with torch.cuda.device_of(x):
            rows_kernel[(tiles(K), triton.cdiv(M, BLOCK_ROWS))](
                x, codes, scales, M, K, x.stride(0), scales.stride(1), BLOCK_ROWS, power_of_two, num_warps=ROW_WARPS
            )
    return codes, scales


def quantise_rows_and_columns(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantise_rows` gives, and codes E4M3 [K, M] with scales FP32 [K, ceil(M/128)], MN-major, of 128x1 tiles.

    `power_of_two` speaks of the rows; scales of columns are always powers of two. Raises ValueError like
    `quantise_rows`.
    """
    check_matrix(x, "x")
    M, K = x.shape
    codes, scales = empty_codes(x, M, K), empty_scales(x, M, tiles(K))
    codes_t, scales_t = empty_codes(x, K, M), empty_scales(x, K, tiles(M))
    if x.numel():
        strides = x.stride(0), scales.stride(1), scales_t.stride(1)
        with torch.cuda.device_of(x):
            rows_and_columns_kernel[(tiles(K), tiles(M))](
                x,
                codes,
                scales,
                codes_t,
                scales_t,
                M,
                K,
                *strides,
                power_of_two,
                num_warps=COLUMN_WARPS,
                maxnreg=COLUMN_REGISTERS,
            )
    return codes, scales, codes_t, scales_t


def requantise_columns(codes: Tensor, scales: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """From cached 1x128 tiles to 128x1 tiles: codes E4M3 [K, M], scales FP32 [K, ceil(M/128)], MN-major.

    From codes E4M3 [M, K], contiguous, and scales FP32 [M, ceil(K/128)] of any strides. Where both scales are powers of
    two only the codes that become subnormal lose anything. Raises ValueError where shapes or dtypes do not fit.
    """
    wanted = (codes.shape[0], tiles(codes.shape[-1]))
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2 or not codes.is_contiguous() or scales.shape != wanted:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)} with scales {tuple(scales.shape)}: "
            "give contiguous E4M3 codes [M, K] and scales [M, ceil(K/128)]"
        )
    M, K = codes.shape
    codes_t, scales_t = empty_codes(codes, K, M), empty_scales(codes, K, tiles(M))
    if codes.numel():
        strides = scales.stride(0), scales.stride(1), scales_t.stride(1)
        with torch.cuda.device_of(codes):
            requantise_kernel[(tiles(K), tiles(M))](
                codes,
                scales,
                codes_t,
                scales_t,
                M,
                K,
                *strides,
                power_of_two,
                num_warps=COLUMN_WARPS,
                maxnreg=COLUMN_REGISTERS,
            )
    return codes_t, scales_t
