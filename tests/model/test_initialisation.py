"""Initial weights: distribution, and independence of everything but seed and name."""

import dataclasses

import pytest
import torch

import transformers_peer as peers
from headrace.config.compose import load
from headrace.model.initialisation import initialise, standard_deviation
from headrace.model.transformer import Transformer


def _initialised(config, seed):
    model = Transformer(config, "fp32")
    initialise(model, config, seed)
    return model.state_dict()


def test_standard_deviation_follows_the_width():
    config = load(["model=v3_671b"]).model
    assert standard_deviation(config) == 0.006
    auto = dataclasses.replace(config, initializer_range="auto")
    assert standard_deviation(auto) == pytest.approx(0.006)
    assert standard_deviation(dataclasses.replace(auto, hidden_size=14336)) == pytest.approx(0.006)
    assert standard_deviation(dataclasses.replace(auto, hidden_size=7168 // 4)) == pytest.approx(0.012)


def test_distribution_norms_and_biases():
    config = dataclasses.replace(load(["experiment=tiny"]).model, initializer_range=0.03)
    for name, tensor in _initialised(config, 0).items():
        if name.endswith("e_score_correction_bias"):
            assert tensor.count_nonzero() == 0
        elif tensor.dim() == 1:
            assert (tensor == 1).all()
        else:
            error = 0.03 * tensor.numel() ** -0.5
            assert abs(tensor.mean().item()) < 5 * error, name
            assert abs(tensor.std().item() - 0.03) < 5 * error, name


def test_a_tensor_depends_on_seed_and_name_only():
    config = dataclasses.replace(peers.random_config(4), num_nextn_predict_layers=1)
    reference = _initialised(config, 7)
    torch.manual_seed(123)
    again = _initialised(config, 7)
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.items())
    other_seed = _initialised(config, 8)
    smaller = dataclasses.replace(
        config, num_nextn_predict_layers=0, n_routed_experts=config.n_routed_experts // 2, n_group=1, topk_group=1
    )
    for name, tensor in _initialised(smaller, 7).items():
        if tensor.dim() == 3:  # the first experts are the same ones, however many there are
            assert torch.equal(tensor, reference[name][: tensor.shape[0]]), name
        elif tensor.dim() == 2 and "mlp.gate." not in name:
            assert torch.equal(tensor, reference[name]), name
            assert not torch.equal(tensor, other_seed[name]), name
    stacked = reference["model.layers.2.mlp.experts.gate_proj.weight"]
    assert not torch.equal(stacked[0], stacked[1])
