"""The published model's folder, all but the numbers, in files with holes: planned, and a sample of it converted."""

import json
import os
import subprocess
import sys
from math import prod

import pytest

from headrace.config.compose import load
from headrace.conversion.fp8_layout import fp8_weights, quantization_config, scales_shape
from headrace.conversion.hub_config import write_hub_config
from headrace.conversion.names import hub_tensors, keeps_fp32
from headrace.conversion.special_tokens import SpecialTokens

INDEX = "model.safetensors.index.json"
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
FILES, PUBLISHED_BYTES = 163, 688_574_839_360
SAMPLE = """
import json, resource, sys
from pathlib import Path
from headrace.artifacts.files import read_json, write_json
from headrace.artifacts.tensors import read_header
from headrace.conversion.check import verify_export
from headrace.conversion.hub_config import CONFIG, converted_config
from headrace.conversion.hub_folder import open_hub_folder
from headrace.conversion.shards import INDEX, plan_folder, write_index, write_shard
from headrace.errors import UserError

source, out = map(Path, sys.argv[1:])

def check(file):
    # As if there were nothing but this file: it is compared before the check asks what else there must be.
    write_json(out / INDEX, {**index, "weight_map": dict.fromkeys(plan.shards[file], file)})
    write_json(out / CONFIG, converted_config(source, "bf16", plan.quantization))
    try:
        verify_export(out, source, folder.config)
    except UserError as error:
        return str(error)

folder = open_hub_folder(source, released=True)
folder.check_copies()
plan = plan_folder(folder.tensors, "bf16", "deepseek", 2_000_000_000)
write_index(plan, out)
index = read_json(out / INDEX)
files, sizes, said = list(plan.shards), {}, []
for file in (files[0], files[len(files) // 2], files[-1]):
    write_shard(plan, file, folder, out)
    sizes[file] = sum(info.bytes for info in read_header(out / file).values())
    if file == files[0]:
        said.append(check(file))
    (out / file).unlink()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "shards": len(files), "sizes": sizes, "total": index["metadata"]["total_size"],
                  "names": len(index["weight_map"]), "said": said}))
"""


def published(folder):
    """The release's 163 files with right names, dtypes and shapes, cut by size alone; returns its tensors."""
    config = load(["model=v3_671b", "tokenizer.vocab_size=129280"]).model
    tensors = hub_tensors(config)
    fp8 = fp8_weights(tensors, "deepseek")
    stored = {}
    for tensor in tensors:
        dtype, width = ("F32", 4) if keeps_fp32(tensor.name) else ("BF16", 2)
        if tensor.name in fp8:
            stored[f"{tensor.name}_scale_inv"] = ("F32", scales_shape(tensor.shape), 4)
            dtype, width = "F8_E4M3", 1
        stored[tensor.name] = (dtype, tensor.shape, width)
    total = sum(prod(shape) * width for _, shape, width in stored.values())
    headers, sizes, begin = [{} for _ in range(FILES)], [0] * FILES, 0
    for name, (dtype, shape, width) in stored.items():
        size, number = prod(shape) * width, begin * FILES // total
        offsets = [sizes[number], sizes[number] + size]
        headers[number][name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        sizes[number], begin = offsets[1], begin + size
    weight_map = {}
    for number, (header, size) in enumerate(zip(headers, sizes, strict=True), 1):
        name = f"model-{number:05d}-of-{FILES:06d}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
        weight_map |= dict.fromkeys(header, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written = write_hub_config(config, "fp8", SpecialTokens(0, 1, None), quantization_config(tensors, fp8))
    (folder / "config.json").write_text(json.dumps({**written, "auto_map": AUTO_MAP}))
    assert total == PUBLISHED_BYTES and len(fp8) == 45_808
    return tensors


def test_the_published_model_is_planned_and_sampled_in_little_memory(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tensors = published(source)
    files = sorted(source.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-000163.safetensors" for n in range(1, FILES + 1)]
    headers = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in files)
    assert sum(file.stat().st_size for file in files) - headers == PUBLISHED_BYTES
    assert sum(file.stat().st_blocks * 512 for file in files) < 100e6  # holes
    command = [sys.executable, "-c", SAMPLE, str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] < 6 * 2**30
    assert found["peak"] < 2 * 2 * 129280 * 7168  # nowhere are two tensors like the embedding in memory
    assert found["peak"] < 2 * 2 * 129280 * 7168  # nowhere are two tensors like the embedding in memory
    # Of the embedding's file nothing is said, so nothing in it differs.
    assert found["said"] == [f"{out}: tensor model.layers.61.embed_tokens.weight is missing; export again"]
    assert found["names"] == len(tensors)
    assert found["total"] == sum(prod(t.shape) * (4 if keeps_fp32(t.name) else 2) for t in tensors)
    assert found["total"] / 1e12 == pytest.approx(1.37, abs=0.005)  # reference, section 10
    assert found["shards"] > found["total"] / 2e9
    first, middle, last = found["sizes"].values()
    assert 1.5e9 < middle <= 2e9 and last == 2 * 129280 * 7168 and 1.8e9 < first <= 2e9
    assert list(out.glob("*.safetensors")) == []
