"""RMSNorm fused with quantisation: the normalised row goes from registers straight into 1x128 tiles.

    y = weight * x / sqrt(mean(x^2) + eps)

y is never rounded to BF16 on its way. The inverse root is returned: with it and x the backward pass can make y again
instead of keeping it (DeepSeek-V3 report, section 3.2.3).

Shapes: M rows (tokens), K width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import TILE, check_matrix, empty_codes, empty_scales, tiles
from .tile import encode, magnitudes, scale_and_multiplier

ELEMENTS = 8192  # one program's: a row of 7168, or several narrower ones
WARPS = 8


@triton.jit
def rmsnorm_kernel(
    x,
    weight,
    codes,
    scales,
    inverse_rms,
    M,
    K,
    x_stride,
    scales_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One program: ROWS whole rows, padded to WIDTH (a power of two, at least 128). Grid: (M / ROWS,)."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside_rows, inside_columns = rows < M - tl.program_id(0) * ROWS, columns < K
    inside = inside_rows[:, None] & inside_columns[None, :]
    x_at = first_row * x_stride + (rows[:, None] * x_stride + columns[None, :])
    values = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(values * values, 1), tl.cast(K, tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(inverse_rms + first_row + rows, inverse, mask=inside_rows)
    factors = tl.load(weight + columns, mask=inside_columns, other=0.0).to(tl.float32)
    normalised = values * inverse[:, None] * factors[None, :]
    tiled = tl.reshape(normalised, (ROWS, WIDTH // 128, 128))
    scale, multiplier = scale_and_multiplier(tl.max(magnitudes(tiled), 2), POWER_OF_TWO)
    row_codes = tl.reshape(encode(tiled, multiplier[:, :, None]), (ROWS, WIDTH))
    tl.store(codes + first_row * K + (rows[:, None] * K + columns[None, :]), row_codes, mask=inside)
    blocks = tl.arange(0, WIDTH // 128)
    scales_at = first_row + rows[:, None] + blocks[None, :].to(tl.int64) * scales_stride
    tl.store(scales + scales_at, scale, mask=inside_rows[:, None] & (blocks * 128 < K)[None, :])


def rmsnorm_quantise(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes E4M3 [M, K] and scales FP32 [M, ceil(K/128)], MN-major, of RMSNorm(x), and 1/rms FP32 [M].

    x [M, K] in BF16 or FP32 (rows contiguous), weight [K]. Raises ValueError where shapes or dtypes do not fit.
    """
    check_matrix(x, "x")
    M, K = x.shape
    if weight.shape != (K,) or not weight.is_contiguous():
        raise ValueError(f"weight is {tuple(weight.shape)}: give a contiguous vector of {K}, the width of x")
    codes, scales = empty_codes(x, M, K), empty_scales(x, M, tiles(K))
    inverse_rms = x.new_empty(M, dtype=torch.float32)
    if x.numel():
        rows, width = block(K)
        with torch.cuda.device_of(x):
            rmsnorm_kernel[(triton.cdiv(M, rows),)](
                x, weight, codes, scales, inverse_rms, M, K, x.stride(0), scales.stride(1), eps,
                rows, width, power_of_two, num_warps=WARPS,
            )  # fmt: skip
    return codes, scales, inverse_rms


def block(K: int) -> tuple[int, int]:
    """Rows that one program takes, and the power of two to which it pads their width."""
    width = max(TILE, triton.next_power_of_2(K))
    return max(1, ELEMENTS // width), width
