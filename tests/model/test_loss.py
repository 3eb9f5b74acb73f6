"""The head's cross entropy against torch's in float64."""

import pytest
import torch
from torch.nn import functional

from headrace.fp8.linear import Linear
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.loss import IGNORED, cross_entropy, inputs_of, log_probabilities


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


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
@pytest.mark.parametrize("absent", [0.0, 0.3, 1.0])
def test_absent_targets_add_nothing_and_the_divisor_stays_the_number_of_places(compute, tolerance, absent):
    torch.manual_seed(1)
    head = Linear(16, 40, compute, WeightGradientStore())
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(150, 16).to(head.dtype).requires_grad_()
    targets = torch.randint(40, (150,)).masked_fill(torch.rand(150) < absent, IGNORED)
    loss = cross_entropy(hidden, head, targets)
    loss.backward()

    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = head.computed().double().requires_grad_()
    logits = hidden64 @ weight64.T
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / 150
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, reference in [(hidden.grad, hidden64.grad), (head.weight.grad, weight64.grad)]:
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()
    assert not hidden.grad[targets == IGNORED].any()
    with torch.no_grad():
        assert cross_entropy(hidden, head, targets).item() == pytest.approx(loss.item(), rel=1e-6)
    by_token = log_probabilities(hidden, head, targets)
    assert not by_token[targets == IGNORED].any()
    assert -by_token.double().sum().item() / 150 == pytest.approx(expected.item(), rel=tolerance)


def test_split_batches_add_up_whatever_their_padding():
    """A mean over the targets that are there would weigh the half with more padding higher."""
    torch.manual_seed(2)
    head = Linear(8, 20, "fp32", WeightGradientStore())
    torch.nn.init.normal_(head.weight)
    hidden, targets = torch.randn(60, 8, requires_grad=True), torch.randint(20, (60,))
    targets[7:30] = IGNORED
    cross_entropy(hidden, head, targets).backward()
    whole, weight = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    for part in (slice(0, 30), slice(30, 60)):
        (cross_entropy(hidden[part], head, targets[part]) / 2).backward()
    torch.testing.assert_close(hidden.grad, whole)
    torch.testing.assert_close(head.weight.grad, weight)


def test_rows_end_on_in_their_last_token_where_they_are_short():
    rows = torch.tensor([[5, 6, 1, IGNORED, IGNORED], [5, 6, 7, 8, 9], [1, IGNORED, IGNORED, IGNORED, IGNORED]])
    expected = [[5, 6, 1, 1, 1], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1]]
    assert inputs_of(rows).tolist() == expected
