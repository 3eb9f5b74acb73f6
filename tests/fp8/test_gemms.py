"""Plain GEMMs, grouped: against one float64 product per row."""

import pytest
import torch
from torch.nn import Parameter

from headrace.fp8.gemms import PlainGemms, add_product, groups_of
from headrace.fp8.linear import StackedLinear, put_weight_gradient
from headrace.fp8.weight_gradients import WeightGradientStore

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [0, 4, 0, 5]]


@pytest.mark.parametrize("counts", COUNTS)
def test_forward_and_both_gradients(counts):
    torch.manual_seed(0)
    rows, inputs, outputs = sum(counts), 7, 5
    x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
    store, gemms = WeightGradientStore(), PlainGemms("fp32")
    layer = StackedLinear(len(counts), inputs, outputs, gemms, store)
    weight = torch.nn.init.normal_(layer.weight)
    group_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    per_row = weight.detach().double()[group_of_row]
    groups = groups_of(counts)

    y = gemms.forward(x, layer.operand(), groups)
    torch.testing.assert_close(y.double(), torch.einsum("soi,si->so", per_row, x.double()), rtol=1e-5, atol=1e-5)
    expected_dx = torch.einsum("soi,so->si", per_row, dy.double())
    dx = gemms.input_gradient(dy, layer.operand(), groups)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
    dx = gemms.input_gradient(dy, layer.operand(), groups, add_to=dx)
    torch.testing.assert_close(dx.double(), 2 * expected_dx, rtol=1e-5, atol=1e-5)

    expected_dw = torch.zeros(weight.shape, dtype=torch.float64)
    expected_dw.index_add_(0, group_of_row, torch.einsum("so,si->soi", dy.double(), x.double()))
    for times in (1, 2):
        put_weight_gradient(layer, dy, lambda: x, groups)
        torch.testing.assert_close(weight.grad.double(), times * expected_dw, rtol=1e-5, atol=1e-5)
    # A recycled buffer holds old numbers: the slices of groups without rows must come out as zeros again.
    store.recycle([weight])
    put_weight_gradient(layer, dy, lambda: x, groups)
    torch.testing.assert_close(weight.grad.double(), expected_dw, rtol=1e-5, atol=1e-5)


def test_bf16_products_accumulate_in_fp32():
    store, parameter = WeightGradientStore(), Parameter(torch.zeros(1, 1))
    one, tiny = torch.ones(1, 1).bfloat16(), torch.full((1, 1), 2.0**-10).bfloat16()
    add_product(*store.gradient(parameter), one, one)
    for _ in range(4):
        add_product(*store.gradient(parameter), one, tiny)
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.item() == 1 + 4 * 2.0**-10  # in BF16 each addition would round back to 1


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp64"])
def test_packed_rows_are_their_bytes(compute):
    gemms = PlainGemms(compute)
    x = torch.randn(4, 6).to(gemms.dtype).T  # not contiguous
    packed = gemms.pack(gemms.rows(x, "dispatched"))
    assert packed.shape == (6, 4 * gemms.dtype.itemsize)
    assert packed.numpy().tobytes() == x.contiguous().view(torch.uint8).numpy().tobytes()
    assert torch.equal(gemms.unpack(packed), x)


def test_float64_weights_keep_their_digits():
    gemms, store = PlainGemms("fp64"), WeightGradientStore()
    layer = StackedLinear(1, 7, 5, gemms, store).double()
    torch.nn.init.normal_(layer.weight)
    x, dy = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    y = gemms.forward(x, layer.operand(), [(0, 0, 9)])
    torch.testing.assert_close(y, x @ layer.weight[0].detach().T, rtol=1e-14, atol=1e-14)
    for _ in range(2):
        put_weight_gradient(layer, dy, lambda: x, [(0, 0, 9)])
    torch.testing.assert_close(layer.weight.grad[0], 2 * dy.T @ x, rtol=1e-14, atol=1e-14)
