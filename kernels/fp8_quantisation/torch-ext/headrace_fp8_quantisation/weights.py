"""Weights to 128x128 tiles, once per optimizer step, as they are and transposed.

The forward pass contracts along K and reads codes [N, K]; the input gradient contracts along N and reads codes [K, N].
A square tile has the same scale either way, so both are the same codes in another order (DeepSeek-V3 report, section
3.3.2).

Shapes: E experts, N outputs, K inputs. Edges that are no multiples of 128 are smaller tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import empty_codes, tiles
from .tile import encode, magnitudes, scale_and_multiplier

WARPS = 8


@triton.jit
def weight_kernel(w, codes, scales, codes_t, scales_t, N, K, TRANSPOSED: tl.constexpr):
    """One program: one tile of 128 x 128. Grid: (K / 128, N / 128, E)."""
    column_block, row_block, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = tl.arange(0, 128), tl.arange(0, 128)
    inside_rows, inside_columns = rows < N - row_block * 128, columns < K - column_block * 128
    inside = inside_rows[:, None] & inside_columns[None, :]
    matrix = expert * N * K
    first = matrix + row_block.to(tl.int64) * 128 * K + column_block * 128
    at = rows[:, None] * K + columns[None, :]
    values = tl.load(w + first + at, mask=inside, other=0.0).to(tl.float32)
    scale, multiplier = scale_and_multiplier(tl.max(tl.max(magnitudes(values), 1), 0), False)
    tile_codes = encode(values, multiplier)
    tl.store(codes + first + at, tile_codes, mask=inside)
    row_blocks, column_blocks = tl.num_programs(1), tl.num_programs(0)
    tl.store(scales + (expert * row_blocks + row_block) * column_blocks + column_block, scale)
    if TRANSPOSED:
        first_t = matrix + column_block.to(tl.int64) * 128 * N + row_block * 128
        at_t = columns[:, None] * N + rows[None, :]
        inside_t = inside_columns[:, None] & inside_rows[None, :]
        tl.store(codes_t + first_t + at_t, tl.trans(tile_codes), mask=inside_t)
        tl.store(scales_t + (expert * column_blocks + column_block) * row_blocks + row_block, scale)


def quantise_weight(w: Tensor, transposed: bool = False) -> tuple[Tensor, ...]:
    """Codes E4M3 [N, K] and scales FP32 [ceil(N/128), ceil(K/128)] of w [N, K] or [E, N, K], BF16 or FP32, contiguous.

    With `transposed` also codes [K, N] and scales [ceil(K/128), ceil(N/128)]. All are contiguous; stacked weights give
    stacked results. `scales` is what the Hub calls `weight_scale_inv`. Raises ValueError for anything else.
    """
    if w.dim() not in (2, 3) or w.dtype not in (torch.bfloat16, torch.float32) or not w.is_contiguous():
        raise ValueError(f"w is {w.dtype} {tuple(w.shape)}: give contiguous BF16 or FP32, [N, K] or [E, N, K]")
    *experts, N, K = w.shape
    codes, scales = (
        torch.empty_like(w, dtype=torch.float8_e4m3fn),
        w.new_empty(*experts, tiles(N), tiles(K), dtype=torch.float32),
    )
    codes_t, scales_t = codes, scales  # unused by the kernel unless asked for
    if transposed:
        codes_t = empty_codes(w, *experts, K, N)
        scales_t = scales.new_empty(*experts, tiles(K), tiles(N))
    if w.numel():
        with torch.cuda.device_of(w):
            weight_kernel[(tiles(K), tiles(N), experts[0] if experts else 1)](
                w, codes, scales, codes_t, scales_t, N, K, transposed, num_warps=WARPS
            )
    return (codes, scales, codes_t, scales_t) if transposed else (codes, scales)
