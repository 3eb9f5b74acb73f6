"""Cross entropy of the output head, with one [tokens, vocabulary] buffer and no more.

The logits are the largest tensor of a training step. The usual chain keeps them in the compute dtype, in FP32, as log
probabilities and as gradients. Here the buffer of logits is turned in place, a few rows at a time in FP32, into the
gradient (softmax - one-hot) / tokens while the loss is computed; the backward pass only multiplies it by the weight and
by the hidden states. Without gradients not even that buffer exists.

A target may be absent (`IGNORED`): behind the last token of a document that ends its row there is nothing to predict.
Losses are sums over the targets that are there, divided by the number of all places, N. So the divisor is the same
constant for every microbatch, and however a batch is split over microbatches and ranks, losses and gradients add up to
the same; a mean over present targets alone would weigh a microbatch with more padding higher.
Shapes: N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from headrace.fp8.gemms import wide
from headrace.fp8.linear import Linear, one_group, put_weight_gradient
from headrace.fp8.products import mm

IGNORED = -1
"""A target that is absent; rows of tokens have it where there is no token (see `tokens.loader`)."""
_ROWS = 64  # rows turned at a time on the CPU
_CHUNK = 1024  # tokens whose logits exist at a time without gradients


def cross_entropy(hidden_ND: Tensor, head: Linear, targets_N: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not `IGNORED`, divided by N: an FP32 scalar."""
    if torch.is_grad_enabled():
        result: Tensor = _HeadCrossEntropy.apply(hidden_ND, head.weight, head, targets_N)  # type: ignore[no-untyped-call]
        return result
    return -log_probabilities(hidden_ND, head, targets_N).mean()


@torch.no_grad()
def log_probabilities(hidden_ND: Tensor, head: Linear, targets_N: Tensor) -> Tensor:
    """log p(target) in nats, [N] FP32, without gradients; 0 where the target is `IGNORED`."""
    parts = []
    for hidden, targets in zip(torch.split(hidden_ND, _CHUNK), torch.split(targets_N, _CHUNK), strict=True):
        logits = head(hidden)
        logits = logits.to(wide(logits.dtype))
        log_p = logits.gather(1, targets[:, None].clamp(min=0))[:, 0] - logits.logsumexp(dim=1)
        parts.append(log_p.masked_fill(targets == IGNORED, 0.0))
    return torch.cat(parts)


def inputs_of(rows_BL: Tensor) -> Tensor:
    """Rows of tokens with `IGNORED` at their ends, as they can be embedded: each ends on in its last token.

    That is the end of a document, since only such a row is short. What the model makes of it has no target.
    """
    present = rows_BL != IGNORED
    last = present.sum(dim=1, keepdim=True) - 1
    return torch.where(present, rows_BL, rows_BL.gather(1, last))


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: nn.Parameter, head: Linear, targets: Tensor) -> Tensor:
        computed = head.computed()
        buffer = mm(hidden, computed.T)
        tokens = buffer.shape[0]
        losses = buffer.new_empty(tokens, dtype=wide(buffer.dtype))
        step = _ROWS if buffer.device.type == "cpu" else _CHUNK
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            absent, target = targets[rows, None] == IGNORED, targets[rows, None].clamp(min=0)
            log_p = functional.log_softmax(buffer[rows], dim=1, dtype=losses.dtype)
            losses[rows] = -log_p.gather(1, target).masked_fill(absent, 0.0)[:, 0]
            gradient = log_p.exp_()
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            torch.mul(gradient.masked_fill_(absent, 0.0), 1 / tokens, out=buffer[rows])
        ctx.save_for_backward(hidden, computed, buffer)
        ctx.head = head
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, computed, dlogits = ctx.saved_tensors
        dhidden = mm(dlogits, computed) * dloss
        scaled = hidden * dloss.to(hidden.dtype)
        put_weight_gradient(ctx.head, dlogits, lambda: scaled, one_group(hidden))
        return dhidden.to(hidden.dtype), None, None, None
