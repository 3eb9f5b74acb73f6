"""What ahead-of-time compilation checks: every path that training takes, and what its machine code must look like.

An entry names a kernel, the types of its arguments, its compile-time constants and its targets; `expects` bounds the
result. The harness in tests/kernels/ compiles and checks them on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

from .operands import BLOCK
from .tiles import BAND, OPTIONS
from .triton_gemm import rows_kernel
from .triton_wgrad import weight_gradient_kernel


def variants() -> list[dict[str, Any]]:
    """The variants of all back ends of this package."""
    from .gluon_gemm import gluon_variants  # here: Gluon is experimental, and the Triton kernels do without it

    return triton_variants() + gluon_variants()


def triton_variants() -> list[dict[str, Any]]:
    """The variants of the portable back end, for Hopper (wgmma) and Blackwell (tcgen05)."""
    return [
        _rows("dense_bf16"),
        _rows("dense_fp32", out="fp32"),
        _rows("dense_ragged_k", EVEN_K=False),
        _rows("m_grouped_bf16", GROUPED=True),
        _weight_gradient("k_grouped"),
        _weight_gradient("k_grouped_accumulate", ACCUMULATE=True),
        _weight_gradient("k_grouped_ragged", ACCUMULATE=True, EVEN=False),
    ]


def _rows(name: str, out: str = "bf16", **switches: bool) -> dict[str, Any]:
    pointers = {
        "a_ptr": "*fp8e4nv",
        "a_scales_ptr": "*fp32",
        "b_ptr": "*fp8e4nv",
        "b_scales_ptr": "*fp32",
        "y_ptr": f"*{out}",
    }
    constants = {"a_scales_stride_m": 1, "GROUPED": False, "EVEN_K": True} | switches
    if constants["GROUPED"]:
        pointers["group_of_block_ptr"] = "*i32"
    else:
        constants["group_of_block_ptr"] = None
    return _variant(name, rows_kernel, pointers, ("M", "N", "K", "a_scales_stride_k"), constants, max_registers=200)


def _weight_gradient(name: str, **switches: bool) -> dict[str, Any]:
    pointers = {
        "left_ptr": "*fp8e4nv",
        "left_scales_ptr": "*fp32",
        "right_ptr": "*fp8e4nv",
        "right_scales_ptr": "*fp32",
        "offsets_ptr": "*i32",
        "out_ptr": "*fp32",
    }
    sizes = ("O", "I", "S", "left_scales_stride_s", "right_scales_stride_s")
    constants = {"left_scales_stride_o": 1, "right_scales_stride_i": 1, "ACCUMULATE": False, "EVEN": True} | switches
    return _variant(name, weight_gradient_kernel, pointers, sizes, constants, max_registers=250)


def _variant(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    constants: dict[str, Any],
    max_registers: int,
) -> dict[str, Any]:
    """Sizes are declared multiples of 16, which Triton finds by itself for every matrix of DeepSeek-V3."""
    return {
        "name": f"triton_{name}",
        "kernel": kernel,
        "signature": pointers | dict.fromkeys(sizes, "i32"),
        "constants": constants | {"BLOCK": BLOCK, "BAND": BAND},
        "options": dict(OPTIONS),
        "attributes": dict.fromkeys((*pointers, *sizes), 16),
        "targets": ["sm_90", "sm_100"],
        "expects": {"fp8_mma": True, "async_copy": True, "max_registers": max_registers, "max_shared": 140_000},
    }
