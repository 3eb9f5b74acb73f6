"""E4M3 against its definition and ml_dtypes; E5M6 against an enumeration of all its codes and an exact search."""

import ml_dtypes
import numpy as np
import pytest
import torch

from headrace.fp8.formats import decode_e4m3, decode_e5m6, encode_e5m6, pack12, unpack12


def value_of(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The textbook value of a code of sign, exponent and mantissa, no specials."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = code % 2**mantissa_bits
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_e4m3_code_decodes_to_its_definition(dtype: torch.dtype) -> None:
    decoded = decode_e4m3(torch.arange(256, dtype=torch.uint8), dtype)
    assert decoded.dtype == dtype
    for code in range(256):
        value = float(decoded[code])
        if code & 0x7F == 0x7F:
            assert np.isnan(value)
        else:
            assert value == value_of(code, 4, 3) and np.signbit(value) == bool(code >> 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_ten_million_codes_is_what_ml_dtypes_decodes(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 256, (10_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)).to(dtype)
    assert torch.equal(decode_e4m3(codes, dtype).nan_to_num(1e9), expected.nan_to_num(1e9))


def test_decoding_respects_shape_stride_and_offset() -> None:
    codes = torch.arange(210, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.float().nan_to_num(1e9)
    for view in (
        lambda x: x,
        lambda x: x.view(10, 21),
        lambda x: x.view(10, 21)[1:4],  # odd offset, odd count
        lambda x: x.view(10, 21)[2:4],  # even offset
        lambda x: x.view(10, 21)[:, 3:9],  # not contiguous
        lambda x: x.view(10, 21).mT,
        lambda x: x.view(2, 5, 21).mT,
        lambda x: x[:0],
    ):
        decoded = decode_e4m3(view(codes))
        assert torch.equal(decoded.nan_to_num(1e9), view(expected))


E5M6_VALUES = np.array([value_of(code, 5, 6) for code in range(31 << 6)])  # finite, not negative, ascending


def nearest_even_e5m6(x: np.ndarray) -> np.ndarray:
    """The code of each finite FP32 value by search among all codes, in float64, where the distances are exact enough:
    a distance that float64 rounds is never near a tie."""
    magnitude = np.abs(x).astype(np.float64)
    above = np.clip(np.searchsorted(E5M6_VALUES, magnitude), 1, len(E5M6_VALUES) - 1)
    to_below, to_above = magnitude - E5M6_VALUES[above - 1], E5M6_VALUES[above] - magnitude
    go_below = (to_below < to_above) | ((to_below == to_above) & (above % 2 == 1))
    return np.where(go_below, above - 1, above) + 0x800 * np.signbit(x)


def test_every_e5m6_code_decodes_to_its_definition_and_comes_back() -> None:
    codes = torch.arange(4096, dtype=torch.int16)
    decoded = decode_e5m6(codes)
    finite = (codes >> 6) % 32 != 31
    expected = torch.tensor([value_of(code, 5, 6) for code in range(4096)])
    assert torch.equal(decoded[finite].view(torch.int32), expected[finite].view(torch.int32))  # -0 as well
    assert decoded[finite].max() == 65024
    assert decoded[0x7C0] == torch.inf and decoded[0xFC0] == -torch.inf
    assert int(decoded.isnan().sum()) == 2 * 63
    number = ~decoded.isnan()
    assert torch.equal(encode_e5m6(decoded)[number], codes[number])
    assert (encode_e5m6(decoded)[~number] == 0x7E0).all()


def test_e5m6_rounds_to_the_nearest_code_ties_to_even() -> None:
    middles = ((E5M6_VALUES[1:] + E5M6_VALUES[:-1]) / 2).astype(np.float32)
    edges = np.concatenate([E5M6_VALUES.astype(np.float32), middles])
    around = [edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(0))]
    rng = np.random.default_rng(0)
    spread = (2.0 ** rng.uniform(-30, 15.98, 2_000_000)).astype(np.float32)
    tiny = np.array([0.0, 1e-45, 1e-38, 2.0**-22, 2.0**-21], dtype=np.float32)
    x = np.concatenate([*around, spread, tiny])
    x = np.concatenate([x, -x])
    assert np.array_equal(encode_e5m6(torch.from_numpy(x)).numpy(), nearest_even_e5m6(x))


def test_e5m6_saturates_finite_values_and_keeps_infinities() -> None:
    x = torch.tensor([65024.0, 65535.0, 1e6, 3e38, -1e6, torch.inf, -torch.inf, torch.nan, -torch.nan])
    expected = [0x7BF, 0x7BF, 0x7BF, 0x7BF, 0xFBF, 0x7C0, 0xFC0, 0x7E0, 0x7E0]
    assert encode_e5m6(x).tolist() == expected
    assert encode_e5m6(x[:5]).tolist() == expected[:5]  # nothing special among them: the short way


def test_twelve_bits_pack_into_the_documented_bytes() -> None:
    packed = pack12(torch.tensor([0xABC, 0x123, 0x456], dtype=torch.int16))
    assert packed.tolist() == [0xBC, 0x3A, 0x12, 0x56, 0x04, 0x00]
    assert unpack12(packed, 3).tolist() == [0xABC, 0x123, 0x456]


@pytest.mark.parametrize("count", [1, 2, 4095, 4096])
def test_every_code_survives_packing(count: int) -> None:
    codes = torch.arange(count, dtype=torch.int16)
    packed = pack12(codes)
    assert packed.dtype == torch.uint8 and packed.numel() == 3 * ((count + 1) // 2)
    assert torch.equal(unpack12(packed, count), codes)
