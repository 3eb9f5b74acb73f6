"""Newton-Schulz against a float64 SVD, batches against single matrices, and the whole update against a plain one."""

import pytest
import torch
from torch import Tensor

from headrace.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalise, shape_scale

SHAPES = [(32, 32), (48, 16), (16, 48), (5, 24, 40), (5, 40, 24), (7, 1)]


def gradient_like(*shape: int, seed: int = 0) -> Tensor:
    """A matrix with a steep spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    decay = torch.logspace(0, -1.5, min(shape[-2:]), dtype=torch.float64)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    return u * decay @ v


def by_singular_values(matrix: Tensor) -> Tensor:
    """The same odd polynomial applied to singular values in float64: what exact arithmetic would give."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm(dim=(-2, -1)).unsqueeze(-1)
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_the_polynomial_of_singular_values(shape: tuple[int, ...]) -> None:
    matrix = gradient_like(*shape)
    result = orthogonalise(matrix.float(), torch.float32)
    torch.testing.assert_close(result.double(), by_singular_values(matrix), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_orthogonal_and_near_the_polynomial(shape: tuple[int, ...]) -> None:
    matrix = gradient_like(*shape)
    result = orthogonalise(matrix.float(), torch.bfloat16)
    assert result.dtype == torch.bfloat16
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.5
    assert values.max() < 1.35
    exact = by_singular_values(matrix)
    assert (result.double() - exact).norm() / exact.norm() < 0.05


def test_singular_vectors_are_those_of_the_gradient() -> None:
    """The result points along U V^T: their inner product is nearly as large as it can be."""
    matrix = gradient_like(24, 40)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix.float(), torch.float32).double()
    cosine = (result * (u @ v)).sum() / (result.norm() * (u @ v).norm())
    assert cosine > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_its_matrices_one_by_one(dtype: torch.dtype) -> None:
    stack = torch.stack([gradient_like(24, 40, seed=seed).float() * 10.0**seed for seed in range(4)])
    together = orthogonalise(stack, dtype)
    for matrix, result in zip(stack, together, strict=True):
        torch.testing.assert_close(
            orthogonalise(matrix, dtype), result, rtol=0, atol=1e-5 if dtype == torch.float32 else 8e-3
        )


def test_an_expert_without_gradient_gets_no_update() -> None:
    stack = torch.stack([torch.zeros(8, 4), gradient_like(8, 4).float()])
    result = orthogonalise(stack, torch.bfloat16)
    assert result[0].abs().max() == 0
    assert result[1].isfinite().all()


def test_scale_by_shape() -> None:
    assert shape_scale(torch.empty(3, 64, 16)) == 2.0
    assert shape_scale(torch.empty(16, 64)) == 1.0


def test_steps_equal_a_plain_float64_muon() -> None:
    """Three steps of momentum, Nesterov, decay and scale, written out for one matrix."""
    start = gradient_like(12, 6, seed=9)
    parameter = start.float().clone().requires_grad_()
    muon = Muon({"w": parameter}, momentum=0.9, weight_decay=0.1, compute=torch.float32, moments=torch.float32)
    weight, momentum = start.clone(), torch.zeros_like(start)
    for step in range(3):
        gradient = gradient_like(12, 6, seed=step)
        parameter.grad = gradient.float()
        muon.step(0.02)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = by_singular_values(0.1 * gradient + 0.9 * momentum)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 2**0.5 * update
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=1e-5)


def test_agrees_with_torch_muon_on_a_matrix() -> None:
    """torch.optim.Muon takes matrices only and always works in BF16."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(16, 8)) for _ in range(2))
    muon = Muon({"w": ours}, momentum=0.95, weight_decay=0.1, compute=torch.bfloat16, moments=torch.float32)
    peer = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="original")
    for _ in range(4):
        gradient = torch.randn(16, 8)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step(0.02)
        peer.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved
