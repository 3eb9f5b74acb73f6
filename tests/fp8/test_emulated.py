"""The FP8 linear layer by emulation, against an independent one in float64 with ml_dtypes' E4M3."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.fp8 import emulated
from headrace.fp8.activations import Activation, Input
from headrace.fp8.emulated import ReferenceGemms
from headrace.fp8.linear import Linear, StackedLinear, put_weight_gradient
from headrace.fp8.weight_gradients import WeightGradientStore

FP8 = load(["experiment=tiny", "precision=fp8"]).precision.fp8


def gemms(compute="fp32", **changes):
    return ReferenceGemms(dataclasses.replace(FP8, backend="reference", **changes), compute)


def rounded(x, tile, power_of_two=False):
    """What FP8 keeps of a float32 matrix, one tile at a time, in float64."""
    x = np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, dtype=np.float32)
    out = np.empty(x.shape)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            block = x[i : i + tile[0], j : j + tile[1]]
            largest = np.float32(max(np.abs(block).max(), np.float32(448 * 2.0**-126)))
            scale, multiplier = largest / np.float32(448), np.float32(448) / largest
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
                multiplier = np.float32(1) / scale
            codes = (block * multiplier).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
            out[i : i + tile[0], j : j + tile[1]] = codes.astype(np.float64) * np.float64(scale)
    return out


def layer_and_data(rows=200, inputs=150, outputs=140, **changes):
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, gemms(**changes), WeightGradientStore())
    torch.nn.init.normal_(layer.weight, std=0.1)
    x = (torch.randn(rows, inputs) * torch.logspace(-2, 2, inputs)).requires_grad_()
    return layer, x, torch.randn(rows, outputs) * torch.logspace(-6, -3, rows)[:, None]


def close(ours, reference, tolerance=1e-6):
    reference = torch.as_tensor(reference)
    assert (ours.double() - reference).norm() <= tolerance * reference.norm()


def test_output_and_both_gradients_are_the_straight_through_ones():
    layer, x, dy = layer_and_data()
    y = layer(x)
    y.backward(dy)
    w = rounded(layer.weight, (128, 128))
    close(y, rounded(x, (1, 128)) @ w.T)
    close(x.grad, rounded(dy, (1, 128)) @ w)
    again = rounded(rounded(x, (1, 128)), (128, 1), power_of_two=True)  # cached in 1x128, then quantised in 128x1
    close(layer.weight.grad, rounded(dy, (128, 1), power_of_two=True).T @ again)


@pytest.mark.parametrize("role", ["dispatched", "swiglu", "attention"])
def test_roles_have_the_scales_and_caches_of_the_report(role):
    layer, x, dy = layer_and_data()
    y = layer(x, role)
    y.backward(dy)
    w = rounded(layer.weight, (128, 128))
    close(y, rounded(x, (1, 128), power_of_two=role == "dispatched") @ w.T)
    close(x.grad, rounded(dy, (1, 128), power_of_two=role == "swiglu") @ w)
    kept = rounded(x, (1, 128), power_of_two=role == "dispatched")
    expected = rounded(dy, (128, 1), power_of_two=True).T @ rounded(kept, (128, 1), power_of_two=True)
    if role == "attention":  # E5M6 has four times the precision of E4M3 and so differs from it
        wide = rounded(dy, (128, 1), power_of_two=True).T @ rounded(x, (128, 1), power_of_two=True)
        difference = (layer.weight.grad.double() - torch.as_tensor(wide)).norm()
        assert 0 < difference < (torch.as_tensor(expected) - torch.as_tensor(wide)).norm()
    else:
        close(layer.weight.grad, expected)


def test_gradients_point_where_the_gradients_of_the_rounded_layer_point():
    """Straight-through in float64: only the rounding of gradients and of cached inputs lies between."""
    layer, x, dy = layer_and_data(rows=512)
    layer(x).backward(dy)
    x64 = torch.as_tensor(rounded(x, (1, 128))).requires_grad_()
    w64 = torch.as_tensor(rounded(layer.weight, (128, 128))).requires_grad_()
    (x64 @ w64.T).backward(dy.double())
    close(x.grad, x64.grad, 0.05)
    close(layer.weight.grad, w64.grad, 0.05)


def test_a_weight_change_below_one_quantum_changes_nothing():
    layer, x, _ = layer_and_data(compute="bf16")
    x = x.detach().bfloat16()
    with torch.no_grad():
        before = layer(x)
        largest = layer.weight.abs().amax()
        moved = layer.weight.abs() < largest / 2
        layer.weight[moved] *= 1 + 2.0**-20
        after = layer(x)
    assert moved.float().mean() > 0.5
    assert (before != after).float().mean() < 0.02  # only values next to a rounding boundary may move
    with torch.no_grad():
        exact = Linear(256, 4, gemms("bf16"), WeightGradientStore())
        exact.weight.fill_(1.0)
        x = torch.randn(8, 256).bfloat16()
        before = exact(x)
        exact.weight[0, 1:] -= 2.0**-6  # a quantum of E4M3 just below its largest value is 1/14 of it
        after = exact(x)
    assert torch.equal(before, after)


@pytest.mark.parametrize("deferred", [False, True])
def test_each_gemm_runs_once_and_weights_are_quantised_once_a_step(monkeypatch, deferred):
    calls = []
    real_rows, real_product, real_quantise = emulated.multiply_rows, emulated.add_product, emulated.quantise
    monkeypatch.setattr(emulated, "multiply_rows", lambda *a: (calls.append("rows"), real_rows(*a))[1])
    monkeypatch.setattr(emulated, "add_product", lambda *a: (calls.append("weight"), real_product(*a))[1])
    monkeypatch.setattr(emulated, "quantise", lambda x, tile, *a: (calls.append(tile), real_quantise(x, tile, *a))[1])
    layer, x, dy = layer_and_data()
    with layer.store.accumulating():
        for microbatch in range(2):
            if deferred:
                with layer.store.deferred():
                    layer(x).backward(dy)
                assert "weight" not in calls
                layer.store.flush()
            else:
                layer(x).backward(dy)
            assert calls.count("rows") == 2
            assert calls.count("weight") == 1
            assert calls.count((128, 128)) == (1 if microbatch == 0 else 0)
            calls.clear()


def test_layers_that_share_an_input_quantise_it_once_each_way(monkeypatch):
    tiles = []
    real = emulated.quantise
    monkeypatch.setattr(emulated, "quantise", lambda x, tile, *a: (tiles.append(tile), real(x, tile, *a))[1])
    store, shared_gemms = WeightGradientStore(), gemms()
    first, second = (Linear(130, outputs, shared_gemms, store) for outputs in (20, 30))
    for layer in (first, second):
        torch.nn.init.normal_(layer.weight)
        layer.operand()
    tiles.clear()
    x = torch.randn(140, 130, requires_grad=True)
    given = Input(shared_gemms, Activation(x), "hidden", users=2)
    out = first(x, shared=given).sum() + second(x, shared=given).square().sum()
    assert tiles == [(1, 128)]
    out.backward()
    assert tiles[1:].count((128, 1)) == 2 + 1  # the two gradients, and the input once
    alone = torch.nn.Parameter(second.weight.grad.clone())
    second.weight.grad = None
    second(x).square().sum().backward()
    assert torch.equal(alone, second.weight.grad)


def test_grouped_rows_equal_one_layer_per_expert():
    torch.manual_seed(1)
    store, ours = WeightGradientStore(), gemms()
    layer = StackedLinear(3, 150, 40, ours, store)
    torch.nn.init.normal_(layer.weight)
    x, dy = torch.randn(384, 150), torch.randn(384, 40)
    groups = [(0, 0, 256), (2, 256, 384)]  # expert 1 gets nothing
    rows = ours.rows(x, "dispatched")
    y = ours.forward(rows, layer.operand(), groups)
    dy_rows, dy_columns = ours.gradient(dy, "dispatched")
    dx = ours.input_gradient(dy_rows, layer.operand(), groups)
    kept = ours.keep(x, rows, "dispatched")
    put_weight_gradient(layer, dy_columns, lambda: ours.columns(kept, "dispatched"), groups)
    for expert, start, end in groups:
        single = Linear(150, 40, ours, WeightGradientStore())
        with torch.no_grad():
            single.weight.copy_(layer.weight[expert])
        part = x[start:end].clone().requires_grad_()
        out = single(part, "dispatched")
        out.backward(dy[start:end])
        assert torch.equal(out, y[start:end])
        assert torch.equal(part.grad, dx[start:end])
        assert torch.equal(single.weight.grad, layer.weight.grad[expert])
    assert layer.weight.grad[1].count_nonzero() == 0


def test_a_row_of_zeros_takes_no_part():
    ours = gemms()
    rows = ours.rows(torch.randn(5, 200), "dispatched")
    taken = ours.take(rows, torch.tensor([3, -1, 0]))
    assert torch.equal(taken.operand_SI[[0, 2]], rows.operand_SI[[3, 0]])
    assert taken.operand_SI[1].count_nonzero() == 0
    assert torch.equal(taken.quantised.dequantise(), taken.operand_SI)


def test_bf16_operands_are_exact_where_scales_are_powers_of_two():
    torch.manual_seed(2)
    x = torch.randn(64, 256)
    wide = gemms("fp32", scales="power_of_two").rows(x, "hidden").operand_SI
    narrow = gemms("bf16", scales="power_of_two").rows(x, "hidden").operand_SI
    assert torch.equal(wide, narrow.float())
    wide, narrow = (gemms(compute).rows(x, "hidden").operand_SI.float() for compute in ("fp32", "bf16"))
    assert 0 < ((wide - narrow).abs() / wide.abs().clamp(min=1e-30)).max() <= 2.0**-8


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_tile": "tensor", "gradient_tile": "tensor", "weight_tile": "tensor"},
        {"gradient_tile": "128x128"},
        {"accumulation": "hopper", "promotion": False},
    ],
)
def test_ablations_change_what_they_say(changes):
    results = []
    for part in ({}, changes):
        layer, x, dy = layer_and_data(**part)
        y = layer(x)
        y.backward(dy)
        results.append((y.detach(), x.grad, layer.weight.grad))
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    assert same == ([True, False, False] if changes == {"gradient_tile": "128x128"} else [False] * 3)
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b).norm() < (1.0 if "activation_tile" in changes else 0.2) * a.norm()


@pytest.mark.parametrize("width", [1, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_packed_rows_are_codes_then_scales_and_come_back_to_the_bit(compute, width):
    ours = gemms(compute)
    x = (torch.randn(5, width) * torch.logspace(-3, 3, 5)[:, None]).to(ours.dtype)
    for rows in (ours.rows(x, "dispatched"), ours.rows(x[:0], "dispatched")):
        packed = ours.pack(rows)
        count = rows.operand_SI.shape[0]
        assert (packed.dtype, packed.shape) == (torch.uint8, (count, width + 4 * -(-width // 128)))
        back = ours.unpack(packed)
        assert torch.equal(back.operand_SI, rows.operand_SI)
        assert torch.equal(back.quantised.codes.view(torch.uint8), rows.quantised.codes.view(torch.uint8))
        assert torch.equal(back.quantised.scales, rows.quantised.scales)
        assert back.quantised.tile == rows.quantised.tile
    order = torch.tensor([3, 0, 4])  # each row by itself: packed rows may be taken in any order
    taken = ours.unpack(ours.pack(ours.rows(x, "dispatched"))[order])
    assert torch.equal(taken.operand_SI, ours.rows(x[order], "dispatched").operand_SI)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 129, 256])
def test_gradients_sent_to_experts_are_rounded_once_and_multiplied_as_if_they_had_not_been_sent(compute, width):
    ours = gemms(compute)
    dy = (torch.randn(400, width) * torch.logspace(-9, 3, 400)[:, None]).to(ours.dtype)
    dy[7] = 0
    sent = ours.pack_gradient(dy)
    assert (sent.dtype, sent.shape) == (torch.uint8, (400, width + 4 * -(-width // 128)))
    arrived = ours.unpack_gradient(sent)
    assert torch.equal(arrived.double(), torch.as_tensor(rounded(dy, (1, 128), power_of_two=True)))
    assert torch.equal(ours.gradient(arrived, "swiglu")[0], ours.gradient(dy, "swiglu")[0])
    assert torch.equal(ours.unpack_gradient(ours.pack_gradient(arrived)), arrived)
    whole = gemms(compute, dispatched_gradients="compute")
    assert torch.equal(whole.unpack_gradient(whole.pack_gradient(dy)), dy)


def test_rows_that_share_a_scale_cannot_be_sent():
    ours = gemms(activation_tile="tensor")
    with pytest.raises(UserError, match=r"activation_tile=tensor.*1x128"):
        ours.pack(ours.rows(torch.randn(3, 8), "dispatched"))
