"""A layer's four steps: composed they are the layer; interleaved with another microbatch they are still the layer."""

import pytest
import torch

import transformers_peer as peers
from headrace.fp8.gemms import PlainGemms
from headrace.model import rope
from headrace.model.dispatch import LocalDispatcher
from headrace.model.transformer import Transformer


@pytest.mark.parametrize("index", [0, 2])  # dense and mixture of experts
def test_steps_of_two_interleaved_microbatches_equal_two_forwards(index):
    config = peers.random_config(4)  # one dense layer
    model = peers.random_model(config, 4)
    layer = model.model.layers[index]
    rotation = rope.rotation(config, 6, torch.device("cpu"))
    first, second = (torch.randn(2, 6, config.hidden_size, requires_grad=True) for _ in range(2))
    expected = [layer(first, rotation)[0], layer(second, rotation)[0]]
    sum(out.square().sum() for out in expected).backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    inputs = [first.grad.clone(), second.grad.clone()]
    layer.zero_grad()
    first.grad = second.grad = None

    sent_a = layer.dispatch(layer.attention(first, rotation))
    hidden_b = layer.attention(second, rotation)
    sent_b = layer.dispatch(hidden_b)
    out_a = layer.experts(sent_a)
    done_a = layer.combine(sent_a, out_a)
    done_b = layer.combine(sent_b, layer.experts(sent_b))
    assert torch.equal(done_a, expected[0])
    assert torch.equal(done_b, expected[1])
    (done_b.square().sum() + done_a.square().sum()).backward()
    torch.testing.assert_close([first.grad, second.grad], inputs)
    torch.testing.assert_close({n: p.grad for n, p in layer.named_parameters() if p.grad is not None}, gradients)


def test_the_dispatcher_handed_in_is_used():
    calls = []

    class Recording(LocalDispatcher):
        def dispatch(self, x_ND, routing):
            calls.append("dispatch")
            return super().dispatch(x_ND, routing)

        def combine(self, rows_SD, dispatched):
            calls.append("combine")
            return super().combine(rows_SD, dispatched)

    config = peers.random_config(4)
    model = Transformer(config, "fp32", dispatcher=Recording(PlainGemms("fp32")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert calls == ["dispatch", "combine"] * (config.num_hidden_layers - config.first_k_dense_replace)
