"""Muon: momentum whose matrices are orthogonalised before they are applied.

A gradient matrix is dominated by a few directions. Muon replaces the momentum matrix M = U S V^T by about U V^T, so
that every direction moves equally far (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks";
at scale: Moonlight, arXiv 2502.16982). U V^T comes from five Newton-Schulz steps: matrix products only, so BF16
serves and the hardware is at its best. With X_0 = M / |M|_F,

    A = X X^T,   X <- a X + (b A + c A^2) X,   (a, b, c) = (3.4445, -4.7750, 2.0315)

takes each singular value through an odd polynomial that lifts it quickly to between about 0.7 and 1.2 and keeps it
there; exact ones are not needed. The Gram matrix is taken on the shorter side.

Stacked experts [E, out, in] are E matrices orthogonalised on their own, in one batched product. Gate and up
projections are separate parameters here and so are never mixed. What an orthogonal update is worth depends on the
shape: it is scaled by sqrt(max(1, out/in)), which keeps the size of the change of the layer's output per unit of
input the same for every shape (Moonlight's 0.2 sqrt(max(out, in)) instead matches AdamW's update size; then both
share one rate, while here Muon has its own, `recipe.optimizer.muon_learning_rate`). Weight decay is decoupled.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.fp8.products import baddbmm, bmm

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_TINY = 1e-7  # keeps an all-zero momentum at zero; an idle expert goes on along its old momentum while that lasts


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of each matrix in `matrices` [..., M, N], computed in `dtype` and returned in it."""
    a, b, c = COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x.to(dtype) * (1 / (norm + _TINY)).to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(ITERATIONS):
        gram = bmm(x, x.mT) if wide else bmm(x.mT, x)
        polynomial = baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = baddbmm(x, polynomial, x, beta=a) if wide else baddbmm(x, x, polynomial, beta=a)
    return x.reshape(matrices.shape)


def shape_scale(parameter: Tensor) -> float:
    """sqrt(max(1, out/in)) of a parameter [..., out, in]."""
    out, fan_in = parameter.shape[-2:]
    return math.sqrt(max(1.0, out / fan_in))


class Muon:
    """Nesterov momentum, orthogonalised, over named parameters [out, in] or [E, out, in]."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        momentum: float,
        weight_decay: float,
        compute: torch.dtype,
        moments: torch.dtype,
    ) -> None:
        assert all(parameter.ndim in (2, 3) for parameter in parameters.values())
        self._parameters = dict(parameters)
        self._momentum, self._weight_decay, self._compute = momentum, weight_decay, compute
        self.buffers = {
            name: torch.zeros_like(parameter, dtype=moments, requires_grad=False)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update at `learning_rate` from the parameters' gradients, which are used up as working memory."""
        for name, parameter in self._parameters.items():
            gradient, buffer = parameter.grad, self.buffers[name]
            if gradient is None:
                continue
            average = buffer.float().lerp_(gradient, 1 - self._momentum)  # FP32 moments: the buffer itself
            if average is not buffer:
                buffer.copy_(average)
            ahead = gradient.lerp_(average, self._momentum)  # Nesterov: where the average is heading
            update = orthogonalise(ahead, self._compute)
            parameter.mul_(1 - learning_rate * self._weight_decay)
            parameter.add_(update, alpha=-learning_rate * shape_scale(parameter))
