"""Proof that a converted folder holds the numbers of what it was made from: every element of every tensor, bit by bit.

This is a second reading, not a replay of the first: it opens the files with safetensors directly and the checkpoint's
slices by itself (`original.py`), takes tensor names from what is in the folder, and rounds to BF16 and FP8 with integer
arithmetic of its own (`fp8_blocks.py`). So a fault in `names.py`, `fp8_layout.py`, `export.py`, `hub_folder.py`,
`shards.py`, `streaming.py`, `headrace.fp8` or `headrace.checkpoint` cannot hide itself here. It costs one reading of
both; memory is one tensor as the folder has it, and a band of rows of its original in FP32.
`expected_values` is the same knowledge for whoever runs the model.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.artifacts.files import read_json
from headrace.config.schema import ModelConfig
from headrace.conversion import fp8_blocks
from headrace.conversion.hub_config import read_hub_config
from headrace.conversion.original import open_original, open_safetensors
from headrace.errors import UserError
from headrace.model.initialisation import standard_deviation

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj\.weight)")
_BAND = 1 << 24  # elements
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
_BIAS, _SCALES = "e_score_correction_bias", "_scale_inv"
_PROJECTION = re.compile(
    r".+\.(?:self_attn|mlp|mlp\.shared_experts|mlp\.experts(?:\.\d+)?)\.[a-z_]+_proj(?:_with_mqa)?\.weight"
)
# Modules that have one format: each is left out of FP8 with its neighbours or not at all.
_NEIGHBOURS = {"gate_proj": "up_proj", "q_a_proj": "kv_a_proj_with_mqa"}
_NEIGHBOURS |= {neighbour: name for name, neighbour in _NEIGHBOURS.items()}


@dataclass(frozen=True)
class _Format:
    """What config.json promises: dtype of weights that are not FP8; whether others are; modules that are left out."""

    dtype: torch.dtype
    fp8: bool
    left_out: Collection[str]

    def of(self, name: str) -> torch.dtype:
        """The dtype that a tensor must have; names of the Hub's layout or of a checkpoint's."""
        if name.endswith((_BIAS, _SCALES)):
            return torch.float32
        module = re.sub(r"(\.mlp\.experts)\..+|\.weight$", r"\1", name)
        if self.fp8 and _PROJECTION.fullmatch(name) and module not in self.left_out:
            return torch.float8_e4m3fn
        return self.dtype


def verify_export(hub_folder: Path, checkpoint: Path, config: ModelConfig, kind: str = "model") -> int:
    """Compare `hub_folder` with the checkpoint it was made from; returns the number of elements compared.

    checkpoint: a folder with slices, of which `kind` was exported, a safetensors file, or another Hub folder.
    Raises `UserError` naming the first tensor, file or key that is missing, left over or different.
    """
    promised = _checked_format(hub_folder, config)
    mapped, total_size = _index(hub_folder)
    size, elements = 0, 0
    seen: set[str] = set()
    source = open_original(checkpoint, kind)
    shapes = source.shapes()
    for file in _shards(hub_folder, mapped):
        names = _checked_names(file, mapped)
        for name in names:
            found = _stored(file, name)
            seen.add(name)
            size += found.nbytes
            if name.endswith(_SCALES):
                _check_scales_belong(file, name, names, promised)
                continue
            original = _original(name, config)
            _check_kind(file, name, found, _shape(shapes, *original), promised)
            scales = _scales(file, name, found, names) if found.dtype == torch.float8_e4m3fn else None
            _compare(file, name, found, scales, partial(source.read, *original))
            elements += found.numel()
    _check_complete(hub_folder, shapes, config, seen)
    if total_size != size:
        raise UserError(f"{hub_folder}: the index says total_size {total_size}, it is {size}; export again")
    return elements


def expected_values(hub_folder: Path, checkpoint: Path, kind: str = "model") -> dict[str, Tensor]:
    """The checkpoint's tensors, by its names, with the values that the exported folder must give them, in FP32."""
    promised, source = _format(hub_folder), open_original(checkpoint, kind)
    tensors = {name: source.read(name) for name in source.shapes()}
    for name, tensor in tensors.items():
        dtype = promised.of(name)
        if dtype == torch.float8_e4m3fn:
            matrices = tensor.reshape(-1, *tensor.shape[-2:]).numpy()  # one, or one of each expert
            rounded = [fp8_blocks.dequantise(*fp8_blocks.quantise(matrix)) for matrix in matrices]
            tensors[name] = torch.from_numpy(np.stack(rounded)).reshape(tensor.shape)
        elif dtype == torch.bfloat16:
            bits = _round_to_bfloat16(tensor.numpy().view(np.uint32)).astype(np.uint32) << np.uint32(16)
            tensors[name] = torch.from_numpy(bits.view(np.float32))
    return tensors


def _checked_format(hub_folder: Path, config: ModelConfig) -> _Format:
    """What config.json promises, after checking that it describes `config` and leaves out neighbours together."""
    written, wanted = read_hub_config(hub_folder), replace(config, initializer_range=standard_deviation(config))
    for key, value in asdict(wanted).items():
        found = asdict(written)[key]
        if found != value:
            raise UserError(f"{hub_folder / 'config.json'}: {key} is {found!r}, the run has {value!r}; export again")
    promised = _format(hub_folder)
    for module in promised.left_out:
        for name, neighbour in _NEIGHBOURS.items():
            other = module.removesuffix(name) + neighbour
            exists = config.q_lora_rank is not None or neighbour != "q_a_proj"
            if module.endswith("." + name) and exists and other not in promised.left_out:
                raise UserError(
                    f"{hub_folder / 'config.json'}: {module} is left out of FP8, {other} is not; export again"
                )
    if promised.left_out and "lm_head" not in promised.left_out:
        raise UserError(f"{hub_folder / 'config.json'}: lm_head is not listed with the modules left out; export again")
    return promised


def _format(hub_folder: Path) -> _Format:
    content = read_json(hub_folder / "config.json")
    dtype, quantization = content.get("dtype"), content.get("quantization_config")
    if dtype not in _DTYPES:
        raise UserError(f"{hub_folder / 'config.json'}: dtype is {dtype!r}, not one of {sorted(_DTYPES)}; export again")
    left_out = (quantization or {}).get("modules_to_not_convert") or ()
    return _Format(_DTYPES[dtype], quantization is not None, left_out)


def _index(hub_folder: Path) -> tuple[dict[str, str], int]:
    path = hub_folder / "model.safetensors.index.json"
    index = read_json(path)
    try:
        return dict(index["weight_map"]), int(index["metadata"]["total_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not an index of weight files; export again") from None


def _shards(hub_folder: Path, mapped: dict[str, str]) -> list[Path]:
    """Files of the index, which must be exactly the safetensors files that are there."""
    listed, present = set(mapped.values()), {path.name for path in hub_folder.glob("*.safetensors")}
    for name in sorted(listed ^ present):
        raise UserError(f"{hub_folder / name}: {'not in the index' if name in present else 'missing'}; export again")
    return [hub_folder / name for name in sorted(listed)]


def _checked_names(file: Path, mapped: dict[str, str]) -> list[str]:
    """Names in a shard, which must be those that the index puts there."""
    with open_safetensors(file) as shard:
        metadata, names = shard.metadata() or {}, list[str](shard.keys())
    if metadata.get("format") != "pt":
        raise UserError(f"{file}: its metadata lacks format=pt, transformers would refuse it; export again")
    listed = {name for name, where in mapped.items() if where == file.name}
    for name in sorted(listed.symmetric_difference(names)):
        raise UserError(f"{file}: tensor {name} is {'missing' if name in listed else 'not in the index'}; export again")
    return names


def _stored(file: Path, name: str) -> Tensor:
    # Opened anew: a file that stays mapped keeps in memory whatever was read of it.
    with open_safetensors(file) as shard:
        tensor: Tensor = shard.get_tensor(name)
    return tensor


def _copies(config: ModelConfig) -> dict[str, str]:
    """The MTP module's copies and what they repeat."""
    if not config.num_nextn_predict_layers:
        return {}
    mtp = f"model.layers.{config.num_hidden_layers}"
    return {
        f"{mtp}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{mtp}.shared_head.head.weight": "lm_head.weight",
    }


def _original(name: str, config: ModelConfig) -> tuple[str, int | None]:
    """Which of the checkpoint's tensors, and which expert's part of it, is a tensor of the Hub layout."""
    if expert := _EXPERT.fullmatch(name):
        return f"{expert[1]}.{expert[3]}", int(expert[2])
    return _copies(config).get(name, name), None


def _shape(shapes: dict[str, list[int]], name: str, expert: int | None) -> list[int] | None:
    """The shape that the checkpoint has for it, None where it has nothing."""
    shape = shapes.get(name)
    if shape is None or expert is None:
        return shape
    return shape[1:] if expert < shape[0] else None


def _check_kind(file: Path, name: str, found: Tensor, shape: list[int] | None, promised: _Format) -> None:
    if shape is None:
        raise UserError(f"{file}: tensor {name} has no original in the checkpoint; export again")
    if list(found.shape) != shape:
        raise UserError(f"{file}: tensor {name} has shape {list(found.shape)}, the checkpoint {shape}")
    needed = promised.of(name)
    if found.dtype != needed:
        raise UserError(f"{file}: tensor {name} is {found.dtype}, it must be {needed}; export again")


def _check_scales_belong(file: Path, name: str, names: list[str], promised: _Format) -> None:
    weight = name.removesuffix(_SCALES)
    if weight not in names or promised.of(weight) != torch.float8_e4m3fn:
        raise UserError(f"{file}: tensor {name} belongs to no FP8 weight of this file; export again")


def _scales(file: Path, name: str, weight: Tensor, names: list[str]) -> Tensor:
    """The scales of an FP8 weight, which must lie in the same file."""
    if name + _SCALES not in names:
        raise UserError(f"{file}: tensor {name + _SCALES} is missing; export again")
    scales = _stored(file, name + _SCALES)
    if scales.dtype != torch.float32:
        raise UserError(f"{file}: tensor {name + _SCALES} is {scales.dtype}, it must be torch.float32; export again")
    needed = [-(-size // fp8_blocks.BLOCK) for size in weight.shape]
    if list(scales.shape) != needed:
        raise UserError(
            f"{file}: tensor {name + _SCALES} has shape {list(scales.shape)}, it needs {needed}; export again"
        )
    return scales


def _compare(file: Path, name: str, found: Tensor, scales: Tensor | None, read: Callable[..., Tensor]) -> None:
    """Every element, and of an FP8 weight every scale, with the original, some of whose rows `read` gives."""
    width = prod(found.shape[1:])
    height = max(_BAND // width // fp8_blocks.BLOCK, 1) * fp8_blocks.BLOCK
    elements, grid = _Differences(), _Differences()
    for row in range(0, len(found), height):
        wanted = read(rows=slice(row, row + height))
        if scales is not None:
            codes, wanted_scales = fp8_blocks.quantise(wanted.numpy())
            block = row // fp8_blocks.BLOCK
            band = scales[block : block + len(wanted_scales)]
            grid.add(block * scales.shape[1], band, torch.from_numpy(wanted_scales))
            wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        elif found.dtype == torch.bfloat16:
            wanted = torch.from_numpy(_round_to_bfloat16(wanted.numpy().view(np.uint32))).view(torch.bfloat16)
        elements.add(row * width, found[row : row + height], wanted)
    if scales is not None:
        grid.refuse(file, name + _SCALES, scales)
    elements.refuse(file, name, found)


@dataclass
class _Differences:
    """Elements of one tensor that are not as they must be: their number, and what is said of the first."""

    count: int = 0
    first: str = ""

    def add(self, begin: int, found: Tensor, wanted: Tensor) -> None:
        """Compare bits: two parts of one dtype, whose first element has the flat index `begin`."""
        bits, wanted_bits = (part.reshape(-1).view(_BITS[part.itemsize]).numpy() for part in (found, wanted))
        different = np.flatnonzero(bits != wanted_bits)
        if different.size and not self.count:
            at = int(different[0])
            got, must = (part.reshape(-1)[at].float().item() for part in (found, wanted))
            self.first = f"first at flat index {begin + at} ({got:.9g} for {must:.9g})"
        self.count += different.size

    def refuse(self, file: Path, name: str, found: Tensor) -> None:
        """Raise `UserError` if there are any."""
        if self.count:
            raise UserError(
                f"{file}: tensor {name} differs from the checkpoint in {self.count} of {found.numel()} elements, "
                f"{self.first}; export again"
            )


def _round_to_bfloat16(bits: NDArray[np.uint32]) -> NDArray[Any]:
    """FP32 bit patterns to BF16 ones, to nearest and ties to even; values are finite."""
    carry = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + carry) >> np.uint32(16)).astype(np.uint16)


def _check_complete(hub_folder: Path, shapes: dict[str, list[int]], config: ModelConfig, seen: set[str]) -> None:
    needed = list(_copies(config))
    for name, shape in shapes.items():
        prefix, stacked, projection = name.partition(".mlp.experts.")
        if stacked:
            needed += [f"{prefix}.mlp.experts.{expert}.{projection}" for expert in range(shape[0])]
        else:
            needed.append(name)
    for name in needed:
        if name not in seen:
            raise UserError(f"{hub_folder}: tensor {name} is missing; export again")
