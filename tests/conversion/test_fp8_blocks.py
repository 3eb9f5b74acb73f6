"""The second reader's E4M3 against ml_dtypes, its blocks against float64, and why a folder comes back bitwise."""

import ml_dtypes
import numpy as np
import pytest

from headrace.conversion import fp8_blocks

E4M3 = ml_dtypes.float8_e4m3fn
LIMIT = np.float32(448)


def rounded_by_ml_dtypes(values):
    return np.clip(values, -LIMIT, LIMIT).astype(E4M3).view(np.uint8)


def test_every_code_has_its_value():
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(fp8_blocks.decode(codes), codes.view(E4M3).astype(np.float32), equal_nan=True)


def test_every_boundary_between_codes_rounds_as_it_should():
    numbers = fp8_blocks.decode(np.arange(127, dtype=np.uint8))
    middles = (numbers[1:] + numbers[:-1]) / 2
    for values in (numbers, middles, np.nextafter(middles, LIMIT), np.nextafter(middles, np.float32(0))):
        for signed in (values, -values):
            assert np.array_equal(fp8_blocks.encode(signed), rounded_by_ml_dtypes(signed))


def test_random_bit_patterns_round_as_they_should():
    values = np.random.default_rng(0).integers(0, 2**32, 3_000_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    assert np.array_equal(fp8_blocks.encode(values), rounded_by_ml_dtypes(values))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (576, 200), (129, 127), (1, 1)])
def test_blocks_and_their_edges(shape):
    """Against float64: the scale is amax / 448 rounded once, and no value is further off than half a step."""
    matrix = (np.random.default_rng(1).standard_normal(shape) * 0.02).astype(np.float32)
    codes, scales = fp8_blocks.quantise(matrix)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128)) and codes.shape == shape
    values = fp8_blocks.dequantise(codes, scales)
    for row, column in np.ndindex(*scales.shape):
        block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
        largest = np.abs(matrix[block]).max().astype(np.float64)
        assert scales[row, column] == np.float32(largest / 448)
        assert np.abs(fp8_blocks.decode(codes[block])).max() == 448
        step = np.maximum(np.abs(matrix[block]), scales[row, column] * 2.0**-6) * 2.0**-3
        assert (np.abs(values[block].astype(np.float64) - matrix[block]) <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 448 * 2.0**-126, 3.4028235e38])
def test_the_ends_of_fp32(largest):
    matrix = np.zeros((130, 3), np.float32)
    matrix[129, 2] = -np.float32(largest)
    codes, scales = fp8_blocks.quantise(matrix)
    assert np.isfinite(scales).all() and (scales >= 2.0**-126).all()
    again = fp8_blocks.quantise(fp8_blocks.dequantise(codes, scales))
    assert np.array_equal(codes, again[0]) and np.array_equal(scales, again[1])


def test_every_scale_that_a_quotient_can_be_comes_back():
    """All amax of one binade, so of all: the powers of two in 448 and in amax change exponents only."""
    amax = (np.arange(2**23, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)
    scales = amax / LIMIT
    assert np.array_equal(LIMIT * scales / LIMIT, scales)
    assert (fp8_blocks.encode(amax * (LIMIT / amax)) == 0x7E).all()  # the largest weight of a block becomes 448


def test_other_scales_need_not_come_back():
    """What `export.py` says: mantissas that are 4 modulo 8 are lost where 7 m needs all of 27 bits, and no others."""
    mantissas = np.arange(2**23, 2**24, dtype=np.uint32)
    scales = mantissas.astype(np.float32)
    lost = mantissas[LIMIT * scales / LIMIT != scales]
    assert np.array_equal(lost, mantissas[(mantissas % 8 == 4) & (7 * mantissas.astype(np.uint64) >= 2**26)])


def test_quantising_what_was_quantised_changes_nothing():
    generator = np.random.default_rng(2)
    for size in (1e-37, 1e-5, 1.0, 1e30):
        matrix = (generator.standard_normal((300, 260)) * size).astype(np.float32)
        matrix[5, :7] = [0.0, -0.0, 2.0**-149, -(2.0**-149), 1e-40, 2.0**-126, 1e-38]
        codes, scales = fp8_blocks.quantise(matrix)
        again = fp8_blocks.quantise(fp8_blocks.dequantise(codes, scales))
        assert np.array_equal(codes, again[0]) and np.array_equal(scales, again[1])
