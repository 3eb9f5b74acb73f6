"""What was converted, read a second time for `check.py`: by safetensors itself, or from where a table points.

A plain safetensors file, a checkpoint's slices, or another Hub folder, whose FP8 is dequantised by `fp8_blocks.py`.
Files are opened anew for each reading: one that stays mapped keeps in memory whatever was read of it. Nothing here is
shared with `headrace.checkpoint` and `hub_folder.py`, through which the conversion read: a fault there would otherwise
be in the result and in its check alike. Hashes are looked at there and not here.
"""

import re
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.artifacts.files import read_json
from headrace.conversion import fp8_blocks
from headrace.errors import UserError

_TABLE = "slices.json"
_EXPERT = re.compile(r"(.+\.mlp\.experts\.)(\d+)\.(.+)")
_SCALES = "_scale_inv"
_ALL = slice(None)


class Original(Protocol):
    """The tensors of a checkpoint, by its names. `read` raises `KeyError` for what it has not."""

    def shapes(self) -> dict[str, list[int]]:
        """Every tensor's name and shape."""
        ...

    def read(self, name: str, expert: int | None = None, rows: slice = _ALL) -> Tensor:
        """A tensor, or one expert's part of a stacked one, or of these some rows from a multiple of 128 on; FP32."""
        ...


def open_original(source: Path, kind: str) -> Original:
    """Open a safetensors file, a Hub folder, or the tensors of one kind in a folder with a table of slices."""
    if not source.is_dir():
        return _File(source)
    return _Slices(source, kind) if (source / _TABLE).exists() else _Hub(source)


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path

    def shapes(self) -> dict[str, list[int]]:
        with open_safetensors(self._path) as file:
            return {name: file.get_slice(name).get_shape() for name in list(file.keys())}

    def read(self, name: str, expert: int | None = None, rows: slice = _ALL) -> Tensor:
        try:
            with open_safetensors(self._path) as file:
                part: Tensor = file.get_slice(name)[rows if expert is None else (expert, rows)]
        except (SafetensorError, IndexError):
            raise KeyError(name) from None
        return part


class _Hub:
    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open_safetensors(path) as file:
                for name in list(file.keys()):
                    self._files[name] = path
                    self._shapes[name] = file.get_slice(name).get_shape()

    def shapes(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name, shape in self._shapes.items():
            if expert := _EXPERT.fullmatch(name):
                stacked = found.setdefault(expert[1] + expert[3], [0, *shape])
                stacked[0] += 1
            else:
                found[name] = shape
        return {name: shape for name, shape in found.items() if not name.endswith(_SCALES)}

    def read(self, name: str, expert: int | None = None, rows: slice = _ALL) -> Tensor:
        if expert is not None:
            name = name.replace(".mlp.experts.", f".mlp.experts.{expert}.")
        stored = self._stored(name, rows)
        if stored.dtype != torch.float8_e4m3fn:
            return stored.float()
        first, last, _ = rows.indices(self._shapes[name][0])
        blocks = slice(first // fp8_blocks.BLOCK, -(-last // fp8_blocks.BLOCK))
        codes, scales = stored.view(torch.uint8).numpy(), self._stored(name + _SCALES, blocks).numpy()
        return torch.from_numpy(fp8_blocks.dequantise(codes, scales))

    def _stored(self, name: str, rows: slice) -> Tensor:
        with open_safetensors(self._files[name]) as file:
            tensor: Tensor = file.get_slice(name)[rows]
        return tensor


class _Slices:
    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        try:
            self._tensors: dict[str, Any] = read_json(folder / _TABLE)["kinds"][kind]
        except (KeyError, TypeError):
            raise UserError(f"{folder / _TABLE}: has no tensors of kind {kind!r}") from None

    def shapes(self) -> dict[str, list[int]]:
        return {name: entry["shape"] for name, entry in self._tensors.items()}

    def read(self, name: str, expert: int | None = None, rows: slice = _ALL) -> Tensor:
        entry = self._tensors[name]
        shape, begin = entry["shape"], 0
        if entry["dtype"] != "F32" or (expert is not None and expert >= shape[0]):
            raise KeyError(name)
        if expert is not None:
            shape = shape[1:]
            begin = expert * prod(shape)
        first, last, _ = rows.indices(shape[0])
        shape = [last - first, *shape[1:]]
        begin += first * prod(shape[1:])
        return torch.from_numpy(self._numbers(entry["slices"], begin, prod(shape))).view(shape)

    def _numbers(self, slices: list[dict[str, Any]], begin: int, size: int) -> NDArray[np.float32]:
        """`size` numbers of the flattened tensor from `begin` on."""
        numbers = np.full(size, np.nan, np.float32)
        for part in slices:
            first, last = max(part["start"], begin), min(part["start"] + part["size"], begin + size)
            if first < last:
                at = part["offset"] + 4 * (first - part["start"])
                file = self._folder / part["file"]
                numbers[first - begin : last - begin] = np.fromfile(file, np.float32, last - first, offset=at)
        return numbers


def open_safetensors(file: Path) -> Any:
    """The library's own handle of a file; `UserError` where it is not whole."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); export again") from None
