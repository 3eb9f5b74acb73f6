"""The emulated accumulator against one written with fractions, and the fast model against the exact one."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from headrace.fp8.accumulator import accumulation_errors, matmul_hopper, matmul_hopper_exact
from headrace.fp8.formats import decode_e4m3
from headrace.fp8.quantise import ROW_TILE, quantise


def exponent(x: Fraction | float) -> int:
    """floor(log2 |x|)."""
    return math.frexp(float(x))[1] - 1


def cut(x: Fraction, quantum: Fraction) -> Fraction:
    """Towards zero to a multiple of the quantum."""
    return math.trunc(x / quantum) * quantum


def dot(a: list[float], b: list[float], promotion: bool) -> float:
    """One element of the product in exact rational arithmetic, by the three steps of the module's docstring."""
    total = register = Fraction(0)
    for start in range(0, len(a), 32):
        pairs = [(x, y) for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True) if x and y]
        exponents = [exponent(x) + exponent(y) for x, y in pairs] + ([exponent(register)] if register else [])
        if exponents:
            quantum = Fraction(2) ** (max(exponents) - 13)
            register = cut(register, quantum) + sum(cut(Fraction(x) * Fraction(y), quantum) for x, y in pairs)
            if register:
                register = cut(register, Fraction(2) ** (exponent(register) - 13))
        if promotion and (start + 32) % 128 == 0:
            total, register = Fraction(float(total) + float(register)), Fraction(0)
            total = Fraction(torch.tensor(float(total)).item())  # the total is FP32
    return torch.tensor(float(total + register)).item()


def cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(7, 300, generator=generator) * 20
    codes = torch.randint(0, 127, (7, 300), generator=generator, dtype=torch.uint8)
    wide = decode_e4m3(codes | (torch.randint(0, 2, (7, 300), generator=generator, dtype=torch.uint8) << 7))
    sparse = torch.where(torch.rand(7, 300, generator=generator) < 0.9, 0.0, wide)
    sparse[:, :64] = 0
    growing = wide.abs().sort(dim=1).values
    return {"normal": normal, "positive": normal.abs(), "every code": wide, "sparse": sparse, "growing": growing}


@pytest.mark.parametrize("promotion", [True, False])
@pytest.mark.parametrize("name", list(cases()))
def test_exact_model_equals_rational_arithmetic(name: str, promotion: bool) -> None:
    x = cases()[name].to(torch.float8_e4m3fn).float()
    a, b = x[:4], x[4:]
    expected = [[dot(row.tolist(), column.tolist(), promotion) for column in b] for row in a]
    assert matmul_hopper_exact(a, b, promotion).tolist() == expected


def test_power_of_two_scales_change_nothing() -> None:
    x = cases()["every code"]
    scaled = matmul_hopper_exact(x[:4] * 2.0**-40, x[4:] * 2.0**30, False)
    assert torch.equal(scaled, matmul_hopper_exact(x[:4], x[4:], False) * 2.0**-10)


def test_small_products_vanish_beside_a_large_register_until_it_is_promoted() -> None:
    a = torch.ones(1, 256)
    a[0, 0] = 256.0
    b = torch.ones(1, 256)
    b[0, 0] = 64.0  # 2^14, whose quantum is 2: the 255 ones after it are cut to nothing
    assert matmul_hopper_exact(a, b, promotion=False).item() == 2.0**14
    assert matmul_hopper_exact(a, b, promotion=True).item() == 2.0**14 + 128


def test_losses_are_towards_zero() -> None:
    x = cases()["positive"].to(torch.float8_e4m3fn).float()
    exact = x[:4].double() @ x[4:].double().T
    for promotion in (True, False):
        assert (matmul_hopper_exact(x[:4], x[4:], promotion).double() <= exact).all()
        assert (matmul_hopper_exact(-x[:4], x[4:], promotion).double() >= -exact).all()


def test_promotion_gains_what_the_issue_expects() -> None:
    norms = {(e.data, e.model, e.promotion): e.norm for e in accumulation_errors(8192)}
    for data, gain, with_promotion in (("zero mean", 5, 2e-4), ("positive", 30, 1e-3)):
        assert norms[data, "exact", True] < with_promotion
        assert norms[data, "exact", False] > gain * norms[data, "exact", True]
    assert norms["positive", "exact", False] > 0.05  # one in twenty: no rounding error any more


def data_of(kind: str, depth: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(depth)
    a, b = (torch.randn(96, depth, generator=generator) for _ in range(2))
    made = {"zero mean": (a, b), "positive": (a.abs(), b.abs()), "relu": (a.relu(), b), "heavy tails": (a**3, b)}
    left, right = (quantise(x, ROW_TILE, power_of_two=True).dequantise() for x in made[kind])
    return left, right


@pytest.mark.parametrize("depth", [200, 512, 2048])
@pytest.mark.parametrize("kind", ["zero mean", "positive", "relu", "heavy tails"])
def test_fast_model_errs_like_the_exact_one(kind: str, depth: int) -> None:
    """Within the bounds that the module's docstring states, and the same where errors are systematic."""
    a, b = data_of(kind, depth)
    reference = a.double() @ b.double().T
    for promotion in (True, False):
        fast, exact = (
            product(a, b, promotion).double() - reference for product in (matmul_hopper, matmul_hopper_exact)
        )
        assert (0.8 if kind == "positive" and not promotion else 0.25) < fast.norm() / exact.norm() < 1.05
        agreement = (fast * exact).sum() / (fast.norm() * exact.norm())
        assert agreement > (0.9 if kind == "positive" else 0.0)


def test_fast_model_gives_back_sums_that_fit() -> None:
    a = torch.eye(40, 300)
    b = torch.randn(50, 300).to(torch.float8_e4m3fn).float()
    for promotion in (True, False):
        assert torch.equal(matmul_hopper(a, b, promotion), b.T[:40])
        assert torch.equal(matmul_hopper_exact(a, b, promotion), b.T[:40])


@pytest.mark.parametrize("product", [matmul_hopper, matmul_hopper_exact])
def test_zeros_and_nan_pass_through(product) -> None:  # type: ignore[no-untyped-def]
    a, b = torch.zeros(3, 300), torch.randn(5, 300)
    assert torch.equal(product(a, b, False), torch.zeros(3, 5))
    a[1, 299] = torch.nan
    for promotion in (True, False):
        bad = product(a, b, promotion).isnan()
        assert bad[1].all() and int(bad.sum()) == 5
