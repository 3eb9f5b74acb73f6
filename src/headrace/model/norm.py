"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps), computed in FP32 whatever comes in.

The weight is FP32 and the result is rounded once, to the input's dtype. The backward pass is written out because
autograd's own walks the activations some fifteen times; here a block of rows stays in the cache while everything is
done to it.
What a linear layer needs of a norm's output in the backward pass can be computed again from its input, which is kept
anyway (report, section 3.2.3): `normalise` says how.
Shapes: S rows, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.fp8.activations import Activation, Again
from headrace.fp8.gemms import wide

_BLOCK = 1 << 16  # elements worked on at a time: 256 kB in FP32


class RMSNorm(nn.Module):
    """Normalises the last dimension, of `width` elements."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        return self.normalise(x, again=False).value

    def normalise(self, x: Tensor, again: bool) -> Activation:
        """The same; with `again` as an activation that is not kept but computed again."""
        scale_S1 = inverse_rms(x, self.eps)
        y: Tensor = _RMSNormFunction.apply(x, self.weight, scale_S1)  # type: ignore[no-untyped-call]
        weight = self.weight.detach()
        recipe = Again((x.detach(), scale_S1), lambda x, scale_S1: _scaled(x, weight, scale_S1))
        return Activation(y, recipe if again else None)


@torch.no_grad()
def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row of x [..., D]: [S, 1] FP32."""
    x_SD = x.reshape(-1, x.shape[-1])
    scale_S1 = torch.empty(x_SD.shape[0], 1, dtype=wide(x.dtype), device=x.device)
    for rows in _blocks(x_SD):
        block = x_SD[rows].to(scale_S1.dtype)
        scale_S1[rows] = torch.linalg.vecdot(block, block).div_(x_SD.shape[1]).add_(eps).rsqrt_()[:, None]
    return scale_S1


def _scaled(x: Tensor, weight: Tensor, scale_S1: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_SD, y_SD = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    for rows in _blocks(x_SD):
        y_SD[rows] = (x_SD[rows].to(scale_S1.dtype) * scale_S1[rows]).mul_(weight)
    return y


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale_S1: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale_S1)
        return _scaled(x, weight, scale_S1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale_S1 = ctx.saved_tensors
        x_SD = x.reshape(-1, x.shape[-1])
        dy_SD = dy.reshape(x_SD.shape)
        dx, dweight = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device), torch.zeros_like(weight)
        dx_SD = dx.view(x_SD.shape)
        for rows in _blocks(x_SD):
            normalised = x_SD[rows].to(scale_S1.dtype) * scale_S1[rows]
            gradient = dy_SD[rows].to(scale_S1.dtype)
            dweight += torch.linalg.vecdot(gradient, normalised, dim=0)
            gradient = gradient * weight
            along = torch.linalg.vecdot(gradient, normalised)[:, None].div_(x_SD.shape[1])
            dx_SD[rows] = gradient.addcmul_(normalised, along, value=-1).mul_(scale_S1[rows])
        return dx, dweight, None


def _blocks(x_SD: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // x_SD.shape[1]) if x_SD.device.type == "cpu" else max(1, x_SD.shape[0])
    return [slice(start, start + rows) for start in range(0, x_SD.shape[0], rows)]
