"""Weight files one after the other: what is finished is kept, what is not is made, and memory is a tensor's."""

import json
import subprocess
import sys
from math import prod

import pytest
import torch
from safetensors.torch import load_file

from conversion_models import LIKE_V3, checkpoint_of, reference_model, sliced, tiny_model, tokenizer_folder
from headrace.conversion import export as exports
from headrace.conversion import shards
from headrace.conversion.export import export
from headrace.conversion.shards import Record, finished
from headrace.errors import UserError

LIMIT = 150_000
DIE_IN_THIRD = """
import os, signal, sys
from pathlib import Path
from headrace.conversion import shards
from headrace.conversion.convert_folder import convert_folder
write = shards.TensorWriter.write
def dying(self, name, tensor, at=0):
    write(self, name, tensor, at)
    if self._path.name.startswith("model-00003"):
        os.kill(os.getpid(), signal.SIGKILL)
shards.TensorWriter.write = dying
source, out, record = map(Path, sys.argv[1:])
convert_folder(source, out, "bf16", 150_000, record=shards.Record(record, {"commit": "a"}))
"""


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory):
    """A checkpoint in three ranks' slices, the same in one file, a tokenizer, and the FP8 folder made of them."""
    folder = tmp_path_factory.mktemp("made")
    tensors = checkpoint_of(reference_model(config()), config(), folder / "model.safetensors")
    sliced(folder, model=tensors)
    tokenizer_folder(folder / "tokenizer")
    write(folder, folder / "hub", folder / "model.safetensors")
    return folder


def config():
    return tiny_model(**LIKE_V3)


def write(made, out, source, record=None):
    return export(source, config(), made / "tokenizer", out, "fp8", LIMIT, record=record)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """Another inode or time: made again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("together", [1, 3 * 128 * 256, 1 << 26])
def test_experts_read_out_of_slices_are_those_of_the_whole_stack(made, together, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_TOGETHER", together)
    write(made, tmp_path / "hub", made / "step-00000007")
    assert contents(tmp_path / "hub") == contents(made / "hub")


def test_of_a_large_stack_only_some_experts_are_read_at_once(made, tmp_path, monkeypatch):
    sizes = []
    read = exports.SlicedTensors.read
    monkeypatch.setattr(exports.SlicedTensors, "read", lambda *given: sizes.append(given[3]) or read(*given))
    monkeypatch.setattr(exports, "_TOGETHER", 3 * 128 * 256)
    write(made, tmp_path / "hub", made / "step-00000007")
    experts, stacks = config().n_routed_experts, 3 * 2
    assert sizes.count(3 * 128 * 256) >= stacks * (experts // 3)
    assert max(sizes) == max(prod(tensor.shape) for tensor in exports.hub_tensors(config()))


@pytest.mark.parametrize("band", [1, 40_000, 1 << 24])
def test_bands_of_rows_change_no_byte(made, band, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BAND", band)
    write(made, tmp_path / "hub", made / "model.safetensors")
    assert contents(tmp_path / "hub") == contents(made / "hub")


class Stopped(Exception):  # noqa: N818
    """In place of a fault."""


@pytest.fixture(name="cut_off")
def _cut_off(made, tmp_path, monkeypatch):
    """An export that got as far as two shards of several; returns its folder and its record's path."""
    write_shard = shards.write_shard

    def stopping(plan, file, *given):
        if file.startswith("model-00003"):
            raise Stopped
        write_shard(plan, file, *given)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(shards, "write_shard", stopping)
        write(made, tmp_path / "hub", made / "model.safetensors", record(tmp_path))
    assert finished(tmp_path / "record.json") == 2 and len(identities(tmp_path / "hub")) == 2
    return tmp_path / "hub"


def record(folder, **inputs):
    return Record(folder / "record.json", {"slices": "sha256:1", **inputs})


def test_an_export_that_was_cut_off_goes_on(made, cut_off, tmp_path):
    before = identities(cut_off)
    taken = record(tmp_path)
    write(made, cut_off, made / "model.safetensors", taken)
    assert identities(cut_off).items() >= before.items()
    assert contents(cut_off) == contents(made / "hub")
    assert taken.files.keys() == identities(cut_off).keys() and finished(tmp_path / "record.json") == len(taken.files)
    again = identities(cut_off)
    write(made, cut_off, made / "model.safetensors", record(tmp_path))
    assert identities(cut_off) == again


def test_a_damaged_shard_is_made_again_and_no_other(made, cut_off, tmp_path):
    before = identities(cut_off)
    first, second = sorted(cut_off.glob("*.safetensors"))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    write(made, cut_off, made / "model.safetensors", record(tmp_path))
    assert contents(cut_off) == contents(made / "hub")
    assert identities(cut_off)[second.name] == before[second.name]


def test_shards_of_other_inputs_or_another_plan_are_not_taken_over(made, cut_off, tmp_path):
    before = identities(cut_off)
    export(made / "model.safetensors", config(), made / "tokenizer", cut_off, "bf16", LIMIT, record=record(tmp_path))
    assert not identities(cut_off).items() & before.items()
    before = identities(cut_off)
    write(made, cut_off, made / "model.safetensors", record(tmp_path, slices="sha256:2"))
    assert not identities(cut_off).items() & before.items()
    assert contents(cut_off) == contents(made / "hub")


def test_a_killed_conversion_goes_on(made, tmp_path):
    out, path = tmp_path / "out", tmp_path / "record.json"
    command = [sys.executable, "-c", DIE_IN_THIRD, str(made / "hub"), str(out), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    before = identities(out)
    assert len(before) == 2 and len(list(out.glob(".*.tmp"))) == 1
    from headrace.conversion.convert_folder import convert_folder

    convert_folder(made / "hub", out, "bf16", LIMIT, record=Record(path, {"commit": "a"}))
    convert_folder(made / "hub", tmp_path / "whole", "bf16", LIMIT)
    assert identities(out).items() >= before.items()
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_without_a_record_must_be_empty(made, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write(made, tmp_path / "hub", made / "model.safetensors", record(tmp_path))
    assert (tmp_path / "hub" / "notes.txt").read_text() == "mine"


def test_the_record_holds_the_hashes_of_the_files(made, tmp_path):
    import hashlib

    write(made, tmp_path / "hub", made / "model.safetensors", record(tmp_path))
    said = json.loads((tmp_path / "record.json").read_text())["files"]
    for path in (tmp_path / "hub").glob("*.safetensors"):
        data = path.read_bytes()
        assert said[path.name] == {"size": len(data), "hash": f"sha256:{hashlib.sha256(data).hexdigest()}"}
    assert len(said) > 3


def test_a_value_that_is_not_finite_leaves_no_shard(made, tmp_path):
    class Weights:
        path = tmp_path / "source"

        def read(self, tensor):
            return torch.full(tensor.shape, torch.inf)

    plan = shards.plan_folder(exports.hub_tensors(config()), "fp8", "deepseek", LIMIT)
    (file, *_) = plan.shards
    with pytest.raises(UserError, match=r"source: tensor model.embed_tokens.weight is not finite as torch.bfloat16"):
        shards.write_shard(plan, file, Weights(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_readable_before_the_others_are_made(made, tmp_path):
    plan = shards.plan_folder(exports.hub_tensors(config()), "fp8", "deepseek", LIMIT)
    file = list(plan.shards)[2]
    with exports.tensors_of(made / "step-00000007") as source:
        shards.write_shard(plan, file, exports._Weights(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert load_file(tmp_path / file).keys() == plan.shards[file].keys()
