"""Products on a CPU without BF16 arithmetic are those of one that has it."""

import pytest
import torch

from headrace.fp8 import products


def matrices(dtype, *shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("widens", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_exact_sums_rounded_once(monkeypatch, dtype, widens):
    monkeypatch.setattr(products, "WIDENS", widens)
    a, b, c = matrices(dtype, (3, 40, 70), (3, 70, 50), (3, 40, 50))
    exact = a.double() @ b.double()
    out, slices = torch.empty_like(c), torch.empty(3, 60, 50, dtype=dtype)
    found = {
        "mm": (products.mm(a[0], b[0]), exact[0]),
        "mm, out": (products.mm(a[0], b[0], out=out[0]), exact[0]),
        "bmm": (products.bmm(a, b), exact),
        "bmm, out": (products.bmm(a, b, out=slices[:, 10:50]), exact),
        "add_mm": (products.add_mm(c[0].clone(), a[0], b[0]), c[0].double() + exact[0]),
        "baddbmm": (products.baddbmm(c, a, b, beta=0.5, alpha=-2.0), 0.5 * c.double() - 2 * exact),
    }
    for name, (ours, expected) in found.items():
        assert ours.dtype == dtype, name
        limit = {torch.bfloat16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
        assert (ours.double() - expected).abs().max() <= limit * expected.abs().max(), name
    assert torch.equal(out[0], found["mm"][0])
    assert torch.equal(slices[:, 10:50], found["bmm"][0])


def test_widened_products_round_once_and_not_their_operands(monkeypatch):
    monkeypatch.setattr(products, "WIDENS", True)
    a, b, _ = matrices(torch.bfloat16, (64, 512), (512, 64), (1,))
    exact = a.double() @ b.double()
    error = (products.mm(a, b).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-4).all()  # half a unit of the eight bits, and the sums of FP32
