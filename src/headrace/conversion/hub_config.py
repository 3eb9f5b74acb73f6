"""`config.json` of a Hub folder: written for three readers, read against a closed list.

Writing: transformers, vLLM and SGLang build the network from this file, and each reads other spellings. What one of
them would guess wrongly is always written: without `scoring_func` vLLM routes with softmax, without `topk_method` it
has no place for the selection bias; RoPE stands both as `rope_parameters` (transformers 5, vLLM) and as `rope_theta`
with `rope_scaling` (SGLang, older transformers). There is no `head_dim`: the three derive it from the MLA dimensions,
and a second spelling could only disagree. No `auto_map`: the folder holds no code.

Reading: every key must be known. Keys that decide the network become a `ModelConfig`, keys with one possible value must
have it, derived keys must agree, and the rest says nothing about the network: token ids, dtype, `quantization_config`,
of which only DeepSeek-V3's kind can be read. `auto_map`, `trust_remote_code` and private keys are therefore refused
before anything is loaded (CVE-2026-4372, CVE-2026-5241). One `auto_map` is passed over where `released` says so: the
one in every release of this family, which names code that nobody needs for this architecture any more.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from headrace.artifacts.files import read_json
from headrace.config.checks import model_problems
from headrace.config.recipe import RopeScaling
from headrace.config.schema import ModelConfig
from headrace.conversion.fp8_layout import check_quantization_config
from headrace.conversion.special_tokens import SpecialTokens
from headrace.errors import UserError
from headrace.model.initialisation import standard_deviation

Dtype = Literal["fp8", "bf16", "fp32"]

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
AUTO_MAP = "auto_map"
MAX_JSON_BYTES = 1 << 20
DTYPE_NAMES: dict[Dtype, str] = {"fp8": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}

_ROPE_KEYS = {"rope_theta", "rope_scaling"}
_COPIED = [field.name for field in fields(ModelConfig) if field.name not in _ROPE_KEYS]
_IDENTITY = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
_FIXED: dict[str, Any] = {
    **_IDENTITY,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
_READ_ONLY_FIXED = {"output_router_logits": False}  # transformers writes it; we have no reason to
_RELEASED_CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
_WITHOUT_MEANING = {
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def write_hub_config(
    config: ModelConfig, dtype: Dtype, tokens: SpecialTokens, quantization: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `config.json`; `initializer_range` is written as the number it means.

    dtype: of the weights, in an FP8 folder of those that are not FP8; quantization: `quantization_config`, if any.
    """
    written = asdict(config)
    return {
        **_FIXED,
        **{key: written[key] for key in _COPIED},
        **_derived(config),
        **_write_rope(config),
        "initializer_range": standard_deviation(config),
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
        **({QUANTIZATION: quantization} if quantization else {}),
    }


def converted_config(folder: Path, dtype: Dtype, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """`folder/config.json`, already checked, for the same network in another format."""
    left_out = {AUTO_MAP, QUANTIZATION}
    kept = {key: value for key, value in read_json(folder / CONFIG).items() if key not in left_out}
    formats = {"dtype": DTYPE_NAMES[dtype], "torch_dtype": DTYPE_NAMES[dtype]}
    return {**kept, **formats, **({QUANTIZATION: quantization} if quantization else {})}


def read_hub_config(folder: Path, released: bool = False) -> ModelConfig:
    """The network that `folder/config.json` describes; every doubtful key is a `UserError` that names it.

    released: the `auto_map` of DeepSeek's releases may be there; it is passed over.
    """
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: larger than {MAX_JSON_BYTES} bytes; this is no configuration")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object; is this the folder of a model?")
    if released and raw.get(AUTO_MAP) == _RELEASED_CODE:
        del raw[AUTO_MAP]
    refuse_unknown_keys(path, raw)
    _check_fixed(path, raw)
    if QUANTIZATION in raw:
        check_quantization_config(path, raw[QUANTIZATION])
    values = {key: raw[key] for key in _COPIED if key in raw}
    values["rope_theta"], values["rope_scaling"] = _read_rope(path, raw)
    config = _validate(path, values)
    for key, value in _derived(config).items() | {"head_dim": config.qk_rope_head_dim}.items():
        if key in raw and raw[key] != value:
            raise UserError(f"{path}: {key} is {raw[key]!r}, the other dimensions make it {value}")
    return config


def is_quantised(folder: Path) -> bool:
    """Whether `folder/config.json` says that weights are FP8."""
    return QUANTIZATION in read_json(folder / CONFIG)


def _derived(config: ModelConfig) -> dict[str, int]:
    """Keys that follow from others. MLA has no grouped queries: each head has its own key and value."""
    return {
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
    }


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = None
    if config.rope_scaling:
        scaling = {**asdict(config.rope_scaling), "rope_type": "yarn"}
        parameters = {**scaling, "rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def refuse_unknown_keys(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first key of a config.json that is not one of this family's."""
    known = {*_COPIED, *_FIXED, *_READ_ONLY_FIXED, *_WITHOUT_MEANING, *_ROPE_KEYS, "rope_parameters"}
    known |= {"num_key_value_heads", "qk_head_dim", "head_dim", QUANTIZATION}
    for key in raw:
        if key not in known:
            raise UserError(
                f"{path}: key {key!r} is not one of DeepSeek-V3's; remove it if the weights do not depend on it "
                "(code and private keys are never read)"
            )


def _check_fixed(path: Path, raw: dict[str, Any]) -> None:
    for key in _IDENTITY:
        if key not in raw:
            raise UserError(f"{path}: {key} is missing; is this the config.json of a DeepSeek-V3 model?")
    for key, value in {**_FIXED, **_READ_ONLY_FIXED}.items():
        found = raw.get(key, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise UserError(f"{path}: {key} is {found!r}; only {value!r} can be read")


def _read_rope(path: Path, raw: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """`rope_theta` and the scaling, from whichever spelling is there; where several are, they must agree."""
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    scalings: list[dict[str, Any] | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        if raw.get(key) is not None:
            rope = _rope_dict(path, key, raw[key])
            thetas += [rope.pop("rope_theta")] if "rope_theta" in rope else []
            scalings.append(rope or None)
    if raw.get("rope_scaling", ...) is None:
        scalings.append(None)
    if not thetas:
        raise UserError(f"{path}: neither rope_theta nor rope_parameters.rope_theta is there")
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        raise UserError(f"{path}: rope_parameters and rope_theta/rope_scaling disagree; correct one of them")
    return thetas[0], scalings[0] if scalings else None


def _rope_dict(path: Path, key: str, value: Any) -> dict[str, Any]:
    """One rope dictionary as the fields of `RopeScaling` (plus `rope_theta`); without scaling only the latter."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {value!r}, not an object")
    rest = dict(value)
    kinds = {rest.pop(name) for name in ("type", "rope_type") if isinstance(rest.get(name), str)}
    allowed = {field.name for field in fields(RopeScaling)} if kinds == {"yarn"} else set()
    if kinds not in ({"yarn"}, {"default"}):
        raise UserError(f"{path}: {key} must have the type yarn or default, it has {sorted(kinds) or 'none'}")
    for name in rest:
        if name not in allowed | {"rope_theta"}:
            raise UserError(f"{path}: {key}.{name} is not a key of RoPE type {kinds.pop()}")
    return rest | ({"type": "yarn"} if kinds == {"yarn"} else {})


def _validate(path: Path, values: dict[str, Any]) -> ModelConfig:
    if values.get("initializer_range") == "auto":
        raise UserError(f"{path}: initializer_range must be a number")
    try:
        # Strict JSON: the text "8" is no integer and true is no 1, while 40 may stand for 40.0.
        config: ModelConfig = TypeAdapter(ModelConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(part for part in map(str, problem["loc"]) if part.isidentifier())
        raise UserError(f"{path}: {key}: {problem['msg']}") from None
    wrong = model_problems(config)
    if wrong:
        raise UserError(f"{path}: {wrong[0]}")
    return config
