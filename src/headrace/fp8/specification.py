"""What an FP8 matrix product is: the specification that every back end is tested against.

    y[m, n] = sum over blocks of 128 along K of  (scale_a[m, block] * scale_b[n, block]) * (sum of a[m, k] b[n, k])

Products of two E4M3 codes are exact in FP32 (8 significant bits). The inner sum stands for the tensor core, here in
FP32; then the block is scaled and added in FP32, as the CUDA cores do every 128 elements on a real device (report,
arXiv 2412.19437, section 3.3.2, "increasing accumulation precision"). What Hopper's tensor core really keeps of the
inner sum is emulated in accumulator.py.

Shapes: M rows, N outputs, K the contraction.
"""

import torch
from torch import Tensor

from headrace.fp8.formats import decode_e4m3
from headrace.fp8.quantise import BLOCK, Quantised


def matmul(a: Quantised, b: Quantised) -> Tensor:
    """y = a b^T in FP32 [M, N]; a [M, K], b [N, K].

    The tiles of both are 128 wide along K and of any height, or cover the whole matrix. `Quantised.mT` turns a matrix
    in 128x1 tiles into such an operand.
    """
    rows, depth = a.shape
    assert b.shape[1] == depth, f"contraction of {depth} with {b.shape[1]}"
    a_MK, b_NK = decode_e4m3(a.codes), decode_e4m3(b.codes)
    out_MN = torch.zeros(rows, b.shape[0], device=a_MK.device)
    partial_MN = torch.empty_like(out_MN)
    for block, start in enumerate(range(0, depth, BLOCK)):
        torch.mm(a_MK[:, start : start + BLOCK], b_NK[:, start : start + BLOCK].T, out=partial_MN)
        scale_MN = _block_scales(a, block)[:, None] * _block_scales(b, block)
        out_MN.addcmul_(partial_MN, scale_MN)
    return out_MN


def _block_scales(matrix: Quantised, block: int) -> Tensor:
    """The scale of every row [R] within one block of 128 columns."""
    height, width = matrix.tile
    assert width == BLOCK or width >= matrix.shape[1], f"tiles of {height}x{width} do not run along the contraction"
    scales = matrix.scales[:, block if width == BLOCK else 0]
    return scales.repeat_interleave(height)[: matrix.shape[0]] if height > 1 else scales
