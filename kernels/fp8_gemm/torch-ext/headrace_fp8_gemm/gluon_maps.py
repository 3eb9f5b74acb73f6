"""Tensor maps of the Gluon kernels: what the tensor memory accelerator (TMA) is told about a tensor, and its limits.

A map names base address, sizes, strides in bytes and the box that one instruction moves. Rows have to start at
multiples of 16 bytes. What a box reaches outside the tensor is read as zeros and not written, so that edges need no
masks.

Scales are read through a map of one dimension: stored MN-major (stride 1 along rows), the scales of 128 rows in one
block of the contraction are 512 consecutive bytes, wherever they start. A box that runs past the last row picks up
scales of the next block; they meet rows that are never stored.

Legend: R rows, C columns, B blocks of 128 along the contraction.
"""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_ring import BLOCK, CODES, HALF, SCALES

TRITON_NAMES = {torch.float8_e4m3fn: "fp8e4nv", torch.float32: "fp32", torch.bfloat16: "bf16"}


def output_layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a consumer's rows lie in shared memory before they are stored."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


def codes_map(codes_RC: torch.Tensor, name: str) -> TensorDescriptor:
    """Boxes of 128x128 E4M3 codes. Raises ValueError, naming the operand, where a row is no multiple of 16 bytes."""
    _check_rows(codes_RC, name)
    return TensorDescriptor.from_tensor(codes_RC, [BLOCK.value, BLOCK.value], CODES)


def output_map(out_RC: torch.Tensor) -> TensorDescriptor:
    """Boxes of 64x128 results. Raises ValueError where a row is no multiple of 16 bytes."""
    _check_rows(out_RC, "the result")
    return TensorDescriptor.from_tensor(out_RC, [HALF.value, BLOCK.value], output_layout(out_RC.dtype))


def scales_map(scales_RB: torch.Tensor) -> TensorDescriptor:
    """Boxes of 128 scales of `mn_major` scales, all blocks in one row."""
    R, B = scales_RB.shape
    length = (B - 1) * scales_RB.stride(1) + R
    return TensorDescriptor(scales_RB, [length], [1], [BLOCK.value], SCALES)


def mn_major(scales_RB: torch.Tensor) -> torch.Tensor:
    """The scales with stride 1 along the rows, as the quantisation kernels store them: copied where they are not."""
    R, B = scales_RB.shape
    if scales_RB.stride(0) == 1 and scales_RB.stride(1) >= R and scales_RB.data_ptr() % 16 == 0:
        return scales_RB
    return torch.empty_strided((R, B), (1, R), dtype=torch.float32, device=scales_RB.device).copy_(scales_RB)


def map_type(dtype: torch.dtype, box: list[int], layout: gl.NVMMASharedLayout) -> str:
    """The type of a map in a kernel's signature, for ahead-of-time compilation."""
    return f"tensordesc<{TRITON_NAMES[dtype]}{box},{layout!r}>"


def multiprocessors(device: torch.device) -> int:
    """How many thread blocks run at once: the kernels take nearly all shared memory of a multiprocessor.

    Raises ValueError where the device is no Hopper GPU: the kernels are written for its matrix instruction.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise ValueError(
            f"the operands are on {device}; the gluon back end needs a Hopper GPU: use the triton back end"
        )
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_rows(tensor_RC: torch.Tensor, name: str) -> None:
    C = tensor_RC.shape[1]
    if C * tensor_RC.element_size() % 16:
        unit = 16 // tensor_RC.element_size()
        rule = f"the gluon back end needs multiples of {unit}: use the triton back end"
        raise ValueError(f"{name} has rows of {C} elements; {rule}")
