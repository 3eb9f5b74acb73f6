"""Quantisation with one scale per tile: from BF16 or FP32 to E4M3 (or E5M6) codes and back.

FP8 has too few exponent bits for a whole tensor: one outlier would push everything else into the subnormals. So every
tile gets its own FP32 scale, found online from its largest magnitude (report, arXiv 2412.19437, section 3.3.2):

    activations, gradients        (1, 128)      a token's 128 neighbouring channels
    weights                       (128, 128)
    operands of weight gradients  (128, 1)      128 tokens, one channel

    amax       = max |x| of the tile, at least 448 * 2^-126, so that scales are normal numbers
    scale      = amax / 448, or the next power of two from there up
    multiplier = 448 / amax, or 1 / scale where the scale is a power of two
    code       = E4M3(x * multiplier), and x is about code * scale

Edges that are no multiple of the tile are smaller tiles. A tile that holds NaN or infinity becomes NaN throughout,
scale and codes: training that diverges has to show. Power-of-two scales change only exponents, so that quantising a
second time along the other axis adds no error from the scale (section 3.3.3).

This is the specification, in plain PyTorch on any device: the kernels give the same bytes. On a CPU it walks through
the rows in pieces that stay in the cache.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.fp8.formats import (
    E4M3,
    E4M3_MAX,
    E4M3_NAN,
    E5M6_MAX,
    E5M6_NAN,
    decode_e4m3,
    decode_e5m6,
    encode_e5m6,
    pack12,
    unpack12,
)

Tile = tuple[int, int]

BLOCK = 128
ROW_TILE: Tile = (1, BLOCK)
COLUMN_TILE: Tile = (BLOCK, 1)
SQUARE_TILE: Tile = (BLOCK, BLOCK)

_CACHED_ELEMENTS = 1 << 17  # 512 kB of FP32 a piece: measured best on a core with 1 MB of L2


@dataclass(frozen=True)
class Quantised:
    """E4M3 codes [..., R, C] with FP32 scales [..., ceil(R / r), ceil(C / c)] for tiles of r x c: x ~ code * scale."""

    codes: Tensor
    scales: Tensor
    tile: Tile

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def mT(self) -> "Quantised":  # noqa: N802 (torch's name for it)
        """The transposed matrix: views of the same memory, the tile turned as well."""
        return Quantised(self.codes.mT, self.scales.mT, (self.tile[1], self.tile[0]))

    def __getitem__(self, index: int) -> "Quantised":
        """One matrix of a stack, by its position in the first dimension. Views."""
        assert self.codes.ndim > 2, "a single matrix has no matrices to pick from: use rows()"
        return Quantised(self.codes[index], self.scales[index], self.tile)

    def rows(self, start: int, end: int) -> "Quantised":
        """Rows start..end with the scales they use. Views. Both bounds lie on tile borders or at the last row."""
        height, count = self.tile[0], self.shape[-2]
        assert 0 <= start <= end <= count, (start, end, count)
        assert start % height == 0 and (end % height == 0 or end == count), f"rows {start}:{end} cut a tile of {height}"
        scales = self.scales[..., start // height : -(-end // height), :]
        return Quantised(self.codes[..., start:end, :], scales, self.tile)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale, in FP32, or that product rounded once to BF16 (exact where the scale is a power of two)."""
        assert dtype in (torch.float32, torch.bfloat16), dtype
        if not self.codes.is_contiguous() and self.codes.mT.is_contiguous():
            return self.mT.dequantise(dtype).mT
        scales, through = self.scales, torch.float32
        if dtype == torch.bfloat16 and scales.device.type == "cpu" and torch.equal(scales.bfloat16().float(), scales):
            scales, through = scales.bfloat16(), torch.bfloat16  # torch multiplies BF16 in FP32 and rounds once
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for codes, part, part_scales in _pieces(self.tile, scales, self.codes, out):
            values = decode_e4m3(codes, through, out=part if through == dtype else None)
            for tiles, scale in _in_tiles(self.tile, part_scales, values):
                tiles.mul_(scale)
            if through != dtype:
                part.copy_(values)
        return out


def concatenate(parts: Sequence[Quantised]) -> Quantised:
    """The rows of all parts below each other: same tile and columns; every part but the last ends on a tile border."""
    tile = parts[0].tile
    assert all(part.tile == tile and part.shape[-1] == parts[0].shape[-1] for part in parts)
    assert all(part.shape[-2] % tile[0] == 0 for part in parts[:-1]), f"a part cuts a tile of {tile[0]} rows"
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts], dim=-2).view(E4M3)
    return Quantised(codes, torch.cat([part.scales for part in parts], dim=-2), tile)


def quantise(x: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
    """Quantise x [..., R, C] (BF16 or FP32) to E4M3 in tiles; (R, C) itself as the tile means one scale per matrix."""
    assert x.dtype in (torch.float32, torch.bfloat16) and x.ndim >= 2, (x.dtype, x.shape)
    *leading, rows, columns = x.shape
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale_shape = (*leading, -(-rows // tile[0]), -(-columns // tile[1]))
    scales = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    for part, part_codes, part_scales in _pieces(tile, scales, x.detach(), codes):
        part = part.float()
        for tiles, tile_codes, scale in _in_tiles(tile, part_scales, part, part_codes):
            multiplier = choose_scale(tiles.abs().amax(dim=(1, 3), keepdim=True), E4M3_MAX, power_of_two, scale)
            # |x * multiplier| is below 448 (1 + 2^-22), which rounds to 448: nothing is left to clamp.
            tile_codes.copy_(tiles * multiplier)
    _poison(tile, scales, codes.view(torch.uint8), E4M3_NAN)
    return Quantised(codes, scales, tile)


def choose_scale(amax: Tensor, largest: float, power_of_two: bool, scale: Tensor) -> Tensor:
    """Write the scales of tiles with these FP32 maxima into `scale`, and return the multipliers, all of one shape.

    `largest` is the largest number of the target format. For a maximum that is NaN or infinite, `scale` is no positive
    finite number: `_poison` looks for that.
    """
    # Tensor by tensor on purpose: torch may divide by a number through its inverse, which is off by an ulp.
    limit = torch.full_like(amax, largest)
    amax = amax.clamp_(min=largest * 2.0**-126)
    if not power_of_two:
        torch.div(amax, limit, out=scale)
        return limit.div_(amax)
    bits = amax.div_(limit).view(torch.int32)
    scale.copy_(bits.add_(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32))
    return torch.ones_like(scale).div_(scale)


def _poison(tile: Tile, scales: Tensor, codes: Tensor, nan: int) -> None:
    """Make NaN of the scales and the whole tiles that `choose_scale` found to hold NaN or infinity."""
    broken = ~((scales > 0) & (scales < torch.inf))
    if scales.device.type == "cpu" and not bool(broken.any()):
        return  # elsewhere the question would cost a wait for the device
    scales.masked_fill_(broken, torch.nan)
    for part_codes, part_broken in _pieces(tile, broken, codes):
        for tile_codes, tile_broken in _in_tiles(tile, part_broken, part_codes):
            tile_codes.masked_fill_(tile_broken, nan)


@dataclass(frozen=True)
class QuantisedE5M6:
    """A tensor of `shape` [..., C]: 12-bit codes packed to 1.5 bytes each (uint8), and the FP32 power-of-two scales
    [..., ceil(C / 128)] of its (1, 128) tiles."""

    packed: Tensor
    scales: Tensor
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it as tensors that autograd can keep; the third is empty and has the width."""
        return self.packed, self.scales, self.scales.new_empty(0, self.shape[-1])

    @staticmethod
    def of(packed: Tensor, scales: Tensor, width: Tensor) -> "QuantisedE5M6":
        """The inverse of `tensors`."""
        return QuantisedE5M6(packed, scales, torch.Size((*scales.shape[:-1], width.shape[-1])))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale in FP32 or BF16: both exact, as far as they reach."""
        codes = unpack12(self.packed, self.shape.numel()).view(self.shape)
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for part_codes, part, part_scales in _pieces(ROW_TILE, self.scales, codes, out):
            values = decode_e5m6(part_codes)
            for tiles, scale in _in_tiles(ROW_TILE, part_scales, values):
                tiles.mul_(scale)
            part.copy_(values)
        return out


def quantise_e5m6(x: Tensor) -> QuantisedE5M6:
    """Quantise x [..., C] (BF16 or FP32) to E5M6 in (1, 128) tiles with scale 2^ceil(log2(amax / 65024))."""
    assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
    codes = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    scales = torch.empty(*x.shape[:-1], -(-x.shape[-1] // BLOCK), dtype=torch.float32, device=x.device)
    for part, part_codes, part_scales in _pieces(ROW_TILE, scales, x.detach(), codes):
        part = part.float()
        for tiles, tile_codes, scale in _in_tiles(ROW_TILE, part_scales, part, part_codes):
            multiplier = choose_scale(tiles.abs().amax(dim=(1, 3), keepdim=True), E5M6_MAX, True, scale)
            tile_codes.copy_(encode_e5m6(tiles * multiplier))
    _poison(ROW_TILE, scales, codes, E5M6_NAN)
    return QuantisedE5M6(pack12(codes), scales, x.shape)


def _pieces(tile: Tile, scales: Tensor, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching groups of rows of matrices [..., R, C] and, last, of their scales; each a whole number of tiles high.

    On a CPU small enough for the cache, elsewhere as large as can be. A last row of lower tiles comes by itself.
    """
    # Rows that stand alone make leading dimensions just more rows.
    count = 1 if tile[0] == 1 else math.prod(scales.shape[:-2])
    scale_stack, *stacks = (
        tensor.reshape(count, math.prod(tensor.shape[:-1]) // max(count, 1), tensor.shape[-1])
        for tensor in (scales, *matrices)
    )
    rows, columns = stacks[0].shape[1:]
    whole = rows // tile[0]
    step = max(_CACHED_ELEMENTS // max(columns * tile[0], 1), 1) if scales.device.type == "cpu" else max(whole, 1)
    bounds = [(first, min(first + step, whole)) for first in range(0, whole, step)]
    if rows % tile[0]:
        bounds.append((whole, whole + 1))
    for index in range(count):
        for first, last in bounds:
            span = slice(first * tile[0], last * tile[0])
            yield *(stack[index, span] for stack in stacks), scale_stack[index, first:last]


def _in_tiles(tile: Tile, scales: Tensor, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [R / r, r, C / c, c] of matrices [R, C], last the scales as [R / r, 1, C / c, 1]: the whole tiles, then a
    last column of narrower ones."""
    rows, columns = matrices[0].shape
    height, whole = min(tile[0], rows), columns // tile[1]
    if whole:
        shape, end = (-1, height, whole, tile[1]), whole * tile[1]
        yield *(matrix[:, :end].view(shape) for matrix in matrices), scales[:, None, :whole, None]
    if columns % tile[1]:
        shape, start = (-1, height, 1, columns % tile[1]), whole * tile[1]
        yield *(matrix[:, start:].view(shape) for matrix in matrices), scales[:, None, whole:, None]
