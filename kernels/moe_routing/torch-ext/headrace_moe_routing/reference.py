"""What the routing kernels compute, in plain PyTorch, for any device: written to be read, not to be fast.

Legend: N tokens, E experts, K experts per token, G groups. The rules are in routing.py.
"""

from __future__ import annotations

import torch

from .routing import ROWS_MULTIPLE, Routed, check


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    groups_chosen: int,
    chosen: int,
    normalise: bool = True,
    factor: float = 1.0,
) -> Routed:
    """As ``headrace_moe_routing.route``; autograd differentiates the weights."""
    check(logits, bias, groups, groups_chosen, chosen)
    E = logits.shape[1]
    scores = logits.sigmoid()
    biased = (scores + bias).detach()
    if groups_chosen < groups:
        grouped = biased.view(-1, groups, E // groups)
        sums = grouped.topk(2, dim=2).values.sum(dim=2)
        excluded = torch.ones_like(sums, dtype=torch.bool).scatter(1, largest(sums, groups_chosen), False)
        biased = grouped.masked_fill(excluded[:, :, None], float("-inf")).flatten(1)
    experts = largest(biased, chosen)
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    counts = torch.bincount(experts.flatten(), minlength=E)
    ends = ((counts + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return Routed(experts.int(), weights * factor, counts.int(), offsets.int())


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [N, count] of the largest values of each row, largest first, equal ones by index."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]
