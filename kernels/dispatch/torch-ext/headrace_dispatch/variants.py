"""Kernels and configurations for ahead-of-time compilation, where there is no GPU to launch them on.

DeepSeek-V3's layer (256 experts, 8 per token, 7,168 columns) held by one process, and by one of 64 with 4 experts each.
"""

from __future__ import annotations

from typing import Any

from .layout import ROWS_MULTIPLE, blocks_at_once, count_kernel, place_kernel, starts_kernel
from .rows import combine_kernel, fill_kernel, permute_kernel, quantise_kernel

_PERMUTE = {
    "rows_of_token_ptr": "*i32",
    "D": "i32",
    "x_stride_n": "i32",
    "x_stride_d": "i32",
    "out_stride_s": "i32",
    "out_stride_d": "i32",
}
_FILL = {"token_of_row_ptr": "*i32", "S": "i32", "D": "i32", "stride_s": "i32", "stride_d": "i32"}


def variants() -> list[dict[str, Any]]:
    """What to compile, for which targets, and what the result has to keep to."""
    return [*_layout(256), *_layout(4), *_moving()]


def _layout(experts: int) -> list[dict[str, Any]]:
    block = {"K": 8, "E_PADDED": experts, "TOKENS": 16}
    sizes = {"N": "i32", "first": "i32", "E": "i32"}
    chosen = {"experts_ptr": "*i32"}
    return [
        _variant(f"count_{experts}", count_kernel, chosen | {"counts_ptr": "*i32"} | sizes, block),
        _variant(
            f"starts_{experts}",
            starts_kernel,
            dict.fromkeys(("counts_ptr", "starts_ptr", "offsets_ptr", "group_of_block_ptr"), "*i32")
            | dict.fromkeys(("B", "row_blocks", "E"), "i32"),
            {"E_PADDED": experts, "BLOCKS": blocks_at_once(experts), "MULTIPLE": ROWS_MULTIPLE},
        ),
        _variant(
            f"place_{experts}",
            place_kernel,
            chosen
            | dict.fromkeys(("starts_ptr", "rows_of_token_ptr", "token_of_row_ptr"), "*i32")
            | sizes
            | {"S": "i32"},
            block,
        ),
    ]


def _moving() -> list[dict[str, Any]]:
    columns = {"K": 8, "COLUMNS": 1024}
    straight = columns | {"x_stride_d": 1, "out_stride_d": 1}
    turned = {"K": 8, "COLUMNS": 64, "x_stride_d": 1, "out_stride_s": 1}
    filled = {"ROWS": 32, "COLUMNS": 128}
    return [
        _variant("permute_bf16", permute_kernel, {"x_ptr": "*bf16", "out_ptr": "*bf16"} | _PERMUTE, straight),
        _variant("permute_codes", permute_kernel, {"x_ptr": "*fp8e4nv", "out_ptr": "*fp8e4nv"} | _PERMUTE, straight),
        _variant("permute_scales", permute_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"} | _PERMUTE, turned),
        _variant("fill_bf16", fill_kernel, {"rows_ptr": "*bf16"} | _FILL, filled | {"VALUE": 0.0, "stride_d": 1}),
        _variant("fill_codes", fill_kernel, {"rows_ptr": "*fp8e4nv"} | _FILL, filled | {"VALUE": 0.0, "stride_d": 1}),
        _variant(
            "fill_scales", fill_kernel, {"rows_ptr": "*fp32"} | _FILL, filled | {"VALUE": 2.0**-126, "stride_s": 1}
        ),
        _variant(
            "permute_quantise",
            quantise_kernel,
            {"x_ptr": "*bf16", "rows_of_token_ptr": "*i32", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
            | {"D": "i32", "S": "i32"},
            {"K": 8, "TILES": 8},
        ),
        _variant(
            "combine_bf16",
            combine_kernel,
            {"rows_ptr": "*bf16", "rows_of_token_ptr": "*i32", "out_ptr": "*bf16", "D": "i32"},
            columns,
        ),
    ]


def _variant(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Pointers and the sizes of V3's matrices are multiples of 16, as the JIT would find them."""
    multiples = ("D", "S", "x_stride_n", "out_stride_s", "out_stride_d", "stride_s", "stride_d")
    free = {argument: type_ for argument, type_ in signature.items() if argument not in constants}
    aligned = [argument for argument, type_ in free.items() if type_.startswith("*") or argument in multiples]
    return {
        "name": name,
        "kernel": kernel,
        "signature": free,
        "constants": constants,
        "options": {"num_warps": 4},
        "attributes": dict.fromkeys(aligned, 16),
        "targets": ["sm_90", "sm_100"],
        "expects": {"fp8_mma": False, "async_copy": False, "max_registers": 128, "max_shared": 32_768},
    }
