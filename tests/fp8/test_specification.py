"""The block-scaled product against float64, within the bound that FP32 sums of exact products allow."""

import pytest
import torch
from torch import Tensor

from headrace.fp8.quantise import COLUMN_TILE, ROW_TILE, SQUARE_TILE, Quantised, Tile, quantise
from headrace.fp8.specification import matmul

UNIT = 2.0**-24  # FP32 rounding


def operands(rows: int, outputs: int, depth: int, tile: Tile = SQUARE_TILE) -> tuple[Quantised, Quantised]:
    generator = torch.Generator().manual_seed(depth)
    a = torch.randn(rows, depth, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    b = torch.randn(outputs, depth, generator=generator) * torch.randn(1, depth, generator=generator).exp()
    return quantise(a, ROW_TILE), quantise(b, tile)


def real(matrix: Quantised) -> Tensor:
    """code * scale in float64, exact; the tiles laid out by indexing each element's own scale."""
    rows, columns = (torch.arange(size) for size in matrix.shape)
    scales = matrix.scales[rows[:, None] // matrix.tile[0], columns // matrix.tile[1]]
    return matrix.codes.double() * scales.double()


def assert_within_bound(y: Tensor, a: Quantised, b: Quantised) -> float:
    """Each of 128 products a block adds at most one rounding; scales, scaling and the outer sum add the rest."""
    a64, b64 = real(a), real(b)
    blocks = -(-a.shape[1] // 128)
    error = (y.double() - a64 @ b64.T).abs()
    assert (error <= (128 + blocks + 3) * UNIT * (a64.abs() @ b64.abs().T)).all()
    return float(error.norm() / (a64 @ b64.T).norm())


@pytest.mark.parametrize("depth", [1, 100, 128, 200, 1024, 4000, 8192])
def test_error_against_float64(depth: int) -> None:
    a, b = operands(37, 150, depth)
    y = matmul(a, b)
    assert y.dtype == torch.float32 and y.shape == (37, 150)
    assert assert_within_bound(y, a, b) < 1e-6


def test_every_combination_of_tiles() -> None:
    for tile in (ROW_TILE, SQUARE_TILE, (150, 300)):
        a, b = operands(37, 150, 300, tile)
        assert_within_bound(matmul(a, b), a, b)
    whole = quantise(torch.randn(37, 300), (37, 300))
    assert_within_bound(matmul(whole, whole), whole, whole)


def test_the_weight_gradient_contracts_columns_in_their_own_tiles() -> None:
    """dW = dy^T x over 300 tokens, both in 128x1 tiles."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (quantise(torch.randn(300, size, generator=generator), COLUMN_TILE, True) for size in (40, 50))
    y = matmul(dy.mT, x.mT)
    assert y.shape == (40, 50)
    assert_within_bound(y, dy.mT, x.mT)


def test_tiles_across_the_contraction_are_refused() -> None:
    x = quantise(torch.randn(300, 200), COLUMN_TILE)
    with pytest.raises(AssertionError, match="contraction"):
        matmul(x, x)


def test_integers_with_power_of_two_scales_come_out_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 1000), generator=generator).float() for _ in range(2))
    a_codes, b_codes = quantise(a * 2.0**-30, ROW_TILE, True), quantise(b * 2.0**20, ROW_TILE, True)
    assert torch.equal(matmul(a_codes, b_codes).double(), (a.double() @ b.double().T) * 2.0**-10)


def test_each_block_is_scaled_by_itself() -> None:
    """Blocks whose sizes differ by 10^8 must both count where the large one cancels."""
    a = torch.full((1, 256), 1e-8)
    b = torch.full((1, 256), 1.0)
    a[:, :128], b[:, :64] = 1.0, -1.0
    y = matmul(quantise(a, ROW_TILE, True), quantise(b, ROW_TILE, True))
    assert abs(float(y) - 128e-8) < 0.1 * 128e-8


def test_fp8_keeps_a_product_of_normal_data_within_four_per_cent() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 2048, generator=generator) for size in (128, 256))
    error = matmul(quantise(a, ROW_TILE), quantise(b, SQUARE_TILE)).double() - a.double() @ b.double().T
    share = error.norm() / (a.double() @ b.double().T).norm()
    assert 0.03 < share < 0.045  # two operands at 2.6 % each


def test_a_bad_tile_spoils_its_row_and_nothing_else() -> None:
    a, b = torch.randn(10, 300), torch.randn(20, 300)
    a[4, 200] = torch.inf
    bad = matmul(quantise(a, ROW_TILE), quantise(b, ROW_TILE)).isnan()
    assert bad[4].all() and int(bad.sum()) == 20
