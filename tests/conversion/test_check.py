"""Every kind of damage to an export is found and named; a sound export passes."""

import json
import shutil
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_models import (
    ALIGNED,
    EDGES,
    LIKE_V3,
    VARIANTS,
    checkpoint_of,
    checkpoint_tensors,
    reference_model,
    tiny_model,
    tokenizer_folder,
)
from headrace.conversion import check
from headrace.conversion.check import expected_values, verify_export
from headrace.conversion.export import export
from headrace.conversion.import_hub import import_, open_for_import
from headrace.conversion.names import hub_tensors
from headrace.errors import UserError

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(name="made", scope="module", params=["fp32", "bf16"])
def _made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    config = tiny_model()
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    tokenizer = tokenizer_folder(folder / "tokenizer")
    export(folder / "model.safetensors", config, tokenizer, folder / "hub", request.param, 300_000)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_export_passes_and_every_element_is_counted(variant, tmp_path):
    config = tiny_model(**VARIANTS[variant])
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "bf16", 1 << 30)
    elements = verify_export(tmp_path / "hub", tmp_path / "model.safetensors", config)
    assert elements == sum(prod(tensor.shape) for tensor in hub_tensors(config))


def alter(hub, tensor, change):
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    path = hub / index["weight_map"][tensor]
    tensors = load_file(path)
    changed = change(tensors.pop(tensor))
    save_file({**tensors, **({} if changed is None else {tensor: changed})}, path, {"format": "pt"})


def one_weight(hub):
    def nudge(tensor):
        tensor[2, 3] = torch.nextafter(tensor[2, 3], torch.tensor(9, dtype=tensor.dtype))
        return tensor

    alter(hub, "model.layers.1.mlp.experts.4.down_proj.weight", nudge)
    return r"experts.4.down_proj.weight differs from the checkpoint in 1 of \d+ elements, first at flat index 67 "


def ends_of_the_embedding(hub):
    def nudge(tensor):
        tensor[[0, -1]] += 1
        return tensor

    alter(hub, "model.embed_tokens.weight", nudge)
    return r"model.embed_tokens.weight differs from the checkpoint in 128 of \d+ elements, first at flat index 0 "


def sign_of_zero(hub):
    def negate(tensor):
        tensor[0] = -tensor[0]
        return tensor

    alter(hub, "model.layers.2.enorm.weight", negate)
    return r"model.layers.2.enorm.weight differs"


def rounded_bias(hub):
    alter(hub, BIAS, lambda tensor: tensor.bfloat16().float())
    return f"{BIAS} differs"


def bias_dtype(hub):
    alter(hub, BIAS, lambda tensor: tensor.bfloat16())
    return f"{BIAS} is torch.bfloat16"


def swapped_experts(hub):
    names = [f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in (0, 1)]
    kept = []
    alter(hub, names[0], lambda tensor: kept.append(tensor) or tensor)
    alter(hub, names[1], lambda tensor: kept[0])
    return "experts.1.gate_proj.weight differs"


def stale_copy(hub):
    alter(hub, "model.layers.2.shared_head.head.weight", lambda tensor: tensor * 2)
    return "shared_head.head.weight differs"


def lost_tensor(hub):
    alter(hub, "model.norm.weight", lambda tensor: None)
    return "model.norm.weight is missing"


def lost_everywhere(hub):
    alter(hub, "model.layers.2.hnorm.weight", lambda tensor: None)
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.2.hnorm.weight"]
    path.write_text(json.dumps(index))
    return "model.layers.2.hnorm.weight is missing"


def transposed(hub):
    alter(hub, "model.layers.0.self_attn.kv_b_proj.weight", lambda tensor: tensor.T.contiguous())
    return "kv_b_proj.weight has shape"


def wrong_total(hub):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 4
    path.write_text(json.dumps(index))
    return "total_size"


def stray_file(hub):
    save_file({"x": torch.zeros(1)}, hub / "model-00099-of-000099.safetensors")
    return "model-00099-of-000099.safetensors: not in the index"


def no_format(hub):
    path = next(hub.glob("*.safetensors"))
    save_file(load_file(path), path)
    return "lacks format=pt"


def cut_short(hub):
    path = next(hub.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.name}: not a whole safetensors file"


def malformed_index(hub):
    (hub / "model.safetensors.index.json").write_text('{"weight_map": []}')
    return "not an index"


def other_dtype(hub):
    path = hub / "config.json"
    written = json.loads(path.read_text())
    other = {"float32": "bfloat16", "bfloat16": "float32"}[written["dtype"]]
    path.write_text(json.dumps({**written, "dtype": other}))
    return r"is torch\.\w+, it must be torch\."


def unknown_dtype(hub):
    path = hub / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16"}))
    return "dtype is 'float16'"


def other_scaling(hub):
    path = hub / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routed_scaling_factor": 1.0}))
    return "routed_scaling_factor is 1.0"


DAMAGES = [
    one_weight,
    ends_of_the_embedding,
    sign_of_zero,
    rounded_bias,
    bias_dtype,
    swapped_experts,
    stale_copy,
    lost_tensor,
    lost_everywhere,
    transposed,
    wrong_total,
    stray_file,
    no_format,
    other_scaling,
    cut_short,
    malformed_index,
    other_dtype,
    unknown_dtype,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("band", [check._BAND, 1], ids=["whole", "bands"])
def test_damage_is_found_and_named(damage, band, made, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_BAND", band)
    hub = shutil.copytree(made / "hub", tmp_path / "hub")
    verify_export(hub, made / "model.safetensors", tiny_model())
    message = damage(hub)
    with pytest.raises(UserError, match=message):
        verify_export(hub, made / "model.safetensors", tiny_model())


def test_an_altered_checkpoint_is_found_too(made, tmp_path):
    tensors = load_file(made / "model.safetensors")
    tensors["model.layers.1.mlp.experts.up_proj.weight"][7, 0, 0] *= 1.5
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"experts.7.up_proj.weight differs"):
        verify_export(made / "hub", tmp_path / "other.safetensors", tiny_model())


@pytest.fixture(name="made_fp8", scope="module", params=["deepseek", "bf16"])
def _made_fp8(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made_fp8")
    config = tiny_model(**LIKE_V3)
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    tokenizer = tokenizer_folder(folder / "tokenizer")
    export(folder / "model.safetensors", config, tokenizer, folder / "hub", "fp8", 400_000, request.param)
    return folder


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("changes", "unaligned"),
    [
        (ALIGNED, "deepseek"),
        (LIKE_V3, "deepseek"),
        (LIKE_V3, "bf16"),
        (EDGES, "deepseek"),
        (EDGES, "bf16"),
        ({**LIKE_V3, "q_lora_rank": None}, "bf16"),
        ({}, "deepseek"),
    ],
)
def test_both_readings_of_an_export_give_the_same_values(changes, unaligned, dtype, tmp_path):
    """The first: codes and scales of the folder, by torch. The second: the checkpoint's weights rounded by numpy."""
    config = tiny_model(**changes)
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", dtype, 1 << 30, unaligned)
    elements = verify_export(tmp_path / "hub", tmp_path / "model.safetensors", config)
    assert elements == sum(prod(tensor.shape) for tensor in hub_tensors(config))
    import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    first, second = (
        checkpoint_tensors(tmp_path / "back"),
        expected_values(tmp_path / "hub", tmp_path / "model.safetensors"),
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.int32), second[name].contiguous().view(torch.int32)), name


WEIGHT = "model.layers.1.mlp.experts.4.down_proj.weight"


def one_code(hub):
    def nudge(tensor):
        tensor.view(torch.uint8)[2, 3] ^= 1
        return tensor

    alter(hub, WEIGHT, nudge)
    return rf"{WEIGHT} differs from the checkpoint in 1 of 32768 elements, first at flat index 259 "


def codes_far_apart(hub):
    def nudge(tensor):
        tensor.view(torch.uint8)[[130, 255], [3, 127]] ^= 1
        return tensor

    alter(hub, WEIGHT, nudge)
    return rf"{WEIGHT} differs from the checkpoint in 2 of 32768 elements, first at flat index {130 * 128 + 3} "


def one_scale(hub):
    def nudge(tensor):
        tensor[1, 0] = torch.nextafter(tensor[1, 0], torch.tensor(9.0))
        return tensor

    alter(hub, f"{WEIGHT}_scale_inv", nudge)
    return rf"{WEIGHT}_scale_inv differs from the checkpoint in 1 of 2 elements, first at flat index 1 "


def swapped_fp8_experts(hub):
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 1)]
    for suffix in ("", "_scale_inv"):
        kept = []
        alter(hub, names[0] + suffix, lambda tensor, kept=kept: kept.append(tensor) or tensor)
        alter(hub, names[1] + suffix, lambda tensor, kept=kept: kept[0])
    return r"experts.1.up_proj.weight_scale_inv differs"


def lost_scale(hub):
    alter(hub, f"{WEIGHT}_scale_inv", lambda tensor: None)
    return rf"{WEIGHT}_scale_inv is missing"


def lost_scale_everywhere(hub):
    lost_scale(hub)
    edit_map(hub, lambda mapped: mapped.pop(f"{WEIGHT}_scale_inv"))
    return rf"{WEIGHT}_scale_inv is missing"


def scale_left_over(hub):
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    path = hub / index["weight_map"]["model.norm.weight"]
    save_file({**load_file(path), "model.norm.weight_scale_inv": torch.ones(1, 1)}, path, {"format": "pt"})
    edit_map(hub, lambda mapped: mapped.update({"model.norm.weight_scale_inv": path.name}))
    return r"model.norm.weight_scale_inv belongs to no FP8 weight"


def scale_rounded(hub):
    alter(hub, f"{WEIGHT}_scale_inv", lambda tensor: tensor.bfloat16())
    return rf"{WEIGHT}_scale_inv is torch.bfloat16"


def grid_too_small(hub):
    alter(hub, f"{WEIGHT}_scale_inv", lambda tensor: tensor[:1].clone())
    return rf"{WEIGHT}_scale_inv has shape \[1, 1\], it needs \[2, 1\]"


def weight_in_bf16(hub):
    alter(hub, WEIGHT, lambda tensor: tensor.bfloat16())
    return rf"{WEIGHT} is torch.bfloat16, it must be torch.float8_e4m3fn"


def embedding_in_fp8(hub):
    alter(hub, "model.embed_tokens.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    return r"model.embed_tokens.weight is torch.float8_e4m3fn, it must be torch.bfloat16"


def listed_alone(hub):
    edit_list(hub, lambda listed: ["lm_head", *listed, "model.layers.0.mlp.gate_proj"])
    return r"config.json: model.layers.0.mlp.gate_proj is left out of FP8, model.layers.0.mlp.up_proj is not"


def listed_without_queries(hub):
    edit_list(hub, lambda _: ["lm_head", "model.layers.0.self_attn.kv_a_proj_with_mqa"])
    return r"kv_a_proj_with_mqa is left out of FP8, model.layers.0.self_attn.q_a_proj is not"


def head_not_listed(hub):
    edit_list(hub, lambda listed: [*listed[1:], "model.layers.0.self_attn.q_b_proj"])
    return "lm_head is not listed"


def listed_for_nothing(hub):
    edit_list(hub, lambda listed: ["lm_head", *listed, "model.layers.1.mlp.experts"])
    return r"model.layers.1.mlp.experts.\d.\w+_proj.weight is torch.float8_e4m3fn, it must be torch.bfloat16"


def unannounced(hub):
    path = hub / "config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    path.write_text(json.dumps(content))
    return r"is torch.float8_e4m3fn, it must be torch.bfloat16|belongs to no FP8 weight"


def edit_map(hub, change):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_list(hub, change):
    path = hub / "config.json"
    content = json.loads(path.read_text())
    quantization = content["quantization_config"]
    quantization["modules_to_not_convert"] = change(quantization.get("modules_to_not_convert", []))
    path.write_text(json.dumps(content))


FP8_DAMAGES = [
    one_code,
    codes_far_apart,
    one_scale,
    swapped_fp8_experts,
    lost_scale,
    lost_scale_everywhere,
    scale_left_over,
    scale_rounded,
    grid_too_small,
    weight_in_bf16,
    embedding_in_fp8,
    listed_alone,
    listed_without_queries,
    head_not_listed,
    listed_for_nothing,
    unannounced,
]


@pytest.mark.parametrize("damage", FP8_DAMAGES)
@pytest.mark.parametrize("band", [check._BAND, 1], ids=["whole", "bands"])
def test_damage_to_fp8_is_found_and_named(damage, band, made_fp8, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_BAND", band)
    hub, config = shutil.copytree(made_fp8 / "hub", tmp_path / "hub"), tiny_model(**LIKE_V3)
    verify_export(hub, made_fp8 / "model.safetensors", config)
    message = damage(hub)
    with pytest.raises(UserError, match=message) as caught:
        verify_export(hub, made_fp8 / "model.safetensors", config)
    assert "\n" not in str(caught.value)
