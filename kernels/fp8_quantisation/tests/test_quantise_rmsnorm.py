"""RMSNorm, quantised in the same pass: against float64."""

import pytest
import torch

from headrace_fp8_quantisation import reference, rmsnorm_quantise


@pytest.mark.parametrize("shape", [(5, 128), (19, 300), (3, 1536), (70, 40)])
def test_against_float64(quantisers, shape, dtype, power_of_two):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=random).to(dtype)
    x[0] *= 1e-3
    weight = torch.rand(shape[1], generator=random) + 0.5
    found = rmsnorm_quantise(x.to(quantisers.device), weight.to(quantisers.device), 1e-6, power_of_two)
    inverse_rms = (x.double().square().mean(1) + 1e-6).rsqrt()
    exact = x.double() * inverse_rms[:, None] * weight.double()
    quantisers.assert_quantised(*found[:2], exact, power_of_two)
    torch.testing.assert_close(found[2].cpu().double(), inverse_rms, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_a_row_that_diverged_is_seen(quantisers):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(4)).to(quantisers.device)
    x[1, 200], x[2, 7] = float("nan"), float("inf")
    weight = torch.ones(300, device=quantisers.device)
    codes, scales, inverse_rms = rmsnorm_quantise(x, weight, 1e-6)
    wanted = reference.rmsnorm_quantise(x, weight, 1e-6)
    assert torch.equal(codes[1:3].view(torch.uint8), wanted[0][1:3].view(torch.uint8))
    assert torch.equal(scales.isnan(), wanted[1].isnan())
    assert scales[1].isnan().all()
    assert inverse_rms.isnan().tolist() == [False, True, False, False]


def test_a_weight_of_another_width_is_refused(quantisers):
    x = torch.ones(2, 128, device=quantisers.device)
    with pytest.raises(ValueError, match="the width of x"):
        rmsnorm_quantise(x, torch.ones(64, device=quantisers.device), 1e-6)
