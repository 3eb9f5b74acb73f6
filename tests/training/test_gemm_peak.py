"""The measured peak against a product timed here, with wide margins for a busy machine."""

import time

import pytest
import torch

from headrace.fp8.products import mm
from headrace.training.gemm_peak import gemm_peak


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_peak_is_the_rate_of_a_large_product(compute: str, dtype: torch.dtype) -> None:
    peak = gemm_peak(compute, torch.device("cpu"), seconds=0.2)
    matrix, fastest = torch.ones(768, 768, dtype=dtype), float("inf")
    for _ in range(8):
        started = time.perf_counter()
        mm(matrix, matrix)  # BF16 as this project multiplies it: some CPUs have none of their own
        fastest = min(fastest, time.perf_counter() - started)
    assert 0.25 < peak / (2 * 768**3 / fastest) < 4
