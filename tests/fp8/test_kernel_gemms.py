"""The GPU back ends through Triton's interpreter: the same layer as the emulation, to FP32 rounding."""

import dataclasses

import pytest
import torch

from headrace.config.compose import load
from headrace.fp8.emulated import ReferenceGemms
from headrace.fp8.linear import Linear, StackedLinear, put_weight_gradient
from headrace.fp8.weight_gradients import WeightGradientStore

pytest.importorskip("triton", reason="would run the FP8 layer through Triton's interpreter; triton is Linux only")

FP8 = load(["experiment=tiny", "precision=fp8"]).precision.fp8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(inputs, outputs, **changes):
    from headrace.fp8.kernel_gemms import KernelGemms

    config = dataclasses.replace(FP8, **changes)
    layers = []
    for gemms in (
        ReferenceGemms(dataclasses.replace(config, backend="reference"), "fp32"),
        KernelGemms(dataclasses.replace(config, backend="triton"), "fp32"),
    ):
        torch.manual_seed(0)
        layer = Linear(inputs, outputs, gemms, WeightGradientStore()).to(DEVICE)
        torch.nn.init.normal_(layer.weight, std=0.1)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("role", ["hidden", "dispatched", "attention"])
def test_the_layer_equals_the_emulated_one(role):
    results = []
    for layer in both(136, 72):
        x = torch.randn(70, 136, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        dy = 1e-4 * torch.randn(70, 72, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        for _ in range(2):  # the second time adds to the gradient
            y = layer(x, role)
            y.backward(dy)
        results.append((y.detach(), x.grad, layer.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=float(1e-6 * ours.abs().max()))


def test_grouped_rows_equal_the_emulated_ones():
    results = []
    for like in both(8, 8):
        gemms = like.gemms
        layer = StackedLinear(3, 136, 72, gemms, WeightGradientStore()).to(DEVICE)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator(DEVICE).manual_seed(3))
        x = torch.randn(100, 136, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        index = torch.cat([torch.arange(100), torch.full((156,), -1), torch.arange(64), torch.full((64,), -1)]).to(
            DEVICE
        )
        rows = gemms.take(gemms.rows(x, "dispatched"), index)
        groups = [(0, 0, 256), (2, 256, 384)]
        y = gemms.forward(rows, layer.operand(), groups)
        dy = torch.randn(384, 72, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        dy[index < 0] = 0
        dy_rows, dy_columns = gemms.gradient(dy, "dispatched")
        dx = gemms.input_gradient(dy_rows, layer.operand(), groups)
        kept = gemms.keep(x, rows, "dispatched")
        put_weight_gradient(layer, dy_columns, lambda g=gemms, k=kept: g.columns(k, "dispatched"), groups)
        gate = gemms.restore_elementwise(gemms.keep_elementwise(x))
        results.append((y, dx, layer.weight.grad, gate))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=float(1e-6 * ours.abs().max()))
    assert results[1][2][1].count_nonzero() == 0


def test_a_weight_changed_between_forward_and_backward_is_refused():
    _, layer = both(136, 72)
    x = torch.randn(8, 136, device=DEVICE, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    layer.operand()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("width", [128, 136])
def test_packed_rows_are_the_emulations_bytes_and_come_back_to_the_bit(width):
    reference, kernel = (layer.gemms for layer in both(width, 8))
    x = (torch.randn(6, width) * torch.logspace(-3, 3, 6)[:, None]).to(DEVICE)
    rows = kernel.rows(x, "dispatched")
    packed = kernel.pack(rows)
    assert torch.equal(packed, reference.pack(reference.rows(x, "dispatched")))
    order = torch.tensor([4, -1, 0, 5], device=DEVICE)
    back = kernel.unpack(packed)
    for ours, theirs in ((back, rows), (kernel.take(back, order), kernel.take(rows, order))):
        assert torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
        assert torch.equal(ours.scales, theirs.scales)
    assert ours.scales.stride() == theirs.scales.stride()
    assert torch.equal(kernel.pack_gradient(x), reference.pack_gradient(x))
    assert torch.equal(kernel.unpack_gradient(packed), reference.unpack_gradient(packed))
