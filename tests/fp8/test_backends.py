"""Choosing a back end: `auto` says what it picked, and what is missing is an error of one line."""

import dataclasses

import pytest
import torch

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.fp8.backends import pick

FP8 = load(["experiment=tiny", "precision=fp8"]).precision.fp8
CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_the_reference():
    assert pick(FP8, CPU) == "reference"


@pytest.mark.parametrize("name", ["triton", "gluon", "scaled_mm", "deep_gemm"])
def test_a_back_end_that_needs_a_gpu_is_refused_on_a_cpu(name):
    with pytest.raises(UserError, match=rf"precision.fp8.backend={name}: needs a GPU .* use reference"):
        pick(dataclasses.replace(FP8, backend=name), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would check what auto picks on a GPU")
def test_auto_on_a_gpu_with_fp8_is_triton():
    able = torch.cuda.get_device_capability() >= (9, 0)
    assert pick(FP8, torch.device("cuda")) == ("triton" if able else "reference")
    odd = dataclasses.replace(FP8, activation_tile="tensor")
    assert pick(odd, torch.device("cuda")) == "reference"


def test_tiles_that_only_the_reference_has_are_refused_elsewhere():
    with pytest.raises(UserError, match=r"precision.fp8.backend=triton has the report's tiles and accumulation only"):
        load(["experiment=tiny", "precision=fp8", "precision.fp8.backend=triton", "precision.fp8.weight_tile=tensor"])
