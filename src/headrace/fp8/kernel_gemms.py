"""Back ends that multiply in FP8 on the GPU: the kernels of this project quantise, a GEMM library multiplies.

Operands stay codes with scales; nothing is dequantised on the way. Weights are kept twice, as they are and transposed,
because the tensor cores want both operands contiguous along the contraction: 128x128 tiles are the same either way.
Rows that only fill up have codes 0. Which library multiplies is `precision.fp8.backend`; all of them take

    dense       a [M, K] in 1x128 tiles, b [N, K] in 128x128 tiles                   [M, N]
    m_grouped   the same with a weight per 128 rows                                  [S, N]
    k_grouped   dy^T [O, S] and x^T [I, S] in tiles along S, per group of rows       [E, O, I] FP32

The Triton kernels also run in Triton's interpreter on a CPU, which is how this module is tested where there is no GPU.
Shapes: S rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import headrace_fp8_quantisation as quantisation
from headrace.config.schema import Fp8Config
from headrace.fp8 import libraries
from headrace.fp8.emulated import pack_gradient, pack_rows, unpack_gradient, unpack_rows
from headrace.fp8.gemms import Compute, Group, Role, dtype_of, stacked
from headrace.fp8.quantise import Quantised, QuantisedE5M6, quantise_e5m6

TILE = 128


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: E4M3 codes and FP32 scales, the scales fastest along the first dimension."""

    codes: Tensor
    scales: Tensor


class KernelGemms:
    """`Gemms` by FP8 kernels."""

    def __init__(self, config: Fp8Config, compute: Compute) -> None:
        self.config, self.dtype, self.row_multiple = config, dtype_of(compute), TILE
        self._library = libraries.library(config.backend)

    def weight(self, master: Tensor, old: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Codes and scales of the stacked weight, and of its transpose."""
        made: tuple[Tensor, ...] = quantisation.quantise_weight(stacked(master).contiguous(), transposed=True)
        if old is not None:
            for kept, new in zip(old, made, strict=True):  # in place, so that a graph made before notices
                kept.copy_(new)
        return old or made

    def rows(self, x_SI: Tensor, role: Role) -> Codes:
        """1x128 tiles."""
        scales = self.config.dispatched_scales if role == "dispatched" else self.config.scales
        return Codes(*quantisation.quantise_rows(x_SI, scales == "power_of_two"))

    def take(self, rows: Codes, index_S: Tensor) -> Codes:
        """Rows in another order; -1 is a row of zeros."""
        index = index_S.clamp(min=0)
        codes = rows.codes.view(torch.uint8).index_select(0, index).masked_fill_((index_S < 0)[:, None], 0)
        return Codes(codes.view(torch.float8_e4m3fn), rows.scales.t().index_select(1, index).t())

    def pack(self, rows: Codes) -> Tensor:
        """E4M3 codes, then the row's FP32 scales."""
        return pack_rows(rows.codes, rows.scales)

    def unpack(self, packed_SB: Tensor) -> Codes:
        """The inverse of `pack`; padding between rows or columns is left to `take`."""
        codes, scales = unpack_rows(packed_SB)
        return Codes(codes, scales.t().contiguous().t())

    def pack_gradient(self, dy_SO: Tensor) -> Tensor:
        """E4M3 in 1x128 tiles, or the gradient itself."""
        return pack_gradient(dy_SO, self.config)

    def unpack_gradient(self, packed_SB: Tensor) -> Tensor:
        """[S, O] in the compute dtype."""
        return unpack_gradient(packed_SB, self.config, self.dtype)

    def keep(self, x_SI: Tensor, rows: Codes, role: Role) -> tuple[Tensor, ...]:
        """E4M3 in 1x128 tiles; after attention what `attention_output_cache` says."""
        cache = self.config.attention_output_cache if role == "attention" else "e4m3"
        if cache == "bf16":
            return (x_SI,)
        if cache == "e5m6":
            return quantise_e5m6(x_SI).tensors
        return rows.codes, rows.scales

    def columns(self, kept: tuple[Tensor, ...], role: Role) -> Codes:
        """128x1 tiles of the transpose [I, S]."""
        if len(kept) == 2:
            codes, scales = kept
            missing = -codes.shape[0] % TILE
            if missing:
                codes = functional.pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(torch.float8_e4m3fn)
                scales = functional.pad(scales, (0, 0, 0, missing), value=1.0)
            return Codes(*quantisation.requantise_columns(codes, scales, power_of_two=self._transposed()))
        if len(kept) == 3:
            return self._both(QuantisedE5M6.of(*kept).dequantise(), False)[1]
        return self._both(kept[0], False)[1]

    def gradient(self, dy_SO: Tensor, role: Role) -> tuple[Codes, Codes]:
        """1x128 tiles for the input gradient, 128x1 tiles of the transpose for the weight gradient."""
        scales = self.config.dispatched_scales if role == "swiglu" else self.config.scales
        return self._both(dy_SO, scales == "power_of_two")

    def keep_elementwise(self, x_SI: Tensor) -> tuple[Tensor, ...]:
        """E4M3 in 1x128 tiles, or the tensor itself."""
        if self.config.swiglu_input_cache == "bf16":
            return (x_SI,)
        codes, scales = quantisation.quantise_rows(x_SI, self.config.scales == "power_of_two")
        return codes, scales

    def restore_elementwise(self, kept: tuple[Tensor, ...]) -> Tensor:
        """[S, I] in the compute dtype."""
        return kept[0] if len(kept) == 1 else Quantised(kept[0], kept[1], (1, TILE)).dequantise(self.dtype)

    def forward(self, rows: Codes, weight: tuple[Tensor, ...], groups: Sequence[Group]) -> Tensor:
        """[S, O]."""
        return self._multiply(rows, weight[0], weight[1], groups)

    def input_gradient(
        self, rows: Codes, weight: tuple[Tensor, ...], groups: Sequence[Group], add_to: Tensor | None = None
    ) -> Tensor:
        """[S, I]."""
        dx_SI = self._multiply(rows, weight[2], weight[3], groups)
        return dx_SI if add_to is None else add_to.add_(dx_SI)

    def weight_gradient(self, gradient_EOI: Tensor, fresh: bool, dy: Codes, x: Codes, groups: Sequence[Group]) -> None:
        """Into the slices of all groups; those without rows are left as they are."""
        ends = dict.fromkeys(range(gradient_EOI.shape[0]), 0)
        ends |= {group: _up(end) for group, _, end in groups}
        offsets = [0]
        for end in ends.values():
            offsets.append(max(offsets[-1], end))
        on_device = torch.tensor(offsets, dtype=torch.int32, device=gradient_EOI.device)
        self._library.k_grouped(dy.codes, dy.scales, x.codes, x.scales, on_device, gradient_EOI, not fresh)

    def _multiply(self, rows: Codes, codes_EOI: Tensor, scales: Tensor, groups: Sequence[Group]) -> Tensor:
        if codes_EOI.shape[0] == 1:
            return self._library.dense(rows.codes, rows.scales, codes_EOI[0], scales[0], self.dtype)
        blocks = [group for group, start, end in groups for _ in range((end - start) // TILE)]
        group_of_block = torch.tensor(blocks, dtype=torch.int32, device=codes_EOI.device)
        return self._library.m_grouped(rows.codes, rows.scales, codes_EOI, scales, group_of_block, self.dtype)

    def _both(self, x_SI: Tensor, power_of_two: bool) -> tuple[Codes, Codes]:
        """Rows, and the transpose's tiles along S, with S filled up to whole tiles."""
        rows, missing = x_SI.shape[0], -x_SI.shape[0] % TILE
        padded = functional.pad(x_SI, (0, 0, 0, missing)) if missing else x_SI.contiguous()
        codes, scales, codes_t, scales_t = quantisation.quantise_rows_and_columns(padded, power_of_two)
        return Codes(codes[:rows], scales[:rows]), Codes(codes_t, scales_t)

    def _transposed(self) -> bool:
        return self.config.transposed_scales == "power_of_two"


def _up(rows: int) -> int:
    return -(-rows // TILE) * TILE
