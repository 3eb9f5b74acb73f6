"""What the tests of the products share: operands that make every mistake visible, and an oracle in NumPy and float64.

Codes are all 254 finite E4M3 numbers alike, subnormals and both zeros included. Scales run over twelve powers of two:
one that is missing, transposed or taken from the next block is off by far more than any rounding.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

BLOCK = 128


class Products:
    """Makes operands on a device and multiplies them in float64, by decoding and scaling every element on its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.random = np.random.default_rng(0)

    def codes(self, *shape: int) -> torch.Tensor:
        """E4M3 codes without NaN."""
        bits = self.random.integers(0, 254, shape, dtype=np.uint8)
        bits += bits >= 0x7F
        return torch.from_numpy(bits).view(torch.float8_e4m3fn).to(self.device)

    def scales(self, *shape: int, mn_major: bool = False) -> torch.Tensor:
        """FP32 scales; ``mn_major`` lays a matrix out as the quantisers do: stride 1 along the rows, padded to four."""
        values = np.exp2(self.random.uniform(-6, 6, shape)).astype(np.float32)
        scales = torch.from_numpy(values).to(self.device)
        if not mn_major:
            return scales
        rows, columns = shape
        buffer = torch.full((columns, -(-rows // 4) * 4), float("nan"), device=self.device)
        return buffer.T[:rows].copy_(scales)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> np.ndarray:
        """The float64 values of a matrix of codes with a scale for every tile."""
        values = codes.cpu().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        every = scales.cpu().numpy().astype(np.float64).repeat(tile[0], -2).repeat(tile[1], -1)
        return values * every[..., : values.shape[-2], : values.shape[-1]]

    def assert_close(self, actual: torch.Tensor, left: np.ndarray, right: np.ndarray, before: float | np.ndarray = 0.0):
        """``actual`` is before + left right^T, within what sums of FP32 or, on a GPU, of 14 bits may lose.

        The bound is on every element: a multiple of sum |left| |right|, and the rounding of the stored number.
        """
        expected = before + left @ right.T
        rounding = 2.0**-8 if actual.dtype == torch.bfloat16 else 2.0**-23
        sums = 2.0**-11 if self.device == "cuda" else 2.0**-19
        bound = sums * (np.abs(left) @ np.abs(right).T) + rounding * np.abs(expected)
        error = np.abs(actual.cpu().double().numpy() - expected)
        assert error.shape == bound.shape
        assert np.all(error <= bound), f"worst error is {np.max(error / bound):.3g} times its bound"

    def assert_same_sums(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Two FP32 results of the same sums in another order, on a GPU with 14 bits: equal in norm."""
        error = ((actual - expected).double().norm() / expected.double().norm()).item()
        assert error < (1e-3 if self.device == "cuda" else 1e-6)


@pytest.fixture
def products(device: str) -> Products:
    return Products(device)
