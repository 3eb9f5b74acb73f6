"""FP8 at the ends of its range: the largest numbers saturate, zeros and subnormals stay what they are, infinity and NaN
show, and no scale makes a NaN of good numbers. Quantised by itself, and through a whole layer (reference A1, N4).
"""

from dataclasses import replace

import pytest
import torch

from headrace.config.compose import load
from headrace.fp8.emulated import ReferenceGemms
from headrace.fp8.linear import Linear
from headrace.fp8.quantise import COLUMN_TILE, ROW_TILE, SQUARE_TILE, quantise, quantise_e5m6
from headrace.fp8.weight_gradients import WeightGradientStore

LIMIT = 0.96
"""Of the largest number: above 248/256 of it E4M3 rounds up to the next power of two, which FP32 does not have; with
power-of-two scales such a number comes back infinite, never NaN, and shows."""
LARGEST = {torch.float32: torch.finfo(torch.float32).max, torch.bfloat16: torch.finfo(torch.bfloat16).max}
TILES = [ROW_TILE, COLUMN_TILE, SQUARE_TILE]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, INPUTS, OUTPUTS = 200, 150, 140


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_numbers_there_are_saturate_and_come_back_finite(dtype, tile, power_of_two):
    largest = LARGEST[dtype] * (LIMIT if power_of_two else 1)
    x = torch.full((130, 260), largest, dtype=dtype)
    x[::3], x[:, ::7] = -x[::3], 1.0
    quantised = quantise(x, tile, power_of_two)
    assert quantised.scales.isfinite().all()
    assert not quantised.codes.float().isnan().any()
    assert quantised.codes.float().abs().max() <= 448
    back = quantised.dequantise()
    assert back.isfinite().all()
    large = x.abs() > 1
    assert ((back[large] / x[large].float() - 1).abs() <= 2.0**-4).all()


def test_finite_values_outside_e5m6_saturate_and_come_back_finite():
    x = torch.tensor([[LIMIT * LARGEST[torch.float32], -1.0, 0.0]])
    back = quantise_e5m6(x).dequantise()
    assert back.isfinite().all()
    assert back[0, 0] > 0.98 * x[0, 0]


@pytest.mark.parametrize("smallest", [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-130, 2.0**-126])
def test_tiles_of_zeros_and_subnormals_have_a_normal_scale_and_no_nan(smallest):
    x = torch.full((3, 200), smallest)
    for quantised in (quantise(x, tile, power) for tile in TILES for power in (False, True)):
        assert (quantised.scales == 2.0**-126).all()
        back = quantised.dequantise()
        assert ((back - smallest).abs() <= 2.0**-126 * 2.0**-10).all()  # half a step of E4M3's subnormals
        assert torch.equal(back.signbit(), x.signbit())
    e5m6 = quantise_e5m6(x)
    assert e5m6.scales.isfinite().all()
    assert (e5m6.scales > 0).all()
    assert (e5m6.dequantise() - smallest).abs().max() <= 2.0**-126 * 2.0**-21


def gemms(compute="fp32", **changes):
    settings = load(["experiment=tiny", "precision=fp8"]).precision.fp8
    return ReferenceGemms(replace(settings, backend="reference", **changes), compute)


def _layer(compute, scales):
    torch.manual_seed(0)
    layer = Linear(INPUTS, OUTPUTS, gemms(compute, scales=scales), WeightGradientStore())
    torch.nn.init.normal_(layer.weight, std=0.1)
    x = torch.randn(ROWS, INPUTS, dtype=DTYPES[compute])
    return layer, x, torch.randn(ROWS, OUTPUTS, dtype=DTYPES[compute])


def _through(layer, x, dy):
    """Output, gradient of the input, gradient of the weight."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


@pytest.fixture(params=[(compute, scales) for compute in DTYPES for scales in ("fp32", "power_of_two")], ids=str)
def layer(request):
    return _layer(*request.param)


def test_zeros_in_a_layer_give_zeros_and_no_nan(layer):
    layer, x, dy = layer
    x[:130], dy[:, :128], dy[50] = 0, 0, 0  # whole tiles either way, and a row
    y, dx, dw = _through(layer, x, dy)
    assert y[:130].count_nonzero() == 0
    assert dx[50].count_nonzero() == 0
    assert dw[:128].count_nonzero() == 0
    assert all(result.isfinite().all() for result in (y, dx, dw))
    assert y[130:].count_nonzero() == y[130:].numel()
    zeros = _through(layer, torch.zeros_like(x), torch.zeros_like(dy))
    assert all(result.count_nonzero() == 0 for result in zeros)
    with torch.no_grad():
        layer.weight.zero_()
    y, dx, dw = _through(layer, x, dy)
    assert y.count_nonzero() == dx.count_nonzero() == 0
    assert dw.isfinite().all()


def test_subnormals_in_a_layer_are_as_good_as_zeros(layer):
    layer, x, dy = layer
    y, dx, dw = _through(layer, x * 1e-42, dy * 1e-42)
    assert all(result.isfinite().all() for result in (y, dx, dw))
    assert all(result.abs().max() < 1e-37 for result in (y, dx, dw))


def test_the_largest_inputs_of_a_layer_do_not_become_nan(layer):
    layer, x, dy = layer
    x[:, :128] = 0
    with torch.no_grad():
        layer.weight.clamp_(-0.1, 0.1)
    without = _through(layer, x, dy)
    x[3, 5] = largest = LIMIT * LARGEST[x.dtype]
    y, dx, _ = _through(layer, x, dy)
    assert y.isfinite().all()
    column = layer.weight.detach()[:, 5].double()
    assert ((y[3].double() / largest - column).abs() <= 0.15 * column.abs() + 2e-3).all()  # two roundings of 1/16
    assert torch.equal(y[:3], without[0][:3])
    assert torch.equal(dx, without[1])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_in_a_layer_show_where_they_reach_and_nowhere_else(layer, bad):
    layer, x, dy = layer
    clean = _through(layer, x, dy)
    x[7, 30] = bad
    y, dx, dw = _through(layer, x, dy)
    assert y[7].isnan().all()
    assert torch.equal(y[8:], clean[0][8:])
    assert torch.equal(dx, clean[1])  # does not depend on the input
    assert dw[:, 30].isnan().all()
    x[7, 30], dy[9, 3] = 0.5, bad
    y, dx, dw = _through(layer, x, dy)
    assert y.isfinite().all()
    assert dx[9].isnan().all()
    assert torch.equal(dx[10:], clean[1][10:])
    assert dw[3].isnan().all()
    assert dw[4:].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, torch.finfo(torch.float32).max, 0.0, 2.0**-149])
def test_extremes_travel_to_experts_as_they_are(value):
    ours = gemms()
    x = torch.randn(5, 200)
    x[2] = value
    x[3, 7] = value
    rows = ours.rows(x, "dispatched")
    back = ours.unpack(ours.pack(rows))
    assert torch.equal(back.quantised.codes.view(torch.uint8), rows.quantised.codes.view(torch.uint8))
    assert torch.equal(back.quantised.scales.view(torch.int32), rows.quantised.scales.view(torch.int32))
    assert torch.equal(back.operand_SI.isnan(), rows.operand_SI.isnan())
    assert torch.equal(back.operand_SI.nan_to_num(), rows.operand_SI.nan_to_num())
    gradients = ours.unpack_gradient(ours.pack_gradient(x))
    assert torch.equal(gradients.isfinite(), rows.operand_SI.isfinite())


@pytest.mark.parametrize("tile", TILES)
def test_numbers_that_round_beyond_fp32_come_back_infinite_and_never_nan(tile):
    quantised = quantise(torch.full((130, 260), LARGEST[torch.float32]), tile, power_of_two=True)
    assert quantised.scales.isfinite().all()
    assert (quantised.codes.float() == 256).all()
    assert (quantised.dequantise() == torch.inf).all()
