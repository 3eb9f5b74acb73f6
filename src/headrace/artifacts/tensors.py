"""Safetensors with caps: headers are bounded before anything is believed, and writes are durable.

The library refuses overlaps, gaps and overflows; it accepts hundreds of thousands of empty tensors, huge metadata and
names that look like paths. The caps here close that. Names never become paths anywhere in Headrace.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from headrace.artifacts.files import sync_file, sync_folder
from headrace.errors import UserError

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 200_000
MAX_METADATA_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,256}")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header: dtype in safetensors' spelling (`BF16`), shape, and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a file holds, without reading them. A file over the caps or not safetensors is a `UserError`."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, MAX_HEADER_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    if size > MAX_HEADER_BYTES:
        raise UserError(f"{path}: header of {size} bytes, more than the {MAX_HEADER_BYTES} allowed")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a safetensors file, or cut short") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file: its header is no object")
    metadata = header.pop("__metadata__", {})
    if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
        raise UserError(f"{path}: metadata larger than {MAX_METADATA_BYTES} bytes")
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path}: {len(header)} tensors, more than the {MAX_TENSORS} allowed")
    return {name: _info(path, name, entry) for name, entry in header.items()}


def _info(path: Path, name: str, entry: object) -> TensorInfo:
    if not _NAME.fullmatch(name) or ".." in name or name.startswith("/"):
        raise UserError(f"{path}: tensor name {name[:80]!r} is not allowed")
    try:
        assert isinstance(entry, dict)
        begin, end = entry["data_offsets"]
        return TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(end) - int(begin))
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: the header's entry for {name!r} is malformed") from None


class TensorFile:
    """An open safetensors file: `keys()`, `info(name)` and `get(name)`, each tensor read when it is asked for."""

    def __init__(self, path: Path, header: dict[str, TensorInfo], handle: safetensors.safe_open) -> None:
        self.path, self._header, self._handle = path, header, handle

    def keys(self) -> list[str]:
        """Names in the file's order."""
        return list(self._header)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of one tensor; `UserError` where it is missing."""
        if name not in self._header:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        return self._header[name]

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU; `UserError` where it is missing."""
        self.info(name)
        tensor: Tensor = self._handle.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file after checking its header against the caps."""
    header = read_header(path)
    try:
        handle = safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    with handle:
        yield TensorFile(path, header, handle)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    with open_tensors(path) as file:
        return {name: file.get(name) for name in file.keys()}  # noqa: SIM118 - TensorFile is no mapping


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata or {})
        )
        sync_file(temporary)
        temporary.replace(path)
    except safetensors.SafetensorError as error:
        temporary.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        # The library hides the system's error in its text; a full disk must be told apart from a bug.
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
