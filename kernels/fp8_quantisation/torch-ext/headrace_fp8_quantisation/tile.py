"""What happens to one tile, inside a kernel: its magnitude, its scale, its codes.

A tile is quantised with one scale: value ~ code * scale, the largest magnitude on the largest E4M3 number, 448
(DeepSeek-V3 report, section 3.3.2, "fine-grained quantization").

    amax = max |x|, at least 448 * 2^-126       so that every scale is a normal FP32 number
    scale = amax / 448, multiplier = 448 / amax          true divisions: a reciprocal times 448 can be one ulp off
    power of two: scale = 2^ceil(log2(amax / 448)), multiplier = 1 / scale, exact
    code = E4M3 of x * multiplier, to nearest even

Two things are done on the bits. The magnitude is a maximum of integers, because FP32 numbers without their sign order
like integers, NaN above Inf above all else, whereas Triton's maximum of floats forgets NaN: one reduction finds amax
and whether the tile is finite. A tile that is not gets scale and multiplier NaN, and so 0x7F in every code: divergence
shall be seen. And a power of two comes from the exponent without any division.

The product is not clamped to 448: |x| * multiplier is at most 448 * (1 + 2^-22), and codes round to 448 up to 464.
"""

import triton
import triton.language as tl


@triton.jit
def magnitudes(x):
    """|x| of FP32 values as integers that order alike; their maximum is what `scale_and_multiplier` takes."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_multiplier(largest, POWER_OF_TWO: tl.constexpr):
    """Scale and multiplier of tiles, FP32, from their largest magnitudes."""
    finite = largest < 0x7F800000  # Inf
    bounded = tl.where(finite, tl.maximum(largest, 0x04E00000), 0x04E00000)  # 448 * 2^-126
    if POWER_OF_TWO:
        # 448 = 1.75 * 2^8: the exponent of amax less 8, and one more where the mantissa is above 1.75
        exponent = ((bounded + 0x001FFFFF) & 0x7F800000) - 0x04000000
        scale = exponent.to(tl.float32, bitcast=True)
        multiplier = (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # biased exponents of 1/s and s add up to 254
    else:
        amax = bounded.to(tl.float32, bitcast=True)
        scale, multiplier = tl.div_rn(amax, 448.0), tl.div_rn(448.0, amax)
    return tl.where(finite, scale, float("nan")), tl.where(finite, multiplier, float("nan"))


@triton.jit
def encode(x, multiplier):
    """E4M3 codes of FP32 values."""
    return (x * multiplier).to(tl.float8e4nv)


@triton.jit
def quantise_rows_of(x, POWER_OF_TWO: tl.constexpr):
    """Codes and scales of the 1x128 tiles of x [rows, 128]."""
    scale, multiplier = scale_and_multiplier(tl.max(magnitudes(x), 1), POWER_OF_TWO)
    return encode(x, multiplier[:, None]), scale


@triton.jit
def quantise_columns_of(x, POWER_OF_TWO: tl.constexpr):
    """Codes and scales of the 128x1 tiles of x [128, columns]; codes are not transposed yet."""
    scale, multiplier = scale_and_multiplier(tl.max(magnitudes(x), 0), POWER_OF_TWO)
    return encode(x, multiplier[None, :]), scale
