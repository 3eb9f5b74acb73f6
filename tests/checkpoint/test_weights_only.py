"""Weights that come from elsewhere become a checkpoint like any other, in the memory of one tensor."""

from pathlib import Path

import pytest
import torch

from headrace.checkpoint.reader import open_checkpoint, steps, tensors_of
from headrace.checkpoint.weights_only import write_weights
from headrace.errors import UserError

SHAPES = {"a.weight": (300, 70), "b.bias": (5,), "experts": (4, 9, 11)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_every_element_is_where_it_belongs_in_whatever_order_it_came(tmp_path: Path) -> None:
    whole = tensors()
    parts = [("experts", 99 * expert, whole["experts"][expert]) for expert in (2, 0, 3, 1)]
    values = [parts[0], ("a.weight", 0, whole["a.weight"]), *parts[1:], ("b.bias", 0, whole["b.bias"])]
    folder = write_weights(tmp_path, SHAPES, values, {"fingerprint": "imported"})
    assert steps(tmp_path) == [0]
    found = open_checkpoint(folder)
    found.verify()
    assert found.step == 0
    with tensors_of(folder) as source:
        for name, tensor in whole.items():
            assert torch.equal(source.get(name), tensor), name


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write_weights(tmp_path, SHAPES, [(name, 0, tensor) for name, tensor in tensors().items()], {})
    path = folder / "model-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model-00000"):
        open_checkpoint(folder).verify()


def test_what_is_missing_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="every element"):
        write_weights(tmp_path, SHAPES, [("b.bias", 0, tensors()["b.bias"])], {})
    assert steps(tmp_path) == []
