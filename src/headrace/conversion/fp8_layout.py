"""Which tensors of an FP8 Hub folder are FP8, with which scales, and how `config.json` says so.

As in DeepSeek-V3's released checkpoint: every projection of attention, dense MLPs, shared and routed experts, those of
the MTP module too, is E4M3 beside an FP32 `<name>_scale_inv` of shape [ceil(out / 128), ceil(in / 128)], and

    value = code * scale        of its block of 128 x 128; blocks at the edges are smaller

Embedding, head, norms, the router's weight and the MTP module's `eh_proj` are BF16, the router's selection bias FP32.

Not every reader gets the edges right. `unaligned="bf16"` keeps matrices that are no multiples of 128 in BF16, and with
them what vLLM, SGLang or transformers fuse them with, since a fused matrix has one format: gate and up projection, the
two projections into latent spaces, all experts of a layer. Such modules are listed in `modules_to_not_convert` under
their full names, the routed experts of a layer as one module. A reader that is given a list leaves out nothing else, so
the head is on it too.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from headrace.conversion.names import HEAD, HubTensor, Shape
from headrace.errors import UserError
from headrace.fp8.quantise import BLOCK

Unaligned = Literal["deepseek", "bf16"]

SCALE_SUFFIX = "_scale_inv"
LEFT_OUT = "modules_to_not_convert"
_PROJECTION = re.compile(
    r"model\.layers\.\d+\.(self_attn|mlp|mlp\.shared_experts|mlp\.experts\.\d+)\.\w+_proj\w*\.weight"
)
_EXPERT = re.compile(r"(\.mlp\.experts)\.\d+\..*")
_LATENT = re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)$")
# What a `quantization_config` may say: the values that each key can have. ue8m0 are FP32 scales that are powers of two.
_READABLE: dict[str, Sequence[Any]] = {
    "quant_method": ["fp8"],
    "weight_block_size": [[BLOCK, BLOCK]],
    "fmt": ["e4m3"],
    "activation_scheme": ["dynamic"],
    "scale_fmt": ["float", "ue8m0"],
    "expert_dtype": ["fp8"],
    "modules_to_convert": [None],
    "dequantize": [False],
}


def is_projection(name: str) -> bool:
    """Whether a tensor of the Hub layout is one that FP8 checkpoints quantise."""
    return _PROJECTION.fullmatch(name) is not None


def scales_shape(shape: Shape) -> Shape:
    """Shape of the scales of a matrix [out, in]: one for each block of 128 x 128 or part of one."""
    return tuple(-(-size // BLOCK) for size in shape)


def fp8_weights(tensors: Iterable[HubTensor], unaligned: Unaligned) -> set[str]:
    """Names of the weights that an FP8 folder holds in E4M3."""
    projections = {tensor.name: tensor.shape for tensor in tensors if is_projection(tensor.name)}
    if unaligned == "deepseek":
        return set(projections)
    kept = {_fused(name) for name, shape in projections.items() if any(size % BLOCK for size in shape)}
    return {name for name in projections if _fused(name) not in kept}


def cuts_blocks(tensors: Iterable[HubTensor], fp8: set[str]) -> bool:
    """Whether a matrix in FP8 has more than one block along a dimension and the last one is cut.

    transformers cannot dequantise such a matrix: it divides the dimension by the number of blocks.
    """
    return any(size > BLOCK and size % BLOCK for tensor in tensors if tensor.name in fp8 for size in tensor.shape)


def quantization_config(tensors: Iterable[HubTensor], fp8: set[str]) -> dict[str, Any]:
    """`quantization_config` of a folder whose weights `fp8` are E4M3."""
    left_out = [_module(t.name) for t in tensors if is_projection(t.name) and t.name not in fp8]
    written: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    if left_out:
        written[LEFT_OUT] = list(dict.fromkeys([HEAD.removesuffix(".weight"), *left_out]))
    return written


def check_quantization_config(path: Path, found: Any) -> None:
    """Refuse a `quantization_config` that is not this format; the `UserError` names the key.

    The list of modules is not needed for reading: each tensor's dtype says what it is.
    """
    if not isinstance(found, dict):
        raise UserError(f"{path}: quantization_config is {found!r}, not an object")
    for key in ("quant_method", "weight_block_size"):
        if key not in found:
            raise UserError(
                f"{path}: quantization_config.{key} is missing; only FP8 in blocks of 128 x 128 can be read"
            )
    for key, value in found.items():
        if key == LEFT_OUT:
            if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
                raise UserError(f"{path}: quantization_config.{key} is not a list of names")
        elif key not in _READABLE:
            raise UserError(f"{path}: quantization_config.{key} is unknown; only FP8 as DeepSeek-V3's can be read")
        elif value not in _READABLE[key]:
            raise UserError(f"{path}: quantization_config.{key} is {value!r}; only {_READABLE[key][0]!r} can be read")


def _module(name: str) -> str:
    """The module that a reader knows a weight by."""
    return _EXPERT.sub(r"\1", name).removesuffix(".weight")


def _fused(name: str) -> str:
    """The module that a weight becomes part of in a reader that fuses; gate and up always have one shape."""
    return _LATENT.sub(".qkv_a_proj", _module(name))
