"""Matrix products in the dtype of their operands, quick on every CPU.

An x86 CPU without AVX-512 has no BF16 arithmetic, and torch multiplies BF16 there eighty times as slowly as FP32
(measured on an AVX2 machine, torch 2.13). On such CPUs BF16 operands are widened to FP32, which is exact, and the
product is rounded once: what a BF16 product with FP32 sums is anywhere, up to the order of the sums. Everywhere else
these are torch's own functions.
"""

import platform

import torch
from torch import Tensor

_SLOW_CAPABILITIES = ("DEFAULT", "NO AVX", "AVX2")
WIDENS = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in _SLOW_CAPABILITIES
"""Whether this machine's CPU multiplies BF16 through FP32."""


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] times b [K, N]."""
    if _widen(a):
        return _rounded(torch.mm(a.float(), b.float()), a.dtype, out)
    return torch.mm(a, b, out=out)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [G, M, K] times b [G, K, N]."""
    if _widen(a):
        return _rounded(torch.bmm(a.float(), b.float()), a.dtype, out)
    return torch.bmm(a, b, out=out)


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] += a [M, K] times b [K, N], in place; rounded once."""
    if _widen(a):
        return total.copy_(torch.addmm(total.float(), a.float(), b.float()))
    return total.addmm_(a, b)


def baddbmm(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """beta * total + alpha * (a times b), [G, M, N]; rounded once."""
    if _widen(a):
        return torch.baddbmm(total.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
    return torch.baddbmm(total, a, b, beta=beta, alpha=alpha)


def _widen(a: Tensor) -> bool:
    return WIDENS and a.dtype == torch.bfloat16 and a.device.type == "cpu"


def _rounded(product: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return product.to(dtype) if out is None else out.copy_(product)
