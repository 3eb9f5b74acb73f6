"""Counts against the published figures and against networks that really exist."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from headrace.config.compose import load
from headrace.model.transformer import Transformer
from headrace.planning.parameters import count, muon_parameters
from headrace.training.optimizer import takes_muon

MODELS: list[tuple[str, dict[str, object]]] = [
    ("pico", {}),
    ("lite_16b", {}),
    ("v3_671b", {}),
    ("nano", {"num_nextn_predict_layers": 0}),
    ("nano", {"q_lora_rank": None, "n_shared_experts": 3}),
    ("nano", {"first_k_dense_replace": 0}),
]


def model_of(name, **changes):
    return replace(load(["experiment=tiny", f"model={name}", "model.vocab_size=129280"]).model, **changes)


def test_the_published_figures():
    counted = count(model_of("v3_671b"))
    assert counted.total == 671_026_404_352
    assert counted.router_bias == 14_848
    assert round(counted.activated / 1e9, 3) == 36.626  # with the head only
    assert round((counted.activated + counted.embedding) / 1e9, 2) == 37.55
    assert round((counted.activated - counted.head) / 1e9, 2) == 35.70
    assert round(counted.mtp / 1e9, 3) == 11.610
    assert round((counted.mtp + counted.embedding + counted.head) / 1e9, 3) == 13.463
    assert counted.mtp_router_bias == 256
    copies = counted.embedding + counted.head
    assert round((counted.stored + copies) / 1e9, 2) == 684.49


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_every_component_of_the_network_on_the_meta_device(name, changes):
    config = model_of(name, **changes)
    with torch.device("meta"):
        network = Transformer(config, "fp32")
    counted = count(config)
    mtp = f"model.layers.{config.num_hidden_layers}."
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    main = {name: size for name, size in sizes.items() if not name.startswith(mtp)}

    def of(*parts):
        return sum(size for name, size in main.items() if any(part in name for part in parts))

    assert counted.total == sum(main.values())
    assert counted.mtp == sum(sizes.values()) - sum(main.values())
    assert counted.attention == of("self_attn")
    assert counted.routers == of("mlp.gate.weight")
    assert counted.routed_experts == of("mlp.experts.")
    assert counted.shared_experts == of("shared_experts")
    assert counted.norms == of("input_layernorm", "post_attention_layernorm", "model.norm")
    assert counted.activated_experts * config.n_routed_experts == counted.routed_experts * config.num_experts_per_tok
    assert counted.stored == sum(tensor.numel() for tensor in network.state_dict().values())
    assert muon_parameters(config) == sum(p.numel() for n, p in network.named_parameters() if takes_muon(n, p.shape))


def test_planning_needs_no_torch():
    program = "import sys, headrace.planning.describe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
