"""Quantisation byte for byte against NumPy with ml_dtypes, written tile by tile from the definition."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.fp8.quantise import (
    COLUMN_TILE,
    ROW_TILE,
    SQUARE_TILE,
    Quantised,
    Tile,
    concatenate,
    quantise,
    quantise_e5m6,
)

TILES = [ROW_TILE, COLUMN_TILE, SQUARE_TILE]
SHAPES = [(1, 1), (3, 128), (128, 3), (5, 200), (130, 257), (127, 129), (300, 384), (2, 130, 70), (2, 3, 4, 129)]


def scale_and_multiplier(amax: np.float32, largest: float, power_of_two: bool) -> tuple[np.float32, np.float32]:
    amax = max(amax, np.float32(largest * 2.0**-126))
    ratio = np.float32(amax) / np.float32(largest)
    if not power_of_two:
        return ratio, np.float32(largest) / np.float32(amax)
    mantissa, exponent = np.frexp(ratio)
    scale = np.ldexp(np.float32(1), exponent if mantissa > 0.5 else exponent - 1)
    return scale, np.float32(1) / scale


def quantise_matrix(x: np.ndarray, tile: Tile, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8) and scales of one FP32 matrix, a Python loop over tiles."""
    rows, columns = x.shape
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty((-(-rows // tile[0]), -(-columns // tile[1])), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            if not np.isfinite(x[part]).all():
                codes[part], scales[i, j] = 0x7F, np.nan
                continue
            scale, multiplier = scale_and_multiplier(np.abs(x[part]).max(), 448.0, power_of_two)
            scaled = np.clip(x[part] * multiplier, np.float32(-448), np.float32(448))
            codes[part], scales[i, j] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale
    return codes, scales


def same_bytes(quantised: Quantised, x: Tensor, power_of_two: bool) -> bool:
    """Whether every matrix of x [..., R, C] was quantised as the loop above does it."""
    matrices = x.float().reshape(-1, *x.shape[-2:]).numpy()
    codes = quantised.codes.view(torch.uint8).reshape(matrices.shape).numpy()
    scales = quantised.scales.reshape(len(matrices), *quantised.scales.shape[-2:]).numpy()
    for matrix, matrix_codes, matrix_scales in zip(matrices, codes, scales, strict=True):
        expected_codes, expected_scales = quantise_matrix(matrix, quantised.tile, power_of_two)
        if not np.array_equal(matrix_codes, expected_codes):
            return False
        if not np.array_equal(matrix_scales, expected_scales, equal_nan=True):
            return False
    return True


def sample(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal values whose size changes by orders of magnitude from row to row and column to column."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
    columns = torch.randn(shape[-1], generator=generator).mul(2).exp()
    return torch.randn(shape, generator=generator) * rows * columns


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_every_tile_shape_and_edge(shape: tuple[int, ...], tile: Tile, power_of_two: bool) -> None:
    x = sample(shape)
    assert same_bytes(quantise(x, tile, power_of_two), x, power_of_two)
    assert same_bytes(quantise(x.bfloat16(), tile, power_of_two), x.bfloat16(), power_of_two)


@pytest.mark.parametrize("tile", TILES)
def test_bytes_where_a_matrix_is_cut_into_several_pieces(tile: Tile) -> None:
    x = sample((700, 600))
    assert same_bytes(quantise(x, tile), x, False)
    assert same_bytes(quantise(x, (700, 600)), x, False)  # one scale for the whole matrix
    assert same_bytes(quantise(x.mT, tile), x.mT.contiguous(), False)  # strides do not matter


def boundary_values() -> np.ndarray:
    """FP32 values on and around every decision of the format: codes, midpoints, and their neighbours on both sides."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = ((codes[1:].astype(np.float64) + codes[:-1]) / 2).astype(np.float32)
    tiny = np.array([0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-11, 2.0**-10, 2.0**-9, 2.0**-7], dtype=np.float32)
    edges = np.concatenate([codes, middles, tiny])
    around = np.concatenate([edges, np.nextafter(edges, np.float32(500)), np.nextafter(edges, np.float32(0))])
    around = around[np.abs(around) <= 448]
    return np.concatenate([around, -around])


def test_ten_million_values_at_scale_one_equal_both_casts() -> None:
    """448 in every tile makes the scale 1, so that the codes must be the plain casts of ml_dtypes and of torch."""
    rng = np.random.default_rng(0)
    count = 80_000 * 127
    values = np.ldexp(rng.uniform(1, 2, count), rng.integers(-14, 8, count)).astype(np.float32)
    values = np.minimum(values, 448) * rng.choice(np.array([-1, 1], np.float32), count)
    edges = boundary_values()
    values[: len(edges)] = edges
    x = np.concatenate([np.full((80_000, 1), 448, np.float32), values.reshape(80_000, 127)], axis=1)
    for power_of_two in (False, True):
        quantised = quantise(torch.from_numpy(x), ROW_TILE, power_of_two)
        assert (quantised.scales == 1).all()
        codes = quantised.codes.view(torch.uint8)
        assert np.array_equal(codes.numpy(), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
        assert torch.equal(codes, torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("exponent", [-126, -3, 0, 127])
def test_the_largest_value_of_a_tile_becomes_448_for_every_mantissa(exponent: int) -> None:
    """Without a clamp: x * (448 / x) may round a little above 448, never so far that the cast would overflow."""
    bits = torch.arange(1 << 23, dtype=torch.int32) + ((exponent + 127) << 23)
    x = bits.view(torch.float32).view(-1, 1024)
    x = x[x[:, 0] >= 448 * 2.0**-126] if exponent == -126 else x  # smaller ones have the smallest scale
    codes = quantise(x, (1, 1)).codes.view(torch.uint8)
    assert (codes == 0x7E).all()
    powers = quantise(x, (1, 1), power_of_two=True).codes.view(torch.uint8)
    assert ((powers >= 0x76) & (powers <= 0x7E)).all()  # 224 to 448


@pytest.mark.parametrize("power", [-130, -20, 0, 3, 118])
def test_power_of_two_scales_at_the_edge(power: int) -> None:
    edge = np.float32(448 * 2.0**power)
    x = np.array([np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))])
    scales = quantise(torch.from_numpy(x)[:, None], ROW_TILE, power_of_two=True).scales[:, 0]
    least = 2.0**-126
    assert scales.tolist() == [max(2.0**power, least), max(2.0**power, least), max(2.0 ** (power + 1), least)]


def test_scales_stay_normal_and_zeros_stay_zeros() -> None:
    x = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [1e-40, 0.0], [2.0**-126, 0.0]])
    for power_of_two in (False, True):
        quantised = quantise(x, ROW_TILE, power_of_two)
        assert (quantised.scales == 2.0**-126).all()
        assert quantised.codes.view(torch.uint8)[:2].tolist() == [[0, 0x80], [0, 0x80]]
        assert quantised.dequantise()[3, 0] == 2.0**-126  # multiplied by 2^126: code 1.0, exact
        assert same_bytes(quantised, x, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_makes_its_whole_tile_nan_and_no_other(tile: Tile, power_of_two: bool, poison: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for row, column in ((0, 0), (140, 200), (299, 269), (129, 130)):  # inside and in edge tiles
            x = sample((300, 270)).to(dtype)
            clean = quantise(x, tile, power_of_two)
            x[row, column] = poison
            quantised = quantise(x, tile, power_of_two)
            assert same_bytes(quantised, x, power_of_two)
            assert int(quantised.scales.isnan().sum()) == 1
            assert quantised.dequantise()[row, column].isnan()
            intact = (~quantised.scales.isnan()).nonzero()[0]
            assert quantised.scales[*intact] == clean.scales[*intact]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_dequantised_values_are_code_times_scale_rounded_once(tile: Tile, power_of_two: bool) -> None:
    for shape in SHAPES:
        quantised = quantise(sample(shape), tile, power_of_two)
        rows, columns = shape[-2:]
        scales = quantised.scales.repeat_interleave(tile[0], -2)[..., :rows, :]
        scales = scales.repeat_interleave(tile[1], -1)[..., :columns].numpy()
        codes = quantised.codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        exact = codes * scales
        assert np.array_equal(quantised.dequantise().numpy(), exact)
        once = torch.from_numpy(exact.astype(ml_dtypes.bfloat16).view(np.int16))
        assert torch.equal(quantised.dequantise(torch.bfloat16).view(torch.int16), once)
        assert np.array_equal(quantised.mT.dequantise().numpy(), np.swapaxes(exact, -1, -2))


def test_power_of_two_scales_make_bf16_exact_and_a_second_quantisation_free() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).clamp(0.05, 4)  # within E4M3's normal range
    quantised = quantise(x, ROW_TILE, power_of_two=True)
    values = quantised.dequantise()
    assert torch.equal(quantised.dequantise(torch.bfloat16).float(), values)
    again = quantise(values, COLUMN_TILE, power_of_two=True)
    assert torch.equal(again.dequantise(), values)
    assert not torch.equal(quantise(values, COLUMN_TILE).dequantise(), values)  # other scales do cost


def test_scales_may_lie_in_any_order_in_memory() -> None:
    quantised = quantise(sample((300, 270)), ROW_TILE)
    turned = Quantised(quantised.codes, quantised.scales.t().contiguous().t(), ROW_TILE)
    assert torch.equal(turned.dequantise(), quantised.dequantise())


@pytest.mark.parametrize(("tile", "cuts"), [(ROW_TILE, [0, 1, 77, 77, 300]), (SQUARE_TILE, [0, 128, 256, 300])])
def test_rows_take_their_scales_with_them(tile: Tile, cuts: list[int]) -> None:
    quantised = quantise(sample((300, 270)), tile)
    parts = [quantised.rows(start, end) for start, end in pairwise(cuts)]
    for part, start, end in zip(parts, cuts[:-1], cuts[1:], strict=True):
        assert torch.equal(part.dequantise(), quantised.dequantise()[start:end])
    whole = concatenate(parts)
    assert torch.equal(whole.codes.view(torch.uint8), quantised.codes.view(torch.uint8))
    assert torch.equal(whole.scales, quantised.scales)


def test_rows_that_cut_a_tile_are_refused() -> None:
    quantised = quantise(sample((300, 270)), SQUARE_TILE)
    for start, end in ((1, 128), (0, 127), (0, 301)):
        with pytest.raises(AssertionError):
            quantised.rows(start, end)
    with pytest.raises(AssertionError):
        concatenate([quantised.rows(256, 300), quantised.rows(0, 128)])


def test_one_matrix_of_a_stack() -> None:
    x = sample((3, 130, 70))
    stack = quantise(x, SQUARE_TILE)
    assert stack.nbytes == 3 * (130 * 70 + 2 * 1 * 4)
    assert torch.equal(stack[1].dequantise(), quantise(x[1], SQUARE_TILE).dequantise())


def test_gradients_do_not_pass() -> None:
    x = torch.randn(3, 200, requires_grad=True)
    assert not quantise(x, ROW_TILE).dequantise().requires_grad
    assert not quantise_e5m6(x).dequantise().requires_grad


def test_no_rows_at_all() -> None:
    for tile in TILES:
        assert quantise(torch.empty(0, 200), tile).dequantise().shape == (0, 200)
    assert quantise_e5m6(torch.empty(2, 0, 200)).dequantise().shape == (2, 0, 200)


@pytest.mark.parametrize("shape", [(1, 1), (5, 200), (2, 3, 129), (700, 600)])
def test_e5m6_takes_a_power_of_two_scale_for_each_row_of_128(shape: tuple[int, ...]) -> None:
    x = sample(shape)
    quantised = quantise_e5m6(x)
    assert quantised.shape == x.shape and quantised.scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert quantised.packed.numel() == 3 * ((x.numel() + 1) // 2)
    values = quantised.dequantise()
    for start in range(0, shape[-1], 128):
        part, got = x[..., start : start + 128], values[..., start : start + 128]
        scale = quantised.scales[..., start // 128]
        expected = [scale_and_multiplier(amax, 65024.0, True)[0] for amax in part.abs().amax(-1).numpy().flat]
        assert scale.flatten().tolist() == [float(value) for value in expected]
        step = torch.maximum(part.abs() * 2.0**-6, scale[..., None] * 2.0**-20)
        assert ((got - part).abs() <= step / 2).all()
    assert torch.equal(quantised.dequantise(torch.bfloat16).float(), values)


def test_e5m6_holds_bf16_but_for_one_bit_and_poisons_bad_tiles() -> None:
    x = sample((64, 256)).bfloat16()
    assert (quantise_e5m6(x).dequantise() - x.float()).norm() < 2.0**-7 * x.float().norm()
    seven_bits = quantise_e5m6(x).dequantise(torch.bfloat16)
    assert torch.equal(quantise_e5m6(seven_bits).dequantise(torch.bfloat16), seven_bits)
    x[3, 130] = torch.inf
    values = quantise_e5m6(x).dequantise()
    assert values[3, 128:].isnan().all() and int(values.isnan().sum()) == 128
    assert quantise_e5m6(torch.zeros(2, 5)).dequantise().tolist() == [[0.0] * 5] * 2
