"""What the three products accept, checked in one place for every back end.

Legend: M rows, N outputs, K inputs (contraction), E experts, S rows sorted by expert, O and I outputs and inputs of a
weight.

A mistake of the caller is a ValueError of one line that names the operand, what it is and what it has to be. Values on
the device are never read (that would stop the stream): that groups and offsets point inside their tensors, and that
offsets are multiples of 128, is the caller's promise.
"""

from __future__ import annotations

import torch

BLOCK = 128


def blocks(length: int) -> int:
    """How many tiles of 128 cover ``length`` elements; the last may be partial."""
    return -(-length // BLOCK)


def check_dense(a_MK: torch.Tensor, a_scales: torch.Tensor, b_NK: torch.Tensor, b_scales: torch.Tensor) -> None:
    """E4M3 [M, K] with 1x128 scales [M, ceil(K/128)] and E4M3 [N, K] with 128x128 scales, both contiguous along K."""
    (M, K), N = _sizes("a", a_MK, 2), _sizes("b", b_NK, 2)[0]
    _codes("a", a_MK, (M, K))
    _codes("b", b_NK, (N, K))
    _scales("a_scales", a_scales, (M, blocks(K)))
    _scales("b_scales", b_scales, (blocks(N), blocks(K)))


def check_m_grouped(
    a_SK: torch.Tensor,
    a_scales: torch.Tensor,
    b_ENK: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor,
) -> None:
    """As ``check_dense`` with a weight per expert, [E, N, K], and the expert of every 128 rows of ``a``."""
    (S, K), (E, N, _) = _sizes("a", a_SK, 2), _sizes("b", b_ENK, 3)
    _codes("a", a_SK, (S, K))
    _codes("b", b_ENK, (E, N, K))
    _scales("a_scales", a_scales, (S, blocks(K)))
    _scales("b_scales", b_scales, (E, blocks(N), blocks(K)))
    if S % BLOCK:
        raise ValueError(f"a has {S} rows; the rows of every expert have to fill whole blocks of {BLOCK}")
    _indices("group_of_block", group_of_block, S // BLOCK)


def check_k_grouped(
    left_OS: torch.Tensor,
    left_scales: torch.Tensor,
    right_IS: torch.Tensor,
    right_scales: torch.Tensor,
    offsets: torch.Tensor,
    out_EOI: torch.Tensor,
) -> None:
    """E4M3 [O, S] and [I, S], scales of 128 consecutive rows [., S/128], offsets [E + 1], FP32 result [E, O, I]."""
    (O, S), I = _sizes("left_t", left_OS, 2), _sizes("right_t", right_IS, 2)[0]  # noqa: E741
    _codes("left_t", left_OS, (O, S))
    _codes("right_t", right_IS, (I, S))
    _scales("left_scales", left_scales, (O, blocks(S)))
    _scales("right_scales", right_scales, (I, blocks(S)))
    if S % BLOCK:
        raise ValueError(f"left_t has {S} rows to contract; every expert has to fill whole blocks of {BLOCK}")
    E = _sizes("out", out_EOI, 3)[0]
    _indices("offsets", offsets, E + 1)
    if out_EOI.shape != (E, O, I) or out_EOI.dtype != torch.float32 or not out_EOI.is_contiguous():
        raise ValueError(f"out is {_describe(out_EOI)}; it has to be contiguous float32 [{E}, {O}, {I}]")


def check_out_dtype(out_dtype: torch.dtype) -> None:
    """The products are stored in BF16 or FP32."""
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype is {out_dtype}; it has to be torch.bfloat16 or torch.float32")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {list(tensor.stride())}"


def _sizes(name: str, tensor: torch.Tensor, dims: int) -> torch.Size:
    if tensor.dim() != dims:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it has to have {dims}")
    return tensor.shape


def _codes(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float8_e4m3fn or not tensor.is_contiguous():
        raise ValueError(f"{name} is {_describe(tensor)}; it has to be contiguous float8_e4m3fn {list(shape)}")


def _scales(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ValueError(f"{name} is {_describe(tensor)}; it has to be float32 {list(shape)}")


def _indices(name: str, tensor: torch.Tensor, length: int) -> None:
    if tensor.shape != (length,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{name} is {_describe(tensor)}; it has to be contiguous int32 [{length}]")
