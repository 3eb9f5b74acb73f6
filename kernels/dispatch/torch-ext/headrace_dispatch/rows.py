"""Moving tokens to their experts' rows and back, inside one GPU's memory.

    permute            rows of any dtype, copied to every expert that wants them
    permute_quantise   BF16 (or FP32) rows, quantised on the way: E4M3 codes, one power-of-two scale per 1x128 tile
    permute_quantised  codes and scales that were quantised before (what another GPU sent)
    combine            the sum of a token's rows

The backward of ``permute`` is ``combine`` and the other way round; those two are differentiable. DeepSeek-V3 sends
activations in FP8 with power-of-two scales and combines in BF16 (report, arXiv 2412.19437, section 3.3.3). Routing
weights are applied inside the experts, so that combining is a plain sum, in FP32 and in the order of the token's
experts: the result does not depend on scheduling.

One program reads a piece of a token once and writes it K times; a gather from the rows' side would read (and quantise)
it K times. The rows that only fill up are written by a second kernel: zeros, with the scale of an all-zero tile.

The numbers of a quantised tile x, with amax = max(max |x|, 448 * 2^-126): scale = 2^ceil(log2(amax / 448)), code =
E4M3 of x / scale, rounded to nearest even; a tile that holds NaN or Inf has scale NaN and codes 0x7F, to be seen.

Legend: N tokens, K experts per token, S rows sorted by expert, D columns, T = D / 128 tiles of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .layout import Layout

_TILE = 128
_TILES = 8  # tiles of one program: 1,024 columns, 8 values in each of 128 threads
_FILL_ROWS = 32
_SMALLEST_SCALE = 2.0**-126  # of an all-zero tile: the smallest normal FP32 number


def permute(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Copy rows of ``x`` [N, D] to [S, D], zeros where rows only fill up. Differentiable: its backward is a combine."""
    return _Permute.apply(check_rows("x", x, layout.rows_of_token.shape[0]), layout)


def combine(rows: torch.Tensor, layout: Layout, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum each token's rows of ``rows`` [S, D] to [N, D]: FP32, in the order of its experts, rounded once at the end.

    Tokens without a row here get zeros. Differentiable unless ``out`` takes the result: the backward is a permute.
    """
    check_rows("rows", rows, layout.token_of_row.shape[0])
    return _Combine.apply(rows, layout) if out is None else _combine(rows, layout, out)


def permute_quantise(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` [N, D] and send it to its rows: codes E4M3 [S, D], scales FP32 [S, T] stored MN-major.

    MN-major: stride (1, S), which is what the FP8 GEMM reads. D has to be a multiple of 128.
    """
    N, K = layout.rows_of_token.shape
    S, D = len(layout.token_of_row), x.shape[-1]
    check_rows("x", x, N)
    if D % _TILE or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it has to be floating-point with a multiple of 128 columns")
    codes = torch.empty((S, D), dtype=torch.float8_e4m3fn, device=x.device)
    scales = _mn_major(S, D // _TILE, x.device)
    if N and S:
        quantise_kernel[(N, triton.cdiv(D, _TILE * _TILES))](
            x, layout.rows_of_token, codes, scales, D, S, K=K, TILES=_TILES
        )
    return _fill(codes, layout, 0.0), _fill(scales, layout, _SMALLEST_SCALE)


def permute_quantised(codes: torch.Tensor, scales: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Send rows that are quantised already, codes [N, D] and scales FP32 [N, T] of any strides; returns as above."""
    N = layout.rows_of_token.shape[0]
    check_rows("codes", codes, N)
    if scales.shape != (N, -(-codes.shape[1] // _TILE)) or scales.dtype != torch.float32:
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; they have to be float32, one per 1x128 tile")
    moved = _mn_major(len(layout.token_of_row), scales.shape[1], scales.device)
    return _permute(codes, layout), _permute(scales, layout, moved, _SMALLEST_SCALE)


def check_rows(name: str, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Refuse, in one line, what is not a contiguous matrix of ``count`` rows."""
    if rows.dim() != 2 or rows.shape[0] != count or not rows.is_contiguous():
        raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}; it has to be contiguous with {count} rows")
    return rows


def _mn_major(rows: int, tiles: int, device: torch.device) -> torch.Tensor:
    return torch.empty((tiles, rows), dtype=torch.float32, device=device).t()


def _permute(x: torch.Tensor, layout: Layout, out: torch.Tensor | None = None, filling: float = 0.0) -> torch.Tensor:
    N, K = layout.rows_of_token.shape
    S, D = len(layout.token_of_row), x.shape[1]
    out = x.new_empty((S, D)) if out is None else out
    if N and S:
        columns = min(_TILE * _TILES, triton.next_power_of_2(D))
        permute_kernel[(N, triton.cdiv(D, columns))](
            x, layout.rows_of_token, out, D, *x.stride(), *out.stride(), K=K, COLUMNS=columns
        )
    return _fill(out, layout, filling)


def _fill(rows: torch.Tensor, layout: Layout, value: float) -> torch.Tensor:
    if rows.numel():
        fill_kernel[(triton.cdiv(len(rows), _FILL_ROWS),)](
            rows, layout.token_of_row, len(rows), rows.shape[1], *rows.stride(),
            VALUE=value, ROWS=_FILL_ROWS, COLUMNS=_TILE,
        )  # fmt: skip
    return rows


def _combine(rows: torch.Tensor, layout: Layout, out: torch.Tensor | None = None) -> torch.Tensor:
    N, K = layout.rows_of_token.shape
    D = rows.shape[1]
    out = check_rows("out", rows.new_empty((N, D)) if out is None else out, N)
    if N:
        combine_kernel[(N, triton.cdiv(D, _TILE * _TILES))](
            rows, layout.rows_of_token, out, D, K=K, COLUMNS=_TILE * _TILES
        )
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return _permute(x, layout)

    @staticmethod
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _combine(drows.contiguous(), ctx.layout), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return _combine(rows, layout)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _permute(dy.contiguous(), ctx.layout), None


@triton.jit
def permute_kernel(
    x_ptr,
    rows_of_token_ptr,
    out_ptr,
    D,
    x_stride_n,
    x_stride_d,
    out_stride_s,
    out_stride_d,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS columns of one token, to each of its rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x_ptr + token * x_stride_n + column * x_stride_d, mask=column < D)
    for k in tl.static_range(K):
        row = tl.load(rows_of_token_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + row * out_stride_s + column * out_stride_d, values, mask=(column < D) & (row >= 0))


@triton.jit
def quantise_tiles(x):
    """FP32 [tiles, 128] to FP32 values that E4M3 rounds, and their power-of-two scales [tiles]."""
    magnitude = tl.abs(x)
    # tl.max drops NaN, so what is not finite is looked for by itself, by a comparison that is false for NaN.
    broken = tl.max(tl.where(magnitude <= 3.4028234663852886e38, 0, 1), axis=1) > 0
    amax = tl.maximum(tl.max(magnitude, axis=1), 448.0 * 1.1754943508222875e-38)
    bits = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000  # up to the next power of two
    multiplier = (0x7F000000 - bits).to(tl.float32, bitcast=True)  # 1 / scale: the exponent negated
    scaled = tl.minimum(tl.maximum(x * multiplier[:, None], -448.0), 448.0)
    scale = tl.where(broken, float("nan"), bits.to(tl.float32, bitcast=True))
    return tl.where(broken[:, None], float("nan"), scaled), scale


@triton.jit
def quantise_kernel(
    x_ptr, rows_of_token_ptr, codes_ptr, scales_ptr, D, S, K: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """TILES tiles of one token: quantised once, stored to each of its rows."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    scaled, scale = quantise_tiles(x)
    codes = scaled.to(codes_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        row = tl.load(rows_of_token_ptr + token * K + k).to(tl.int64)
        tl.store(codes_ptr + row * D + column, codes, mask=(column < D) & (row >= 0))
        tl.store(scales_ptr + tile.to(tl.int64) * S + row, scale, mask=(tile * 128 < D) & (row >= 0))


@triton.jit
def fill_kernel(
    rows_ptr,
    token_of_row_ptr,
    S,
    D,
    stride_s,
    stride_d,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """VALUE into those of ROWS rows that hold no token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    empty = (tl.load(token_of_row_ptr + row, mask=row < S, other=0) < 0) & (row < S)
    if tl.max(empty.to(tl.int32), axis=0) > 0:
        value = tl.full((ROWS, COLUMNS), VALUE, tl.float32).to(rows_ptr.dtype.element_ty)
        for first in range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            address = rows_ptr + row.to(tl.int64)[:, None] * stride_s + column.to(tl.int64)[None, :] * stride_d
            tl.store(address, value, mask=empty[:, None] & (column < D)[None, :])


@triton.jit
def combine_kernel(rows_ptr, rows_of_token_ptr, out_ptr, D, K: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of one token: its rows added up one after the other in FP32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows_of_token_ptr + token * K + k).to(tl.int64)
        total += tl.load(rows_ptr + row * D + column, mask=(column < D) & (row >= 0), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)
