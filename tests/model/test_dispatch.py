"""Dispatch and combine against indexing, for FP32 (dense rows) and BF16 (rows filled up)."""

import pytest
import torch

from headrace.fp8.gemms import PlainGemms
from headrace.model.dispatch import LocalDispatcher, as_rows, as_tokens
from headrace.model.router import Routing


def _routing(tokens, experts, chosen):
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(experts - 1, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator).requires_grad_()
    return Routing(indices, weights, torch.empty(0), torch.bincount(indices.flatten(), minlength=experts))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_rows_are_sorted_by_expert_and_come_back_to_their_tokens(compute):
    dispatcher, dtype = LocalDispatcher(PlainGemms(compute)), PlainGemms(compute).dtype
    routing = _routing(tokens=50, experts=7, chosen=3)  # the last expert gets nothing
    x = torch.randint(-8, 8, (50, 4)).to(dtype).requires_grad_()  # small integers: sums are exact in BF16 too
    sent = dispatcher.send(x.detach(), routing)
    rows, weights = as_rows(dispatcher, sent, x, routing.weights_NK)
    multiple = 1 if dtype == torch.float32 else 32
    assert sent.counts == [-(-count // multiple) * multiple for count in routing.counts_E.tolist()]
    start, seen = 0, []
    for expert, count in enumerate(sent.counts):
        span = slice(start, start + count)
        real = [(t, k) for t in range(50) for k in range(3) if routing.experts_NK[t, k] == expert]
        filled = weights[span].tolist()
        assert filled == [routing.weights_NK[t, k].item() for t, k in real] + [0.0] * (count - len(real))
        assert torch.equal(sent.operand[span][: len(real)], x[[t for t, _ in real]])
        seen += real
        start += count
    assert len(seen) == 150
    assert start == sent.rows == rows.shape[0]

    back = as_tokens(dispatcher, sent, rows + sent.operand)  # rows is all zeros and carries the gradient
    assert torch.equal(back, 3 * x)
    back.backward(torch.ones_like(back))
    assert torch.equal(x.grad, torch.full_like(x, 3))
    weights.sum().backward()
    assert torch.equal(routing.weights_NK.grad, torch.ones(50, 3))
