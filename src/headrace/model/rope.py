"""Rotary position embedding as DeepSeek-V3 uses it: adjacent pairs, a part of each head only, YaRN for long contexts.

A pair (x_2i, x_2i+1) is turned by the angle position * theta^(-2i/r). Only r = `qk_rope_head_dim` of a head's
dimensions are turned, and the key's turned part is one vector that all heads share ("decoupled" RoPE, report section
2.1.1, eq. 3 and 8). YaRN (arXiv 2309.00071; report section 4.3) stretches slow frequencies by `factor`, keeps fast
ones, blends between, and sharpens the softmax. Angles, cosines and products are FP32 whatever the compute dtype.

The rotated part is stored with all first members of the pairs before all second members; queries and keys are permuted
alike, so their products do not change.
Shapes: B batch, T tokens, H heads, N unrotated, R rotated, V value dimensions.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headrace.config.recipe import RopeScaling
from headrace.config.schema import ModelConfig
from headrace.fp8.gemms import wide


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines (FP32) of the positions of a row, [T, R/2], or of each row, [B, T, R/2].

    `starts_BT` int64 [B, T] is where each token's document begins, before which it sees nothing; None: with the row.
    """

    cos: Tensor
    sin: Tensor
    starts_BT: Tensor | None = None


def rotation(config: ModelConfig, tokens: int, device: torch.device, starts_BT: Tensor | None = None) -> Rotation:
    """Rotations of positions 0 to `tokens` - 1; with `starts_BT`, of positions counted from each token's document's."""
    angles = torch.arange(tokens, dtype=torch.float32, device=device)[:, None] * frequencies(config).to(device)
    magnitude = _attention_factor(config.rope_scaling) if config.rope_scaling else 1.0
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    if starts_BT is None:
        return Rotation(cos, sin)
    positions_BT = torch.arange(tokens, device=device) - starts_BT
    return Rotation(cos[positions_BT], sin[positions_BT], starts_BT)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(d_h + d_h^R), times the square of YaRN's magnitude where YaRN is on."""
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.rope_scaling and config.rope_scaling.mscale_all_dim:
        scale *= _magnitude(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of every pair, [R/2] FP32 on the CPU."""
    width, base, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    with torch.device("cpu"):
        wavelengths = base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        if scaling is None:
            return 1.0 / wavelengths
        low, high = _blend_range(scaling, width, base)
        slow = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return slow / (scaling.factor * wavelengths) + (1 - slow) / wavelengths


def _blend_range(scaling: RopeScaling, width: int, base: float) -> tuple[float, float]:
    """Pairs below the first index turn often enough to be left alone; pairs above the second are fully stretched."""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def heads(
    q_BTHd: Tensor, kv_BTHd: Tensor, k_rope_BTR: Tensor, rotation: Rotation, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (rotated, times `scale`) and keys (rotated), both [B, H, T, N+R], and values [B, H, T, V], contiguous.

    From q [B, T, H, N+R], kv [B, T, H, N+V] and the shared key k_rope [B, T, R]. One pass each way instead of a chain
    of splits, expansions and concatenations.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Heads.apply(q_BTHd, kv_BTHd, k_rope_BTR, rotation.cos, rotation.sin, scale)  # type: ignore[no-untyped-call]
    return result


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, count, width = q.shape
        rope = k_rope.shape[-1]
        plain = width - rope
        queries = q.new_empty(batch, count, tokens, width)
        keys, values = torch.empty_like(queries), q.new_empty(batch, count, tokens, kv.shape[-1] - plain)
        torch.mul(q[..., :plain].transpose(1, 2), scale, out=queries[..., :plain])
        turns = cos.unsqueeze(-3) * scale, sin.unsqueeze(-3) * scale
        _rotate(q[..., plain:].transpose(1, 2), queries[..., plain:], *turns)
        keys[..., :plain] = kv[..., :plain].transpose(1, 2)
        shared = torch.empty_like(k_rope)
        _rotate(k_rope, shared, cos, sin)
        keys[..., plain:] = shared[:, None]
        values.copy_(kv[..., plain:].transpose(1, 2))
        ctx.save_for_backward(cos, sin)
        ctx.scale, ctx.rope = scale, rope
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dqueries: Tensor, dkeys: Tensor, dvalues: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        batch, count, tokens, width = dqueries.shape
        plain = width - ctx.rope
        dq = dqueries.new_empty(batch, tokens, count, width)
        torch.mul(dqueries[..., :plain].transpose(1, 2), ctx.scale, out=dq[..., :plain])
        turned = dqueries[..., plain:].transpose(1, 2)
        _unrotate(turned, dq[..., plain:], cos.unsqueeze(-2) * ctx.scale, sin.unsqueeze(-2) * ctx.scale)
        dkv = dqueries.new_empty(batch, tokens, count, plain + dvalues.shape[-1])
        dkv[..., :plain] = dkeys[..., :plain].transpose(1, 2)
        dkv[..., plain:] = dvalues.transpose(1, 2)
        dk_rope = dqueries.new_empty(batch, tokens, ctx.rope)
        _unrotate(dkeys[..., plain:].sum(1, dtype=wide(dkeys.dtype)), dk_rope, cos, sin)
        return dq, dkv, dk_rope, None, None, None


def _rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Pairs (even, odd) of x turned by the angle, written to the two halves of `out`."""
    first, second, half = x[..., 0::2].to(wide(x.dtype)), x[..., 1::2].to(wide(x.dtype)), x.shape[-1] // 2
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin


def _unrotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The transpose of `_rotate`: halves of x turned back, written to the pairs of `out`."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].to(wide(x.dtype)), x[..., half:].to(wide(x.dtype))
    out[..., 0::2] = first * cos + second * sin
    out[..., 1::2] = second * cos - first * sin
