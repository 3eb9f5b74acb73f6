"""Kernels that quantise activations: byte for byte what the reference gives, laid out as the products want it."""

import pytest
import torch

from headrace_fp8_quantisation import quantise_rows, quantise_rows_and_columns, reference, requantise_columns

SHAPES = [(1, 1), (33, 128), (37, 300), (130, 257)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows(quantisers, shape, dtype, power_of_two):
    x = quantisers.hard_matrix(*shape, dtype)
    quantisers.assert_same(quantise_rows(x, power_of_two), reference.quantise_rows(x, power_of_two))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns(quantisers, shape, dtype, power_of_two):
    x = quantisers.hard_matrix(*shape, dtype)
    wanted = reference.quantise_rows_and_columns(x, power_of_two)
    quantisers.assert_same(quantise_rows_and_columns(x, power_of_two), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_requantised_columns(quantisers, shape, power_of_two):
    codes, scales = quantise_rows(quantisers.hard_matrix(*shape, torch.float32), True)
    wanted = reference.requantise_columns(codes, scales, power_of_two)
    quantisers.assert_same(requantise_columns(codes, scales, power_of_two), wanted)
    quantisers.assert_same(requantise_columns(codes, scales.contiguous(), power_of_two), wanted)


def test_scale_turns_to_the_next_power_of_two_at_448(quantisers):
    """448 * 2^n for every n, the numbers around it, and random ones: the kernel finds the scale without dividing."""
    mantissas = torch.tensor([1.75]).view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32)
    powers = torch.exp2(torch.arange(-126, 127, dtype=torch.float32))[:, None]
    amax = (mantissas.view(torch.float32) * powers).view(-1, 1)
    random = torch.randint(1, 0x7F800000, (1000, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    amax = torch.cat([amax, random.view(torch.float32)]).to(quantisers.device)
    quantisers.assert_same(quantise_rows(amax, True), quantisers.by_hand(amax, (1, 128), True))


def test_scales_are_mn_major_and_padded_to_four_rows(quantisers):
    x = quantisers.hard_matrix(37, 300, torch.bfloat16)
    _, scales, _, scales_t = quantise_rows_and_columns(x)
    assert (scales.shape, scales.stride()) == ((37, 3), (1, 40))
    assert (scales_t.shape, scales_t.stride()) == ((300, 1), (1, 300))


def test_rows_need_not_be_neighbours(quantisers):
    wide = quantisers.hard_matrix(30, 400, torch.bfloat16)
    x = wide[:, 100:300]
    quantisers.assert_same(quantise_rows_and_columns(x), reference.quantise_rows_and_columns(x))
    quantisers.assert_same(quantise_rows(x), reference.quantise_rows(x))


@pytest.mark.parametrize("shape", [(0, 128), (5, 0)])
def test_nothing_gives_nothing(quantisers, shape):
    x = torch.empty(shape, device=quantisers.device)
    codes, scales, codes_t, scales_t = quantise_rows_and_columns(x)
    assert (codes.shape, codes_t.shape) == (shape, shape[::-1])
    assert scales.numel() == scales_t.numel() == 0


@pytest.mark.parametrize("x", [torch.ones(2, 3, dtype=torch.float16), torch.ones(6), torch.ones(3, 2).t()])
def test_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match="give a BF16 or FP32 matrix"):
        quantise_rows(x)


def test_codes_and_scales_must_fit(quantisers):
    codes, scales = quantise_rows(torch.ones(4, 300, device=quantisers.device))
    with pytest.raises(ValueError, match="give contiguous E4M3 codes"):
        requantise_columns(codes, scales[:, :2])
