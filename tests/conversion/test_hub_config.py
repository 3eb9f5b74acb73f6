"""config.json against the lists of fields that its readers look up, against transformers' reading, and the refusals."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from conversion_models import VARIANTS, tiny_model, transformers_config
from headrace.conversion.hub_config import is_quantised, read_hub_config, write_hub_config
from headrace.conversion.special_tokens import SpecialTokens
from headrace.errors import UserError
from headrace.model.initialisation import standard_deviation

TOKENS = SpecialTokens(bos=0, eos=1, pad=2)

# Attributes that each reader takes from the configuration of a DeepseekV3ForCausalLM: model, MTP and rope code of
# vLLM 0.33 (models/deepseek_v2.py, deepseek_mtp.py, config/model.py, config/speculative.py) and SGLang
# (models/deepseek_v2.py, deepseek_nextn.py, configs/model_config.py), and reference C, "Export contract".
COMMON = {
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "moe_layer_freq",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "num_nextn_predict_layers",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
}
VLLM = COMMON | {"rope_parameters", "dtype"}
SGLANG = COMMON | {"rope_theta", "rope_scaling", "torch_dtype"}
TRANSFORMERS = COMMON | {"attention_bias", "attention_dropout", "rope_interleave", "initializer_range", "use_cache"}
# Keys whose presence makes one of them build another network or load code.
FORBIDDEN = {"auto_map", "head_dim", "index_topk", "llama_4_scaling", "is_causal", "quantization_config", "layer_types"}


def save(folder, content):
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_that_a_reader_looks_up_is_there(variant):
    written = write_hub_config(tiny_model(**VARIANTS[variant]), "bf16", TOKENS)
    for reader in (VLLM, SGLANG, TRANSFORMERS):
        assert reader - written.keys() == set()
    assert FORBIDDEN & written.keys() == set()


def test_values_that_decide_the_routing_and_the_layout():
    written = write_hub_config(tiny_model(), "bf16", TOKENS)
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert written["topk_method"] == "noaux_tc"
    assert written["scoring_func"] == "sigmoid"
    assert written["moe_layer_freq"] == 1
    assert written["num_key_value_heads"] == written["num_attention_heads"]
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (0, 1, 2)


def test_yarn_is_written_in_both_spellings():
    written = write_hub_config(tiny_model(**VARIANTS["yarn"]), "fp32", TOKENS)
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == "yarn"
    assert written["rope_parameters"] == {**written["rope_scaling"], "rope_theta": written["rope_theta"]}
    plain = write_hub_config(tiny_model(), "fp32", TOKENS)
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_fp8_is_written_beside_the_dtype_of_the_rest_and_read(tmp_path):
    published = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    written = write_hub_config(tiny_model(), "fp8", TOKENS, published)
    assert written["quantization_config"] == published
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    read_hub_config(save(tmp_path, written))
    assert is_quantised(tmp_path)
    assert not is_quantised(save(tmp_path, write_hub_config(tiny_model(), "bf16", TOKENS)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, tmp_path):
    config = tiny_model(**VARIANTS[variant])
    save(tmp_path, write_hub_config(config, "fp32", TOKENS))
    assert read_hub_config(tmp_path) == replace(config, initializer_range=standard_deviation(config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_understands_it_as_we_mean_it(variant, tmp_path, caplog):
    config = tiny_model(**VARIANTS[variant])
    read = AutoConfig.from_pretrained(save(tmp_path, write_hub_config(config, "fp32", TOKENS)))
    wanted = transformers_config(config)
    for key, value in wanted.to_dict().items():
        if key not in {"initializer_range", "architectures", "dtype", "transformers_version", "_name_or_path"}:
            found = getattr(read, key)
            if key == "rope_parameters":
                found = {name: item for name, item in found.items() if name != "type"}
            assert found == value, key
    assert not caplog.records


def test_a_config_written_by_transformers_is_read(tmp_path):
    config = tiny_model(**VARIANTS["yarn"])
    written = transformers_config(config)
    written.architectures = ["DeepseekV3ForCausalLM"]
    written.save_pretrained(tmp_path)
    assert read_hub_config(tmp_path) == replace(config, initializer_range=0.02)


def test_the_published_config_is_read_when_its_code_is_removed(tmp_path):
    published = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    config = read_hub_config(save(tmp_path, published))
    assert (config.hidden_size, config.rope_scaling.factor, config.rope_theta) == (7168, 40.0, 10000.0)
    with pytest.raises(UserError, match="auto_map"):
        read_hub_config(save(tmp_path, {**published, "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}}))


REFUSED = [
    ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
    ({"trust_remote_code": True}, "trust_remote_code"),
    ({"_attn_implementation_internal": "user/repo"}, "_attn_implementation_internal"),
    ({"quantization_config": {"quant_method": "awq", "weight_block_size": [128, 128]}}, "quant_method is 'awq'"),
    ({"quantization_config": None}, "quantization_config is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"attention_bias": True}, "attention_bias"),
    ({"moe_layer_freq": True}, "moe_layer_freq is True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2'"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ({"head_dim": 128}, "head_dim is 128"),
    ({"hidden_size": "64"}, "hidden_size: Input should be a valid integer"),
    ({"hidden_size": True}, "hidden_size"),
    ({"n_routed_experts": -8}, "n_routed_experts"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    ({"initializer_range": "auto"}, "initializer_range must be a number"),
    ({"rope_theta": 5000.0}, "disagree"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "disagree"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type yarn or default"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial": 1}}, "rope_parameters.partial"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "disagree"),
    ({"rope_parameters": [1]}, "not an object"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_doubtful_key_is_refused_by_name(change, message, tmp_path):
    content = write_hub_config(tiny_model(), "fp32", TOKENS)
    with pytest.raises(UserError, match=message) as caught:
        read_hub_config(save(tmp_path, {**content, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "n_group", "architectures", "kv_lora_rank", "v_head_dim"])
def test_a_missing_key_is_named(key, tmp_path):
    content = write_hub_config(tiny_model(), "fp32", TOKENS)
    del content[key]
    with pytest.raises(UserError, match=key):
        read_hub_config(save(tmp_path, content))


def test_incomplete_scaling_is_named(tmp_path):
    content = write_hub_config(tiny_model(**VARIANTS["yarn"]), "fp32", TOKENS)
    del content["rope_parameters"]
    del content["rope_scaling"]["mscale"]
    with pytest.raises(UserError, match=r"rope_scaling\.mscale"):
        read_hub_config(save(tmp_path, content))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1, "a": 2}', "[" * 100_000, '{"vocab_size": "' + "x" * 2_000_000 + '"}']
)
def test_malformed_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_hub_config(tmp_path)


@pytest.mark.parametrize(("width", "std"), [(7168, 0.006), (1792, 0.012), (14336, 0.006)])
def test_initial_spread_is_written_as_a_number(width, std):
    assert write_hub_config(tiny_model(hidden_size=width), "fp32", TOKENS)["initializer_range"] == pytest.approx(std)
    assert write_hub_config(tiny_model(initializer_range=0.01), "fp32", TOKENS)["initializer_range"] == 0.01
