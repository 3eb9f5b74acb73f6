"""The repair of Triton's interpreter: the original conversions are wrong, the repaired ones are right.

The judge is ml_dtypes, which shares no code with torch or Triton. Once `test_unrepaired_*` fails, Triton has been
mended and kernels/interpreter.py can be taken out.
"""

import ml_dtypes
import numpy as np
import pytest


@pytest.fixture(scope="module")
def repaired(interpreter):
    from triton.runtime import interpreter as patched

    return patched._convert_float


@pytest.fixture(scope="module")
def original(repaired):
    return repaired.args[0]


def boundaries() -> np.ndarray:
    """Every E4M3 value, every midpoint between neighbours, and the FP32 numbers on either side of both; all finite."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    points = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [np.float32(2.0**-11), np.float32(1e-30)]])
    around = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    around = around[around <= 448]
    return np.concatenate([around, -around]).astype(np.float32)


def random_bits(count: int) -> np.ndarray:
    """FP32 numbers of every exponent, subnormals included, without NaN and Inf."""
    values = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    return values[np.isfinite(values)]


def to_e4m3(convert, values: np.ndarray) -> np.ndarray:
    import triton.language as tl
    from triton._C.libtriton import ir

    return convert(values, tl.float32, tl.float8e4nv, ir.ROUNDING_MODE.RTNE)


def to_bf16(convert, values: np.ndarray) -> np.ndarray:
    import triton.language as tl

    return convert(values, tl.float32, tl.bfloat16, None)


def test_unrepaired_e4m3_is_still_wrong(original):
    values = boundaries()
    wanted = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert (to_e4m3(original, values) != wanted).mean() > 0.05
    assert to_e4m3(original, np.float32([127.8]))[0] == np.float32(64).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_unrepaired_bf16_is_still_wrong(original):
    values = random_bits(10_000)
    wanted = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (to_bf16(original, values) != wanted).mean() > 0.2


def test_repaired_e4m3_rounds_to_nearest_even_at_every_boundary(repaired):
    values = boundaries()
    wanted = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(to_e4m3(repaired, values), wanted)


def test_repaired_e4m3_rounds_values_of_every_exponent(repaired):
    values = random_bits(200_000)
    values = values[np.abs(values) <= 448]
    wanted = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(to_e4m3(repaired, values), wanted)


def test_repaired_e4m3_saturates_and_has_one_nan(repaired):
    values = np.float32([464, 1e30, np.inf, -np.inf, np.nan, -np.nan])
    assert to_e4m3(repaired, values).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x7F]


def test_repaired_bf16_rounds_to_nearest_even(repaired):
    ties = (np.arange(0x3F80, 0x4000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([random_bits(200_000), ties, np.float32([np.inf, -np.inf])])
    wanted = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(to_bf16(repaired, values), wanted)


def test_repaired_widening_is_exact_for_every_code(repaired):
    import triton.language as tl

    codes = np.arange(256, dtype=np.uint8)
    found = repaired(codes, tl.float8e4nv, tl.float32, None).view(np.float32)
    assert np.array_equal(found, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)


def test_repairing_again_changes_nothing(interpreter, repaired):
    from triton.runtime import interpreter as patched

    interpreter.repair()
    assert patched._convert_float is repaired


def test_a_kernel_sees_the_repair(repaired, device):
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def cast(x, y, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(y + at, tl.load(x + at).to(tl.float8e4nv))

    x = torch.tensor([127.8, 2.5 * 2**-9, 0.3, 448.0], device=device)
    y = torch.empty(4, dtype=torch.float8_e4m3fn, device=device)
    cast[(1,)](x, y, 4)
    assert y.float().tolist() == [128.0, 2 * 2**-9, 0.3125, 448.0]
