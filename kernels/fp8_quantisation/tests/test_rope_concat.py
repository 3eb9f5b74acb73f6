"""RoPE and the joining of heads: against complex numbers in float64, forward and backward."""

import pytest
import torch

from headrace_fp8_quantisation import reference, rope_concat, rope_concat_backward

SCALE = 0.13


def exactly(q, kv, k_rope, angles):
    """The definition: every pair of neighbours is a complex number, and the position turns it."""
    plain = q.shape[-1] - k_rope.shape[-1]
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(x, turn):
        pairs = torch.complex(*x.unflatten(-1, (-1, 2)).unbind(-1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q_part = turned(q[..., plain:], turn[:, None])
    queries = torch.cat([q[..., :plain], q_part], -1).transpose(1, 2) * SCALE
    shared = turned(k_rope, turn)[:, :, None].expand(-1, -1, q.shape[2], -1)
    keys = torch.cat([kv[..., :plain], shared], -1).transpose(1, 2)
    return queries, keys, kv[..., plain:].transpose(1, 2)


@pytest.fixture(params=[(2, 19, 3, 12, 8, 10), (1, 33, 2, 128, 64, 128), (1, 1, 1, 1, 2, 1)], ids=str)
def inputs(request):
    """q, kv, k_rope and angles in float64, of B, T, H, N, R, V."""
    B, T, H, N, R, V = request.param
    random = torch.Generator().manual_seed(5)
    shapes = (B, T, H, N + R), (B, T, H, N + V), (B, T, R)
    q, kv, k_rope = (torch.randn(shape, generator=random).bfloat16().double() for shape in shapes)
    return q, kv, k_rope, torch.rand(T, R // 2, generator=random, dtype=torch.float64) * 100


def tables(angles, device):
    return angles.cos().float().to(device), angles.sin().float().to(device)


def assert_close(found, exact, dtype):
    tolerance = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}[dtype]
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("back_end", [rope_concat, reference.rope_concat])
def test_forward(quantisers, inputs, dtype, back_end):
    *tensors, angles = inputs
    given = [x.to(dtype).to(quantisers.device) for x in tensors]
    assert_close(back_end(*given, *tables(angles, quantisers.device), SCALE), exactly(*inputs), dtype)


@pytest.mark.parametrize("back_end", [rope_concat_backward, reference.rope_concat_backward])
def test_backward(quantisers, inputs, dtype, back_end):
    *tensors, angles = inputs
    tensors = [x.requires_grad_() for x in tensors]
    outputs = exactly(*tensors, angles)
    random = torch.Generator().manual_seed(6)
    gradients = [torch.randn(x.shape, generator=random).bfloat16().double() for x in outputs]
    exact = torch.autograd.grad(outputs, tensors, gradients)
    given = [x.to(dtype).to(quantisers.device) for x in gradients]
    assert_close(back_end(*given, *tables(angles, quantisers.device), SCALE), exact, dtype)


def test_what_does_not_fit_is_refused(quantisers, inputs):
    *tensors, angles = inputs
    q, kv, k_rope = (x.float().to(quantisers.device) for x in tensors)
    cos, sin = tables(angles, quantisers.device)
    with pytest.raises(ValueError, match="sin is"):
        rope_concat(q, kv, k_rope, cos, sin.double(), SCALE)
    with pytest.raises(ValueError, match="kv is"):
        rope_concat(q, kv.bfloat16(), k_rope, cos, sin, SCALE)
