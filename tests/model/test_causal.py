"""Blockwise causal attention against the full square in float64."""

import pytest
import torch

from headrace.model.causal import causal_attention


def _reference(q, k, v):
    tokens = q.shape[2]
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


# Below, at and above a block of 128 and no multiple of it; above 1024 the probabilities are computed again.
@pytest.mark.parametrize("tokens", [1, 5, 127, 128, 129, 300, 1100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients(tokens, dtype):
    torch.manual_seed(tokens)
    dtype = getattr(torch, dtype)
    q, k, v = (torch.randn(2, 3, tokens, width).to(dtype).requires_grad_() for width in (12, 12, 7))
    dout = torch.randn(2, tokens, 3, 7).to(dtype)
    out = causal_attention(q, k, v)
    out.backward(dout)
    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    expected = _reference(q64, k64, v64)
    expected.backward(dout.double())
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    for ours, reference in [(out, expected), (q.grad, q64.grad), (k.grad, k64.grad), (v.grad, v64.grad)]:
        assert ours.dtype == dtype
        assert (ours.double() - reference).norm() <= tolerance * reference.norm() + 1e-12


def test_the_future_does_not_matter():
    q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
    before = causal_attention(q, k, v)
    k[:, :, 150:] += 100
    v[:, :, 150:] -= 100
    assert torch.equal(causal_attention(q, k, v)[:, :150], before[:, :150])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: padded fused attention against float64")
def test_padded_fused_attention_on_cuda():
    q, k, v = (torch.randn(2, 3, 200, width) for width in (24, 24, 16))
    ours = causal_attention(q.cuda(), k.cuda(), v.cuda()).cpu()
    torch.testing.assert_close(ours.double(), _reference(q.double(), k.double(), v.double()), rtol=1e-3, atol=1e-3)
