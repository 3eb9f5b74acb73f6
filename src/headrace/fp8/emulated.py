"""Back end `reference`: FP8 with the exact numbers, on any device, by dequantising and multiplying.

Every operand is quantised as `quantise.py` specifies and multiplied as `compute` dtype: with compute=fp32 the products
are exact and only the order of FP32 additions differs from the specification (`specification.matmul`); with
compute=bf16 a dequantised value is rounded to BF16 once, which is exact where its scale is a power of two and else 2^-8
at most, a sixteenth of what rounding to E4M3 costs. This is emulation: it takes longer than BF16 and never less.

Here alone tiles and accumulation can differ from the report's, for ablations (`Fp8Config`). With accumulation=hopper
the products are added as Hopper's tensor cores add them (`accumulator.py`).

Weight gradients contract over rows, so their operands need 128x1 tiles: gradients are quantised so directly, cached
inputs are dequantised and quantised again with power-of-two scales (report, section 3.5.2).
Shapes: S rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.config.schema import Fp8Config
from headrace.errors import UserError
from headrace.fp8.accumulator import matmul_hopper
from headrace.fp8.gemms import Compute, Group, Role, add_product, dtype_of, multiply_rows, stacked
from headrace.fp8.quantise import Quantised, QuantisedE5M6, quantise, quantise_e5m6

TILE = 128


@dataclass(frozen=True)
class Rows:
    """Rows in FP8 as they are cached, and dequantised as they are multiplied."""

    quantised: Quantised
    operand_SI: Tensor


class ReferenceGemms:
    """`Gemms` by emulation."""

    def __init__(self, config: Fp8Config, compute: Compute) -> None:
        self.config, self.dtype, self.row_multiple = config, dtype_of(compute), TILE

    def weight(self, master: Tensor, old: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """[O, I] or [E, O, I] in FP8 and back, in the compute dtype."""
        tile = (TILE, TILE) if self.config.weight_tile == "128x128" else _whole(master)
        operand = quantise(master, tile, self._power_of_two(self.config.scales)).dequantise(self.dtype)
        return (operand,) if old is None else (old[0].copy_(operand),)

    def rows(self, x_SI: Tensor, role: Role) -> Rows:
        """1x128 tiles."""
        tile = (1, TILE) if self.config.activation_tile == "1x128" else _whole(x_SI)
        return self._rows(x_SI, tile, self._scales(role))

    def take(self, rows: Rows, index_S: Tensor) -> Rows:
        """Rows in another order; -1 is a row of zeros."""
        index, empty = index_S.clamp(min=0), index_S < 0
        per_row = rows.quantised.tile[0] == 1
        scales = rows.quantised.scales.index_select(0, index) if per_row else rows.quantised.scales
        codes = rows.quantised.codes.view(torch.uint8).index_select(0, index)
        operand = rows.operand_SI.index_select(0, index)
        if bool(empty.any()):
            codes[empty], operand[empty] = 0, 0
        tile = rows.quantised.tile if per_row else _whole(codes)
        return Rows(Quantised(codes.view(torch.float8_e4m3fn), scales, tile), operand)

    def pack(self, rows: Rows) -> Tensor:
        """E4M3 codes, then the row's FP32 scales."""
        if self.config.activation_tile == "tensor":
            raise UserError(
                "precision.fp8.activation_tile=tensor: a row sent to another rank needs a scale of its own; "
                "use 1x128 or parallel.expert=1"
            )
        return pack_rows(rows.quantised.codes, rows.quantised.scales)

    def unpack(self, packed_SB: Tensor) -> Rows:
        """The inverse of `pack`."""
        quantised = Quantised(*unpack_rows(packed_SB), (1, TILE))
        return Rows(quantised, quantised.dequantise(self.dtype))

    def pack_gradient(self, dy_SO: Tensor) -> Tensor:
        """E4M3 in 1x128 tiles, or the gradient itself."""
        return pack_gradient(dy_SO, self.config)

    def unpack_gradient(self, packed_SB: Tensor) -> Tensor:
        """[S, O] in the compute dtype."""
        return unpack_gradient(packed_SB, self.config, self.dtype)

    def keep(self, x_SI: Tensor, rows: Rows, role: Role) -> tuple[Tensor, ...]:
        """E4M3 in 1x128 tiles; after attention what `attention_output_cache` says."""
        cache = self.config.attention_output_cache if role == "attention" else "e4m3"
        if cache == "bf16":
            return (x_SI,)
        if cache == "e5m6":
            return quantise_e5m6(x_SI).tensors
        return rows.quantised.codes, rows.quantised.scales

    def columns(self, kept: tuple[Tensor, ...], role: Role) -> Tensor:
        """128x1 tiles, dequantised: [S, I]."""
        if role == "attention" and self.config.attention_output_cache != "e4m3":
            return self._columns(kept[0] if len(kept) == 1 else QuantisedE5M6.of(*kept).dequantise())
        codes, scales = kept
        tile = (1, TILE) if self.config.activation_tile == "1x128" else _whole(codes)
        return self._columns(Quantised(codes, scales, tile).dequantise(torch.float32))

    def gradient(self, dy_SO: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """1x128 tiles for the input gradient, 128x1 for the weight gradient; both dequantised."""
        scales = self.config.dispatched_scales if role == "swiglu" else self.config.scales
        if self.config.gradient_tile == "1x128":
            rows = self._rows(dy_SO, (1, TILE), scales).operand_SI
            columns = quantise(dy_SO, (TILE, 1), self._power_of_two(self.config.transposed_scales))
            return rows, columns.dequantise(self.dtype)
        tile = (TILE, TILE) if self.config.gradient_tile == "128x128" else _whole(dy_SO)
        both = self._rows(dy_SO, tile, scales).operand_SI
        return both, both

    def keep_elementwise(self, x_SI: Tensor) -> tuple[Tensor, ...]:
        """E4M3 in 1x128 tiles, or the tensor itself."""
        if self.config.swiglu_input_cache == "bf16":
            return (x_SI,)
        quantised = quantise(x_SI, (1, TILE), self._power_of_two(self.config.scales))
        return quantised.codes, quantised.scales

    def restore_elementwise(self, kept: tuple[Tensor, ...]) -> Tensor:
        """[S, I] in the compute dtype."""
        return kept[0] if len(kept) == 1 else Quantised(kept[0], kept[1], (1, TILE)).dequantise(self.dtype)

    def forward(self, rows: Rows, weight: tuple[Tensor, ...], groups: Sequence[Group]) -> Tensor:
        """[S, O]."""
        return self._multiply(rows.operand_SI, stacked(weight[0]), groups, None)

    def input_gradient(
        self, rows: Tensor, weight: tuple[Tensor, ...], groups: Sequence[Group], add_to: Tensor | None = None
    ) -> Tensor:
        """[S, I]."""
        return self._multiply(rows, stacked(weight[0]).transpose(1, 2), groups, add_to)

    def weight_gradient(
        self, gradient_EOI: Tensor, fresh: bool, dy: Tensor, x: Tensor, groups: Sequence[Group]
    ) -> None:
        """Into the slices of the groups listed."""
        for group, start, end in groups:
            if self.config.accumulation == "fp32":
                add_product(gradient_EOI[group], fresh, dy[start:end], x[start:end])
                continue
            product = self._hopper(dy[start:end].T, x[start:end].T)
            gradient_EOI[group] = product if fresh else gradient_EOI[group] + product

    def _multiply(self, x_SI: Tensor, weight_EOI: Tensor, groups: Sequence[Group], add_to: Tensor | None) -> Tensor:
        if self.config.accumulation == "fp32":
            return multiply_rows(x_SI, weight_EOI, groups, add_to)
        y_SO = x_SI.new_zeros(x_SI.shape[0], weight_EOI.shape[1]) if add_to is None else add_to
        for group, start, end in groups:
            y_SO[start:end] += self._hopper(x_SI[start:end], weight_EOI[group]).to(self.dtype)
        return y_SO

    def _hopper(self, a_MK: Tensor, b_NK: Tensor) -> Tensor:
        return matmul_hopper(a_MK.float(), b_NK.float(), self.config.promotion)

    def _rows(self, x_SI: Tensor, tile: tuple[int, int], scales: str) -> Rows:
        quantised = quantise(x_SI, tile, self._power_of_two(scales))
        return Rows(quantised, quantised.dequantise(self.dtype))

    def _columns(self, x_SI: Tensor) -> Tensor:
        tile = (TILE, 1) if self.config.activation_tile == "1x128" else _whole(x_SI)
        return quantise(x_SI, tile, self._power_of_two(self.config.transposed_scales)).dequantise(self.dtype)

    def _scales(self, role: Role) -> str:
        return self.config.dispatched_scales if role == "dispatched" else self.config.scales

    @staticmethod
    def _power_of_two(scales: str) -> bool:
        return scales == "power_of_two"


def pack_rows(codes_SI: Tensor, scales: Tensor) -> Tensor:
    """E4M3 codes [S, I] and FP32 scales [S, ceil(I / 128)] of 1x128 tiles as bytes, a row's scales after its codes."""
    by_row = scales.clone(memory_format=torch.contiguous_format)  # the kernels' scales lie by column
    return torch.cat([codes_SI.view(torch.uint8), by_row.view(torch.uint8)], dim=1)


def unpack_rows(packed_SB: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_rows`. The width follows from the bytes: 132 for each whole tile of 128."""
    tiles = -(-packed_SB.shape[1] // (TILE + 4))
    width = packed_SB.shape[1] - 4 * tiles
    codes, scales = (part.clone(memory_format=torch.contiguous_format) for part in packed_SB.tensor_split([width], 1))
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float32)


def pack_gradient(dy_SO: Tensor, config: Fp8Config) -> Tensor:
    """Gradients on their way to experts as `dispatched_gradients` says, as bytes (report, section 3.3.3).

    With power-of-two scales the experts' own quantisation of what arrives, `Gemms.gradient`, gives the same rows as of
    what was sent: a tile's largest value cannot grow, and values that a scale can express a smaller one can as well.
    """
    if not _gradients_travel_in_fp8(config):
        return dy_SO.contiguous().view(torch.uint8)
    quantised = quantise(dy_SO.contiguous(), (1, TILE), config.dispatched_scales == "power_of_two")
    return pack_rows(quantised.codes, quantised.scales)


def unpack_gradient(packed_SB: Tensor, config: Fp8Config, dtype: torch.dtype) -> Tensor:
    """What `pack_gradient` packed, [S, O]."""
    if not _gradients_travel_in_fp8(config):
        return packed_SB.view(dtype)
    return Quantised(*unpack_rows(packed_SB), (1, TILE)).dequantise(dtype)


def _gradients_travel_in_fp8(config: Fp8Config) -> bool:
    """An ablation of the gradients' tiles is one of all their roundings."""
    return config.dispatched_gradients == "e4m3" and config.gradient_tile == "1x128"


def _whole(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
