"""Names and shapes against transformers' own state_dict, and the refusals."""

from math import prod
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from conversion_models import VARIANTS, checkpoint_of, tiny_model, transformers_config
from headrace.conversion.names import check_tensors, checkpoint_shapes, hub_tensors, keeps_fp32
from headrace.errors import UserError


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_names_and_shapes_are_those_of_transformers_network(variant, tmp_path):
    config = tiny_model(**VARIANTS[variant])
    model = DeepseekV3ForCausalLM(transformers_config(config))
    tensors = checkpoint_of(model, config, tmp_path / "model.safetensors")
    assert checkpoint_shapes(config) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_hub_has_every_expert_apart_and_two_copies():
    config = tiny_model()
    tensors = {tensor.name: tensor for tensor in hub_tensors(config)}
    third = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert (third.source, third.expert) == ("model.layers.1.mlp.experts.down_proj.weight", 3)
    assert third.shape == (config.hidden_size, config.moe_intermediate_size)
    assert {name for name, tensor in tensors.items() if tensor.copy} == {
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    }
    assert {name for name in tensors if keeps_fp32(name)} == {
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.gate.e_score_correction_bias",
    }
    elements = sum(prod(tensor.shape) for tensor in tensors.values() if not tensor.copy)
    assert elements == sum(prod(shape) for shape in checkpoint_shapes(config).values())


def test_the_published_model_has_the_published_size():
    config = tiny_model(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    tensors = hub_tensors(config)
    total = sum(prod(tensor.shape) for tensor in tensors)
    assert round(total / 1e9, 2) == 684.49  # the Hub's total without scales
    # The published checkpoint's layout: 45,808 tensors are FP8 there, all of them projections.
    projections = [tensor for tensor in tensors if "_proj" in tensor.name and "eh_proj" not in tensor.name]
    assert len(projections) == 45_808


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda found: found.update({"model.extra": (1,)}), "model.extra is unknown"),
        (
            lambda found: found.update({"lm_head.weight": (64, 300)}),
            r"lm_head.weight has shape \[64, 300\].*\[300, 64\]",
        ),
    ],
)
def test_a_difference_is_named(change, message):
    expected = checkpoint_shapes(tiny_model())
    found = dict(expected)
    check_tensors(Path("file"), found, expected)
    change(found)
    with pytest.raises(UserError, match=message):
        check_tensors(Path("file"), found, expected)


def test_meta_tensors_suffice_for_the_comparison():
    config = tiny_model()
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(transformers_config(config))
    assert model.lm_head.weight.shape == checkpoint_shapes(config)["lm_head.weight"]
