"""Operands that do not fit are refused in one line that names them."""

import pytest
import torch

from headrace_fp8_gemm import dense, k_grouped, m_grouped


def _line(error) -> str:
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("a", torch.zeros(128, 256), "a is float32 [128, 256]"),
        ("a", torch.zeros(256, 128, dtype=torch.float8_e4m3fn).T, "contiguous float8_e4m3fn [128, 256]"),
        ("a", torch.zeros(256, dtype=torch.float8_e4m3fn), "a has 1 dimensions"),
        ("a_scales", torch.zeros(2, 128), "float32 [128, 2]"),
        ("b", torch.zeros(64, 128, dtype=torch.float8_e4m3fn), "contiguous float8_e4m3fn [64, 256]"),
        ("b_scales", torch.zeros(1, 2, dtype=torch.float64), "b_scales is float64"),
        ("out_dtype", torch.float16, "torch.bfloat16 or torch.float32"),
    ],
)
def test_dense(name, wrong, said):
    operands = {
        "a": torch.zeros(128, 256, dtype=torch.float8_e4m3fn),
        "a_scales": torch.zeros(128, 2),
        "b": torch.zeros(64, 256, dtype=torch.float8_e4m3fn),
        "b_scales": torch.zeros(1, 2),
        "out_dtype": torch.bfloat16,
    }
    with pytest.raises(ValueError) as error:
        dense(**operands | {name: wrong})
    assert said in _line(error)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("group_of_block", torch.zeros(2, dtype=torch.int64), "contiguous int32 [2]"),
        ("b_scales", torch.zeros(1, 1), "float32 [3, 1, 1]"),
    ],
)
def test_m_grouped(name, wrong, said):
    operands = {
        "a": torch.zeros(256, 128, dtype=torch.float8_e4m3fn),
        "a_scales": torch.zeros(256, 1),
        "b": torch.zeros(3, 64, 128, dtype=torch.float8_e4m3fn),
        "b_scales": torch.zeros(3, 1, 1),
        "group_of_block": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError) as error:
        m_grouped(**operands | {name: wrong})
    assert said in _line(error)


@pytest.mark.parametrize("rows", [128, 100])
def test_k_grouped(rows):
    codes, scales = torch.zeros(64, rows, dtype=torch.float8_e4m3fn), torch.zeros(64, 1)
    offsets = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError) as error:
        k_grouped(codes, scales, codes, scales, offsets, torch.zeros(2, 64, 63))
    assert ("float32 [2, 64, 64]" if rows == 128 else "whole blocks of 128") in _line(error)
