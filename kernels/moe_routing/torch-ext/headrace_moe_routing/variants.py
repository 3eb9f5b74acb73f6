"""Kernels and configurations for ahead-of-time compilation, where there is no GPU to launch them on.

DeepSeek-V3's router (256 experts in 8 groups, 4 groups and 8 experts chosen), and one whose sizes are no powers of two.
"""

from __future__ import annotations

from typing import Any

from .routing import ROWS_MULTIPLE, backward_kernel, offsets_kernel, route_kernel

_ROUTE = {
    "logits_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "experts_ptr": "*i32",
    "weights_ptr": "*fp32",
    "counts_ptr": "*i32",
    "N": "i32",
    "factor": "fp32",
}
_BACKWARD = {
    "dweights_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "experts_ptr": "*i32",
    "dlogits_ptr": "*fp32",
    "N": "i32",
    "E": "i32",
    "factor": "fp32",
}
_V3 = {"G": 8, "G_PADDED": 8, "G_CHOSEN": 4, "P": 32, "P_PADDED": 32, "K": 8, "K_PADDED": 8, "TOKENS": 4}
_ODD = {"G": 3, "G_PADDED": 4, "G_CHOSEN": 2, "P": 20, "P_PADDED": 32, "K": 6, "K_PADDED": 8, "TOKENS": 4}


def variants() -> list[dict[str, Any]]:
    """What to compile, for which targets, and what the result has to keep to."""
    weights = {"K": 8, "K_PADDED": 8, "NORMALISE": True, "TOKENS": 4}
    return [
        _variant("route_v3", route_kernel, _ROUTE, _V3 | {"NORMALISE": True}),
        _variant("route_60_experts", route_kernel, _ROUTE, _ODD | {"NORMALISE": False}),
        _variant(
            "offsets_v3",
            offsets_kernel,
            {"counts_ptr": "*i32", "offsets_ptr": "*i32", "E": "i32"},
            {"E_PADDED": 256, "MULTIPLE": ROWS_MULTIPLE},
        ),
        _variant("route_backward_v3", backward_kernel, _BACKWARD, weights),
    ]


def _variant(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    pointers = [argument for argument, type_ in signature.items() if type_.startswith("*")]
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "options": {"num_warps": 4},
        "attributes": dict.fromkeys(pointers, 16),
        "targets": ["sm_90", "sm_100"],
        "expects": {"fp8_mma": False, "async_copy": False, "max_registers": 128, "max_shared": 16_384},
    }
