"""A node of four ranks, with tokens, choices and experts that are easy to compute by hand."""

import torch

from headrace_dispatch import BufferPlan

PLAN = BufferPlan(ranks=4, capacity=12, columns=512, chosen=4, experts_per_rank=4)
TOKENS = (12, 5, 0, 9)  # of each rank


def choices(rank, tokens=None, seed=0):
    """Experts int32 [N, 4], distinct in a token; and weights FP32 [N, 4]."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    tokens = TOKENS[rank] if tokens is None else tokens
    experts = torch.rand(tokens, 16, generator=generator).topk(4, dim=1).indices.int()
    experts[: min(1, tokens)] = torch.tensor([4, 5, 6, 7], dtype=torch.int32)  # one token stays with one rank
    return experts, torch.rand(tokens, 4, generator=generator)


def hidden(rank, tokens=None):
    """BF16 [N, 512]."""
    tokens = TOKENS[rank] if tokens is None else tokens
    return torch.randn(tokens, PLAN.columns, generator=torch.Generator().manual_seed(rank)).bfloat16()


def run_experts(rank, received, results, result_weights):
    """What a rank does with what it received: expert e multiplies by e + 1, in FP32; the weight is applied; one sum.

    The numbers offered as gradients of the weights are the expert's number and the weight.
    """
    results.zero_()
    for slot, (chosen, weights) in enumerate(zip(received.experts.tolist(), received.weights.tolist(), strict=True)):
        total = torch.zeros(PLAN.columns)
        for k, (expert, weight) in enumerate(zip(chosen, weights, strict=True)):
            if expert >= 0 and expert // PLAN.experts_per_rank == rank:
                total += received.rows[slot].cpu().float() * (expert + 1) * weight
                result_weights[slot, k] = 1000 * expert + weight
        results[slot] = total.bfloat16()
