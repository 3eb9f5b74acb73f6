"""The reference against float64, and the bound itself against the mistakes that it has to catch."""

import numpy as np
import pytest
import torch

from headrace_fp8_gemm import reference

DENSE = [(128, 128, 128), (256, 256, 512), (200, 136, 320), (3, 5, 7)]


@pytest.mark.parametrize("shape", DENSE)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_dense(products, shape, out_dtype):
    M, N, K = shape
    a, a_scales = products.codes(M, K), products.scales(M, -(-K // 128))
    b, b_scales = products.codes(N, K), products.scales(-(-N // 128), -(-K // 128))
    y = reference.dense(a, a_scales, b, b_scales, out_dtype)
    assert y.dtype == out_dtype
    products.assert_close(y, products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128)))


def test_dense_of_two_by_two_by_hand(device):
    """[[1, 2]] x [[3, 4], [0.5, -1]] with scales 2 and 10: 2 * 10 * [11, -1.5]."""
    a = torch.tensor([[1.0, 2.0]], device=device).to(torch.float8_e4m3fn)
    b = torch.tensor([[3.0, 4.0], [0.5, -1.0]], device=device).to(torch.float8_e4m3fn)
    y = reference.dense(a, torch.full((1, 1), 2.0, device=device), b, torch.full((1, 1), 10.0, device=device))
    assert y.tolist() == [[220.0, -30.0]]


def test_blocks_are_added_in_float32_and_may_be_in_float64(products):
    """2^24 + 1 - 2^24 over three blocks: FP32 loses the one, float64 does not."""
    codes = torch.zeros(1, 384, device=products.device)
    codes[0, [0, 128, 256]] = 1.0
    a = codes.to(torch.float8_e4m3fn)
    b = (codes * torch.tensor([1.0, 1.0, -1.0], device=products.device).repeat_interleave(128)).to(torch.float8_e4m3fn)
    a_scales = torch.tensor([[2.0**24, 1.0, 2.0**24]], device=products.device)
    b_scales = torch.ones(1, 3, device=products.device)
    assert reference.dense(a, a_scales, b, b_scales, torch.float32).item() == 0.0
    assert reference.dense(a, a_scales, b, b_scales, torch.float32, sums=torch.float64).item() == 1.0


def test_m_grouped(products):
    S, E, N, K = 384, 3, 136, 200
    a, a_scales = products.codes(S, K), products.scales(S, 2)
    b, b_scales = products.codes(E, N, K), products.scales(E, 2, 2)
    group_of_block = torch.tensor([0, 2, 2], dtype=torch.int32, device=products.device)
    y = reference.m_grouped(a, a_scales, b, b_scales, group_of_block, torch.float32)
    left, right = products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128))
    products.assert_close(y[:128], left[:128], right[0])
    products.assert_close(y[128:], left[128:], right[2])


@pytest.mark.parametrize("accumulate", [False, True])
def test_k_grouped(products, accumulate):
    O, I, S, bounds = 136, 72, 512, [0, 128, 128, 384]  # noqa: E741
    left, left_scales = products.codes(O, S), products.scales(O, S // 128)
    right, right_scales = products.codes(I, S), products.scales(I, S // 128)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=products.device)
    out = products.scales(3, O, I)
    before = out.cpu().double().numpy() * accumulate
    assert reference.k_grouped(left, left_scales, right, right_scales, offsets, out, accumulate) is out
    left, right = products.decode(left, left_scales, (1, 128)), products.decode(right, right_scales, (1, 128))
    for expert in range(3):
        rows = slice(bounds[expert], bounds[expert + 1])
        products.assert_close(out[expert], left[:, rows], right[:, rows], before[expert])


def _without_scales(a, a_scales, b, b_scales):
    return a, torch.ones_like(a_scales), b, b_scales


def _next_block_of_k(a, a_scales, b, b_scales):
    return a, a_scales, b, b_scales.roll(1, 1)


def _transposed_scales(a, a_scales, b, b_scales):
    return a, a_scales, b, b_scales.T.contiguous()


def _next_row(a, a_scales, b, b_scales):
    return a, a_scales.roll(1, 0), b, b_scales


def _blocks_swapped(a, a_scales, b, b_scales):
    return a, a_scales, b.view(torch.uint8).roll(128, 0).view(torch.float8_e4m3fn), b_scales


def _one_scale_off_by_a_percent(a, a_scales, b, b_scales):
    a_scales = a_scales.clone()
    a_scales[a_scales.argmax(0)[0], 0] *= 1.01
    return a, a_scales, b, b_scales


@pytest.mark.parametrize(
    "mistake",
    [
        _without_scales,
        _next_block_of_k,
        _transposed_scales,
        _next_row,
        _blocks_swapped,
        _one_scale_off_by_a_percent,
    ],
)
def test_the_bound_catches(products, mistake):
    operands = products.codes(128, 256), products.scales(128, 2), products.codes(256, 256), products.scales(2, 2)
    y = reference.dense(*mistake(*operands), torch.float32)
    a, a_scales, b, b_scales = operands
    with pytest.raises(AssertionError, match="worst error"):
        products.assert_close(y, products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128)))


def test_no_rows_give_no_rows(products):
    y = reference.dense(products.codes(0, 128), products.scales(0, 1), products.codes(8, 128), products.scales(1, 1))
    assert np.array_equal(y.shape, (0, 8))
