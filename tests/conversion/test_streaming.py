"""The written file is what the safetensors library would have read, whatever the order of writing."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file

from headrace.artifacts.tensors import read_header
from headrace.conversion.streaming import PlannedTensor, TensorWriter

E4M3, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


def test_any_order_and_in_parts(tmp_path):
    odd, whole, byte = torch.randn(3).bfloat16(), torch.randn(4, 5), torch.randn(3, 1).to(E4M3)
    plan = {"odd": PlannedTensor(BF16, (3,)), "whole": PlannedTensor(FP32, (4, 5)), "one": PlannedTensor(BF16, (1, 1))}
    plan["byte"] = PlannedTensor(E4M3, (3, 1))
    with TensorWriter(tmp_path / "file", plan, {"format": "pt"}) as writer:
        writer.write("whole", whole[2:].T.contiguous().T, at=10)
        writer.write("one", torch.ones(1, 1, dtype=BF16))
        writer.write("byte", byte)
        writer.write("odd", odd)
        writer.write("whole", whole[:2])
    found = load_file(tmp_path / "file")
    assert found.keys() == plan.keys()
    assert torch.equal(found["odd"], odd)
    assert torch.equal(found["whole"], whole)
    assert found["byte"].dtype == E4M3 and torch.equal(found["byte"].float(), byte.float())
    assert {name: info.shape for name, info in read_header(tmp_path / "file").items()} == {
        name: tensor.shape for name, tensor in plan.items()
    }


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    plan = {"byte": PlannedTensor(E4M3, (1,)), "odd": PlannedTensor(BF16, (3,))}
    plan |= {"whole": PlannedTensor(FP32, (2,)), "odder": PlannedTensor(BF16, (2,))}
    with TensorWriter(tmp_path / "file", plan, {"some": "text"}) as writer:
        for name, tensor in plan.items():
            writer.write(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    raw = (tmp_path / "file").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, tensor in plan.items():
        assert (8 + size + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("parts", [[], [(0, 4)], [(0, 8), (0, 8)], [(4, 8)], [(0, 8), (8, 9)]])
def test_anything_but_every_element_once_leaves_no_file(parts, tmp_path):
    with (
        pytest.raises(AssertionError),
        TensorWriter(tmp_path / "file", {"x": PlannedTensor(FP32, (8,))}, {}) as writer,
    ):
        for begin, end in parts:
            writer.write("x", torch.zeros(end - begin), at=begin)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), TensorWriter(tmp_path / "file", {"x": PlannedTensor(FP32, (8,))}, {}) as writer:
        writer.write("y", torch.zeros(8))
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_dtype_than_planned_is_our_fault(tmp_path):
    with (
        pytest.raises(AssertionError, match="planned as"),
        TensorWriter(tmp_path / "file", {"x": PlannedTensor(BF16, (2,))}, {}) as writer,
    ):
        writer.write("x", torch.zeros(2))


def test_memory_does_not_grow_with_the_file(tmp_path):
    piece = torch.ones(1 << 18)
    plan = {f"tensor.{number}": PlannedTensor(FP32, (1 << 18,)) for number in range(64)}
    tracemalloc.start()
    with TensorWriter(tmp_path / "file", plan, {}) as writer:
        for name in plan:
            writer.write(name, piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > 64 << 20
    assert peak < 1 << 20
