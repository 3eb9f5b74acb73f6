"""Which experts a token goes to, with what weight, and how the load is kept even without an auxiliary loss.

    s = sigmoid(x W^T)                      FP32
    z = s + b                               b selects only; no gradient reaches it
    groups: the best `topk_group` by the sum of their two largest z; experts of other groups count as -inf
    experts: the best `num_experts_per_tok` of z;  weight = s / sum of the chosen s * routed_scaling_factor

(Report, section 2.1.2, eq. 12-16. The scaling factor and the use of biased scores for the groups are in the released
code only; excluded groups are masked with -inf because biases may turn z negative.)

Load: after each step b_i rises by gamma where expert i got fewer tokens than the mean and falls where it got more
(arXiv 2408.15664, algorithm 1). A weak sequence-wise loss (report, eq. 17-20) guards against extremes within a
sequence.
Shapes: N tokens, D model width, E experts, K experts per token, B sequences, T tokens of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation


@dataclass(frozen=True)
class Routing:
    """The router's decision for N tokens."""

    experts_NK: Tensor  # int64
    weights_NK: Tensor  # FP32, differentiable
    scores_NE: Tensor  # FP32 sigmoid scores, differentiable
    counts_E: Tensor  # int64: how many tokens chose each expert


class Router(nn.Module):
    """Sigmoid router with a selection bias and group-limited top-k; `weight` [E, D] and the bias [E] are FP32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.chosen = config.n_routed_experts, config.num_experts_per_tok
        self.groups, self.groups_chosen = config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size, dtype=torch.float32))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor | Activation) -> Routing:
        """Route normalised hidden states [N, D] of any float dtype."""
        given = Activation.of(x_ND)
        scores_NE = _RouterLogits.apply(given.value, self.weight, given).sigmoid()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            experts_NK = self.select(scores_NE)
            counts_E = torch.bincount(experts_NK.flatten(), minlength=self.experts)
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.normalise:
            weights_NK = weights_NK / (weights_NK.sum(dim=1, keepdim=True) + 1e-20)
        return Routing(experts_NK, weights_NK * self.factor, scores_NE, counts_E)

    def select(self, scores_NE: Tensor) -> Tensor:
        """Indices [N, K] of the experts chosen from sigmoid scores [N, E]."""
        biased_NE = scores_NE + self.e_score_correction_bias
        if self.groups_chosen < self.groups:
            grouped = biased_NE.view(-1, self.groups, self.experts // self.groups)
            best = grouped.topk(2, dim=2).values.sum(dim=2).topk(self.groups_chosen, dim=1, sorted=False).indices
            excluded = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            biased_NE = grouped.masked_fill(excluded[..., None], float("-inf")).flatten(1)
        return biased_NE.topk(self.chosen, dim=1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor, speed: float) -> None:
        """b_i += speed * sign(mean(c) - c_i), with c the tokens each expert got in the whole global batch."""
        counts = counts_E.to(self.e_score_correction_bias.device)
        below_mean = (counts.sum() - counts * self.experts).sign()  # in integers, so that the sign is exact
        self.e_score_correction_bias += speed * below_mean


class _RouterLogits(torch.autograd.Function):
    """x W^T in FP32. Keeps x as it is or not at all, where autograd would keep a copy in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, given: Activation) -> Tensor:
        ctx.save_for_backward(weight, *(given.again.tensors if given.again else (x,)))
        ctx.function, ctx.shape, ctx.dtype = given.again.function if given.again else None, x.shape, x.dtype
        return x.to(weight.dtype) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, *kept = ctx.saved_tensors
        x = kept[0] if ctx.function is None else ctx.function(*kept).view(ctx.shape)
        return (dlogits @ weight).to(ctx.dtype), dlogits.T @ x.to(weight.dtype), None


def balance_loss(scores_BTE: Tensor, chosen: int) -> Tensor:
    """Sequence-wise balance loss without its weight alpha (report, eq. 17-20), averaged over sequences: a scalar.

    sum_i f_i P_i with f_i = E/(K T) * (tokens of the sequence that have i among their K largest scores), from scores
    without bias and groups as the report prints it, and P_i the mean of the scores normalised over experts.
    A perfectly even load gives 1.
    """
    batch, tokens, experts = scores_BTE.shape
    with torch.no_grad():
        top = scores_BTE.topk(chosen, dim=2, sorted=False).indices.view(batch, -1)
        offsets = torch.arange(0, batch * experts, experts, device=top.device)[:, None]
        hits = torch.bincount((top + offsets).flatten(), minlength=batch * experts).view(batch, experts)
        share_BE = hits * (experts / (chosen * tokens))
    probability_BE = (scores_BTE / scores_BTE.sum(dim=2, keepdim=True)).mean(dim=1)
    return (share_BE * probability_BE).sum(dim=1).mean()
