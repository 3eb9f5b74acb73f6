"""RMSNorm against float64 autograd."""

import pytest
import torch

from headrace.model.norm import RMSNorm


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5, 24), "float32"), ((700, 512), "float32"), ((700, 512), "bfloat16")]
)
def test_value_and_gradients(shape, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-3)
    torch.nn.init.normal_(norm.weight)
    dtype = getattr(torch, dtype)
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)
    x = wide[..., : shape[-1]].requires_grad_()  # not contiguous, as the latent in MLA is not
    dy = torch.randn(shape).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    y.backward(dy)

    x64, w64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y64 = w64 * x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    y64.backward(dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), y64, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)
