"""Routing against a brute force in float64, which shares neither the code nor the method of the kernels."""

import math
from types import SimpleNamespace

import pytest
import torch

from headrace_moe_routing import reference, route, route_backward

# experts, groups, groups chosen, experts per token
SHAPES = {
    "v3": (256, 8, 4, 8),
    "no groups": (64, 1, 1, 6),
    "all groups": (16, 4, 4, 3),
    "twelve experts, three groups": (12, 3, 2, 3),
    "pairs, one left over": (10, 5, 2, 4),
    "every expert of the chosen groups": (24, 4, 2, 12),
    "one": (7, 1, 1, 1),
}


def brute_force(logits, bias, groups, groups_chosen, chosen, normalise, factor):
    """Experts and weights of one token by sorting Python floats; ties by index."""
    scores = [1 / (1 + math.exp(-value)) for value in logits]
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    if groups_chosen < groups:
        sums = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in members]
        members = [members[g] for g in sorted(range(groups), key=lambda g: (-sums[g], g))[:groups_chosen]]
    allowed = [expert for group in members for expert in group]
    experts = sorted(allowed, key=lambda expert: (-biased[expert], expert))[:chosen]
    total = sum(scores[expert] for expert in experts) if normalise else 1.0
    return experts, [scores[expert] / total * factor for expert in experts]


def distinct_logits(tokens, experts, device, seed=0):
    """Scores that lie at least 1/4096 apart within a token, so that FP32 and float64 agree on every order."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(3 * experts, generator=generator)[:experts] for _ in range(tokens)])
    return torch.logit((ranks + 1).double() / (3 * experts + 1)).float().to(device)


def routers():
    return pytest.mark.parametrize("router", [route, reference.route], ids=["kernel", "reference"])


@routers()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [1, 11])
def test_agrees_with_brute_force(router, shape, tokens, device):
    experts, groups, groups_chosen, chosen = shape
    logits = distinct_logits(tokens, experts, device)
    # Biases that are multiples of the scores' spacing / 3 keep biased scores of one token apart; half are below -1.
    bias = torch.where(torch.arange(experts) % 2 == 0, -1.5, 0.1) + torch.arange(experts) / (9.0 * (3 * experts + 1))
    bias = bias.float().to(device)
    for normalise, factor in ((True, 2.5), (False, 1.0)):
        routed = router(logits, bias, groups, groups_chosen, chosen, normalise, factor)
        for token in range(tokens):
            expected_experts, expected_weights = brute_force(
                logits[token].tolist(), bias.tolist(), groups, groups_chosen, chosen, normalise, factor
            )
            assert routed.experts[token].tolist() == expected_experts
            assert routed.weights[token].tolist() == pytest.approx(expected_weights, rel=2e-6)


@routers()
def test_counts_and_offsets(router, device):
    logits, bias = distinct_logits(300, 12, device), torch.zeros(12, device=device)
    bias[4] = -2.0  # never chosen: an expert without rows
    bias[0] = 2.0  # always chosen: three blocks of 128
    routed = router(logits, bias, 3, 2, 3)
    counts = [sum(expert in chosen for chosen in routed.experts.tolist()) for expert in range(12)]
    assert counts[0] == 300
    assert counts[4] == 0
    assert routed.counts.tolist() == counts
    assert routed.offsets.tolist() == [sum(math.ceil(c / 128) * 128 for c in counts[:e]) for e in range(13)]
    assert routed.experts.dtype == routed.counts.dtype == routed.offsets.dtype == torch.int32


@routers()
def test_ties_go_to_the_lowest_index(router, device):
    logits, bias = torch.zeros(3, 16, device=device), torch.zeros(16, device=device)
    logits[1, 8:] = 1.0  # groups 2 and 3 tie above 0 and 1
    logits[2, [5, 6, 13, 14]] = 2.0  # two in group 1, two in group 3
    routed = router(logits, bias, 4, 2, 5)
    assert routed.experts.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12], [5, 6, 13, 14, 4]]


@routers()
def test_negative_scores_do_not_let_excluded_groups_in(router, device):
    # With zeros instead of -inf for excluded groups, every excluded expert would beat these.
    logits, bias = distinct_logits(9, 16, device), torch.full((16,), -3.0, device=device)
    routed = router(logits, bias, 4, 1, 4)
    assert all(len({expert // 4 for expert in chosen}) == 1 for chosen in routed.experts.tolist())


@routers()
def test_infinite_bias_switches_an_expert_off(router, device):
    logits, bias = distinct_logits(9, 16, device), torch.zeros(16, device=device)
    bias[3] = float("-inf")
    routed = router(logits, bias, 2, 2, 4)
    assert routed.counts[3] == 0
    assert routed.counts.sum() == 36


@routers()
def test_nan_is_chosen_and_shows_in_the_weights(router, device):
    logits, bias = distinct_logits(2, 16, device), torch.zeros(16, device=device)
    logits[1, 7] = float("nan")
    routed = router(logits, bias, 4, 2, 3)
    assert routed.experts[1, 0] == 7
    assert routed.weights[1].isnan().all()
    assert routed.weights[0].isfinite().all()
    assert all(len(set(chosen)) == 3 for chosen in routed.experts.tolist())


def test_no_tokens(device):
    routed = route(torch.empty(0, 8, device=device), torch.zeros(8, device=device), 2, 1, 2)
    assert routed.experts.shape == (0, 2)
    assert routed.offsets.tolist() == [0] * 9


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shape", [SHAPES["v3"], SHAPES["pairs, one left over"]], ids=["v3", "ten experts"])
def test_gradient_against_float64(shape, normalise, device):
    experts, groups, groups_chosen, chosen = shape
    logits, bias = distinct_logits(9, experts, device).requires_grad_(), torch.zeros(experts, device=device)
    routed = route(logits, bias, groups, groups_chosen, chosen, normalise, 2.5)
    upstream = torch.randn(routed.weights.shape, generator=torch.Generator().manual_seed(1)).to(device)
    routed.weights.backward(upstream)

    exact = logits.detach().double().requires_grad_()
    scores = exact.sigmoid().gather(1, routed.experts.long())
    weights = scores / scores.sum(dim=1, keepdim=True) if normalise else scores
    (weights * 2.5).backward(upstream.double())
    assert (logits.grad - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max()
    assert torch.equal(logits.grad, route_backward(upstream, logits.detach(), routed.experts, normalise, 2.5))


def test_selects_what_the_trainers_router_selects(device):
    """headrace's own selection, where headrace is installed; it leaves the order of the chosen open."""
    router = pytest.importorskip("headrace.model.router").Router
    logits, bias = distinct_logits(20, 32, device), torch.linspace(-2, -1.9, 32, device=device)
    rule = SimpleNamespace(e_score_correction_bias=bias, experts=32, groups=4, groups_chosen=2, chosen=4)
    theirs = router.select(rule, logits.sigmoid())
    assert torch.equal(theirs.sort(dim=1).values, route(logits, bias, 4, 2, 4).experts.long().sort(dim=1).values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 16, dtype=torch.bfloat16)}, "contiguous float32"),
        ({"logits": torch.zeros(16)}, "contiguous float32"),
        ({"bias": torch.zeros(15)}, r"bias is .*\[15\]"),
        ({"groups": 3}, "divide"),
        ({"groups_chosen": 5}, "5 of 4 groups"),
        ({"groups": 16, "groups_chosen": 2, "chosen": 2}, "two best"),
        ({"chosen": 9}, "hold 8 experts"),
        ({"chosen": 0}, "chosen is 0"),
    ],
)
def test_refuses_in_one_line(change, message):
    arguments = {"logits": torch.zeros(4, 16), "bias": torch.zeros(16), "groups": 4, "groups_chosen": 2, "chosen": 4}
    with pytest.raises(ValueError, match=message) as error:
        route(**(arguments | change))
    assert "\n" not in str(error.value)
