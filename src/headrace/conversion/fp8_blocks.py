"""E4M3 in blocks of 128 x 128 with numpy and integers: the second reading that `check.py` holds an FP8 export against.

Nothing here comes from `headrace.fp8`, which wrote the export. Both follow one definition (report, section 3.3.2):
per block amax = max |w|, but at least 448 * 2^-126, scale = amax / 448, code = E4M3(w * (448 / amax)); every operation
rounds to nearest even, in FP32. One band of 128 rows at a time, so memory is a few bands.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
_MAX = np.float32(448)
_LEAST_AMAX = np.float32(448 * 2.0**-126)  # keeps scales normal numbers
_LEAST_NORMAL = np.float32(2.0**-6)


def quantise(matrix: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Finite FP32 [R, C] -> E4M3 codes as bytes [R, C], FP32 scales [ceil(R / 128), ceil(C / 128)]."""
    codes, scales = [], []
    for band in _bands(matrix):
        columns = np.abs(band).max(axis=0)
        largest = np.maximum.reduceat(columns, np.arange(0, len(columns), BLOCK))
        amax: NDArray[np.float32] = np.maximum(largest, _LEAST_AMAX)
        scales.append(np.divide(amax, _MAX, dtype=np.float32))
        codes.append(encode(band * _spread(np.divide(_MAX, amax, dtype=np.float32), band)))
    return np.concatenate(codes), np.stack(scales)


def dequantise(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codes [R, C] and scales as from `quantise` -> their values, FP32 [R, C]; NaN codes give NaN."""
    bands = zip(_bands(codes), scales, strict=True)
    return np.concatenate([decode(band) * _spread(scale, band) for band, scale in bands])


def encode(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Finite FP32 of any shape -> E4M3 codes: one sign bit, four of exponent (bias 7), three of mantissa."""
    bits = values.view(np.uint32)
    magnitude = np.minimum(np.abs(values), _MAX)
    kept = magnitude.view(np.uint32)
    # 20 of 23 mantissa bits go, half to even; a carry runs into the exponent, as it should. Biases differ by 120.
    normal = ((kept + np.uint32(0x7FFFF) + ((kept >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
    subnormal = np.rint(magnitude * np.float32(512))  # units of 2^-9; 8 of them are the least normal number
    code = np.where(magnitude < _LEAST_NORMAL, subnormal, normal.astype(np.float32)).astype(np.uint8)
    return code | (bits >> np.uint32(24) & np.uint32(0x80)).astype(np.uint8)


def decode(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """E4M3 codes of any shape -> FP32."""
    return _TABLE[codes]


def _decode_all() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values = np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)
    values[[0x7F, 0xFF]] = np.nan
    return values


_TABLE = _decode_all()


def _bands(matrix: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (matrix[row : row + BLOCK] for row in range(0, len(matrix), BLOCK))


def _spread(of_blocks: NDArray[np.float32], band: NDArray[Any]) -> NDArray[np.float32]:
    return np.repeat(of_blocks, BLOCK)[: band.shape[1]]
