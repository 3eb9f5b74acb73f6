"""What the tests of the quantisers share: matrices that hold every hard case, and a judge of its own.

The judge is NumPy and ml_dtypes, one tile after the other, from the definition; it shares nothing with the kernels nor
with their PyTorch reference.
"""

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch


def hard_matrix(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Row by row: wide ranges, subnormals, zeros, huge numbers, ties, Inf, NaN; as many as there is room for."""
    random = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=random)
    wide = torch.exp2(torch.randint(-20, 1, (rows, columns), generator=random).float())
    x[0::3] *= wide[0::3]
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, -codes]).repeat(1 + columns // 379)[:columns]
    ties[::128] = 448.0
    hard = [ties, x[0] * 1e-38, 0 * x[0], x[0] * 1e36, ties * 2.0**-100]
    infinite, undefined = x[0].clone(), x[0].clone()
    infinite[columns // 2], undefined[columns - 1] = -math.inf, math.nan
    for at, row in zip(range(1, rows, 2), [*hard, infinite, undefined], strict=False):
        x[at] = row
    return x.to(dtype).to(device)


def by_hand(x: torch.Tensor, tile: tuple[int, int], power_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes (their bits) and scales of a matrix."""
    values = x.float().cpu().numpy()
    codes = np.empty(values.shape, dtype=np.uint8)
    scales = np.empty([-(-size // step) for size, step in zip(values.shape, tile, strict=True)], dtype=np.float32)
    for i, j in np.ndindex(scales.shape):
        part = slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1])
        codes[part], scales[i, j] = _tile_by_hand(values[part], power_of_two)
    return codes, scales


def _tile_by_hand(values: np.ndarray, power_of_two: bool) -> tuple[np.ndarray | int, np.float32]:
    if not np.isfinite(values).all():
        return 0x7F, np.float32(np.nan)
    amax = np.maximum(np.abs(values).max(), np.float32(448 * 2.0**-126))
    scale, multiplier = amax / np.float32(448), np.float32(448) / amax
    if power_of_two:
        mantissa, exponent = math.frexp(scale)  # mantissa in [0.5, 1)
        scale = np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))
        multiplier = np.float32(1) / scale
    scaled = np.clip(values * multiplier, np.float32(-448), np.float32(448))
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def bits(codes: torch.Tensor) -> np.ndarray:
    """The bits of E4M3 codes."""
    assert codes.dtype == torch.float8_e4m3fn
    return codes.cpu().view(torch.uint8).numpy()


def assert_same(found: tuple, wanted: tuple) -> None:
    """Equal shapes, equal bits, NaN where NaN is wanted; `wanted` holds tensors or the judge's arrays."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if one.dtype == torch.float8_e4m3fn:
            np.testing.assert_array_equal(bits(one), other if isinstance(other, np.ndarray) else bits(other))
        else:
            other = other if isinstance(other, np.ndarray) else other.cpu().numpy()
            np.testing.assert_array_equal(one.cpu().numpy(), other)


def assert_quantised(codes: torch.Tensor, scales: torch.Tensor, exact: torch.Tensor, power_of_two: bool) -> None:
    """Codes and scales of 1x128 tiles are those of `exact` (float64): no further off than half a step of E4M3.

    That leaves a computation in FP32 one part in a hundred thousand; a wrong formula is off by far more.
    """
    tiles = torch.nn.functional.pad(exact, (0, -exact.shape[1] % 128)).unflatten(1, (-1, 128))
    wanted = tiles.abs().amax(2).clamp(min=448 * 2.0**-126) / 448
    found = scales.cpu().double()
    if power_of_two:
        assert torch.all(found.log2() == found.log2().round())
        assert torch.all((found > wanted * (1 - 1e-5)) & (found < 2 * wanted * (1 + 1e-5)))
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    every = found.repeat_interleave(128, 1)[:, : exact.shape[1]]
    error = (codes.cpu().double() * every - exact).abs()
    assert torch.all(error <= (exact.abs() * 2.0**-4).maximum(every * 2.0**-10) * (1 + 1e-5) + every * 448 * 1e-6)


@pytest.fixture(scope="session")
def quantisers(device) -> SimpleNamespace:
    """The functions above, and the device bound to `hard_matrix`."""
    return SimpleNamespace(
        hard_matrix=lambda rows, columns, dtype: hard_matrix(rows, columns, dtype, device),
        by_hand=by_hand,
        assert_same=assert_same,
        assert_quantised=assert_quantised,
        device=device,
    )


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["exact", "power_of_two"])
def power_of_two(request) -> bool:
    return request.param
