"""What ahead-of-time compilation checks: every kernel as DeepSeek-V3's shapes launch it, and that nothing spills.

An entry names a kernel, the types of its arguments, its compile-time constants and its targets; `expects` bounds the
result. Sizes and strides are declared multiples of 16, which Triton finds by itself for V3's matrices. Ragged sizes run
the same code with narrower loads; one variant holds that this does not spill either.
The harness in tests/kernels/ compiles and checks them on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

from . import rmsnorm, rope, rows, swiglu, weights

CODES, SCALES = "*fp8e4nv", "*fp32"
V3_ROPE = {"N": 128, "R": 64, "V": 128}
V3_WIDTHS = (7168, 1536, 512)  # hidden states, and the compressed queries, keys and values


def variants() -> list[dict[str, Any]]:
    """Every variant of this package."""
    return [*_quantisers(), *_swiglu(), *_rmsnorm(), *_rope()]


def _quantisers() -> list[dict[str, Any]]:
    pair, pair_t = {"codes": CODES, "scales": SCALES}, {"codes_t": CODES, "scales_t": SCALES}
    block = {"BLOCK_ROWS": rows.BLOCK_ROWS}
    exact, rounded = {"POWER_OF_TWO": False}, {"POWER_OF_TWO": True}
    one = rows.rows_kernel, rows.ROW_WARPS
    both = rows.rows_and_columns_kernel, rows.COLUMN_WARPS
    again = rows.requantise_kernel, rows.COLUMN_WARPS
    limit = {"maxnreg": rows.COLUMN_REGISTERS}
    square = weights.weight_kernel, weights.WARPS
    return [
        _variant("rows_bf16", *one, {"x": "*bf16", **pair}, exact | block),
        _variant("rows_bf16_power_of_two", *one, {"x": "*bf16", **pair}, rounded | block),
        _variant("rows_fp32", *one, {"x": "*fp32", **pair}, exact | block),
        _variant("rows_bf16_ragged", *one, {"x": "*bf16", **pair}, exact | block, divisor=1, max_registers=255),
        _variant("rows_and_columns_bf16", *both, {"x": "*bf16", **pair, **pair_t}, exact, **limit),
        _variant("rows_and_columns_bf16_power_of_two", *both, {"x": "*bf16", **pair, **pair_t}, rounded, **limit),
        _variant("rows_and_columns_fp32", *both, {"x": "*fp32", **pair, **pair_t}, exact, **limit),
        _variant("requantise_columns", *again, {**pair, **pair_t}, rounded, **limit),
        _variant("weight_fp32", *square, {"w": "*fp32", **pair, **pair_t}, {"TRANSPOSED": False}),
        _variant("weight_fp32_transposed", *square, {"w": "*fp32", **pair, **pair_t}, {"TRANSPOSED": True}),
        _variant("weight_bf16_transposed", *square, {"w": "*bf16", **pair, **pair_t}, {"TRANSPOSED": True}),
    ]


def _swiglu() -> list[dict[str, Any]]:
    inputs = {"gate": "*bf16", "up": "*bf16"}
    outputs = {
        f"{name}{suffix}": SCALES if "scales" in suffix else CODES
        for name in ("dgate", "dup")
        for suffix in ("", "_scales", "_t", "_t_scales")
    }
    forward = swiglu.forward_kernel, swiglu.FORWARD_WARPS, {**inputs, "codes": CODES, "scales": SCALES}
    backward = swiglu.backward_kernel, swiglu.BACKWARD_WARPS, {"dhidden": "*bf16", **inputs, **outputs}
    block = {"BLOCK_ROWS": swiglu.BLOCK_ROWS, "POWER_OF_TWO": True}
    return [
        _weighted("swiglu_weighted", *forward, block),
        _unweighted("swiglu", *forward, block, unused=("weights",)),
        _weighted("swiglu_backward_weighted", *backward, {"POWER_OF_TWO": False}, sums=("dweights",)),
        _unweighted("swiglu_backward", *backward, {"POWER_OF_TWO": False}, unused=("weights", "dweights")),
    ]


def _weighted(
    name: str, kernel: Any, warps: int, pointers: dict[str, str], constants: dict[str, Any], sums: tuple[str, ...] = ()
) -> dict[str, Any]:
    return _variant(
        name, kernel, warps, pointers | dict.fromkeys(("weights", *sums), "*fp32"), constants | {"WEIGHTED": True}
    )


def _unweighted(
    name: str,
    kernel: Any,
    warps: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    unused: tuple[str, ...],
) -> dict[str, Any]:
    return _variant(name, kernel, warps, pointers, constants | dict.fromkeys(unused) | {"WEIGHTED": False})


def _rmsnorm() -> list[dict[str, Any]]:
    pointers = {"x": "*bf16", "weight": "*fp32", "codes": CODES, "scales": SCALES, "inverse_rms": "*fp32"}
    found = []
    for width in V3_WIDTHS:
        block = dict(zip(("ROWS", "WIDTH"), rmsnorm.block(width), strict=True))
        constants = {"POWER_OF_TWO": False, **block}
        found.append(_variant(f"rmsnorm_{width}", rmsnorm.rmsnorm_kernel, rmsnorm.WARPS, pointers, constants))
    return found


def _rope() -> list[dict[str, Any]]:
    plain, half, value = rope.padded(**V3_ROPE)
    tables = {"cos": "*fp32", "sin": "*fp32"}
    heads = {"BLOCK": rope.BLOCK_TOKENS, "PLAIN": plain, "HALF": half, "VALUE": value}
    forward = dict.fromkeys(("q", "kv", "k_rope", "queries", "keys", "values"), "*bf16") | tables
    backward = dict.fromkeys(("dqueries", "dkeys", "dvalues", "dq", "dkv"), "*bf16") | tables
    shared = {"dkeys": "*bf16", "dk_rope": "*bf16", **tables}
    return [
        _variant("rope_concat", rope.forward_kernel, rope.WARPS, forward, heads),
        _variant("rope_concat_backward", rope.backward_kernel, rope.WARPS, backward, heads),
        _variant("rope_shared_key", rope.shared_key_kernel, rope.WARPS, shared, {"HEADS": 128, "HALF": half}),
    ]


def _variant(
    name: str,
    kernel: Any,
    warps: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    divisor: int = 16,
    max_registers: int = 128,
    **options: int,
) -> dict[str, Any]:
    """What is neither pointer nor constant is a size or a stride, or one of the two FP32 numbers."""
    numbers = {"eps": "fp32", "scale": "fp32"}
    rest = [argument for argument in kernel.arg_names if argument not in pointers | constants]
    sizes = [argument for argument in rest if argument not in numbers]
    return {
        "name": name,
        "kernel": kernel,
        "signature": pointers | {argument: numbers.get(argument, "i32") for argument in rest},
        "constants": constants,
        "options": {"num_warps": warps, **options},
        "attributes": dict.fromkeys(pointers, 16) | (dict.fromkeys(sizes, divisor) if divisor > 1 else {}),
        "targets": ["sm_90", "sm_100"],
        "expects": {"fp8_mma": False, "async_copy": False, "max_registers": max_registers, "max_shared": 32 * 1024},
    }
