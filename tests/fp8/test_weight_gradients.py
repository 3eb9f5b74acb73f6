"""The weight-gradient store: now or later gives the same, in FP32."""

import torch
from torch.nn import Parameter

from headrace.fp8.weight_gradients import WeightGradientStore, add_product


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


def test_bf16_products_accumulate_in_fp32():
    store, parameter = WeightGradientStore(), Parameter(torch.zeros(1, 1))
    one, tiny = torch.ones(1, 1).bfloat16(), torch.full((1, 1), 2.0**-10).bfloat16()
    add_product(*store.gradient(parameter), one, one)
    for _ in range(4):
        add_product(*store.gradient(parameter), one, tiny)
    assert parameter.grad.dtype == torch.float32
    assert parameter.grad.item() == 1 + 4 * 2.0**-10  # in BF16 each addition would round back to 1
