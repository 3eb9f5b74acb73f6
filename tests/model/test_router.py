"""Routing against a direct transcription in Python, balance loss against float64 loops, the bias rule by hand."""

import dataclasses
import math

import pytest
import torch

import transformers_peer as peers
from headrace.model.router import Router, balance_loss


def _router(seed, **changes):
    config = dataclasses.replace(peers.random_config(seed), **changes)
    router = Router(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(generator=generator)
    return config, router, torch.randn(40, config.hidden_size, generator=generator)


def _route_one(scores, bias, config):
    """One token in plain Python (report, eq. 12-16)."""
    per_group = config.n_routed_experts // config.n_group
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    value_of = {g: sum(sorted(biased[g * per_group : (g + 1) * per_group])[-2:]) for g in range(config.n_group)}
    groups = sorted(value_of, key=value_of.get)[-config.topk_group :]
    reachable = [e for e in range(config.n_routed_experts) if e // per_group in groups]
    chosen = sorted(reachable, key=lambda e: biased[e])[-config.num_experts_per_tok :]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("seed", range(8))
def test_selection_weights_and_counts(seed):
    config, router, x = _router(seed)
    routing = router(x)
    scores = torch.sigmoid(x.double() @ router.weight.detach().double().T).tolist()
    counts = [0] * config.n_routed_experts
    for token, row in enumerate(scores):
        expected = _route_one(row, router.e_score_correction_bias.tolist(), config)
        ours = dict(zip(routing.experts_NK[token].tolist(), routing.weights_NK[token].tolist(), strict=True))
        assert ours == pytest.approx(expected, rel=1e-5)
        for expert in expected:
            counts[expert] += 1
    assert routing.counts_E.dtype == torch.int64
    assert routing.counts_E.tolist() == counts
    assert routing.weights_NK.dtype == routing.scores_NE.dtype == torch.float32


def test_excluded_groups_stay_excluded_when_all_biased_scores_are_negative():
    """Masking with 0 instead of -inf would prefer the excluded groups here."""
    _, router, x = _router(0, n_routed_experts=8, n_group=4, topk_group=1, num_experts_per_tok=2, norm_topk_prob=True)
    router.e_score_correction_bias.fill_(-3.0)
    groups = router(x).experts_NK // 2
    assert (groups[:, 0] == groups[:, 1]).all()


def test_router_works_in_fp32_on_bf16_input_and_the_bias_gets_no_gradient():
    _, router, x = _router(3)
    x = x.bfloat16()
    routing = router(x)
    assert torch.equal(routing.scores_NE, router(x.float()).scores_NE)
    routing.weights_NK.square().sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.e_score_correction_bias.grad is None
    assert not router.e_score_correction_bias.requires_grad


def test_bias_rises_below_the_mean_and_falls_above_it():
    _, router, _ = _router(0, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    router.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.25]))
    router.update_bias(torch.tensor([10, 2, 6, 6]), 0.001)  # mean 6
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.499, -0.499, 0.0, 0.25]))
    large = 2**40 + 1  # a float32 mean could not tell these apart
    router.e_score_correction_bias.zero_()
    router.update_bias(torch.tensor([large, large, large, large - 1]), 1.0)
    assert router.e_score_correction_bias.tolist() == [-1, -1, -1, 1]


def test_repeated_updates_even_out_the_load():
    config, router, x = _router(5, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2)
    x = torch.randn(2000, config.hidden_size, generator=torch.Generator().manual_seed(1))
    router.e_score_correction_bias.zero_()
    with torch.no_grad():
        router.weight.mul_(0.1)
        router.weight[0] += 0.05 * x.mean(0).sign()
    violations = []
    for _ in range(300):
        counts = router(x).counts_E
        violations.append((counts.max() / counts.double().mean() - 1).item())
        router.update_bias(counts, 0.002)
    assert violations[-1] < 0.05 < violations[0]


def test_balance_loss_and_its_gradient_against_loops():
    """Report, eq. 17-20, term by term."""
    torch.manual_seed(0)
    batch, tokens, experts, chosen = 3, 11, 6, 2
    scores = torch.rand(batch, tokens, experts, requires_grad=True)
    loss = balance_loss(scores, chosen)
    loss.backward()
    reference = scores.detach().double().requires_grad_()
    total = 0.0
    for sequence in reference:
        for expert in range(experts):
            hits = sum(expert in row.topk(chosen).indices.tolist() for row in sequence)
            share = experts / (chosen * tokens) * hits
            total = total + share * sum(row[expert] / row.sum() for row in sequence) / tokens
    total = total / batch
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(scores.grad.double(), reference.grad, rtol=1e-5, atol=1e-8)


def test_balance_loss_of_an_even_load_is_one():
    rows = [torch.roll(torch.tensor([0.9, 0.9, 0.1, 0.1]), shift) for shift in range(4)]
    assert math.isclose(balance_loss(torch.stack(rows)[None], 2).item(), 1.0, rel_tol=1e-6)
