"""The weight files of a Hub folder: planned from shapes alone, then made one after the other, tensor by tensor.

    model-00001-of-000002.safetensors ...   V3's spelling: 5-digit number, 6-digit total
    model.safetensors.index.json            where each tensor lies, and their size together

Memory is one tensor and a band of its rows, cast, whatever the size of file and model. A finished shard is on the disk
under its name, and with a `Record` its hash is written down beside the folder: a conversion that was killed finds what
it has made, verifies it, and goes on with the next shard. The record is bound to the inputs and the plan, so shards of
other inputs are never taken over.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.artifacts.files import hash_bytes, hash_file, read_json, write_json
from headrace.artifacts.manifest import FileEntry
from headrace.conversion.fp8_layout import SCALE_SUFFIX, Unaligned, fp8_weights, quantization_config, scales_shape
from headrace.conversion.hub_config import Dtype
from headrace.conversion.names import HubTensor, keeps_fp32
from headrace.conversion.streaming import PlannedTensor, TensorWriter
from headrace.errors import UserError
from headrace.fp8.quantise import BLOCK, SQUARE_TILE, quantise

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # without it transformers refuses the file
_TORCH: dict[Dtype, torch.dtype] = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
_BAND = 1 << 24  # elements


class Weights(Protocol):
    """Where values come from: a checkpoint, or another folder."""

    @property
    def path(self) -> Path: ...
    def read(self, tensor: HubTensor) -> Tensor:
        """A tensor of the Hub layout in FP32 or BF16."""
        ...


@dataclass(frozen=True)
class Exported:
    """What was written: number of tensors and shards, bytes of all tensors together."""

    tensors: int
    shards: int
    total_size: int


@dataclass(frozen=True)
class Plan:
    """Every tensor of the folder, the file it goes into, and the names of those that become FP8."""

    dtype: Dtype
    tensors: dict[str, HubTensor]
    fp8: set[str]
    shards: dict[str, dict[str, PlannedTensor]]

    @cached_property
    def exported(self) -> Exported:
        """Counts and bytes, scales included."""
        planned = [tensor.bytes for shard in self.shards.values() for tensor in shard.values()]
        return Exported(len(planned), len(self.shards), sum(planned))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The folder's `quantization_config`; None where nothing is FP8."""
        return quantization_config(self.tensors.values(), self.fp8) if self.dtype == "fp8" else None


def plan_folder(tensors: list[HubTensor], dtype: Dtype, unaligned: Unaligned, max_shard_bytes: int) -> Plan:
    """Which tensor is stored how, and in which file.

    A shard holds at most `max_shard_bytes` of tensors, or one tensor (with its scales) that alone is larger. unaligned:
    what FP8 does with matrices that are no multiples of 128, see `fp8_layout.py`; `UserError` where nothing is left.
    """
    fp8 = fp8_weights(tensors, unaligned) if dtype == "fp8" else set()
    if dtype == "fp8" and not fp8:
        raise UserError(
            "convert.unaligned=bf16: no matrix of this model is a multiple of 128, so nothing would be FP8; "
            "use convert.unaligned=deepseek or convert.dtype=bf16"
        )
    groups = [_stored(tensor, _TORCH[dtype], tensor.name in fp8) for tensor in tensors]
    return Plan(dtype, {tensor.name: tensor for tensor in tensors}, fp8, _filled(groups, max_shard_bytes))


def write_index(plan: Plan, out: Path) -> None:
    """Write `model.safetensors.index.json`."""
    weight_map = {name: file for file, shard in plan.shards.items() for name in shard}
    write_json(out / INDEX, {"metadata": {"total_size": plan.exported.total_size}, "weight_map": weight_map})


def write_shard(plan: Plan, file: str, weights: Weights, out: Path) -> None:
    """Make one weight file; it appears when it is whole. Raises `UserError` for values that are not finite, by name."""
    shard = plan.shards[file]
    with TensorWriter(out / file, shard, METADATA) as writer:
        for name in shard:
            if name not in plan.tensors:
                continue  # scales are written with their weight
            if not _write(writer, name, weights.read(plan.tensors[name]), shard[name].dtype):
                raise UserError(
                    f"{weights.path}: tensor {name} is not finite as {shard[name].dtype}; it is damaged, or the run "
                    "diverged: use an earlier step"
                )


@dataclass
class Record:
    """The finished shards of a folder with their hashes, kept at `path`, outside the folder.

    inputs: names and hashes of all that decides the tensors' values; JSON-ready. Without a record a folder must be new
    or empty. `files` are the finished shards, for the manifest.
    """

    path: Path
    inputs: Mapping[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)
    _of: str = ""

    def take_up(self, plan: Plan, out: Path) -> None:
        """Find the shards in `out` that are finished, whole and of these inputs and this plan; all else there goes."""
        self._of = self._bound(plan)
        said = read_json(self.path) if self.path.exists() else None
        if said is None:
            _require_empty(out)
        elif said["of"] == self._of:
            entries = {name: FileEntry(**entry) for name, entry in said["files"].items()}
            self.files = {name: entry for name, entry in entries.items() if _is_whole(out / name, entry)}
        for path in out.iterdir():
            if path.name not in self.files:
                path.unlink()
        self._write()

    def add(self, path: Path) -> None:
        """Note that a shard is finished. Its bytes are read back from the file."""
        self.files[path.name] = FileEntry(path.stat().st_size, hash_file(path, "sha256"))
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"of": self._of, "files": {name: asdict(entry) for name, entry in self.files.items()}})

    def _bound(self, plan: Plan) -> str:
        shards = {
            file: {name: [str(tensor.dtype), *tensor.shape] for name, tensor in shard.items()}
            for file, shard in plan.shards.items()
        }
        text = json.dumps({"inputs": dict(self.inputs), "shards": shards}, sort_keys=True)
        return hash_bytes(text.encode(), "sha256")


def finished(path: Path) -> int:
    """How many shards the record at `path` lists."""
    return len(read_json(path)["files"]) if path.exists() else 0


def begin(plan: Plan, out: Path, record: Record | None) -> None:
    """Make `out`, or find in it what an earlier attempt has made; `UserError` where it holds anything else."""
    out.mkdir(parents=True, exist_ok=True)
    if record:
        record.take_up(plan, out)
    else:
        _require_empty(out)


def write_shards(plan: Plan, weights: Weights, out: Path, record: Record | None) -> None:
    """Make the weight files that are not finished yet, and the index."""
    for file in plan.shards:
        if record is None:
            write_shard(plan, file, weights, out)
        elif file not in record.files:
            write_shard(plan, file, weights, out)
            record.add(out / file)
    write_index(plan, out)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: extremes tell both, in a twentieth of `isfinite`'s time."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _require_empty(out: Path) -> None:
    if any(out.iterdir()):
        raise UserError(f"{out}: is not empty; export into a new folder")


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and hash_file(path, "sha256") == entry.hash


def _stored(tensor: HubTensor, dtype: torch.dtype, fp8: bool) -> dict[str, PlannedTensor]:
    """What lies in the files for one tensor: itself, and after an FP8 weight its scales."""
    if fp8:
        scales = PlannedTensor(torch.float32, scales_shape(tensor.shape))
        return {
            tensor.name: PlannedTensor(torch.float8_e4m3fn, tensor.shape),
            tensor.name + SCALE_SUFFIX: scales,
        }
    return {tensor.name: PlannedTensor(torch.float32 if keeps_fp32(tensor.name) else dtype, tensor.shape)}


def _filled(groups: list[dict[str, PlannedTensor]], max_shard_bytes: int) -> dict[str, dict[str, PlannedTensor]]:
    """Which tensors go into which file, in order, filled up to `max_shard_bytes`; a group stays together."""
    plans: list[dict[str, PlannedTensor]] = [{}]
    filled = 0
    for group in groups:
        size = sum(planned.bytes for planned in group.values())
        if plans[-1] and filled + size > max_shard_bytes:
            plans.append({})
            filled = 0
        plans[-1] |= group
        filled += size
    return {f"model-{number:05d}-of-{len(plans):06d}.safetensors": plan for number, plan in enumerate(plans, 1)}


def _write(writer: TensorWriter, name: str, values: Tensor, dtype: torch.dtype) -> bool:
    """Cast a tensor and write it, some rows of blocks at a time; for FP8 its codes and scales. False: not finite."""
    width = math.prod(values.shape[1:])
    height = max(_BAND // width // BLOCK, 1) * BLOCK
    for row in range(0, len(values), height):
        band = values[row : row + height]
        if dtype == torch.float8_e4m3fn:
            quantised = quantise(band, SQUARE_TILE)
            cast, finite = quantised.codes, quantised.scales  # a block that holds NaN or Inf has the scale NaN
            writer.write(name + SCALE_SUFFIX, quantised.scales, at=row // BLOCK * quantised.scales.shape[1])
        else:
            cast = finite = band.to(dtype)
        if not is_finite(finite):
            return False
        writer.write(name, cast, at=row * width)
    return True
