"""Proof that an exported folder holds the checkpoint's numbers: every element of every tensor, bit by bit.

This is a second reading, not a replay of the first: it opens the files with safetensors directly, takes tensor names
from what is in the folder, and rounds to BF16 with integer arithmetic of its own. So a fault in `names.py`, `export.py`
or `streaming.py` cannot hide itself here. It costs one reading of both files.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.artifacts.files import read_json
from headrace.config.schema import ModelConfig
from headrace.conversion.hub_config import read_hub_config
from headrace.errors import UserError
from headrace.model.initialisation import standard_deviation

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.((?:gate|up|down)_proj\.weight)")


def verify_export(hub_folder: Path, checkpoint_model_file: Path, config: ModelConfig) -> int:
    """Compare `hub_folder` with the checkpoint it was made from; returns the number of elements compared.

    Raises `UserError` naming the first tensor, file or key that is missing, left over or different.
    """
    dtype = _checked_dtype(hub_folder, config)
    mapped, total_size = _index(hub_folder)
    size, elements = 0, 0
    seen: set[str] = set()
    with _open(checkpoint_model_file) as checkpoint:
        for file in _shards(hub_folder, mapped):
            with _open(file) as shard:
                for name in _checked_names(file, shard, mapped):
                    found = shard.get_tensor(name)
                    _compare(file, name, found, _original(file, name, checkpoint, config), dtype)
                    seen.add(name)
                    size += found.nbytes
                    elements += found.numel()
        _check_complete(hub_folder, checkpoint, config, seen)
    if total_size != size:
        raise UserError(f"{hub_folder}: the index says total_size {total_size}, it is {size}; export again")
    return elements


def _checked_dtype(hub_folder: Path, config: ModelConfig) -> torch.dtype:
    """The dtype that config.json promises, after checking that it describes `config`."""
    written, wanted = read_hub_config(hub_folder), replace(config, initializer_range=standard_deviation(config))
    for key, value in asdict(wanted).items():
        found = asdict(written)[key]
        if found != value:
            raise UserError(f"{hub_folder / 'config.json'}: {key} is {found!r}, the run has {value!r}; export again")
    promised = read_json(hub_folder / "config.json").get("dtype")
    if promised not in _DTYPES:
        raise UserError(
            f"{hub_folder / 'config.json'}: dtype is {promised!r}, not one of {sorted(_DTYPES)}; export again"
        )
    return _DTYPES[promised]


def _index(hub_folder: Path) -> tuple[dict[str, str], int]:
    path = hub_folder / "model.safetensors.index.json"
    index = read_json(path)
    try:
        return dict(index["weight_map"]), int(index["metadata"]["total_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not an index of weight files; export again") from None


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); export again") from None


def _shards(hub_folder: Path, mapped: dict[str, str]) -> list[Path]:
    """Files of the index, which must be exactly the safetensors files that are there."""
    listed, present = set(mapped.values()), {path.name for path in hub_folder.glob("*.safetensors")}
    for name in sorted(listed ^ present):
        raise UserError(f"{hub_folder / name}: {'not in the index' if name in present else 'missing'}; export again")
    return [hub_folder / name for name in sorted(listed)]


def _checked_names(file: Path, shard: Any, mapped: dict[str, str]) -> list[str]:
    """Names in a shard, which must be those that the index puts there."""
    if (shard.metadata() or {}).get("format") != "pt":
        raise UserError(f"{file}: its metadata lacks format=pt, transformers would refuse it; export again")
    listed = {name for name, where in mapped.items() if where == file.name}
    names: list[str] = list(shard.keys())
    for name in sorted(listed.symmetric_difference(names)):
        raise UserError(f"{file}: tensor {name} is {'missing' if name in listed else 'not in the index'}; export again")
    return names


def _copies(config: ModelConfig) -> dict[str, str]:
    """The MTP module's copies and what they repeat."""
    if not config.num_nextn_predict_layers:
        return {}
    mtp = f"model.layers.{config.num_hidden_layers}"
    return {
        f"{mtp}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{mtp}.shared_head.head.weight": "lm_head.weight",
    }


def _original(file: Path, name: str, checkpoint: Any, config: ModelConfig) -> Tensor:
    """What the checkpoint holds for a tensor of the Hub layout."""
    expert = _EXPERT.fullmatch(name)
    source = f"{expert[1]}.{expert[3]}" if expert else _copies(config).get(name, name)
    try:
        tensor: Tensor = checkpoint.get_tensor(source)
        return tensor[int(expert[2])] if expert else tensor
    except (SafetensorError, IndexError):
        raise UserError(f"{file}: tensor {name} has no original in the checkpoint; export again") from None


def _compare(file: Path, name: str, found: Tensor, original: Tensor, dtype: torch.dtype) -> None:
    if found.shape != original.shape:
        raise UserError(f"{file}: tensor {name} has shape {list(found.shape)}, the checkpoint {list(original.shape)}")
    needed = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    if found.dtype != needed:
        raise UserError(f"{file}: tensor {name} is {found.dtype}, it must be {needed}; export again")
    wanted = original.numpy().view(np.uint32).ravel()
    if found.dtype == torch.bfloat16:
        wanted = _round_to_bfloat16(wanted)
    got = found.view(torch.uint16 if found.dtype == torch.bfloat16 else torch.uint32).numpy().ravel()
    different = np.flatnonzero(got != wanted)
    if different.size:
        at = int(different[0])
        raise UserError(
            f"{file}: tensor {name} differs from the checkpoint in {different.size} of {got.size} elements, first at "
            f"flat index {at} ({found.flatten()[at].item():.9g} for {original.flatten()[at].item():.9g}); export again"
        )


def _round_to_bfloat16(bits: NDArray[np.uint32]) -> NDArray[Any]:
    """FP32 bit patterns to BF16 ones, to nearest and ties to even; values are finite."""
    carry = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + carry) >> np.uint32(16)).astype(np.uint16)


def _check_complete(hub_folder: Path, checkpoint: Any, config: ModelConfig, seen: set[str]) -> None:
    needed = list(_copies(config))
    for name in list(checkpoint.keys()):
        prefix, stacked, projection = name.partition(".mlp.experts.")
        if stacked:
            experts = checkpoint.get_slice(name).get_shape()[0]
            needed += [f"{prefix}.mlp.experts.{expert}.{projection}" for expert in range(experts)]
        else:
            needed.append(name)
    for name in needed:
        if name not in seen:
            raise UserError(f"{hub_folder}: tensor {name} is missing; export again")
