"""Hopper's FP8 tensor core adds with 14 bits. This module emulates that, so that its cost can be measured.

One instruction takes 32 products and the accumulator, and does not add them as FP32 would:

    1. a product a * b is exact, and its exponent is the sum of the operands' exponents;
    2. all 33 terms are aligned to the largest exponent e among them: what lies below 2^(e - 13) is cut off;
    3. the cut terms are added exactly, and the sum is cut to 13 fraction bits: the register holds 1 + 8 + 13 bits.

So a small product beside a large accumulator loses its lower bits or vanishes, always towards zero: over long sums of
one sign the losses add up. The cure is promotion: every 128 elements (four instructions) the CUDA cores add the short
sum to an FP32 total, and the tensor core starts from zero again (report, arXiv 2412.19437, section 3.3.2).

Known: the 14 bits, the alignment and the cutting (report, section 3.5.2; "Insights into DeepSeek-V3", arXiv 2505.09343,
section 3.1.1); that accumulator and products are aligned together, and step 3, from probing the hardware (MMA-Sim,
arXiv 2511.10909, whose authors report bit for bit agreement). Assumed: instructions run in ascending K; operands are
taken as normalised, which differs from hardware only where a subnormal code makes the largest product. We compared
nothing here with a GPU.

`matmul_hopper_exact` does just this, M * N * K products: some 100 times as slow as a plain product.
`matmul_hopper` is for training, some 6 times. It takes 64 products at once and replaces their cutting by its average:
a product p loses q * 0.42 q / (q + mean|p| / 69) towards zero, with q = 2^(e - 13) from the accumulator. For products
of normal E4M3 numbers that is the average within some 10 % for q from 2^-8 to 1 times mean|p|; a product of signs says
how many products are positive and negative. Its errors are 0.27 to 0.96 times those of the exact model (norm-wise): it
understates random errors and gets the systematic ones. tests/fp8/test_accumulator.py holds that.

Operands are FP32 tensors that hold dequantised FP8. Scales may be applied to them beforehand: powers of two change
nothing; others round each product to FP32, 2^-24 where the hardware cuts at 2^-13.

Shapes: M rows, N outputs, K the contraction, G a group of 32 or 64 along K.

    python -m headrace.fp8.accumulator        prints the table of errors in docs/fp8.md
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.fp8.quantise import BLOCK, ROW_TILE, quantise

INSTRUCTION = 32  # products that one FP8 tensor-core instruction adds up
FRACTION_BITS = 13
_DROPPED_BITS = 23 - FRACTION_BITS
_EXPONENT_MASK = 0x7F800000
_CACHED_ELEMENTS = 1 << 17


def matmul_hopper(a_MK: Tensor, b_NK: Tensor, promotion: bool) -> Tensor:
    """y = a b^T in FP32 [M, N], by the fast model: losses on average, the register rounded to 14 bits."""
    group = 2 * INSTRUCTION
    promoted = BLOCK if promotion else a_MK.shape[1]
    sign_a_MK, sign_b_NK = a_MK.sign(), b_NK.sign()
    # mean |a| * mean |b|, as factors; never zero, so that nothing is divided by zero below.
    size_a_M = [part.abs().mean(1, keepdim=True).add_(1e-19) for part in torch.split(a_MK, group, dim=1)]
    size_b_N = [
        part.abs().mean(1).mul_(2.0**FRACTION_BITS / 69).add_(1e-19) for part in torch.split(b_NK, group, dim=1)
    ]

    def add(accumulator_MN: Tensor, rows: slice, columns: slice) -> None:
        if columns.start % promoted:
            power_MN = _power(accumulator_MN)
            share_MN = torch.addcmul(power_MN, size_a_M[columns.start // group][rows], size_b_N[columns.start // group])
            torch.div(power_MN, share_MN, out=share_MN)
            signs_MN = torch.mm(sign_a_MK[rows, columns], sign_b_NK[:, columns].T)
            accumulator_MN.addcmul_(signs_MN.mul_(power_MN), share_MN, value=-0.42 * 2.0**-FRACTION_BITS)
        accumulator_MN.addmm_(a_MK[rows, columns], b_NK[:, columns].T)
        bits_MN = accumulator_MN.view(torch.int32)
        bits_MN.add_(1 << (_DROPPED_BITS - 1)).bitwise_and_(-1 << _DROPPED_BITS)

    return _accumulate(a_MK, b_NK, promoted, group, _CACHED_ELEMENTS // b_NK.shape[0], add)


def matmul_hopper_exact(a_MK: Tensor, b_NK: Tensor, promotion: bool) -> Tensor:
    """y = a b^T in FP32 [M, N], every product aligned and cut as the hardware is known to do."""

    def add(accumulator_MN: Tensor, rows: slice, columns: slice) -> None:
        a_GM1, b_G1N = a_MK[rows, columns].T.unsqueeze(2), b_NK[:, columns].T.unsqueeze(1)
        largest_MN = (_power(a_GM1) * _power(b_G1N)).amax(0)
        quantum_MN = torch.maximum(largest_MN, _power(accumulator_MN)).mul_(2.0**-FRACTION_BITS).clamp_(min=2.0**-126)
        inverse_MN = quantum_MN.reciprocal()
        # In quanta a term is an integer below 2^15, so that FP32 adds 33 of them exactly.
        sum_MN = (a_GM1 * b_G1N).mul_(inverse_MN).trunc_().sum(0)
        sum_MN.add_(accumulator_MN.mul_(inverse_MN).trunc_())
        torch.mul(sum_MN, quantum_MN, out=accumulator_MN)
        accumulator_MN.view(torch.int32).bitwise_and_(-1 << _DROPPED_BITS)

    promoted = BLOCK if promotion else a_MK.shape[1]
    return _accumulate(a_MK, b_NK, promoted, INSTRUCTION, _CACHED_ELEMENTS // (INSTRUCTION * b_NK.shape[0]), add)


def _accumulate(
    a_MK: Tensor, b_NK: Tensor, promoted: int, group: int, height: int, add: Callable[[Tensor, slice, slice], None]
) -> Tensor:
    """Let `add` put the products of `group` columns into a register, until `promoted` columns join the FP32 total.

    The result is made `height` rows at a time, so that a register stays in the cache.
    """
    assert a_MK.dtype == b_NK.dtype == torch.float32 and a_MK.shape[1] == b_NK.shape[1] > 0, (a_MK.shape, b_NK.shape)
    (count, depth), height = a_MK.shape, max(height, 1)
    total_MN = torch.zeros(count, b_NK.shape[0], device=a_MK.device)
    for first in range(0, count, height):
        rows = slice(first, min(first + height, count))
        for block in range(0, depth, promoted):
            accumulator_MN = torch.zeros_like(total_MN[rows])
            end = min(block + promoted, depth)
            for start in range(block, end, group):
                add(accumulator_MN, rows, slice(start, min(start + group, end)))
            total_MN[rows] += accumulator_MN
    return total_MN


def _power(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), or 0 for zero; infinity for infinity and NaN."""
    return (x.contiguous().view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


@dataclass(frozen=True)
class AccumulationError:
    """How far a product is from float64 on the same FP8 operands: accumulation alone, without quantisation.

    largest: max over elements of |y - y64| / |y64|; norm: ||y - y64|| / ||y64|| (Frobenius).
    """

    data: str
    model: str
    promotion: bool
    largest: float
    norm: float


def accumulation_errors(depth: int, size: int = 128, seed: int = 0) -> list[AccumulationError]:
    """Errors of both models for K = `depth`, M = N = `size`: normal data, and their magnitudes for positive sums."""
    generator = torch.Generator().manual_seed(seed)
    errors = []
    normal = [torch.randn(size, depth, generator=generator) for _ in range(2)]
    for data, operands in (("zero mean", normal), ("positive", [x.abs() for x in normal])):
        a_MK, b_NK = (quantise(x, ROW_TILE, power_of_two=True).dequantise() for x in operands)
        exact_MN = a_MK.double() @ b_NK.double().T
        for model, product in (("exact", matmul_hopper_exact), ("fast", matmul_hopper)):
            for promotion in (True, False):
                difference_MN = product(a_MK, b_NK, promotion).double() - exact_MN
                largest = (difference_MN / exact_MN).abs().max().item()
                norm = (difference_MN.norm() / exact_MN.norm()).item()
                errors.append(AccumulationError(data, model, promotion, largest, norm))
    return errors


def main() -> None:
    """Print `accumulation_errors` for several depths as a Markdown table, promoted / not promoted."""
    print("| K | data | norm-wise | gain | largest relative | norm-wise, fast model |\n|---|---|---|---|---|---|")
    for depth in (512, 2048, 4096, 8192):
        errors = accumulation_errors(depth)
        for on, off, fast_on, fast_off in zip(*(errors[start::4] for start in range(4)), strict=True):
            norms = f"{on.norm:.1e} / {off.norm:.1e} | {off.norm / on.norm:.0f}x"
            fast = f"{fast_on.norm:.1e} / {fast_off.norm:.1e}"
            print(f"| {depth:,} | {on.data} | {norms} | {on.largest:.1e} / {off.largest:.1e} | {fast} |")


if __name__ == "__main__":
    main()
