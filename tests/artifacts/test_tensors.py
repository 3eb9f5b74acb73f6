"""Safetensors with caps: what the library accepts and a trainer should not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headrace.artifacts import tensors
from headrace.errors import UserError


def raw(path: Path, header: object, data: bytes = b"", size: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def test_round_trip_through_the_library_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    values = {
        "a.weight": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(2).bfloat16(),
        "empty": torch.zeros(0),
    }
    tensors.save_tensors(path, values, {"format": "pt"})
    for name, value in load_file(path).items():
        assert torch.equal(value, values[name])
        assert value.dtype == values[name].dtype
    with tensors.open_tensors(path) as file:
        assert file.info("a.weight") == tensors.TensorInfo("F32", (3, 4), 48)
        assert torch.equal(file.get("a.weight"), values["a.weight"])
        with pytest.raises(UserError, match="'d' is missing"):
            file.get("d")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "size", "says"),
    [
        ({"../../etc/x": ENTRY}, None, "not allowed"),
        ({"/etc/x": ENTRY}, None, "not allowed"),
        ({"a b": ENTRY}, None, "not allowed"),
        ({"x" * 300: ENTRY}, None, "not allowed"),
        ({"a": {"dtype": "F32"}}, None, "malformed"),
        ({"a": [1]}, None, "malformed"),
        ([1, 2], None, "no object"),
        ({"__metadata__": {"k": "v" * (2 << 20)}}, None, "metadata"),
        ({}, 1 << 40, "header of"),
        ({}, 100, "cut short"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, size: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tensors.read_header(raw(tmp_path / "t.safetensors", header, b"\0" * 4, size))


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = raw(tmp_path / "t.safetensors", {f"t{index}": empty for index in range(tensors.MAX_TENSORS + 1)})
    with pytest.raises(UserError, match="200001 tensors"):
        tensors.read_header(path)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors.save_tensors(path, {"a": torch.arange(16.0)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            tensors.load_tensors(path)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        tensors.save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)}, {"k": 1})
    assert list(tmp_path.iterdir()) == []
