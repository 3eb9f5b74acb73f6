"""The Gluon products against the Triton ones, float64 and the reference, on a Hopper GPU; their refusals anywhere.

Gluon has no interpreter. Without such a GPU the numerical tests skip, each saying what it would have checked; that the
kernels compile and what their machine code holds is checked in tests/kernels.
"""

import pytest
import torch

from headrace_fp8_gemm import gluon_gemm, reference, triton_gemm
from headrace_fp8_gemm.gluon_maps import mn_major, scales_map


@pytest.fixture
def hopper(request) -> None:
    """Skips where there is no GPU of compute capability 9.0, with the first line of the test's docstring."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"no Hopper GPU; not checked: {request.function.__doc__.splitlines()[0]}")


DENSE = {
    "one tile, one block": (128, 128, 128),
    "fewer blocks than the ring has slots": (256, 384, 256),
    "laps of the ring": (256, 128, 4096),
    "several tiles a thread block": (2048, 2048, 512),
    "every edge": (200, 136, 336),
    "one row": (1, 128, 256),
    "rows of the first consumer only": (192, 128, 640),
    "a full band of tiles and one more": (1100, 256, 128),
    "wide and short, as q_a and kv_a": (384, 2112, 1024),
}


def _dense_operands(products, M, N, K):
    blocks = -(-K // 128)
    a, a_scales = products.codes(M, K), products.scales(M, blocks, mn_major=True)
    return a, a_scales, products.codes(N, K), products.scales(-(-N // 128), blocks)


def _transposed_operands(products, O, I, S):  # noqa: E741
    left, left_scales = products.codes(O, S), products.scales(O, S // 128, mn_major=True)
    return left, left_scales, products.codes(I, S), products.scales(I, S // 128, mn_major=True)


def _tensor(products, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=products.device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", DENSE.values(), ids=DENSE.keys())
def test_gluon_dense(products, shape, hopper):
    """dense is within the bounds of float64, as close as the Triton kernel, in FP32 and rounded once to BF16."""
    a, a_scales, b, b_scales = operands = _dense_operands(products, *shape)
    y = gluon_gemm.dense(*operands, torch.float32)
    products.assert_close(y, products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128)))
    assert torch.equal(gluon_gemm.dense(*operands), y.bfloat16())
    torch.testing.assert_close(
        y, triton_gemm.dense(*operands, torch.float32), rtol=1e-5, atol=1e-5 * y.abs().max().item()
    )
    torch.testing.assert_close(
        y, reference.dense(*operands, torch.float32), rtol=1e-3, atol=1e-3 * y.abs().max().item()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("N", [256, 136])
def test_gluon_m_grouped(products, N, hopper):
    """m_grouped takes each block's own expert, out of order, some left out, also where N ends in a tile."""
    S, K, E = 5 * 128, 640, 4
    groups = _tensor(products, 2, 0, 0, 3, 2)
    a, a_scales = products.codes(S, K), products.scales(S, 5, mn_major=True)
    b, b_scales = products.codes(E, N, K), products.scales(E, -(-N // 128), 5)
    y = gluon_gemm.m_grouped(a, a_scales, b, b_scales, groups, torch.float32)
    for block, expert in enumerate(groups.tolist()):
        rows = slice(128 * block, 128 * (block + 1))
        alone = gluon_gemm.dense(a[rows], a_scales[rows], b[expert], b_scales[expert], torch.float32)
        assert torch.equal(y[rows], alone), f"block {block} is not what its expert {expert} gives alone"
    theirs = triton_gemm.m_grouped(a, a_scales, b, b_scales, groups, torch.float32)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5 * y.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("O", "I"), [(128, 256), (200, 136), (64, 100), (576, 1280)])
def test_gluon_k_grouped(products, O, I, accumulate, hopper):  # noqa: E741
    """k_grouped gives each expert its rows only, writes or adds, keeps to its own gradient, zeros empty experts."""
    offsets = _tensor(products, 0, 256, 256, 1408, 1536)  # the second expert is empty, and 128 rows belong to nobody
    E, S = 4, 1664
    left, left_scales, right, right_scales = operands = _transposed_operands(products, O, I, S)
    before = torch.randn(E, O, I, device=products.device) * 1e4
    out = gluon_gemm.k_grouped(*operands, offsets, before.clone(), accumulate)
    left_64, right_64 = products.decode(left, left_scales, (1, 128)), products.decode(right, right_scales, (1, 128))
    for expert in range(E):
        rows = slice(*offsets[expert : expert + 2].tolist())
        was = before[expert].cpu().double().numpy() if accumulate else 0.0
        products.assert_close(out[expert], left_64[:, rows], right_64[:, rows], was)
    theirs = triton_gemm.k_grouped(*operands, offsets, before.clone(), accumulate)
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.gpu
def test_gluon_products_repeat_bit_for_bit(products, hopper):
    """fifty runs of a product that fills the GPU several times agree: races of producer and consumers would show."""
    operands = _dense_operands(products, 4096, 4096, 2048)
    first = gluon_gemm.dense(*operands)
    assert all(torch.equal(gluon_gemm.dense(*operands), first) for _ in range(50))


@pytest.mark.gpu
def test_gluon_takes_scales_in_any_layout(products, hopper):
    """scales that are not MN-major are copied, not misread."""
    a, a_scales, b, b_scales = _dense_operands(products, 70, 256, 256)
    y = gluon_gemm.dense(a, a_scales, b, b_scales)
    assert torch.equal(y, gluon_gemm.dense(a, a_scales.contiguous(), b, b_scales.T.contiguous().T))


def test_gluon_refuses_rows_that_a_tensor_map_cannot_describe(products):
    operands = _dense_operands(products, 64, 128, 136)
    message = "a has rows of 136 elements; the gluon back end needs multiples of 16: use the triton back end"
    with pytest.raises(ValueError, match=message):
        gluon_gemm.dense(*operands)
    with pytest.raises(
        ValueError, match="the result has rows of 130 elements; the gluon back end needs multiples of 8"
    ):
        gluon_gemm.dense(*_dense_operands(products, 64, 130, 128))
    left, left_scales, right, right_scales = _transposed_operands(products, 128, 128, 256)
    with pytest.raises(ValueError, match="left_t"):
        offsets = _tensor(products, 0, 256)
        gluon_gemm.k_grouped(left[:, :200], left_scales, right, right_scales, offsets, torch.empty(1, 128, 128))


def test_gluon_refuses_other_devices():
    a, scales = torch.zeros(128, 128).to(torch.float8_e4m3fn), torch.ones(128, 1)
    with pytest.raises(ValueError, match="the operands are on cpu; the gluon back end needs a Hopper GPU"):
        gluon_gemm.dense(a, scales, a, scales[:1])


def test_gluon_needs_no_gpu_where_there_is_nothing_to_multiply(products):
    a, a_scales, b, b_scales = _dense_operands(products, 0, 128, 256)
    assert gluon_gemm.dense(a, a_scales, b, b_scales).shape == (0, 128)
    before = torch.ones(2, 128, 128, device=products.device)
    empty = _transposed_operands(products, 128, 128, 0)
    offsets = _tensor(products, 0, 0, 0)
    assert torch.equal(gluon_gemm.k_grouped(*empty, offsets, before.clone(), accumulate=True), before)
    assert not gluon_gemm.k_grouped(*empty, offsets, before.clone()).any()


def test_the_map_of_scales_reaches_every_scale_and_no_further(products):
    for scales in (products.scales(70, 3, mn_major=True), products.scales(70, 3), products.scales(1, 3)):
        laid = mn_major(scales)
        (length,) = scales_map(laid).shape
        flat = laid.as_strided((length,), (1,))
        for block in range(3):
            start = block * laid.stride(1)
            assert torch.equal(flat[start : start + scales.shape[0]], scales[:, block])
        assert start + scales.shape[0] == length
