"""The weight-gradient store: now or later gives the same."""

import torch
from torch.nn import Parameter

from headrace.fp8.gemms import add_product
from headrace.fp8.weight_gradients import WeightGradientStore


def test_work_runs_at_once_or_in_order_at_flush():
    store, log = WeightGradientStore(), []
    store.put(lambda: log.append("now"))
    with store.deferred():
        store.put(lambda: log.append("first"))
        store.put(lambda: log.append("second"))
        assert log == ["now"]
    store.put(lambda: log.append("between"))
    store.flush()
    assert log == ["now", "between", "first", "second"]
    store.flush()
    assert len(log) == 4


def test_recycled_buffers_are_overwritten_not_added_to():
    store, parameter = WeightGradientStore(), Parameter(torch.zeros(3, 2))
    left, right = torch.randn(5, 3), torch.randn(5, 2)
    add_product(*store.gradient(parameter), left, right)
    buffer = parameter.grad
    store.recycle([parameter])
    assert parameter.grad is None
    add_product(*store.gradient(parameter), left, right)
    assert parameter.grad is buffer
    torch.testing.assert_close(parameter.grad, left.T @ right)
    add_product(*store.gradient(parameter), left, right)
    torch.testing.assert_close(parameter.grad, 2 * left.T @ right)
