"""Which tensors are FP8: against the published checkpoint's counts, and against transformers' own choice."""

import json
from math import prod

import pytest
import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from conversion_models import ALIGNED, EDGES, LIKE_V3, tiny_model, transformers_config
from headrace.config.compose import load
from headrace.conversion.fp8_layout import (
    SCALE_SUFFIX,
    check_quantization_config,
    cuts_blocks,
    fp8_weights,
    is_projection,
    quantization_config,
    scales_shape,
)
from headrace.conversion.names import hub_tensors, keeps_fp32
from headrace.errors import UserError


@pytest.fixture(name="v3", scope="module")
def _v3():
    return hub_tensors(load(["model=v3_671b"]).model)


def test_the_published_checkpoint_has_as_many_fp8_tensors_and_bytes(v3):
    """45,808 tensors and 688,574,839,360 bytes: counted from the released index and layout."""
    fp8 = fp8_weights(v3, "deepseek")
    assert len(fp8) == 45_808
    size = 0
    for tensor in v3:
        if tensor.name in fp8:
            size += prod(tensor.shape) + 4 * prod(scales_shape(tensor.shape))
        else:
            size += prod(tensor.shape) * (4 if keeps_fp32(tensor.name) else 2)
    assert size == 688_574_839_360


def test_the_published_names(v3):
    fp8, layer = fp8_weights(v3, "deepseek"), "model.layers.61."
    for name in ("self_attn.kv_a_proj_with_mqa", "mlp.experts.255.down_proj", "mlp.shared_experts.gate_proj"):
        assert f"{layer}{name}.weight" in fp8
    for name in ("eh_proj", "mlp.gate", "enorm", "embed_tokens", "shared_head.head", "self_attn.q_a_layernorm"):
        assert f"{layer}{name}.weight" not in fp8
    assert not is_projection("lm_head.weight") and not is_projection("model.norm.weight")
    shapes = {tensor.name: tensor.shape for tensor in v3}
    assert scales_shape(shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]) == (5, 56)
    assert SCALE_SUFFIX == "_scale_inv"
    assert "modules_to_not_convert" not in quantization_config(v3, fp8)


def test_of_v3_only_the_latent_projections_are_left_out(v3):
    fp8 = fp8_weights(v3, "bf16")
    listed = quantization_config(v3, fp8)["modules_to_not_convert"]
    attention = [f"model.layers.{layer}.self_attn." for layer in range(62)]
    assert listed[0] == "lm_head" and len(listed) == 1 + 2 * 62
    assert set(listed[1:]) == {prefix + name for prefix in attention for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    assert len(fp8) == 45_808 - 2 * 62


def test_experts_are_left_out_together_and_listed_as_one_module():
    tensors = hub_tensors(tiny_model(**{**ALIGNED, "moe_intermediate_size": 96, "n_shared_experts": 4}))
    fp8 = fp8_weights(tensors, "bf16")
    listed = quantization_config(tensors, fp8)["modules_to_not_convert"]
    assert listed == ["lm_head", "model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in fp8  # 384 wide


def test_without_query_compression_the_key_projection_stands_alone():
    tensors = hub_tensors(tiny_model(**{**LIKE_V3, "q_lora_rank": None}))
    listed = quantization_config(tensors, fp8_weights(tensors, "bf16"))["modules_to_not_convert"]
    assert [name.rpartition(".")[2] for name in listed] == ["lm_head"] + 3 * ["kv_a_proj_with_mqa"]


@pytest.mark.parametrize("unaligned", ["deepseek", "bf16"])
@pytest.mark.parametrize("changes", [ALIGNED, LIKE_V3, EDGES, {}])
def test_transformers_makes_the_same_modules_fp8(changes, unaligned):
    """Its own replacement of modules, as on a GPU, driven by our list."""
    config = tiny_model(**changes)
    tensors = hub_tensors(config)
    fp8 = fp8_weights(tensors, unaligned)
    settings = {key: value for key, value in quantization_config(tensors, fp8).items() if key != "fmt"}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(transformers_config(config))
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**settings), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, FP8Experts):
            projections = [f"{e}.{p}_proj" for e in range(config.n_routed_experts) for p in ("gate", "up", "down")]
            found |= {f"{name}.{projection}.weight" for projection in projections}
        elif isinstance(module, FP8Linear):
            found.add(f"{name}.weight")
        elif isinstance(module, nn.Linear):
            assert f"{name}.weight" not in fp8
    mtp = f"model.layers.{config.num_hidden_layers}."
    assert found == {name for name in fp8 if not name.startswith(mtp)}


def test_which_models_have_blocks_that_transformers_misreads(v3):
    """`test_export.py` shows that it does, and that it reads the others."""
    assert cuts_blocks(v3, fp8_weights(v3, "deepseek")) and not cuts_blocks(v3, fp8_weights(v3, "bf16"))
    for changes, cut in ((ALIGNED, False), ({}, False), (LIKE_V3, True), (EDGES, True)):
        tensors = hub_tensors(tiny_model(**changes))
        assert cuts_blocks(tensors, fp8_weights(tensors, "deepseek")) == cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"weight_block_size": [1, 128]}, r"weight_block_size is \[1, 128\]"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
        ({"kv_cache_scheme": {}}, "kv_cache_scheme is unknown"),
    ],
)
def test_other_quantisations_are_refused_by_key(change, message, tmp_path):
    written = quantization_config([], set())
    check_quantization_config(tmp_path, written)
    with pytest.raises(UserError, match=message):
        check_quantization_config(tmp_path, {**written, **change})
    for key in ("quant_method", "weight_block_size"):
        with pytest.raises(UserError, match=f"{key} is missing"):
            check_quantization_config(tmp_path, {name: value for name, value in written.items() if name != key})
    with pytest.raises(UserError, match="not an object"):
        check_quantization_config(tmp_path, "fp8")


def test_what_transformers_writes_is_read(tmp_path):
    written = json.dumps(FineGrainedFP8Config(modules_to_not_convert=["lm_head"]).to_dict())
    check_quantization_config(tmp_path, json.loads(written))
