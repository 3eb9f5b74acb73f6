"""Triton's interpreter, repaired, so that kernels can be tested on a machine without a GPU.

With TRITON_INTERPRET=1 Triton runs a kernel's source with NumPy, one program after the other. All is right but the
conversions between floating-point formats (Triton 3.6 to 3.9; upstream issue 8322): FP32 to E4M3 loses the carry when a
mantissa rounds up to the next power of two (127.8 becomes 64), sends ties away from zero, gets subnormals wrong and
reads NaN as 480; FP32 to BF16 cuts off instead of rounding. A quantiser tested that way passes or fails for the wrong
reason.

`repair` sends these conversions through torch, which rounds as the hardware does: to nearest even; E4M3 saturates at
448 and has one NaN, 0x7F (PTX ISA, `cvt` with `.satfinite`). Conversions that ask for another rounding, and formats
that torch has no name for, stay with Triton. test_interpreter.py holds both halves: that the original is wrong (the day
this fails, this file can go) and that the repaired one is right.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch


def interpret() -> None:
    """Switch this process to the interpreter and repair it. Must come before anything imports triton."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before kernels/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    repair()


def repair() -> None:
    """Replace the interpreter's conversion of floating-point formats; a second call changes nothing."""
    from triton.runtime import interpreter

    if not isinstance(interpreter._convert_float, partial):
        interpreter._convert_float = partial(convert, interpreter._convert_float)


def convert(original: Callable, values: np.ndarray, source, target, rounding) -> np.ndarray:
    """Bits of `values` (bits of Triton's type `source`) in Triton's type `target`, as unsigned integers.

    `rounding` is None or Triton's ROUNDING_MODE; what is not rounding to nearest even is left to Triton's `original`.
    """
    from triton._C.libtriton import ir

    known = _torch_types()
    narrower = target.primitive_bitwidth < source.primitive_bitwidth
    other_rounding = narrower and rounding not in (None, ir.ROUNDING_MODE.RTNE)
    if other_rounding or source not in known or target not in known:
        return original(values, source, target, rounding)
    integer = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
    unsigned = np.ascontiguousarray(values).view(f"uint{source.primitive_bitwidth}")
    given = torch.from_numpy(unsigned.copy()).view(known[source])
    bits = given.to(known[target]).view(integer[target.primitive_bitwidth]).numpy()
    if known[target] is torch.float8_e4m3fn:
        bits = np.where(bits & 0x7F == 0x7F, np.uint8(0x7F), bits)
    return bits.reshape(values.shape)


def _torch_types() -> dict:
    import triton.language as tl

    return {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }
