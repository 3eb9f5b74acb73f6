"""The tile of the Triton kernels, the order in which tiles are computed, and the rows of one.

Addresses are a 64-bit pointer to the tile, which moves along the contraction, and 32-bit offsets inside it, which do
not: less arithmetic in the hot loop than moving a pointer for every element.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 128x128 tiles and two warp-groups: with one the two accumulators of 128x128 do not fit 255 registers and spill.
# Four stages of 32 KiB keep three blocks in flight. Fusion makes one instruction of the promotion: times scale, add.
OPTIONS = {"num_warps": 8, "num_stages": 4, "enable_fp_fusion": True}
# Tiles run down this many rows of tiles before they move one column on: neighbours in time share operands in L2.
BAND = 8


@triton.jit
def tile_of_program(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """The tile (row, column) of a program: bands of BAND rows of tiles, column after column inside a band."""
    programs_in_band = BAND * tiles_n
    first_m = program // programs_in_band * BAND
    band_m = tl.minimum(tiles_m - first_m, BAND)
    place = program % programs_in_band
    return first_m + place % band_m, place // band_m


@triton.jit
def rows_inside(tile, length, BLOCK: tl.constexpr):
    """0 to BLOCK - 1, the rows of a tile of a matrix of `length` rows; past the edge its last row again.

    What is computed from repeated rows is never stored, and so the loop over the contraction needs no mask for rows.
    """
    return tl.minimum(tl.arange(0, BLOCK), length - 1 - tile * BLOCK)
