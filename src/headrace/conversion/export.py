"""Training checkpoint to Hub folder: the tensors of `names.py` in shards, with everything that makes them loadable.

    model-*.safetensors and their index     see `shards.py`
    config.json, generation_config.json     the network, and the ids that begin and end a text
    tokenizer.json, tokenizer_config.json   copied

Weights are cast to the asked dtype (BF16 rounds to nearest even); the router's selection bias is FP32 in every export.
FP8 quantises what `fp8_layout.py` names, from FP32 as training does with its default scales (report, section 3.3.2):
the forward pass of a model that was trained in FP8 used these codes and scales.

Exported, imported and exported again, an FP8 folder is the same byte for byte. With scale s = fl(amax / 448) a block's
largest code is 448, so its largest value becomes fl(448 s), and fl(fl(448 s) / 448) = s again: for s = m * 2^e, m of
24 bits, that fails only where 7 m has 27 bits and m is 4 modulo 8, and no amax / 448 rounds to such an s, since amax is
then a multiple of 8 and 7 m is 4 away from the next of them. A foreign folder with scales of another choice, powers of
two for instance, is imported exactly, but exporting it chooses scales anew and rounds once more.
"""

from math import prod
from pathlib import Path

from torch import Tensor

from headrace.artifacts.files import write_json
from headrace.checkpoint.reader import SlicedTensors, TensorSource, tensors_of
from headrace.config.schema import ModelConfig
from headrace.conversion.fp8_layout import Unaligned
from headrace.conversion.hub_config import CONFIG, Dtype, write_hub_config
from headrace.conversion.names import HubTensor, check_tensors, checkpoint_shapes, hub_tensors
from headrace.conversion.shards import INDEX, Exported, Record, begin, plan_folder, write_shards
from headrace.conversion.special_tokens import SpecialTokens, copy_tokenizer, read_special_tokens
from headrace.errors import UserError

__all__ = ["INDEX", "Exported", "export", "exported_bytes"]

_TOGETHER = 1 << 26  # elements


def export(
    checkpoint: Path,
    config: ModelConfig,
    tokenizer_folder: Path,
    out: Path,
    dtype: Dtype,
    max_shard_bytes: int,
    unaligned: Unaligned = "deepseek",
    kind: str = "model",
    record: Record | None = None,
) -> Exported:
    """Write the Hub folder `out` (new or empty) from a checkpoint: a folder with its slices, or a safetensors file.

    kind: of the folder's tensors, `model` or `ema`. config: of the network at the checkpoint's step.
    unaligned, max_shard_bytes: see `plan_folder`. record: of an export that may have begun, see `shards.py`.
    Memory: one tensor of the Hub layout, or 256 MiB of a layer's experts. Raises `UserError` for a missing, unknown,
    wrongly shaped or non-FP32 tensor and for values that are not finite, each by name, and where FP8 would leave out
    everything.
    """
    tokens = read_special_tokens(tokenizer_folder, config.vocab_size)
    plan = plan_folder(hub_tensors(config), dtype, unaligned, max_shard_bytes)
    begin(plan, out, record)
    with tensors_of(checkpoint, kind) as source:
        _check_source(source, config)
        write_shards(plan, _Weights(source), out, record)
    write_json(out / CONFIG, write_hub_config(config, dtype, tokens, plan.quantization))
    write_json(out / "generation_config.json", _generation_config(tokens))
    copy_tokenizer(tokenizer_folder, out)
    return plan.exported


def exported_bytes(config: ModelConfig, dtype: Dtype, unaligned: Unaligned) -> int:
    """Bytes of all tensors that `export` would write, scales included."""
    return plan_folder(hub_tensors(config), dtype, unaligned, max_shard_bytes=1 << 62).exported.total_size


class _Weights:
    """A checkpoint's tensors as the Hub has them: an expert is read out of the stack of its layer.

    The stack may be many times larger than any tensor (15 GB in V3), so only some experts of it are read at once; not
    one by one, since a slice of the checkpoint that holds parts of two is read and verified whole.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source, self.path = source, source.path
        self._of: tuple[str, int] | None = None
        self._experts: Tensor

    def read(self, tensor: HubTensor) -> Tensor:
        """One tensor of the Hub layout, in FP32."""
        if tensor.expert is None:
            return self._source.get(tensor.source)
        if not isinstance(self._source, SlicedTensors):
            return self._source.get(tensor.source)[tensor.expert]  # of a mapped file: nothing else is read
        size = prod(tensor.shape)
        count = max(_TOGETHER // size, 1)
        first = tensor.expert // count * count
        if self._of != (tensor.source, first):
            last = min(first + count, self._source.entry(tensor.source).shape[0])
            self._experts = self._source.read(tensor.source, first * size, (last - first) * size)
            self._of = (tensor.source, first)
        return self._experts.view(-1, *tensor.shape)[tensor.expert - first]


def _check_source(source: TensorSource, config: ModelConfig) -> None:
    infos = {name: source.info(name) for name in source.keys()}  # noqa: SIM118 - a source is no mapping
    check_tensors(source.path, {name: info.shape for name, info in infos.items()}, checkpoint_shapes(config))
    for name, info in infos.items():
        if info.dtype != "F32":
            raise UserError(f"{source.path}: tensor {name} is {info.dtype}; a training checkpoint holds F32 weights")


def _generation_config(tokens: SpecialTokens) -> dict[str, object]:
    """Greedy by default: a base model's sampling settings are its user's choice."""
    return {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad, "do_sample": False}
