"""SwiGLU and its gradient, quantised in the same pass: against float64; byte for byte where the gate is a number."""

import pytest
import torch
from torch.nn import functional

from headrace_fp8_quantisation import reference, swiglu_backward_quantise, swiglu_quantise

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid(-100) is 0 by way of 1/Inf


@pytest.fixture(params=[(37, 300), (130, 128)], ids=str)
def inputs(request, quantisers, dtype):
    """dhidden, gate and up, with gates far into both tails, and routing weights."""
    random = torch.Generator().manual_seed(1)
    dhidden, gate, up = torch.randn(3, *request.param, generator=random)
    gate[1] *= 30
    tensors = [x.to(dtype).to(quantisers.device) for x in (dhidden, gate, up)]
    return *tensors, torch.rand(request.param[0], generator=random).to(quantisers.device)


@pytest.mark.parametrize("weighted", [False, True])
def test_forward_against_float64(quantisers, inputs, weighted, power_of_two):
    _, gate, up, weights = inputs
    codes, scales = swiglu_quantise(gate, up, weights if weighted else None, power_of_two)
    exact = functional.silu(gate.cpu().double()) * up.cpu().double()
    exact *= weights.cpu().double()[:, None] if weighted else 1
    quantisers.assert_quantised(codes, scales, exact, power_of_two)


@pytest.mark.parametrize("weighted", [False, True])
def test_backward_against_float64(quantisers, inputs, weighted, power_of_two):
    dhidden, gate, up, weights = inputs
    found = swiglu_backward_quantise(dhidden, gate, up, weights if weighted else None, power_of_two)
    g, u, w = (x.cpu().double().requires_grad_() for x in (gate, up, weights))
    hidden = functional.silu(g) * u * (w[:, None] if weighted else 1)
    hidden.backward(dhidden.cpu().double())
    quantisers.assert_quantised(found.dgate, found.dgate_scales, g.grad, power_of_two)
    quantisers.assert_quantised(found.dup, found.dup_scales, u.grad, power_of_two)
    quantisers.assert_quantised(found.dgate_t, found.dgate_t_scales, g.grad.t(), True)
    quantisers.assert_quantised(found.dup_t, found.dup_t_scales, u.grad.t(), True)
    if weighted:
        torch.testing.assert_close(found.dweights.cpu().double(), w.grad, rtol=1e-5, atol=1e-5)
    else:
        assert found.dweights is None


def test_hardly_a_code_differs_from_the_reference(quantisers, inputs):
    dhidden, gate, up, weights = inputs
    found = swiglu_backward_quantise(dhidden, gate, up, weights)
    wanted = reference.swiglu_backward_quantise(dhidden, gate, up, weights)
    for name in ("dgate", "dgate_t", "dup", "dup_t"):
        differing = getattr(found, name).view(torch.uint8) != getattr(wanted, name).view(torch.uint8)
        assert differing.float().mean() < 1e-3, name


def test_where_the_gate_is_large_bytes_are_those_of_the_quantiser(quantisers):
    """silu(64) is 64 in FP32, so what is left is a product and the quantiser: NaN and Inf travel through it."""
    up = quantisers.hard_matrix(40, 300, torch.float32)
    gate = torch.full_like(up, 64.0)
    quantisers.assert_same(swiglu_quantise(gate, up), reference.quantise_rows(up * 64))


def test_halves_of_one_tensor_are_read_in_place(quantisers):
    both = torch.randn(20, 400, generator=torch.Generator().manual_seed(2)).to(quantisers.device)
    gate, up = both.chunk(2, 1)
    quantisers.assert_same(swiglu_quantise(gate, up), swiglu_quantise(gate.contiguous(), up.contiguous()))
    strided = swiglu_backward_quantise(up, gate, up)
    copied = swiglu_backward_quantise(*(x.contiguous() for x in (up, gate, up)))
    quantisers.assert_same(strided[:8], copied[:8])


def test_what_does_not_fit_is_refused(quantisers):
    gate = torch.ones(4, 8, device=quantisers.device)
    with pytest.raises(ValueError, match="up is"):
        swiglu_quantise(gate, gate[:3])
    with pytest.raises(ValueError, match="weights are"):
        swiglu_quantise(gate, gate, gate[:, 0].double())
