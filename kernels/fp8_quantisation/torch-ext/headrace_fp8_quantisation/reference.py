"""The same functions in a few lines of plain PyTorch each, on any device: what the kernels are tested against.

Written to be read, not to be fast. Quantisers must give the same bytes as the kernels; functions that contain an
exponential or a long sum may differ from them by its rounding.
Shapes: M rows, K columns, N outputs, E experts, B batch, T tokens, H heads, and the letters of rope.py.
"""

import torch
from torch import Tensor, nn

from .swiglu import SwigluGradients

SMALLEST_AMAX = 448 * 2.0**-126


def quantise(x: Tensor, tile: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [ceil(R/r), ceil(C/c)] of x [R, C] in tiles of r x c, padded with zeros at the edges."""
    (rows, columns), (r, c) = x.shape, tile
    padded = nn.functional.pad(x.float(), (0, -columns % c, 0, -rows % r))
    tiled = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
    finite = tiled.isfinite().all(3, keepdim=True).all(1, keepdim=True)
    amax = torch.where(finite, tiled.abs().amax((1, 3), keepdim=True).clamp(min=SMALLEST_AMAX), 1.0)
    largest = torch.full_like(amax, 448)  # a tensor: torch divides number / tensor by a reciprocal, one ulp off
    scales, multipliers = amax / largest, largest / amax
    if power_of_two:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        multipliers = torch.ones_like(scales) / scales
    codes = (tiled * multipliers).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(finite, codes, 0x7F).view(torch.float8_e4m3fn).reshape(padded.shape)
    return codes[:rows, :columns].contiguous(), torch.where(finite, scales, torch.nan)[:, 0, :, 0]


def quantise_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """1x128 tiles."""
    return quantise(x, (1, 128), power_of_two)


def quantise_rows_and_columns(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1x128 tiles, and 128x1 tiles transposed: the 1x128 tiles of the transpose."""
    return *quantise(x, (1, 128), power_of_two), *quantise(x.t(), (1, 128), True)


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """FP32 values of 1x128 tiles."""
    return codes.float() * scales.repeat_interleave(128, 1)[:, : codes.shape[1]]


def requantise_columns(codes: Tensor, scales: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """Dequantise, transpose, quantise."""
    return quantise(dequantise_rows(codes, scales).t(), (1, 128), power_of_two)


def quantise_weight(w: Tensor, transposed: bool = False) -> tuple[Tensor, ...]:
    """128x128 tiles of [N, K] or [E, N, K], and the same of the transpose."""
    if w.dim() == 3:
        return tuple(torch.stack(parts) for parts in zip(*(quantise_weight(one, transposed) for one in w), strict=True))
    as_it_is = quantise(w, (128, 128), False)
    return (*as_it_is, *quantise(w.t(), (128, 128), False)) if transposed else as_it_is


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """silu(gate) * up * weights in FP32."""
    hidden = nn.functional.silu(gate.float()) * up.float()
    return hidden if weights is None else hidden * weights[:, None]


def swiglu_quantise(
    gate: Tensor, up: Tensor, weights: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """SwiGLU in 1x128 tiles."""
    return quantise_rows(swiglu(gate, up, weights), power_of_two)


def swiglu_backward_quantise(
    dhidden: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None = None, power_of_two: bool = False
) -> SwigluGradients:
    """Autograd's gradients of SwiGLU, quantised both ways."""
    inputs = [None if x is None else x.detach().float().requires_grad_() for x in (gate, up, weights)]
    swiglu(*inputs).backward(dhidden.float())
    dgate, dup = (quantise_rows_and_columns(x.grad, power_of_two) for x in inputs[:2])
    return SwigluGradients(*dgate, *dup, None if weights is None else inputs[2].grad)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm in FP32, and 1/rms of each row."""
    inverse_rms = 1 / (x.float().square().mean(1) + eps).sqrt()
    return x.float() * inverse_rms[:, None] * weight.float(), inverse_rms


def rmsnorm_quantise(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm in 1x128 tiles."""
    y, inverse_rms = rmsnorm(x, weight, eps)
    return *quantise_rows(y, power_of_two), inverse_rms


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours turned by their angle; first members before second members."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_concat(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, T, N+R] and values [B, H, T, V]; see rope.py."""
    plain = q.shape[-1] - k_rope.shape[-1]
    turned = rotate(q[..., plain:].transpose(1, 2), cos * scale, sin * scale)
    queries = torch.cat([q[..., :plain].transpose(1, 2).float() * scale, turned], -1)
    shared = rotate(k_rope, cos, sin)[:, None].expand(-1, q.shape[2], -1, -1)
    keys = torch.cat([kv[..., :plain].transpose(1, 2).float(), shared], -1)
    return queries.to(q.dtype), keys.to(q.dtype), kv[..., plain:].transpose(1, 2).contiguous()


def rope_concat_backward(
    dqueries: Tensor, dkeys: Tensor, dvalues: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Autograd's gradients of `rope_concat`, which is linear: any point will do. FP32 inside, rounded once."""
    (B, H, T, width), V, R = dqueries.shape, dvalues.shape[-1], 2 * cos.shape[-1]
    shapes = (B, T, H, width), (B, T, H, width - R + V), (B, T, R)
    inputs = [torch.zeros(shape, device=dqueries.device, requires_grad=True) for shape in shapes]
    outputs = rope_concat(*inputs, cos, sin, scale)
    gradients = torch.autograd.grad(outputs, inputs, [g.float() for g in (dqueries, dkeys, dvalues)])
    return tuple(g.to(dqueries.dtype) for g in gradients)
