"""The kernel that quantises weights, byte for byte what the reference gives."""

import pytest
import torch

from headrace_fp8_quantisation import quantise_weight, reference


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (200, 300)])
def test_one_matrix(quantisers, shape, dtype, transposed):
    w = quantisers.hard_matrix(*shape, dtype)
    quantisers.assert_same(quantise_weight(w, transposed), reference.quantise_weight(w, transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_matrices(quantisers, dtype, transposed):
    w = torch.stack([torch.randn(150, 260, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    w[1, 140, 100] = float("nan")
    w[2, :128] = 0
    w = w.to(dtype).to(quantisers.device)
    found = quantise_weight(w, transposed)
    quantisers.assert_same(found, reference.quantise_weight(w, transposed))
    assert found[1].shape == (3, 2, 3)
    assert all(part.is_contiguous() for part in found)


def test_the_transpose_is_the_same_codes(quantisers):
    codes, scales, codes_t, scales_t = quantise_weight(quantisers.hard_matrix(140, 260, torch.float32), True)
    quantisers.assert_same((codes_t, scales_t), (codes.t().contiguous(), scales.t().contiguous()))


@pytest.mark.parametrize("w", [torch.ones(4), torch.ones(4, 6).t(), torch.ones(2, 2, dtype=torch.float64)])
def test_other_inputs_are_refused(w):
    with pytest.raises(ValueError, match="give contiguous BF16 or FP32"):
        quantise_weight(w)
