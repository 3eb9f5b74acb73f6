"""Who multiplies FP8 matrices on a GPU: this project's Triton and Gluon kernels, PyTorch, DeepGEMM, behind one shape.

Every class offers `dense`, `m_grouped` and `k_grouped` as the package `headrace_fp8_gemm` documents them. PyTorch and
DeepGEMM lend what they have: PyTorch has no grouped product with these scales, so groups are a loop over slices;
DeepGEMM's weight gradient wants its operands in a layout of its own, so that one product is Triton's here. Neither has
run on a GPU in this project yet (docs/fp8.md says what has).
Shapes: M rows, N outputs, K contraction, S rows sorted by expert, E experts, O and I outputs and inputs of a weight.
"""

import importlib
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

TILE = 128


class Library(Protocol):
    """The three products."""

    def dense(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype) -> Tensor: ...
    def m_grouped(
        self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group_of_block: Tensor, out_dtype: torch.dtype
    ) -> Tensor: ...
    def k_grouped(
        self,
        left_t: Tensor,
        left_scales: Tensor,
        right_t: Tensor,
        right_scales: Tensor,
        offsets: Tensor,
        out: Tensor,
        accumulate: bool,
    ) -> Any: ...


def library(backend: str) -> Library:
    """The library of a back end; its package is imported here and not before."""
    if backend == "scaled_mm":
        return ScaledMm()
    if backend == "deep_gemm":
        return DeepGemm()
    module: Library = importlib.import_module(f"headrace_fp8_gemm.{backend}_gemm")
    return module


class ScaledMm:
    """`torch.nn.functional.scaled_mm` with blockwise scales (cuBLASLt 12.9 or newer)."""

    def dense(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype) -> Tensor:
        """[M, N]."""
        return self._product(
            a, a_scales, b, _four_aligned(b_scales), functional.ScalingType.BlockWise128x128, out_dtype
        )

    def m_grouped(
        self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group_of_block: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        """[S, N], one product per run of blocks of the same expert."""
        out = a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)
        start = 0
        experts, lengths = torch.unique_consecutive(group_of_block, return_counts=True)
        for expert, blocks in zip(experts.tolist(), lengths.tolist(), strict=True):
            end = start + blocks * TILE
            rows = _stored_by_column(a_scales[start:end])
            out[start:end] = self.dense(a[start:end], rows, b[expert], b_scales[expert], out_dtype)
            start = end
        return out

    def k_grouped(
        self,
        left_t: Tensor,
        left_scales: Tensor,
        right_t: Tensor,
        right_scales: Tensor,
        offsets: Tensor,
        out: Tensor,
        accumulate: bool,
    ) -> Tensor:
        """[E, O, I] FP32, one product per expert that has rows; the others get zeros, or keep what they have."""
        bounds = offsets.tolist()
        for expert, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                if not accumulate:
                    out[expert].zero_()
                continue
            tiles = slice(start // TILE, end // TILE)
            product = self._product(
                left_t[:, start:end].contiguous(),
                _stored_by_column(left_scales[:, tiles]),
                right_t[:, start:end].contiguous(),
                _stored_by_column(right_scales[:, tiles]),
                functional.ScalingType.BlockWise1x128,
                torch.float32,
            )
            out[expert] = out[expert] + product if accumulate else product
        return out

    @staticmethod
    def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_tiles: Any, dtype: torch.dtype) -> Tensor:
        a_tiles = functional.ScalingType.BlockWise1x128
        return functional.scaled_mm(a, b.t(), a_scales, a_tiles, b_scales.t(), b_tiles, output_dtype=dtype)


class DeepGemm:
    """DeepSeek's DeepGEMM, forward and input gradient; the weight gradient is this project's Triton kernel."""

    def __init__(self) -> None:
        self._library = importlib.import_module("deep_gemm")
        self._triton = library("triton")

    def dense(self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype) -> Tensor:
        """[M, N]; DeepGEMM gives BF16."""
        out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
        self._library.fp8_gemm_nt((a, a_scales), (b, b_scales), out)
        return out.to(out_dtype)

    def m_grouped(
        self, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, group_of_block: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        """[S, N]; DeepGEMM gives BF16."""
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
        group_of_row = group_of_block.repeat_interleave(TILE)
        self._library.m_grouped_fp8_gemm_nt_contiguous((a, a_scales), (b, b_scales), out, group_of_row)
        return out.to(out_dtype)

    def k_grouped(
        self,
        left_t: Tensor,
        left_scales: Tensor,
        right_t: Tensor,
        right_scales: Tensor,
        offsets: Tensor,
        out: Tensor,
        accumulate: bool,
    ) -> Any:
        """[E, O, I] FP32, by Triton."""
        return self._triton.k_grouped(left_t, left_scales, right_t, right_scales, offsets, out, accumulate)


def _stored_by_column(scales: Tensor) -> Tensor:
    """[M, K/128] with stride (1, M)."""
    return scales.t().contiguous().t()


def _four_aligned(scales: Tensor) -> Tensor:
    """[N/128, K/128] whose rows begin at multiples of four scales, as cuBLASLt reads them."""
    columns = scales.shape[1]
    return functional.pad(scales, (0, -columns % 4))[:, :columns]
