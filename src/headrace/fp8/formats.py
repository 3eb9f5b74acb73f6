"""Two small floating-point formats, bit by bit: E4M3 (8 bits) and E5M6 (12 bits).

    E4M3   s eeee mmm        bias 7,  largest 448,   smallest normal 2^-6,  subnormals in steps of 2^-9
    E5M6   s eeeee mmmmmm    bias 15, largest 65024, smallest normal 2^-14, subnormals in steps of 2^-20

E4M3 is torch.float8_e4m3fn: no infinity, one NaN pattern per sign (0x7F, 0xFF), so that the code that would be infinity
in IEEE style holds ordinary numbers. The report (arXiv 2412.19437, section 3.3.2) uses it for every FP8 tensor.

E5M6 is what the report keeps of the input of the projection after attention, which is needed twice in the backward pass
and hurts when it has only three mantissa bits. Nothing but its name and its use was published. Our choices: IEEE style
(exponent 31 holds infinity and NaN), subnormals kept, round to nearest, ties to even, finite values beyond the largest
saturate. Scales are not the business of this module: see quantise.py.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_NAN = 0x7F

E5M6_MAX = 65024.0
E5M6_INFINITY = 0x7C0
E5M6_NAN = 0x7E0


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """The 256 values of E4M3 in `dtype`, on the CPU."""
    return torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype)


@cache
def _pair_table(dtype: torch.dtype) -> Tensor:
    """Two neighbouring codes at once: entry i holds the values of the low and the high byte of i, as one integer."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(E4M3)
    return pairs.to(dtype).view(torch.int64 if dtype == torch.float32 else torch.int32)


def decode_e4m3(codes: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Values of E4M3 codes (uint8 or float8_e4m3fn, any shape) in FP32 or BF16, exact; into contiguous `out` if given.

    On a CPU this is a look-up, two codes at a time: ten times as fast as torch's own cast (measured, one core).
    """
    assert dtype in (torch.float32, torch.bfloat16), dtype
    if codes.device.type != "cpu":
        values = codes.view(E4M3).to(dtype)
        return values if out is None else out.copy_(values)
    if out is None and not codes.is_contiguous() and codes.ndim >= 2 and codes.mT.is_contiguous():
        return decode_e4m3(codes.mT, dtype).mT
    flat = codes.contiguous().view(torch.uint8).view(-1)
    out = torch.empty(codes.shape, dtype=dtype) if out is None else out
    if flat.numel() % 2 or flat.storage_offset() % 2 or out.storage_offset() % 2:
        torch.index_select(_table(dtype), 0, flat.int(), out=out.view(-1))
    else:
        table = _pair_table(dtype)
        torch.index_select(table, 0, flat.view(torch.uint16).int(), out=out.view(-1).view(table.dtype))
    return out


def encode_e5m6(x: Tensor) -> Tensor:
    """The nearest E5M6 code of each FP32 value, as int16 in 0..4095, sign in bit 11. Same shape.

    Ties go to the even code; finite values beyond 65024 saturate; infinities stay, NaN becomes 0x7E0, -0 is kept.
    """
    assert x.dtype == torch.float32 and x.numel(), (x.dtype, x.shape)
    value = x.clamp(-E5M6_MAX, E5M6_MAX)
    # Steps between codes are 2^(e - 6) for values of exponent e, and 2^-20 for subnormals. FP32 numbers near 1.5 * 2^17
    # times 2^e have that very step, so that adding and subtracting one rounds as FP32 does: to nearest even.
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-14)
    shift = power.mul_(1.5 * 2.0**17)
    rounded = ((value + shift) - shift).copysign_(x)
    # FP16 has the same exponent and four more mantissa bits: this cast is exact, and its upper 12 bits are the code.
    codes = (rounded.half().view(torch.int16) >> 4) & 0xFFF
    if codes.device.type == "cpu" and bool(x.abs().amax() < torch.inf):
        return codes  # elsewhere the question would cost a wait for the device
    return (
        codes.masked_fill_(x == torch.inf, E5M6_INFINITY)
        .masked_fill_(x == -torch.inf, E5M6_INFINITY | 0x800)
        .masked_fill_(x.isnan(), E5M6_NAN)
    )


def decode_e5m6(codes: Tensor) -> Tensor:
    """FP32 values, exact, of int16 E5M6 codes in 0..4095. Same shape."""
    return (codes << 4).view(torch.float16).float()


def pack12(codes: Tensor) -> Tensor:
    """12-bit codes (int16 in 0..4095, any shape, read in order) to uint8 [3 * ceil(count / 2)].

    Codes a, b become the bytes a[7:0], b[3:0] a[11:8], b[11:4]; an odd count is padded with code 0.
    """
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.clone().view(torch.int32)  # a + 2^16 b, little-endian; a clone is aligned
    words = (pairs & 0xFFF) | ((pairs >> 4) & 0xFFF000)
    return words.view(torch.uint8).view(-1, 4)[:, :3].reshape(-1)


def unpack12(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack12`: the first `count` codes, int16 [count]."""
    assert packed.dtype == torch.uint8 and packed.numel() == 3 * ((count + 1) // 2), (packed.shape, count)
    words = functional.pad(packed.view(-1, 3), (0, 1)).view(torch.int32).view(-1)
    pairs = (words & 0xFFF) | ((words & 0xFFF000) << 4)
    return pairs.view(torch.int16)[:count]
