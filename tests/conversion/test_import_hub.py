"""There and back is bitwise; a foreign folder is believed in nothing."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod

import ml_dtypes
import numpy as np
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
    our_network,
    reference_model,
    tiny_model,
    tokenizer_folder,
)
from headrace.conversion.export import export
from headrace.conversion.hub_config import write_hub_config
from headrace.conversion.import_hub import import_, open_for_import
from headrace.conversion.names import hub_tensors, keeps_fp32
from headrace.conversion.special_tokens import SpecialTokens
from headrace.errors import UserError
from headrace.model.initialisation import standard_deviation

INDEX = "model.safetensors.index.json"


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(name="original", scope="module")
def _original(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("original")
    config = tiny_model()
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    export(folder / "model.safetensors", config, tokenizer, folder / "hub", "fp32", 400_000)
    return folder / "hub"


@pytest.fixture(name="hub")
def _hub(original, tmp_path):
    return shutil.copytree(original, tmp_path / "hub")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, dtype, tmp_path, tokenizer):
    config = tiny_model(**VARIANTS[variant])
    tensors = checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", dtype, 400_000)
    back = import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    assert back == replace(config, initializer_range=standard_deviation(config))
    got = checkpoint_tensors(tmp_path / "back")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        rounds = dtype == "bf16" and not name.endswith("e_score_correction_bias")
        expected = tensor.bfloat16().float() if rounds else tensor
        assert torch.equal(got[name].view(torch.int32), expected.contiguous().view(torch.int32)), name


LARGE = [ALIGNED, LIKE_V3, EDGES, {**LIKE_V3, "q_lora_rank": None}]
FP8 = [(changes, "deepseek") for changes in [*VARIANTS.values(), *LARGE]] + [(changes, "bf16") for changes in LARGE]


def dequantised_by_ml_dtypes(weight, scales):
    rows, columns = weight.shape
    codes = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = scales.numpy().repeat(128, axis=0)[:rows].repeat(128, axis=1)[:, :columns]
    return torch.from_numpy(codes * grid)


@pytest.mark.parametrize(("changes", "unaligned"), FP8)
def test_fp8_there_back_and_there_again(changes, unaligned, tmp_path, tokenizer):
    """Values as an independent dequantiser has them, and the second folder is the first byte for byte."""
    config = tiny_model(**changes)
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp8", 400_000, unaligned)
    import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    got, stored = checkpoint_tensors(tmp_path / "back"), {}
    for file in (tmp_path / "hub").glob("*.safetensors"):
        stored |= load_file(file)
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            prefix, expert, projection = re.fullmatch(r"(.*?)(?:(?<=experts\.)(\d+)\.)?(\w+\.weight)", name).groups()
            mine = got[prefix + projection] if expert is None else got[prefix + projection][int(expert)]
            assert torch.equal(mine, dequantised_by_ml_dtypes(tensor, stored[f"{name}_scale_inv"])), name
        elif name in got:
            assert torch.equal(got[name], tensor.float()), name
    export(tmp_path / "back" / "step-00000000", config, tokenizer, tmp_path / "again", "fp8", 400_000, unaligned)
    for file in (tmp_path / "hub").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_there_back_and_there_again(variant, tmp_path, tokenizer):
    """The second folder is the first byte for byte."""
    config = tiny_model(**VARIANTS[variant])
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "bf16", 100_000)
    import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    export(tmp_path / "back" / "step-00000000", config, tokenizer, tmp_path / "again", "bf16", 100_000)
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 3
    for file in (tmp_path / "hub").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_training_goes_on_from_an_fp8_folder(tmp_path, tokenizer):
    config = tiny_model(**LIKE_V3)
    network = our_network(config)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp8", 1 << 30)
    import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    network.load_state_dict(checkpoint_tensors(tmp_path / "back"))
    rows = torch.randint(0, config.vocab_size, (4, 34), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = network.losses(rows, 0.3, 0.0).main
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_a_bf16_folder_saved_by_transformers_comes_back_bit_by_bit(tmp_path, tokenizer):
    """transformers' own names, files and rounding; ours in between."""
    config = tiny_model(num_nextn_predict_layers=0)
    source = reference_model(config).bfloat16()
    for name, buffer in source.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    source.save_pretrained(tmp_path / "hub", max_shard_size="200KB")
    config = import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    export(tmp_path / "back" / "step-00000000", config, tokenizer, tmp_path / "again", "bf16", 100_000)
    theirs, ours = ({}, {})
    for folder, tensors in (("hub", theirs), ("again", ours)):
        for file in (tmp_path / folder).glob("*.safetensors"):
            tensors |= load_file(file)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name


def test_a_folder_saved_by_transformers_is_read(tmp_path):
    config = tiny_model(num_nextn_predict_layers=0, rope_scaling=VARIANTS["yarn"]["rope_scaling"])
    source = reference_model(config)
    source.save_pretrained(tmp_path / "hub")
    tensors = checkpoint_of(source, config, tmp_path / "model.safetensors")
    assert import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {}) == replace(config, initializer_range=0.02)
    got = checkpoint_tensors(tmp_path / "back")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_files_are_bounded_and_hold_the_same_values_however_they_are_cut(original, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    import_(open_for_import(original), whole, {})
    import_(open_for_import(original), cut, {}, 100_000)
    files = [path.stat().st_size for path in cut.glob("step-00000000/*.safetensors")]
    assert len(files) > 5 and max(files) < 100_000 + 20_000  # and a header
    one, other = checkpoint_tensors(whole), checkpoint_tensors(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


MEMORY = r"""
import re, sys
from pathlib import Path
from headrace.conversion.import_hub import import_, open_for_import

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, out = map(Path, sys.argv[1:4])
import_(open_for_import(small), out / "small", {}, 1 << 20)
before = peak()
import_(open_for_import(large), out / "large", {}, int(sys.argv[4]))
print(peak() - before)
"""


def with_holes(folder, config):
    """A BF16 folder of zeros that takes no room on the disk; returns the bytes of its checkpoint."""
    folder.mkdir()
    header, end = {}, 0
    for tensor in hub_tensors(config):
        dtype, width = ("F32", 4) if keeps_fp32(tensor.name) else ("BF16", 2)
        begin, end = end, end + prod(tensor.shape) * width
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(write_hub_config(config, "bf16", SpecialTokens(0, 1, None), None)))
    return sum(prod(tensor.shape) * 4 for tensor in hub_tensors(config) if not tensor.copy)


def test_memory_is_one_file_and_one_tensor_whatever_the_models_size(original, tmp_path):
    config = tiny_model(hidden_size=256, moe_intermediate_size=1024, n_routed_experts=32)
    size, shard, tensor = with_holes(tmp_path / "large", config), 16 << 20, 4 * 256 * 1024
    command = [sys.executable, "-c", MEMORY, str(original), str(tmp_path / "large"), str(tmp_path), str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert size > 10 * shard and int(done.stdout) < shard + 3 * tensor + (4 << 20), (size, done.stdout)


def shard_with(hub, tensor):
    return hub / json.loads((hub / INDEX).read_text())["weight_map"][tensor]


def rewrite(hub, tensor, change):
    """Replace, or with None remove, one tensor of a shard, leaving the index as it is."""
    path = shard_with(hub, tensor)
    tensors = load_file(path)
    changed = change(tensors.pop(tensor))
    save_file(tensors if changed is None else {**tensors, tensor: changed}, path, {"format": "pt"})


def edit_index(hub, change):
    index = json.loads((hub / INDEX).read_text())
    change(index["weight_map"])
    (hub / INDEX).write_text(json.dumps(index))


def drop_mtp(hub):
    rewrite(hub, "model.layers.2.hnorm.weight", lambda tensor: None)
    edit_index(hub, lambda mapped: mapped.pop("model.layers.2.hnorm.weight"))
    return "model.layers.2.hnorm.weight is missing"


def drop_from_shard_only(hub):
    rewrite(hub, "model.layers.2.hnorm.weight", lambda tensor: None)
    return "model.layers.2.hnorm.weight should be in model-.*, it is in none"


def add_tensor(hub):
    path = shard_with(hub, "lm_head.weight")
    save_file({**load_file(path), "model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, path, {"format": "pt"})
    edit_index(hub, lambda mapped: mapped.update({"model.layers.0.self_attn.q_proj.bias": path.name}))
    return "q_proj.bias is unknown"


def add_to_shard_only(hub):
    path = shard_with(hub, "lm_head.weight")
    save_file({**load_file(path), "extra": torch.zeros(3)}, path, {"format": "pt"})
    return "tensor extra should be in no file"


def duplicate(hub):
    path = next(file for file in hub.glob("*.safetensors") if file != shard_with(hub, "model.norm.weight"))
    save_file({**load_file(path), "model.norm.weight": torch.ones(64)}, path, {"format": "pt"})
    return "model.norm.weight is in 2 files"


def wrong_shape(hub):
    rewrite(hub, "model.layers.1.mlp.experts.5.gate_proj.weight", lambda tensor: tensor.T.contiguous())
    return "experts.5.gate_proj.weight has shape"


def round_bias(hub):
    rewrite(hub, "model.layers.1.mlp.gate.e_score_correction_bias", lambda tensor: tensor.bfloat16())
    return "e_score_correction_bias is BF16; the selection bias must be F32"


def half_precision(hub):
    rewrite(hub, "model.norm.weight", lambda tensor: tensor.half())
    return "model.norm.weight is F16"


def different_copy(hub):
    def alter(tensor):
        tensor[7, 7] += 1e-3
        return tensor

    rewrite(hub, "model.layers.2.embed_tokens.weight", alter)
    return "model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight"


def stray_shard(hub):
    save_file({"model.norm.weight": torch.ones(64)}, hub / "other.safetensors")
    return "other.safetensors: not listed"


def lost_shard(hub):
    shard_with(hub, "lm_head.weight").unlink()
    return "no such file"


def cut_shard(hub):
    path = shard_with(hub, "lm_head.weight")
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def climbing_name(hub):
    edit_index(hub, lambda mapped: mapped.update({"lm_head.weight": "../../secret.safetensors"}))
    return "not a plain file name"


def code(hub):
    (hub / "modeling_other.py").write_text("print('run')")
    return "could hold code"


def pickled(hub):
    (hub / "pytorch_model.bin").write_bytes(b"\x80\x04")
    return "could hold code"


def no_map(hub):
    (hub / INDEX).write_text("[]")
    return "has no weight_map"


ATTACKS = [
    drop_mtp,
    drop_from_shard_only,
    add_tensor,
    add_to_shard_only,
    duplicate,
    wrong_shape,
    round_bias,
    half_precision,
    different_copy,
    stray_shard,
    lost_shard,
    cut_shard,
    climbing_name,
    code,
    pickled,
    no_map,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_folder_is_refused_by_name_and_nothing_is_written(attack, hub, tmp_path):
    message = attack(hub)
    with pytest.raises(UserError, match=message) as caught:
        import_(open_for_import(hub), tmp_path / "back", {})
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.iterdir() if path != hub] == []
