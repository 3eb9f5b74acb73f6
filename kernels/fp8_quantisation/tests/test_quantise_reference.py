"""The PyTorch reference of the quantisers against NumPy and ml_dtypes, byte for byte."""

import pytest
import torch

from headrace_fp8_quantisation import reference


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(20, 256), (131, 300), (1, 1), (129, 127)])
def test_every_tile_and_edge(quantisers, shape, tile, dtype, power_of_two):
    x = quantisers.hard_matrix(*shape, dtype)
    quantisers.assert_same(reference.quantise(x, tile, power_of_two), quantisers.by_hand(x, tile, power_of_two))


def test_columns_are_the_rows_of_the_transpose(quantisers, dtype):
    x = quantisers.hard_matrix(140, 150, dtype)
    codes, scales = quantisers.by_hand(x, (128, 1), True)
    quantisers.assert_same(reference.quantise_rows_and_columns(x)[2:], (codes.T, scales.T))


def test_powers_of_two_survive_requantising(quantisers):
    """Where both scales are powers of two, only codes that fall among the subnormals lose anything."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = reference.quantise_rows(x, True)
    values = reference.dequantise_rows(codes, scales)
    again = reference.dequantise_rows(*reference.requantise_columns(codes, scales)).t()
    smallest = reference.requantise_columns(codes, scales)[1].t().repeat_interleave(128, 0) * 2.0**-6
    kept = values.abs() >= smallest
    assert kept.float().mean() > 0.9
    assert torch.equal(again[kept], values[kept])


def test_stacked_weights_are_quantised_one_by_one(quantisers):
    w = torch.stack([quantisers.hard_matrix(130, 200, torch.float32), torch.ones(130, 200, device=quantisers.device)])
    for stacked, *single in zip(*(reference.quantise_weight(one, True) for one in (w, *w)), strict=True):
        assert torch.equal(stacked.view(torch.uint8), torch.stack(single).view(torch.uint8))
