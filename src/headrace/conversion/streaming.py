"""One safetensors file, written tensor by tensor: memory is one tensor, whatever the file's size.

The header is computed from names, dtypes and shapes before the first weight is read; each tensor, or part of one, then
goes straight to its place. The widest dtype comes first, so that every tensor is aligned to its element size. The file
appears under its name only when all its bytes are on the disk.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from headrace.artifacts.files import sync_folder

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class PlannedTensor:
    """Dtype (FP32, BF16 or E4M3) and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Context manager that writes the tensors of `plan` to `path` in any order; leaving it publishes the file."""

    def __init__(self, path: Path, plan: Mapping[str, PlannedTensor], metadata: Mapping[str, str]) -> None:
        self._path, self._plan = path, plan
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._missing = {name: tensor.bytes for name, tensor in plan.items()}
        self._header, self._begin = _header(plan, metadata)
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb")
        self._file.write(self._header)
        self._file.truncate(len(self._header) + sum(self._missing.values()))
        return self

    def write(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Write `tensor`, of the planned dtype, as the elements of `name` from flat index `at` on."""
        planned = self._plan[name]
        assert tensor.dtype == planned.dtype, f"{name}: planned as {planned.dtype}, got {tensor.dtype}"
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert at * planned.dtype.itemsize + data.nbytes <= planned.bytes, f"{name}: more elements than planned"
        self._file.seek(len(self._header) + self._begin[name] + at * planned.dtype.itemsize)
        self._file.write(data.data)
        self._missing[name] -= data.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                unwritten = [name for name, count in self._missing.items() if count]
                assert not unwritten, f"{self._path}: {unwritten[0]} was not written exactly once"
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self._path)
                sync_folder(self._path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def _header(plan: Mapping[str, PlannedTensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes (length, JSON, padding to 8) and where each tensor begins after them."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin, offset = {}, 0
    for name, tensor in sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize):
        begin[name] = offset
        offset += tensor.bytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin[name], offset],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin
