"""The linear layer against plain autograd, and its BF16 copy against the weight it copies."""

import pytest
import torch
from torch.nn import functional

from headrace.fp8.linear import Linear
from headrace.fp8.weight_gradients import WeightGradientStore


def _layer(compute):
    layer = Linear(6, 4, compute, WeightGradientStore())
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("deferred", [False, True])
def test_three_gemms_equal_plain_autograd(deferred):
    layer = _layer("fp32")
    x = torch.randn(2, 3, 6, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    if deferred:
        with layer.store.deferred():
            layer(x).backward(dy)
        assert layer.weight.grad is None
        assert x.grad is not None
        layer.store.flush()
    else:
        layer(x).backward(dy)
    x64, w64 = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    functional.linear(x64, w64).backward(dy.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-6)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad.double(), 2 * w64.grad, rtol=1e-5, atol=1e-6)


def test_bf16_copy_follows_every_way_a_weight_changes():
    layer = _layer("bf16")
    # PyTorch's fused optimizers change weights without raising the version counter.
    for options in ({"fused": True}, {"fused": False, "foreach": True}, {"fused": False, "foreach": False}):
        optimizer = torch.optim.AdamW([layer.weight], lr=0.1, **options)
        layer(torch.randn(3, 6).bfloat16()).sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        optimizer.step()
        assert torch.equal(layer.computed(), layer.weight.detach().bfloat16())
    layer.load_state_dict({"weight": torch.ones(4, 6)})
    assert torch.equal(layer.computed(), torch.ones(4, 6).bfloat16())
    layer.weight = torch.nn.Parameter(torch.zeros(4, 6))
    assert torch.equal(layer.computed(), torch.zeros(4, 6).bfloat16())


def test_bf16_copy_is_cast_once_per_step():
    layer, x = _layer("bf16"), torch.randn(3, 6).bfloat16()
    casts = layer.computed()._version
    assert layer.computed()._version == casts
    with layer.store.accumulating():
        for _ in range(3):
            layer(x).sum().backward()
    assert layer.computed()._version == casts + 1
    layer(x)
    layer(x)
    assert layer.computed()._version == casts + 1


def test_a_weight_changed_between_forward_and_backward_is_refused():
    for compute in ("fp32", "bf16"):
        layer = _layer(compute)
        x = torch.randn(3, 6, requires_grad=True)
        y = layer(x.to(layer.dtype))
        with torch.no_grad():
            layer.weight.add_(1)
        layer.computed()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_no_gradient_work_for_a_frozen_weight():
    layer = _layer("fp32")
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
