"""One step's gradient from microbatches: summed in FP32, equal to that of the whole batch at once.

Losses are means over equally long sequences, so the mean over microbatches of one size is the mean over the batch.
Gradients add up in the parameters' `.grad`, which is FP32 like the parameters, whatever the compute dtype. Expert
counts are integers and are summed over all microbatches: the router's bias moves once a step, from the whole batch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headrace.recipe.schedule import Step


class Losses(Protocol):
    """What a forward pass returns: means in nats per token, and tokens per expert by MoE layer [layers, E] int64."""

    @property
    def total(self) -> Tensor: ...  # main + mtp_weight * mtp + balance, differentiable
    @property
    def main(self) -> Tensor: ...
    @property
    def mtp(self) -> Tensor: ...
    @property
    def balance(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...


class LossModel(Protocol):
    """The part of the model that this module calls."""

    def losses(self, tokens_BL: Tensor, mtp_weight: float, balance_weight: float, /) -> Losses: ...


@dataclass
class BatchLosses:
    """Means over a whole batch, still on the device, so that nothing waits for them."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    counts: Tensor  # int64 [layers, E]


def accumulate(model: LossModel, batch_BL: Tensor, plan: Step, microbatch: int) -> BatchLosses:
    """Add the gradient of the mean loss over `batch_BL` to the parameters' `.grad`, `microbatch` rows at a time."""
    assert len(batch_BL) % microbatch == 0, "the configuration's check lets only divisors through"
    parts = torch.split(batch_BL, microbatch)
    sums: BatchLosses | None = None
    for part in parts:
        losses = model.losses(part, plan.mtp_weight, plan.balance_weight)
        (losses.total / len(parts)).backward()  # type: ignore[no-untyped-call]
        sums = _add(sums, losses, 1 / len(parts))
    assert sums is not None
    return sums


@torch.no_grad()
def measure(model: LossModel, rows_BL: Tensor, microbatch: int) -> BatchLosses:
    """Mean losses over `rows_BL` without gradients; the last part may be smaller than `microbatch`."""
    sums: BatchLosses | None = None
    for part in torch.split(rows_BL, microbatch):
        sums = _add(sums, model.losses(part, 0.0, 0.0), len(part) / len(rows_BL))
    assert sums is not None
    return sums


def _add(sums: BatchLosses | None, losses: Losses, weight: float) -> BatchLosses:
    main, mtp, balance = (loss.detach().float() * weight for loss in (losses.main, losses.mtp, losses.balance))
    if sums is None:
        return BatchLosses(main, mtp, balance, losses.counts.detach().clone())
    return BatchLosses(sums.main + main, sums.mtp + mtp, sums.balance + balance, sums.counts + losses.counts.detach())
