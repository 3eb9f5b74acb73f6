"""The Triton products against float64 and against the reference: edges, groups without rows, accumulation, layouts.

Without a GPU they run in Triton's interpreter (kernels/conftest.py), which shows arithmetic and addresses, not races.
"""

import pytest
import torch

from headrace_fp8_gemm import dense, k_grouped, m_grouped, reference

DENSE = {
    "one tile": (128, 128, 128),
    "many blocks": (256, 256, 512),
    "every edge": (200, 136, 320),
    "K not a multiple of 16": (64, 130, 141),
    "one row": (1, 128, 256),
    "a full band of tiles and one more": (1100, 130, 32),
}


def _dense_operands(products, M, N, K):
    blocks = -(-K // 128)
    a, a_scales = products.codes(M, K), products.scales(M, blocks, mn_major=True)
    return a, a_scales, products.codes(N, K), products.scales(-(-N // 128), blocks)


def _transposed_operands(products, O, I, S):  # noqa: E741
    left, left_scales = products.codes(O, S), products.scales(O, S // 128, mn_major=True)
    return left, left_scales, products.codes(I, S), products.scales(I, S // 128, mn_major=True)


@pytest.mark.parametrize("shape", DENSE.values(), ids=DENSE.keys())
def test_dense(products, shape):
    a, a_scales, b, b_scales = operands = _dense_operands(products, *shape)
    y = dense(*operands, torch.float32)
    products.assert_close(y, products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128)))
    assert torch.equal(dense(*operands), y.bfloat16())


def test_dense_is_the_reference_but_for_the_order_of_sums(products):
    operands = _dense_operands(products, 96, 160, 384)
    products.assert_same_sums(dense(*operands, torch.float32), reference.dense(*operands, torch.float32))


def test_scales_in_any_layout(products):
    a, a_scales, b, b_scales = _dense_operands(products, 70, 256, 256)
    y = dense(a, a_scales, b, b_scales, torch.float32)
    assert a_scales.stride() == (1, 72)
    assert torch.equal(y, dense(a, a_scales.contiguous(), b, b_scales.T.contiguous().T, torch.float32))


def test_a_tile_without_numbers_spoils_its_row_only(products):
    a, a_scales, b, b_scales = _dense_operands(products, 8, 128, 256)
    clean = dense(a, a_scales, b, b_scales, torch.float32)
    a_scales[3, 1] = float("nan")
    spoilt = dense(a, a_scales, b, b_scales, torch.float32)
    assert spoilt[3].isnan().all()
    assert torch.equal(torch.cat([spoilt[:3], spoilt[4:]]), torch.cat([clean[:3], clean[4:]]))


def test_no_rows_give_no_rows(products):
    assert dense(*_dense_operands(products, 0, 128, 128)).shape == (0, 128)


@pytest.mark.parametrize("groups", [[0, 2, 2], [3, 0, 1]], ids=["experts without rows", "any order"])
def test_m_grouped(products, groups):
    E, N, K = 4, 136, 200
    a, a_scales = products.codes(384, K), products.scales(384, 2, mn_major=True)
    b, b_scales = products.codes(E, N, K), products.scales(E, 2, 2)
    group_of_block = torch.tensor(groups, dtype=torch.int32, device=products.device)
    y = m_grouped(a, a_scales, b, b_scales, group_of_block, torch.float32)
    left, right = products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128))
    for block, expert in enumerate(groups):
        rows = slice(block * 128, block * 128 + 128)
        products.assert_close(y[rows], left[rows], right[expert])
    assert torch.equal(m_grouped(a, a_scales, b, b_scales, group_of_block), y.bfloat16())


def test_m_grouped_of_one_expert_is_dense(products):
    operands = _dense_operands(products, 256, 128, 256)
    a, a_scales, b, b_scales = operands
    group_of_block = torch.zeros(2, dtype=torch.int32, device=products.device)
    assert torch.equal(m_grouped(a, a_scales, b[None], b_scales[None], group_of_block), dense(*operands))


@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("sizes", [(128, 256), (136, 72)], ids=["even", "edges"])
def test_k_grouped(products, sizes, accumulate):
    """Experts without rows come first, last and between; the last block belongs to nobody and is not a number."""
    (O, I), bounds = sizes, [0, 0, 256, 256, 384, 384]  # noqa: E741
    left, left_scales, right, right_scales = operands = _transposed_operands(products, O, I, 512)
    left.view(torch.uint8)[:, 384:] = 0x7F
    right_scales[:, 3] = float("nan")
    offsets = torch.tensor(bounds, dtype=torch.int32, device=products.device)
    out = products.scales(5, O, I)
    before = out.cpu().double().numpy() * accumulate
    assert k_grouped(*operands, offsets, out, accumulate=accumulate) is out
    left, right = products.decode(left, left_scales, (1, 128)), products.decode(right, right_scales, (1, 128))
    for expert in range(5):
        rows = slice(bounds[expert], bounds[expert + 1])
        products.assert_close(out[expert], left[:, rows], right[:, rows], before[expert])


def test_k_grouped_of_one_expert_is_the_weight_gradient_of_a_linear_layer(products):
    left, left_scales, right, right_scales = operands = _transposed_operands(products, 128, 128, 256)
    offsets = torch.tensor([0, 256], dtype=torch.int32, device=products.device)
    out = k_grouped(*operands, offsets, torch.empty(1, 128, 128, device=products.device))
    products.assert_same_sums(out, reference.k_grouped(*operands, offsets, torch.empty_like(out)))
    row_major = left, left_scales.contiguous(), right, right_scales.contiguous()
    assert torch.equal(k_grouped(*row_major, offsets, torch.empty_like(out)), out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the tensor core: its sums of 14 bits are promoted")
def test_a_long_sum_of_positive_numbers_is_promoted(products):
    """K = 8192. By the emulation of headrace.fp8.accumulator 1.3e-1 unpromoted and 6.2e-4 promoted, above this bound.

    No GPU has run it yet: the first one decides between the bound and the emulation.
    """
    a, b = (products.codes(128, 8192).abs() for _ in range(2))
    ones = torch.ones(128, 64, device="cuda")
    y = dense(a, ones, b, ones[:1], torch.float32).double()
    exact = a.double() @ b.double().T
    assert ((y - exact).norm() / exact.norm()).item() < 3e-4
