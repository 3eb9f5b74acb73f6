"""Back ends of the FP8 GEMMs by name; one that is asked for and missing is an error, never a silent fall-back.

    reference   any device: quantise, dequantise, multiply (`emulated.py`)
    triton      the kernels of this project in Triton, compute capability 9.0 or newer
    gluon       the same, written for Hopper in Gluon
    scaled_mm   PyTorch's blockwise cuBLASLt path; grouped as a loop
    deep_gemm   DeepSeek's library where it is installed

`auto` is `triton` on a GPU that has FP8 matrix instructions and `reference` everywhere else.
"""

from importlib.util import find_spec
from typing import Literal

import torch

from headrace.config.checks import published_tiles
from headrace.config.schema import Fp8Config
from headrace.errors import UserError
from headrace.fp8.emulated import ReferenceGemms
from headrace.fp8.gemms import Compute, Gemms

Backend = Literal["reference", "triton", "scaled_mm", "gluon", "deep_gemm"]

_FP8_CAPABILITY = (9, 0)


def pick(config: Fp8Config, device: torch.device) -> Backend:
    """The back end that `config.backend` means on `device`; raises `UserError` where that one cannot run."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    if config.backend == "auto":
        usual = published_tiles(config) and config.transposed_scales == "power_of_two"
        return "triton" if able and usual and find_spec("triton") else "reference"
    if config.backend == "reference":
        return "reference"
    name = f"precision.fp8.backend={config.backend}"
    if not able:
        raise UserError(f"{name}: needs a GPU of compute capability 9.0 or newer, this is {device}; use reference")
    module = {"triton": "triton", "gluon": "triton", "deep_gemm": "deep_gemm"}.get(config.backend)
    if module and not find_spec(module):
        raise UserError(f"{name}: the Python package {module} is not installed; install it or use auto")
    return config.backend


def fp8_gemms(config: Fp8Config, compute: Compute) -> Gemms:
    """The `Gemms` of a resolved configuration."""
    if config.backend == "reference":
        return ReferenceGemms(config, compute)
    from headrace.fp8.kernel_gemms import KernelGemms  # needs triton, which not every machine has

    return KernelGemms(config, compute)
