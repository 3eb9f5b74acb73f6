"""FP8 folders of foreign origin: the official layout is read, whatever is wrong with weights and scales is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_models import LIKE_V3, checkpoint_of, reference_model, tiny_model, tokenizer_folder
from headrace.conversion.export import export
from headrace.conversion.hub_folder import open_hub_folder
from headrace.conversion.import_hub import import_, open_for_import
from headrace.errors import UserError

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.5.gate_proj.weight"
KEYS = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
E4M3 = torch.float8_e4m3fn


@pytest.fixture(name="original", scope="module")
def _original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    config = tiny_model(**LIKE_V3)
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    tokenizer = tokenizer_folder(folder / "tokenizer")
    export(folder / "model.safetensors", config, tokenizer, folder / "hub", "fp8", 400_000)
    return folder / "hub"


@pytest.fixture(name="hub")
def _hub(original, tmp_path):
    return shutil.copytree(original, tmp_path / "hub")


def rewrite(hub, name, change):
    """Replace, add or with None remove one tensor, in shard and index."""
    index = json.loads((hub / INDEX).read_text())
    file = index["weight_map"].setdefault(name, index["weight_map"][name.removesuffix("_scale_inv")])
    tensors = load_file(hub / file)
    changed = change(tensors.pop(name, None))
    if changed is None:
        del index["weight_map"][name]
    else:
        tensors[name] = changed
    save_file(tensors, hub / file, {"format": "pt"})
    (hub / INDEX).write_text(json.dumps(index))


def edit_config(hub, change):
    content = json.loads((hub / "config.json").read_text())
    change(content)
    (hub / "config.json").write_text(json.dumps(content))


def with_value(value, at=(0, 0)):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


def missing_scale(hub):
    rewrite(hub, f"{EXPERT}_scale_inv", lambda tensor: None)
    return rf"{EXPERT}_scale_inv is missing"


def left_over_scale(hub):
    rewrite(hub, EXPERT, lambda tensor: tensor.bfloat16())
    return rf"{EXPERT}_scale_inv is left over: {EXPERT} is BF16"


def scale_of_a_norm(hub):
    rewrite(hub, "model.norm.weight_scale_inv", lambda _: torch.ones(1, 1))
    return r"model.norm.weight_scale_inv is left over: model.norm.weight is BF16"


def scale_without_weight(hub):
    path = next(hub.glob("*.safetensors"))
    save_file({**load_file(path), "model.layers.9.x.weight_scale_inv": torch.ones(1, 1)}, path, {"format": "pt"})
    index = json.loads((hub / INDEX).read_text())
    index["weight_map"]["model.layers.9.x.weight_scale_inv"] = path.name
    (hub / INDEX).write_text(json.dumps(index))
    return r"model.layers.9.x.weight_scale_inv is unknown"


def floored_grid(hub):
    rewrite(hub, f"{KEYS}_scale_inv", lambda tensor: tensor[:1].clone())
    return rf"{KEYS}_scale_inv has shape \[1, 2\], this model needs \[2, 2\]"


def transposed_weight(hub):
    rewrite(hub, EXPERT, lambda tensor: tensor.view(torch.uint8).T.contiguous().view(E4M3))
    return rf"{EXPERT} has shape"


def rounded_scale(hub):
    rewrite(hub, f"{KEYS}_scale_inv", lambda tensor: tensor.bfloat16())
    return rf"{KEYS}_scale_inv is BF16; scales must be F32"


def infinite_scale(hub):
    rewrite(hub, f"{KEYS}_scale_inv", with_value(float("inf")))
    return rf"{KEYS}_scale_inv holds scales that are not finite"


def nan_scale(hub):
    rewrite(hub, f"{KEYS}_scale_inv", with_value(float("nan")))
    return rf"{KEYS}_scale_inv holds scales that are not finite"


def negative_scale(hub):
    rewrite(hub, f"{KEYS}_scale_inv", with_value(-1.0))
    return rf"{KEYS}_scale_inv holds scales that are not finite or negative"


def nan_code(hub):
    rewrite(hub, EXPERT, lambda tensor: with_value(0xFF)(tensor.view(torch.uint8)).view(E4M3))
    return rf"{EXPERT} is not finite"


def fp8_head(hub):
    rewrite(hub, "lm_head.weight", lambda tensor: tensor.to(E4M3))
    return r"lm_head.weight is F8_E4M3; only projections can be"


def other_fp8(hub):
    rewrite(hub, EXPERT, lambda tensor: tensor.float().to(torch.float8_e5m2))
    return rf"{EXPERT}_scale_inv is left over: {EXPERT} is F8_E5M2"


def unannounced(hub):
    edit_config(hub, lambda content: content.pop("quantization_config"))
    return "is F8_E4M3, but config.json has no quantization_config"


def other_blocks(hub):
    edit_config(hub, lambda content: content["quantization_config"].update(weight_block_size=[64, 128]))
    return r"weight_block_size is \[64, 128\]"


ATTACKS = [
    missing_scale,
    left_over_scale,
    scale_of_a_norm,
    scale_without_weight,
    floored_grid,
    transposed_weight,
    rounded_scale,
    infinite_scale,
    nan_scale,
    negative_scale,
    nan_code,
    fp8_head,
    other_fp8,
    unannounced,
    other_blocks,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_fp8_folder_is_refused_by_name_and_nothing_is_written(attack, hub, tmp_path):
    message = attack(hub)
    with pytest.raises(UserError, match=message) as caught:
        import_(open_for_import(hub), tmp_path / "back", {})
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.iterdir() if path != hub] == []


def test_scales_may_lie_in_another_file_and_be_of_another_origin(hub):
    """As in the released checkpoint, whose shards were cut by size alone; powers of two as in its successors."""
    name = f"{EXPERT}_scale_inv"
    rewrite(hub, name, lambda tensor: None)
    scales = torch.tensor([[2.0**-9, 2.0**-7]])
    index = json.loads((hub / INDEX).read_text())
    other = next(file for file in sorted(set(index["weight_map"].values())) if file != index["weight_map"][EXPERT])
    save_file({**load_file(hub / other), name: scales}, hub / other, {"format": "pt"})
    index["weight_map"][name] = other
    (hub / INDEX).write_text(json.dumps(index))
    edit_config(hub, lambda content: content["quantization_config"].update(scale_fmt="ue8m0"))
    values = {tensor.name: value for tensor, value in open_hub_folder(hub).values()}
    codes = load_file(hub / index["weight_map"][EXPERT])[EXPERT].float()
    assert torch.equal(values[EXPERT], torch.cat([codes[:, :128] * 2.0**-9, codes[:, 128:] * 2.0**-7], dim=1))


def test_a_folder_cast_to_bf16_that_still_calls_itself_fp8_is_read(hub):
    """What DeepSeek's own conversion script leaves behind: each tensor's dtype says what it is."""
    before = {tensor.name: value for tensor, value in open_hub_folder(hub).values()}
    names = json.loads((hub / INDEX).read_text())["weight_map"]
    for name in [name for name in names if f"{name}_scale_inv" in names]:
        rewrite(hub, name, lambda _, name=name: before[name].bfloat16())
        rewrite(hub, f"{name}_scale_inv", lambda _: None)
    after = {tensor.name: value for tensor, value in open_hub_folder(hub).values()}
    assert all(torch.equal(after[name], value.bfloat16().float()) for name, value in before.items() if "_proj" in name)
