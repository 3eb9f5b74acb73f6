"""Rotary embedding against complex multiplication, YaRN against the published constants."""

import dataclasses
import itertools

import pytest
import torch

import transformers_peer as peers
from headrace.config.compose import load
from headrace.model import rope


@pytest.mark.parametrize("tokens", [1, 9])
def test_heads_equal_complex_rotation_with_gradients(tokens):
    torch.manual_seed(0)
    config = dataclasses.replace(peers.random_config(0), qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    rotation = rope.rotation(config, tokens, torch.device("cpu"))
    q, kv = torch.randn(2, tokens, 3, 10, requires_grad=True), torch.randn(2, tokens, 3, 11, requires_grad=True)
    k_rope = torch.randn(2, tokens, 4, requires_grad=True)
    scale = 0.37
    outputs = rope.heads(q, kv, k_rope, rotation, scale)

    inputs64 = [t.detach().double().requires_grad_() for t in (q, kv, k_rope)]
    q64, kv64, k_rope64 = inputs64
    angles = torch.arange(tokens).double()[:, None] * config.rope_theta ** -(torch.arange(0, 4, 2).double() / 4)

    def turned(x, angles):  # pairs as complex numbers; then all real parts before all imaginary ones
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=-1)

    queries = torch.cat([q64[..., :6], turned(q64[..., 6:], angles[:, None])], -1).transpose(1, 2) * scale
    shared = turned(k_rope64, angles)[:, :, None].expand(-1, -1, 3, -1)
    keys = torch.cat([kv64[..., :6], shared], -1).transpose(1, 2)
    expected = (queries, keys, kv64[..., 6:].transpose(1, 2))
    gradients = [torch.randn_like(t) for t in outputs]
    torch.autograd.backward(outputs, gradients)
    torch.autograd.backward(expected, [g.double() for g in gradients])
    for ours, reference in zip(outputs, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)
    for ours, reference in zip((q, kv, k_rope), inputs64, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_positions_begin_anew_with_each_document():
    torch.manual_seed(0)
    config = peers.random_config(1)  # YaRN
    plain, rotated, bounds = config.qk_nope_head_dim, config.qk_rope_head_dim, [0, 1, 5, 9]
    inputs = [torch.randn(2, 9, 3, width) for width in (plain + rotated, plain + 5)] + [torch.randn(2, 9, rotated)]
    starts = torch.tensor([[0, 1, 1, 1, 1, 5, 5, 5, 5], [0] * 9])

    def results(tokens, starts=None, row=slice(None)):
        given = [tensor[row, tokens].clone().requires_grad_() for tensor in inputs]
        rotation = rope.rotation(config, given[0].shape[1], torch.device("cpu"), starts)
        outs = rope.heads(*given, rotation, 0.37)
        return [
            *(out.transpose(1, 2) for out in outs),
            *torch.autograd.grad(sum(o.square().sum() for o in outs), given),
        ]

    together = results(slice(None), starts)
    assert all(torch.equal(found[1:], one) for found, one in zip(together, results(slice(None), row=[1]), strict=True))
    for piece in itertools.starmap(slice, itertools.pairwise(bounds)):
        for found, one in zip(together, results(piece, row=[0]), strict=True):
            assert torch.equal(found[:1, piece], one)


def test_products_depend_on_distance_only():
    config = peers.random_config(1)
    rotation = rope.rotation(config, 12, torch.device("cpu"))
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    q = torch.randn(1, 1, 1, width).expand(1, 12, 1, width)
    kv = torch.randn(1, 1, 1, config.qk_nope_head_dim + 1).expand(1, 12, 1, -1)
    queries, keys, _ = rope.heads(q, kv, torch.randn(1, 1, config.qk_rope_head_dim).expand(1, 12, -1), rotation, 1.0)
    products = (queries @ keys.transpose(2, 3))[0, 0]
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_yarn_constants_of_the_published_model():
    """Report, section 4.3: s = 40, beta 32 and 1, length 4096: pairs 10 to 23 blend, softmax scale 0.135234."""
    config = load(["model=v3_671b_128k"]).model
    assert rope.softmax_scale(config) == pytest.approx(0.135234, abs=1e-6)
    plain = rope.frequencies(load(["model=v3_671b"]).model)
    stretched = plain / rope.frequencies(config)
    torch.testing.assert_close(stretched[:11], torch.ones(11))
    torch.testing.assert_close(stretched[23:], torch.full((9,), 40.0))
    assert (stretched[11:23].diff() > 0).all()
    assert ((stretched[11:23] > 1.01) & (stretched[11:23] < 39.99)).all()
    assert load(["model=v3_671b"]).model.rope_scaling is None
    assert rope.softmax_scale(load(["model=v3_671b"]).model) == pytest.approx(192**-0.5)
    rotation = rope.rotation(config, 2, torch.device("cpu"))
    torch.testing.assert_close(rotation.cos[0], torch.ones(32))  # mscale = mscale_all_dim: the magnitudes cancel
