"""A Hub folder of foreign origin, opened: nothing in it is believed before it is checked.

`config.json` passes a closed list of keys; the index and the headers of the files must agree tensor by tensor; every
tensor must be one that the configuration needs, of its shape. In an FP8 folder a weight in E4M3 must be a projection
and have its scales, and scales must belong to such a weight; whether a projection is FP8 or BF16 is said by its dtype.
`read` then gives a tensor as it is stored, FP8 as code * scale in FP32.

The code that DeepSeek's own releases carry is refused too, unless `released` asks for one of them: then those two files
and the key that names them are passed over, never read.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import TensorInfo, open_tensors
from headrace.config.schema import ModelConfig
from headrace.conversion.fp8_layout import SCALE_SUFFIX, is_projection, scales_shape
from headrace.conversion.hub_config import CONFIG, QUANTIZATION, is_quantised, read_hub_config
from headrace.conversion.names import HubTensor, Shape, check_tensors, hub_tensors, keeps_fp32
from headrace.conversion.shards import INDEX, is_finite
from headrace.errors import UserError
from headrace.fp8.quantise import SQUARE_TILE, Quantised

_SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_-]+\.safetensors")
_MAX_INDEX_BYTES = 64 << 20
_CODE = {".py", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt"}
_RELEASED = {"configuration_deepseek.py", "modeling_deepseek.py"}
_FP8 = "F8_E4M3"
_BAND, _ALL = 4096, slice(None)  # rows


@dataclass(frozen=True)
class HubFolder:
    """A checked folder: its network, the file of each tensor and its entry there, the weights without their scales."""

    path: Path
    config: ModelConfig
    file_of: dict[str, str]
    infos: dict[str, TensorInfo]
    tensors: list[HubTensor]

    def values(self) -> Iterator[tuple[HubTensor, Tensor]]:
        """Every tensor but the MTP module's copies, as FP32; memory is one tensor. Raises what `read` raises."""
        for tensor in self.tensors:
            if not tensor.copy:
                yield tensor, self.read(tensor).to(torch.float32)

    def read(self, tensor: HubTensor) -> Tensor:
        """A tensor in BF16 or FP32, as it is stored, or FP32 where it is FP8.

        Raises `UserError` for scales and FP8 weights that are not finite.
        """
        name = tensor.name
        stored = self._get(name)
        if stored.dtype != torch.float8_e4m3fn:
            return stored
        scales = self._get(name + SCALE_SUFFIX)
        if not is_finite(scales) or (scales < 0).any():
            raise UserError(f"{self.path}: tensor {name + SCALE_SUFFIX} holds scales that are not finite or negative")
        values = Quantised(stored, scales, SQUARE_TILE).dequantise()
        if not is_finite(values):
            raise UserError(f"{self.path}: tensor {name} is not finite; it is damaged, or its training diverged")
        return values

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is FP8."""
        return any(info.dtype == _FP8 for info in self.infos.values())

    def _get(self, name: str, rows: slice = _ALL) -> Tensor:
        # Opened anew: a file that stays mapped keeps in memory whatever was read of it.
        path = self.path / self.file_of[name]
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[rows]
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: changed while it was read ({error}); run it again") from None
        return tensor

    def check_copies(self) -> None:
        """Refuse copies of the MTP module that differ from what they repeat; memory is a band of rows of the two."""
        for tensor in self.tensors:
            if tensor.copy and not self._is_same(tensor.name, tensor.source):
                raise UserError(
                    f"{self.path}: tensor {tensor.name} differs from {tensor.source}; a checkpoint shares the two"
                )

    def _is_same(self, name: str, other: str) -> bool:
        if self.infos[name] != self.infos[other]:
            return False
        bands = (slice(row, row + _BAND) for row in range(0, self.infos[name].shape[0], _BAND))
        return all(torch.equal(*(self._get(of, rows).view(torch.uint8) for of in (name, other))) for rows in bands)


def open_hub_folder(path: Path, released: bool = False) -> HubFolder:
    """Check everything about a folder but the values of its tensors.

    released: it may be as DeepSeek released it, with code, which is passed over.
    Raises `UserError` for a missing, unknown, duplicate, wrongly shaped or wrongly typed tensor, for scales that are
    missing or left over, an index that disagrees with its files, and files that could hold code.
    """
    config = read_hub_config(path, released)
    file_of, infos = _read_headers(path, _RELEASED if released else set())
    tensors = hub_tensors(config)
    _check_dtypes(path, tensors, infos, is_quantised(path))
    needed: dict[str, Shape] = {}
    for tensor in tensors:
        needed[tensor.name] = tensor.shape
        if tensor.name in infos and infos[tensor.name].dtype == _FP8:
            needed[tensor.name + SCALE_SUFFIX] = scales_shape(tensor.shape)
    check_tensors(path, {name: info.shape for name, info in infos.items()}, needed)
    return HubFolder(path, config, file_of, infos, tensors)


def _check_dtypes(path: Path, tensors: list[HubTensor], infos: dict[str, TensorInfo], quantised: bool) -> None:
    weights = {tensor.name for tensor in tensors}
    for name, info in infos.items():
        of, is_scales, _ = name.rpartition(SCALE_SUFFIX)
        if is_scales and of in weights:
            if of in infos and infos[of].dtype != _FP8:
                raise UserError(f"{path}: tensor {name} is left over: {of} is {infos[of].dtype}, not {_FP8}; remove it")
            if info.dtype != "F32":
                raise UserError(f"{path}: tensor {name} is {info.dtype}; scales must be F32")
        elif keeps_fp32(name) and info.dtype != "F32":
            raise UserError(f"{path}: tensor {name} is {info.dtype}; the selection bias must be F32")
        elif info.dtype == _FP8 and not quantised:
            raise UserError(f"{path}: tensor {name} is {_FP8}, but {CONFIG} has no {QUANTIZATION}; correct {CONFIG}")
        elif info.dtype == _FP8 and not is_projection(name):
            raise UserError(f"{path}: tensor {name} is {_FP8}; only projections can be, this one must be BF16 or F32")
        elif info.dtype not in ("F32", "BF16", _FP8):
            raise UserError(f"{path}: tensor {name} is {info.dtype}; only BF16, F32 and {_FP8} weights can be imported")


def _read_headers(path: Path, passed_over: set[str]) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    for entry in sorted(path.iterdir()):
        if entry.suffix.lower() in _CODE and entry.name not in passed_over:
            raise UserError(f"{entry}: could hold code; remove it, only safetensors and JSON are read")
    mapped = _read_index(path) if (path / INDEX).exists() else None
    present = {entry.name for entry in path.iterdir() if entry.suffix == ".safetensors"}
    files = sorted(set(mapped.values())) if mapped is not None else [_SINGLE]
    for name in files:
        if name not in present:
            raise UserError(f"{path / name}: no such file, though the model needs it")
    for name in sorted(present.difference(files)):
        raise UserError(f"{path / name}: not listed in {INDEX}; remove it or use the index that belongs to it")
    headers = {name: _header(path / name) for name in files}
    count = Counter(tensor for header in headers.values() for tensor in header)
    for tensor, times in count.items():
        if times > 1:
            raise UserError(f"{path}: tensor {tensor} is in {times} files; keep one")
    file_of = {tensor: file for file, header in headers.items() for tensor in header}
    if mapped is not None:
        _compare_index(path, mapped, file_of)
    return file_of, {name: headers[file][name] for name, file in file_of.items()}


def _header(path: Path) -> dict[str, TensorInfo]:
    with open_tensors(path) as file:
        return {name: file.info(name) for name in file.keys()}  # noqa: SIM118 - TensorFile is no mapping


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
