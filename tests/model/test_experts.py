"""The grouped SwiGLU function against plain autograd in float64, one expert at a time."""

import pytest
import torch
from torch.nn import functional

from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.dispatch import Received
from headrace.model.experts import DenseFeedForward, Experts

COUNTS = [40, 0, 7, 300, 1]


def _reference(x, weights, counts, gate, up, down):
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        rows = x[start : start + count]
        hidden = functional.silu(rows @ gate[expert].T) * (rows @ up[expert].T)
        outputs.append((hidden @ down[expert].T) * weights[start : start + count, None])
        start += count
    return torch.cat(outputs)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_value_and_every_gradient(compute, deferred):
    torch.manual_seed(0)
    experts = Experts(
        len(COUNTS), 24, 640, Numerics(compute), WeightGradientStore()
    )  # wide enough for several blocks of rows
    parameters = [experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    dtype = experts.gate_proj.dtype
    x, dy = torch.randn(sum(COUNTS), 24).to(dtype).requires_grad_(), torch.randn(sum(COUNTS), 24).to(dtype)
    weights = torch.rand(sum(COUNTS), requires_grad=True)
    y = experts(x, weights, Received(x.detach(), weights.detach(), COUNTS, None))
    if deferred:
        with experts.gate_proj.store.deferred():
            y.backward(dy)
        assert all(parameter.grad is None for parameter in parameters)
        experts.gate_proj.store.flush()
    else:
        y.backward(dy)

    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *parameters)]
    expected = _reference(leaves[0], leaves[1], COUNTS, *leaves[2:])
    expected.backward(dy.double())
    tolerance = 1e-6 if compute == "fp32" else 1e-2
    ours = [y, x.grad, weights.grad, *(parameter.grad for parameter in parameters)]
    for value, reference in zip(ours, [expected, *(leaf.grad for leaf in leaves)], strict=True):
        assert (value.double() - reference).norm() <= tolerance * reference.norm()
    assert all(parameter.grad[1].count_nonzero() == 0 for parameter in parameters)  # the expert without rows


def test_dense_network_is_the_same_function_with_one_group():
    torch.manual_seed(0)
    dense = DenseFeedForward(8, 12, Numerics("fp32"), WeightGradientStore())
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8, requires_grad=True)
    dense(x).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, *dense.parameters())]
    x64, gate, up, down = leaves
    ((functional.silu(x64 @ gate.T) * (x64 @ up.T)) @ down.T).sum().backward()
    for ours, leaf in zip((x, *dense.parameters()), leaves, strict=True):
        torch.testing.assert_close(ours.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)
