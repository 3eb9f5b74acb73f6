"""Products that other libraries lend: grouping and layout of scales, on a stand-in that multiplies as it is asked."""

import pytest
import torch

from headrace.fp8.libraries import ScaledMm
from headrace.fp8.quantise import quantise
from headrace_fp8_gemm import reference


@pytest.fixture
def library(monkeypatch):
    """`ScaledMm` on a scaled_mm that checks the layouts cuBLASLt demands and dequantises."""
    kinds = torch.nn.functional.ScalingType

    def scaled_mm(a, b, a_scales, a_tiles, b_scales, b_tiles, output_dtype):
        assert a_tiles == kinds.BlockWise1x128
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a_scales.stride(0) == 1  # fastest along the rows
        if b_tiles == kinds.BlockWise128x128:
            assert b_scales.t().stride(1) == 1 and b_scales.t().stride(0) % 4 == 0
        right = b_scales.t().repeat_interleave(128 if b_tiles == kinds.BlockWise128x128 else 1, 0)[: b.shape[1]]
        wide = [s.repeat_interleave(128, 1)[:, : a.shape[1]] for s in (a_scales, right)]
        return ((a.float() * wide[0]) @ (b.t().float() * wide[1]).T).to(output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    return ScaledMm()


def by_column(scales):
    return scales.t().contiguous().t()


def test_groups_are_slices_of_one_product_each(library):
    torch.manual_seed(0)
    x, w = quantise(torch.randn(384, 200), (1, 128)), quantise(torch.randn(3, 140, 200), (128, 128))
    blocks = torch.tensor([0, 2, 2], dtype=torch.int32)
    arguments = (x.codes, by_column(x.scales), w.codes, w.scales, blocks, torch.float32)
    torch.testing.assert_close(library.m_grouped(*arguments), reference.m_grouped(*arguments), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradients_contract_each_experts_rows(library, accumulate):
    torch.manual_seed(1)
    dy, x = (quantise(torch.randn(width, 384), (1, 128)) for width in (24, 40))
    offsets = torch.tensor([0, 128, 128, 384], dtype=torch.int32)
    ours, theirs = torch.ones(3, 24, 40), torch.ones(3, 24, 40)
    arguments = (dy.codes, by_column(dy.scales), x.codes, by_column(x.scales), offsets)
    library.k_grouped(*arguments, ours, accumulate)
    reference.k_grouped(*arguments, theirs, accumulate)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
