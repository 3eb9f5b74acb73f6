"""The head's cross entropy against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from headrace.fp8.linear import Linear
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.loss import cross_entropy, log_probabilities


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_value_and_gradients_under_a_loss_weight(tokens, compute, tolerance):
    torch.manual_seed(0)
    head = Linear(16, 40, compute, WeightGradientStore())
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(tokens, 16).to(head.dtype).requires_grad_()
    targets = torch.randint(40, (tokens,))
    loss = cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32
    (0.3 * loss).backward()

    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = head.computed().double().requires_grad_()
    expected = functional.cross_entropy(hidden64 @ weight64.T, targets)
    (0.3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, reference in [(hidden.grad, hidden64.grad), (head.weight.grad, weight64.grad)]:
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()
    with torch.no_grad():
        assert cross_entropy(hidden, head, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    by_token = log_probabilities(hidden, head, targets)
    reference = functional.log_softmax((hidden64 @ weight64.T).detach(), 1).gather(1, targets[:, None])[:, 0]
    assert (by_token.double() - reference).abs().max() <= 10 * tolerance


def test_extreme_logits_stay_finite():
    head = Linear(1, 3, "fp32", WeightGradientStore())
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [-1e4]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = cross_entropy(hidden, head, torch.tensor([2]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert hidden.grad.item() == pytest.approx(2e4)


def test_a_second_backward_is_refused_or_equal():
    head = Linear(4, 5, "fp32", WeightGradientStore())
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(hidden, head, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)
