"""Hub folder to training checkpoint: the reverse of `export.py`, for any folder in DeepSeek-V3's layout.

The folder is foreign: nothing in it is believed before it is checked. `config.json` passes a closed list of keys, the
index and the headers of the files must agree tensor by tensor, and every tensor must be one that the configuration
needs. Values are taken over as they are (BF16 widens to FP32 without loss); the MTP module's copies of embedding and
head are dropped after their bits were compared.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import TensorFile, TensorInfo, open_tensors, read_header
from headrace.config.schema import ModelConfig
from headrace.conversion.export import INDEX, METADATA
from headrace.conversion.hub_config import read_hub_config
from headrace.conversion.names import HubTensor, check_tensors, checkpoint_shapes, hub_tensors, keeps_fp32
from headrace.conversion.streaming import PlannedTensor, TensorWriter
from headrace.errors import UserError

_SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_-]+\.safetensors")
_MAX_INDEX_BYTES = 64 << 20
_CODE = {".py", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True)
class _Folder:
    """Headers of a folder's weight files: file of each tensor, and its entry."""

    path: Path
    file_of: dict[str, str]
    infos: dict[str, TensorInfo]


def import_(hub_folder: Path, out_path: Path) -> ModelConfig:
    """Write the checkpoint tensors file `out_path` (FP32, experts stacked) from a Hub folder; returns its network.

    Memory: one tensor of the Hub layout. Raises `UserError` for a missing, unknown, duplicate, wrongly shaped or
    wrongly typed tensor, an index that disagrees with its files, copies that differ, and files that could hold code.
    """
    config = read_hub_config(hub_folder)
    folder = _read_folder(hub_folder)
    tensors = hub_tensors(config)
    check_tensors(
        hub_folder,
        {name: info.shape for name, info in folder.infos.items()},
        {tensor.name: tensor.shape for tensor in tensors},
    )
    _check_dtypes(folder)
    _check_copies(folder, tensors)
    plan = {name: PlannedTensor(torch.float32, shape) for name, shape in checkpoint_shapes(config).items()}
    with TensorWriter(out_path, plan, METADATA) as writer:
        for tensor, file in _by_file(folder, [tensor for tensor in tensors if not tensor.copy]):
            at = (tensor.expert or 0) * prod(tensor.shape)
            writer.write(tensor.source, file.get(tensor.name).to(torch.float32), at)
    return config


def _read_folder(path: Path) -> _Folder:
    for entry in sorted(path.iterdir()):
        if entry.suffix.lower() in _CODE:
            raise UserError(f"{entry}: could hold code; remove it, only safetensors and JSON are read")
    mapped = _read_index(path) if (path / INDEX).exists() else None
    present = {entry.name for entry in path.iterdir() if entry.suffix == ".safetensors"}
    files = sorted(set(mapped.values())) if mapped is not None else [_SINGLE]
    for name in files:
        if name not in present:
            raise UserError(f"{path / name}: no such file, though the model needs it")
    for name in sorted(present.difference(files)):
        raise UserError(f"{path / name}: not listed in {INDEX}; remove it or use the index that belongs to it")
    headers = {name: read_header(path / name) for name in files}
    count = Counter(tensor for header in headers.values() for tensor in header)
    for tensor, times in count.items():
        if times > 1:
            raise UserError(f"{path}: tensor {tensor} is in {times} files; keep one")
    file_of = {tensor: file for file, header in headers.items() for tensor in header}
    if mapped is not None:
        _compare_index(path, mapped, file_of)
    return _Folder(path, file_of, {name: headers[file][name] for name, file in file_of.items()})


def _read_index(path: Path) -> dict[str, str]:
    index_path = path / INDEX
    if index_path.stat().st_size > _MAX_INDEX_BYTES:
        raise UserError(f"{index_path}: larger than {_MAX_INDEX_BYTES} bytes; this is no index")
    index = read_json(index_path)
    mapped = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise UserError(f"{index_path}: has no weight_map")
    for tensor, file in mapped.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise UserError(f"{index_path}: {file!r} of tensor {tensor!r} is not a plain file name")
    return mapped


def _compare_index(path: Path, mapped: dict[str, str], file_of: dict[str, str]) -> None:
    for tensor in sorted(mapped.keys() | file_of.keys()):
        said, found = mapped.get(tensor), file_of.get(tensor)
        if said != found:
            raise UserError(
                f"{path / INDEX}: tensor {tensor} should be in {said or 'no file'}, it is in {found or 'none'}"
            )


def _check_dtypes(folder: _Folder) -> None:
    for name, info in folder.infos.items():
        if keeps_fp32(name) and info.dtype != "F32":
            raise UserError(f"{folder.path}: tensor {name} is {info.dtype}; the selection bias must be F32")
        if info.dtype not in ("F32", "BF16"):
            raise UserError(f"{folder.path}: tensor {name} is {info.dtype}; only BF16 and F32 weights can be imported")


def _check_copies(folder: _Folder, tensors: list[HubTensor]) -> None:
    for tensor in tensors:
        if tensor.copy:
            with (
                open_tensors(folder.path / folder.file_of[tensor.name]) as copies,
                open_tensors(folder.path / folder.file_of[tensor.source]) as originals,
            ):
                copy, original = copies.get(tensor.name), originals.get(tensor.source)
                if copy.dtype != original.dtype or not torch.equal(copy.view(torch.uint8), original.view(torch.uint8)):
                    raise UserError(
                        f"{folder.path}: tensor {tensor.name} differs from {tensor.source}; a checkpoint shares the two"
                    )


def _by_file(folder: _Folder, tensors: list[HubTensor]) -> Iterator[tuple[HubTensor, TensorFile]]:
    """Each tensor with its open file; every file is opened once."""

    def file_of(tensor: HubTensor) -> str:
        return folder.file_of[tensor.name]

    for name, group in groupby(sorted(tensors, key=file_of), key=file_of):
        with open_tensors(folder.path / name) as file:
            for tensor in group:
                yield tensor, file
