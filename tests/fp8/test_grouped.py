"""Grouped GEMMs against one float64 product per row."""

import pytest
import torch
from torch.nn import Parameter

from headrace.fp8 import grouped
from headrace.fp8.weight_gradients import WeightGradientStore

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [0, 4, 0, 5]]


@pytest.mark.parametrize("counts", COUNTS)
def test_forward_and_both_gradients(counts):
    torch.manual_seed(0)
    rows, inputs, outputs = sum(counts), 7, 5
    x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight = Parameter(torch.randn(len(counts), outputs, inputs))
    group_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    per_row = weight.detach().double()[group_of_row]
    groups = grouped.groups_of(counts)

    y = grouped.forward(x, weight.detach(), groups)
    torch.testing.assert_close(y.double(), torch.einsum("soi,si->so", per_row, x.double()), rtol=1e-5, atol=1e-5)
    expected_dx = torch.einsum("soi,so->si", per_row, dy.double())
    dx = grouped.input_gradient(dy, weight.detach(), groups)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
    dx = grouped.input_gradient(dy, weight.detach(), groups, add_to=dx)
    torch.testing.assert_close(dx.double(), 2 * expected_dx, rtol=1e-5, atol=1e-5)

    expected_dw = torch.zeros(weight.shape, dtype=torch.float64)
    expected_dw.index_add_(0, group_of_row, torch.einsum("so,si->soi", dy.double(), x.double()))
    store = WeightGradientStore()
    for times in (1, 2):
        grouped.put_weight_gradient(store, weight, dy, x, groups)
        torch.testing.assert_close(weight.grad.double(), times * expected_dw, rtol=1e-5, atol=1e-5)
    # A recycled buffer holds old numbers: the slices of groups without rows must come out as zeros again.
    store.recycle([weight])
    grouped.put_weight_gradient(store, weight, dy, x, groups)
    torch.testing.assert_close(weight.grad.double(), expected_dw, rtol=1e-5, atol=1e-5)
