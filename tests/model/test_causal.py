"""Blockwise causal attention against the full square in float64."""

import pytest
import torch
from torch.nn import functional

from headrace.model.causal import causal_attention, visible_keys


def _reference(q, k, v, documents_BT=None):
    """Documents are told apart by their numbers."""
    tokens = q.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if documents_BT is not None:
        hidden = hidden | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])
    scores = (q @ k.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def _documents(tokens):
    """Two rows of documents, [2, T]: their numbers, and where each token's begins."""
    begins = torch.rand(2, tokens) < torch.tensor([[0.3], [0.01]])
    begins[:, 0] = True
    return begins.cumsum(1), torch.where(begins, torch.arange(tokens), 0).cummax(1).values


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


@pytest.mark.parametrize("tokens", [1, 5, 129, 300, 1100])
def test_documents_that_do_not_see_each_other(tokens):
    torch.manual_seed(tokens)
    documents, starts = _documents(tokens)
    q, k, v = (torch.randn(2, 3, tokens, width, dtype=torch.float64, requires_grad=True) for width in (12, 12, 7))
    dout = torch.randn(2, tokens, 3, 7, dtype=torch.float64)
    out, expected = causal_attention(q, k, v, starts_BT=starts), _reference(q, k, v, documents)
    ours, theirs = (torch.autograd.grad(result, (q, k, v), dout) for result in (out, expected))
    for one, other in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    fused = functional.scaled_dot_product_attention(q, k, v, visible_keys(starts)[:, None], scale=1.0)
    torch.testing.assert_close(fused.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [200, 1100])
def test_one_document_is_the_whole_row_to_the_bit(tokens):
    q, k, v = (torch.randn(2, 3, tokens, width, requires_grad=True) for width in (12, 12, 7))
    outs = [causal_attention(q, k, v, starts_BT=starts) for starts in (None, torch.zeros(2, tokens, dtype=torch.int64))]
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for one, other in zip((outs[0], *gradients[0]), (outs[1], *gradients[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: padded fused attention against float64")
@pytest.mark.parametrize("masked", [False, True])
def test_padded_fused_attention_on_cuda(masked):
    q, k, v = (torch.randn(2, 3, 200, width) for width in (24, 24, 16))
    documents, starts = _documents(200) if masked else (None, None)
    ours = causal_attention(q.cuda(), k.cuda(), v.cuda(), starts_BT=starts.cuda() if masked else None).cpu()
    expected = _reference(q.double(), k.double(), v.double(), documents)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)
