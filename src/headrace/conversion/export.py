"""Training checkpoint to Hub folder: the tensors of `names.py` in shards, with everything that makes them loadable.

    model-00001-of-000002.safetensors ...   V3's spelling: 5-digit number, 6-digit total
    model.safetensors.index.json            where each tensor lies, and their size together
    config.json, generation_config.json     the network, and the ids that begin and end a text
    tokenizer.json, tokenizer_config.json   copied

Shards are planned from shapes alone, then filled one checkpoint tensor at a time. Weights are cast to the asked dtype
(BF16 rounds to nearest even); the router's selection bias is FP32 in every export. FP8 quantises what `fp8_layout.py`
names, from FP32 as training does with its default scales (report, section 3.3.2): the forward pass of a model that was
trained in FP8 used these codes and scales.

Exported, imported and exported again, an FP8 folder is the same byte for byte. With scale s = fl(amax / 448) a block's
largest code is 448, so its largest value becomes fl(448 s), and fl(fl(448 s) / 448) = s again: for s = m * 2^e, m of
24 bits, that fails only where 7 m has 27 bits and m is 4 modulo 8, and no amax / 448 rounds to such an s, since amax is
then a multiple of 8 and 7 m is 4 away from the next of them. A foreign folder with scales of another choice, powers of
two for instance, is imported exactly, but exporting it chooses scales anew and rounds once more.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from headrace.artifacts.files import write_json
from headrace.checkpoint.reader import TensorSource, tensors_of
from headrace.config.schema import ModelConfig
from headrace.conversion.fp8_layout import SCALE_SUFFIX, Unaligned, fp8_weights, quantization_config, scales_shape
from headrace.conversion.hub_config import CONFIG, Dtype, write_hub_config
from headrace.conversion.names import HubTensor, check_tensors, checkpoint_shapes, hub_tensors, keeps_fp32
from headrace.conversion.special_tokens import SpecialTokens, copy_tokenizer, read_special_tokens
from headrace.conversion.streaming import PlannedTensor, TensorWriter
from headrace.errors import UserError
from headrace.fp8.quantise import SQUARE_TILE, quantise

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # without it transformers refuses the file
_TORCH: dict[Dtype, torch.dtype] = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: number of tensors and shards, bytes of all tensors together."""

    tensors: int
    shards: int
    total_size: int


def export(
    checkpoint: Path,
    config: ModelConfig,
    tokenizer_folder: Path,
    out: Path,
    dtype: Dtype,
    max_shard_bytes: int,
    unaligned: Unaligned = "deepseek",
    kind: str = "model",
) -> Exported:
    """Write the Hub folder `out` (new or empty) from a checkpoint: a folder with its slices, or a safetensors file.

    kind: of the folder's tensors, `model` or `ema`. config: of the network at the checkpoint's step.
    unaligned: what FP8 does with matrices that are no multiples of 128, see `fp8_layout.py`. A shard holds at most
    `max_shard_bytes` of tensors, or one tensor (with its scales) that alone is larger. Memory: one checkpoint tensor
    and a cast. Raises `UserError` for a missing, unknown, wrongly shaped or non-FP32 tensor and for values that are not
    finite, each by name, and where FP8 would leave out everything.
    """
    tokens = read_special_tokens(tokenizer_folder, config.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out}: is not empty; export into a new folder")
    tensors = hub_tensors(config)
    fp8 = _chosen(tensors, dtype, unaligned)
    shards = plan_shards([_stored(tensor, _TORCH[dtype], tensor.name in fp8) for tensor in tensors], max_shard_bytes)
    with tensors_of(checkpoint, kind) as source:
        _check_source(source, config)
        _write_shards(source, tensors, shards, out)
    total = sum(planned.bytes for plan in shards.values() for planned in plan.values())
    weight_map = {name: file for file, plan in shards.items() for name in plan}
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    quantization = quantization_config(tensors, fp8) if dtype == "fp8" else None
    write_json(out / CONFIG, write_hub_config(config, dtype, tokens, quantization))
    write_json(out / "generation_config.json", _generation_config(tokens))
    copy_tokenizer(tokenizer_folder, out)
    return Exported(len(weight_map), len(shards), total)


def exported_bytes(config: ModelConfig, dtype: Dtype, unaligned: Unaligned) -> int:
    """Bytes of all tensors that `export` would write, scales included."""
    tensors = hub_tensors(config)
    fp8 = _chosen(tensors, dtype, unaligned)
    stored = (_stored(tensor, _TORCH[dtype], tensor.name in fp8) for tensor in tensors)
    return sum(planned.bytes for group in stored for planned in group.values())


def _chosen(tensors: list[HubTensor], dtype: Dtype, unaligned: Unaligned) -> set[str]:
    """Names of the weights that are written in FP8."""
    fp8 = fp8_weights(tensors, unaligned) if dtype == "fp8" else set()
    if dtype == "fp8" and not fp8:
        raise UserError(
            "convert.unaligned=bf16: no matrix of this model is a multiple of 128, so nothing would be FP8; "
            "use convert.unaligned=deepseek or convert.dtype=bf16"
        )
    return fp8


def _stored(tensor: HubTensor, dtype: torch.dtype, fp8: bool) -> dict[str, PlannedTensor]:
    """What lies in the files for one tensor: itself, and after an FP8 weight its scales."""
    if fp8:
        scales = PlannedTensor(torch.float32, scales_shape(tensor.shape))
        return {
            tensor.name: PlannedTensor(torch.float8_e4m3fn, tensor.shape),
            tensor.name + SCALE_SUFFIX: scales,
        }
    return {tensor.name: PlannedTensor(torch.float32 if keeps_fp32(tensor.name) else dtype, tensor.shape)}


def plan_shards(groups: list[dict[str, PlannedTensor]], max_shard_bytes: int) -> dict[str, dict[str, PlannedTensor]]:
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


def _check_source(source: TensorSource, config: ModelConfig) -> None:
    infos = {name: source.info(name) for name in source.keys()}  # noqa: SIM118 - a source is no mapping
    check_tensors(source.path, {name: info.shape for name, info in infos.items()}, checkpoint_shapes(config))
    for name, info in infos.items():
        if info.dtype != "F32":
            raise UserError(f"{source.path}: tensor {name} is {info.dtype}; a training checkpoint holds F32 weights")


def _write_shards(
    source: TensorSource,
    tensors: list[HubTensor],
    shards: Mapping[str, Mapping[str, PlannedTensor]],
    out: Path,
) -> None:
    """Fill the shards in order; each is published as soon as the next begins, so two are never open."""
    shard_of = {name: file for file, plan in shards.items() for name in plan}
    with ExitStack() as stack:
        current, writer = "", None
        for name, pieces in groupby(tensors, key=lambda tensor: tensor.source):
            weights = source.get(name)
            for piece in pieces:
                file = shard_of[piece.name]
                if writer is None or file != current:
                    stack.close()
                    current = file
                    writer = stack.enter_context(TensorWriter(out / file, shards[file], METADATA))
                part = weights if piece.expert is None else weights[piece.expert]
                for stored, tensor in _cast(source.path, piece, part, shards[file][piece.name].dtype).items():
                    writer.write(stored, tensor)


def _cast(path: Path, piece: HubTensor, weights: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor as it is stored, by name; for FP8 its codes and scales."""
    if dtype == torch.float8_e4m3fn:
        quantised = quantise(weights, SQUARE_TILE)
        stored = {piece.name: quantised.codes, piece.name + SCALE_SUFFIX: quantised.scales}
        finite = torch.isfinite(quantised.scales).all()  # a block that holds NaN or Inf has the scale NaN
    else:
        stored = {piece.name: weights.to(dtype)}
        finite = torch.isfinite(stored[piece.name]).all()
    if not finite:
        raise UserError(
            f"{path}: tensor {piece.source} is not finite as {dtype}; the run diverged, use an earlier step"
        )
    return stored


def _generation_config(tokens: SpecialTokens) -> dict[str, object]:
    """Greedy by default: a base model's sampling settings are its user's choice."""
    return {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad, "do_sample": False}
