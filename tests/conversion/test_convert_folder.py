"""One Hub folder to another: values, configuration and files; and what the gate finds."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion_models import (
    ALIGNED,
    EDGES,
    LIKE_V3,
    checkpoint_of,
    checkpoint_tensors,
    our_network,
    reference_model,
    tiny_model,
)
from conversion_models import tokenizer_folder as make_tokenizer
from headrace.conversion import check, hub_folder
from headrace.conversion.check import verify_export
from headrace.conversion.convert_folder import convert_folder
from headrace.conversion.export import export
from headrace.conversion.hub_folder import open_hub_folder
from headrace.conversion.import_hub import import_, open_for_import
from headrace.conversion.mtp import mtp_loading
from headrace.errors import UserError

INDEX = "model.safetensors.index.json"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.4.down_proj.weight"
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
LIMIT = 400_000


def made_of(changes, dtype, folder):
    config = tiny_model(**changes)
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    export(folder / "model.safetensors", config, make_tokenizer(folder / "tokenizer"), folder / dtype, dtype, LIMIT)
    return folder / dtype


@pytest.fixture(name="fp8", scope="module")
def _fp8(tmp_path_factory):
    return made_of(LIKE_V3, "fp8", tmp_path_factory.mktemp("fp8"))


def tensors_in(folder):
    """All tensors, and the file of each."""
    found, file_of = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        found |= loaded
        file_of |= dict.fromkeys(loaded, path)
    return found, file_of


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def dequantised(tensors, name):
    """By ml_dtypes and numpy."""
    codes = tensors[name].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = tensors[f"{name}_scale_inv"].numpy().repeat(128, axis=0)[: len(codes)]
    return codes * grid.repeat(128, axis=1)[:, : codes.shape[1]]


@pytest.mark.parametrize("changes", [ALIGNED, LIKE_V3, EDGES, {}], ids=["aligned", "v3", "edges", "tiny"])
def test_fp8_to_bf16_gives_the_rounded_values_and_all_else_bit_by_bit(changes, tmp_path, monkeypatch):
    source = made_of(changes, "fp8", tmp_path)
    config, made = convert_folder(source, tmp_path / "out", "bf16", LIMIT)
    stored, (found, _) = tensors_in(source)[0], tensors_in(tmp_path / "out")
    assert found.keys() == {name for name in stored if not name.endswith("_scale_inv")} and len(found) == made.tensors
    for name, tensor in found.items():
        if f"{name}_scale_inv" in stored:
            rounded = dequantised(stored, name).astype(ml_dtypes.bfloat16).view(np.uint16)
            assert np.array_equal(tensor.view(torch.uint16).numpy(), rounded), name
        else:
            assert tensor.dtype == stored[name].dtype and torch.equal(bits(tensor), bits(stored[name])), name
    assert verify_export(tmp_path / "out", source, config) == sum(tensor.numel() for tensor in found.values())
    monkeypatch.setattr(check, "_BAND", 1)  # 128 rows
    assert verify_export(tmp_path / "out", source, config) == sum(tensor.numel() for tensor in found.values())


@pytest.mark.parametrize("changes", [ALIGNED, LIKE_V3, EDGES, {}], ids=["aligned", "v3", "edges", "tiny"])
def test_by_fp32_the_way_back_to_fp8_is_byte_for_byte(changes, tmp_path):
    source = made_of(changes, "fp8", tmp_path)
    convert_folder(source, tmp_path / "fp32", "fp32", LIMIT)
    config, _ = convert_folder(tmp_path / "fp32", tmp_path / "back", "fp8", LIMIT)
    verify_export(tmp_path / "back", tmp_path / "fp32", config)
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("changes", [ALIGNED, LIKE_V3, EDGES, {}], ids=["aligned", "v3", "edges", "tiny"])
def test_by_bf16_codes_come_back_and_scales_move_as_bf16_rounds(changes, tmp_path):
    source = made_of(changes, "fp8", tmp_path)
    convert_folder(source, tmp_path / "bf16", "bf16", LIMIT)
    config, _ = convert_folder(tmp_path / "bf16", tmp_path / "back", "fp8", LIMIT)
    verify_export(tmp_path / "back", tmp_path / "bf16", config)
    before, after = tensors_in(source)[0], tensors_in(tmp_path / "back")[0]
    assert before.keys() == after.keys()
    moved = 0.0
    for name, tensor in before.items():
        if name.endswith("_scale_inv"):
            moved = max(moved, (after[name] / tensor - 1).abs().max().item())
        else:
            assert torch.equal(bits(tensor), bits(after[name])), name
    assert 0 < moved <= 2**-8  # BF16 has 8 significant bits


def test_other_files_hold_the_same_bits(fp8, tmp_path):
    convert_folder(fp8, tmp_path / "first", "bf16", LIMIT)
    config, _ = convert_folder(tmp_path / "first", tmp_path / "second", "bf16", 100_000)
    verify_export(tmp_path / "second", tmp_path / "first", config)
    (before, files), (after, others) = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert len(set(others.values())) > len(set(files.values())) and before.keys() == after.keys()
    assert all(torch.equal(bits(tensor), bits(after[name])) for name, tensor in before.items())


def test_configuration_and_tokenizer_go_along(fp8, tmp_path):
    source = shutil.copytree(fp8, tmp_path / "source")
    beside = ("LICENSE-MODEL", "LICENSE.txt", "LICENCE", "NOTICE", "NOTICE.md", "special_tokens_map.json")
    for name in beside:
        (source / name).write_text(name)
    convert_folder(source, tmp_path / "out", "bf16", LIMIT)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert before.pop("quantization_config")["quant_method"] == "fp8"
    assert after == {**before, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", *beside):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    convert_folder(tmp_path / "out", tmp_path / "back", "fp8", LIMIT, "bf16")
    written = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in written["modules_to_not_convert"]


def test_a_chat_template_in_a_file_of_its_own_goes_along(fp8, tmp_path):
    """As transformers writes it, and reads it again."""
    source = shutil.copytree(fp8, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(fp8)
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "chat_template.jinja", source)
    convert_folder(source, tmp_path / "out", "bf16", LIMIT)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_transformers_loads_the_converted_folder_and_computes_the_same(fp8, tmp_path):
    """BF16 weights, read as FP32 by both."""
    config, _ = convert_folder(fp8, tmp_path / "out", "bf16", LIMIT)
    with mtp_loading(config.num_hidden_layers):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True
        )
    assert {key: found for key, found in info.items() if found} == {}
    import_(open_for_import(tmp_path / "out"), tmp_path / "back", {})
    network = our_network(config)
    network.load_state_dict(checkpoint_tensors(tmp_path / "back"))
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (model(tokens).logits - network(tokens)).abs().max() <= 2e-5


def as_released(folder):
    """What DeepSeek's repositories hold beside weights: code, its key, other folders; weights cut by size alone."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key in ("dtype", "rope_parameters", "pad_token_id", "qk_head_dim", "rope_interleave"):
        del content[key]
    path.write_text(json.dumps({**content, "auto_map": AUTO_MAP, "transformers_version": "4.46.3"}))
    for name in ("modeling_deepseek.py", "configuration_deepseek.py"):
        (folder / name).write_text("raise SystemExit('read')")
    (folder / "inference").mkdir()
    (folder / "inference" / "convert.py").write_text("raise SystemExit('read')")
    (folder / "README.md").write_text("# DeepSeek")
    return folder


def test_a_release_is_converted_and_its_code_left_behind(fp8, tmp_path):
    source = as_released(shutil.copytree(fp8, tmp_path / "source"))
    with pytest.raises(UserError, match="auto_map"):
        open_hub_folder(source)
    config, _ = convert_folder(source, tmp_path / "out", "bf16", LIMIT)
    verify_export(tmp_path / "out", source, config)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    open_hub_folder(tmp_path / "out")


def other_code(source):
    (source / "tokenization.py").write_text("print()")
    return "tokenization.py: could hold code"


def other_auto_map(source):
    path = source / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "auto_map": {**AUTO_MAP, "AutoModel": "me/x--modeling.X"}}))
    return "auto_map"


def tokenizer_code(source):
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {}}))
    return "auto_map asks for code"


def dropped_mtp(source):
    edit(source, "model.layers.2.eh_proj.weight", lambda tensor: None)
    return "model.layers.2.eh_proj.weight is missing"


def unknown_tensor(source):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(source, name, lambda tensor: torch.zeros(3), beside="lm_head.weight")
    return "q_proj.bias is unknown"


def rounded_bias(source):
    edit(source, BIAS, lambda tensor: tensor.bfloat16())
    return f"{BIAS} is BF16; the selection bias must be F32"


def other_copy(source):
    def nudge(tensor):
        tensor[-1, -1] += 1
        return tensor

    edit(source, "model.layers.2.shared_head.head.weight", nudge)
    return "shared_head.head.weight differs from lm_head.weight"


def edit(folder, name, change, beside=None):
    """Replace, add or with None remove one tensor, in file and index."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].setdefault(name, index["weight_map"].get(beside))
    tensors = load_file(folder / file)
    changed = change(tensors.pop(name, None))
    if changed is None:
        del index["weight_map"][name]
    else:
        tensors[name] = changed
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


SOURCES = [other_code, other_auto_map, tokenizer_code, dropped_mtp, unknown_tensor, rounded_bias, other_copy]


@pytest.mark.parametrize("attack", SOURCES)
def test_a_wrong_source_is_refused_by_name_and_nothing_is_converted(attack, fp8, tmp_path, monkeypatch):
    source = as_released(shutil.copytree(fp8, tmp_path / "source"))
    message = attack(source)
    monkeypatch.setattr(hub_folder, "_BAND", 100)
    with pytest.raises(UserError, match=message) as caught:
        convert_folder(source, tmp_path / "out", "bf16", LIMIT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_fp8_to_fp8_is_refused(fp8, tmp_path):
    with pytest.raises(UserError, match="is FP8 already"):
        convert_folder(fp8, tmp_path / "out", "fp8", LIMIT)


def ones(tensor):
    return torch.ones_like(tensor)


def swapped(tensor):
    """Of one matrix, the scales of two blocks."""
    assert tensor.numel() > 1
    return tensor.flatten().roll(1).view(tensor.shape)


@pytest.mark.parametrize("wrong", [ones, swapped])
def test_weights_made_with_wrong_scales_do_not_pass(wrong, fp8, tmp_path, monkeypatch):
    """The fault is in the conversion: it takes other scales than those in the file."""
    get, name = hub_folder.HubFolder._get, f"{EXPERT}_scale_inv"
    monkeypatch.setattr(
        hub_folder.HubFolder,
        "_get",
        lambda self, of, *rows: wrong(get(self, of)) if of == name else get(self, of, *rows),
    )
    config, _ = convert_folder(fp8, tmp_path / "out", "bf16", LIMIT)
    with pytest.raises(UserError, match=rf"tensor {EXPERT} differs from the checkpoint in \d+ of 32768 elements"):
        verify_export(tmp_path / "out", fp8, config)


def scales_of_one(out):
    edit(out, f"{EXPERT}_scale_inv", ones)
    return f"{EXPERT}_scale_inv differs from the checkpoint in 2 of 2 elements"


def swapped_scale(out):
    edit(out, f"{EXPERT}_scale_inv", swapped)
    return f"{EXPERT}_scale_inv differs from the checkpoint in 2 of 2 elements"


def swapped_with_another_expert(out):
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale_inv" for expert in (0, 1)]
    kept = {}
    edit(out, names[0], lambda tensor: kept.setdefault("first", tensor))
    edit(out, names[1], lambda tensor: kept.setdefault("second", tensor) * 0 + kept["first"])
    edit(out, names[0], lambda tensor: kept["second"])
    return r"experts.\d.up_proj.weight_scale_inv differs from the checkpoint"


def mtp_tensor_dropped(out):
    edit(out, "model.layers.2.enorm.weight", lambda tensor: None)
    return "model.layers.2.enorm.weight is missing"


def bias_rounded_in_place(out):
    edit(out, BIAS, lambda tensor: tensor.bfloat16().float())
    return f"{BIAS} differs from the checkpoint"


def bias_stored_in_bf16(out):
    edit(out, BIAS, lambda tensor: tensor.bfloat16())
    return f"{BIAS} is torch.bfloat16, it must be torch.float32"


RESULTS = [scales_of_one, swapped_scale, swapped_with_another_expert]
RESULTS += [mtp_tensor_dropped, bias_rounded_in_place, bias_stored_in_bf16]


@pytest.fixture(name="converted", scope="module")
def _converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    source = made_of(LIKE_V3, "bf16", folder)
    config, _ = convert_folder(source, folder / "out", "fp8", LIMIT)
    return source, folder / "out", config


@pytest.mark.parametrize("damage", RESULTS)
def test_the_gate_finds_and_names_what_is_wrong(damage, converted, tmp_path):
    source, out, config = converted
    out = shutil.copytree(out, tmp_path / "out")
    verify_export(out, source, config)
    message = damage(out)
    with pytest.raises(UserError, match=message) as caught:
        verify_export(out, source, config)
    assert "\n" not in str(caught.value)
