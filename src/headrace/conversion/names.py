"""Which tensors a model has, under which name and in which shape: in a checkpoint and on the Hub.

Both lists are computed from the configuration alone, so a tensor that is missing, unknown or of another shape is found
by comparing names before any weight is read. The two layouts differ in two places only:

- experts: the checkpoint has `mlp.experts.gate_proj.weight` [E, out, in], the Hub `mlp.experts.<e>.gate_proj.weight`;
- the MTP module (report, section 2.2) is layer `num_hidden_layers`; the Hub repeats embedding and head inside it
  (`embed_tokens`, `shared_head.head`), a checkpoint holds them once because they are physically shared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.config.schema import ModelConfig
from headrace.errors import UserError

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BIAS_SUFFIX = "e_score_correction_bias"
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class HubTensor:
    """One tensor of the Hub layout and where it comes from.

    `source` is the checkpoint's name; `expert` picks a slice of a stacked source; `copy` marks the repeated embedding
    and head of the MTP module.
    """

    name: str
    shape: Shape
    source: str
    expert: int | None = None
    copy: bool = False


def keeps_fp32(name: str) -> bool:
    """Whether a tensor stays FP32 in every export: the router's selection bias, which BF16 would round into ties."""
    return name.endswith(BIAS_SUFFIX)


def checkpoint_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a training checkpoint, in the network's order."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= _block(config, layer)
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes[HEAD] = (config.vocab_size, config.hidden_size)
    if config.num_nextn_predict_layers:
        shapes |= _mtp(config)
    return shapes


def hub_tensors(config: ModelConfig) -> list[HubTensor]:
    """Every tensor of the Hub layout; those of one source follow each other."""
    tensors = [piece for name, shape in checkpoint_shapes(config).items() for piece in _split(name, shape)]
    if config.num_nextn_predict_layers:
        shared = (config.vocab_size, config.hidden_size)
        layer = f"model.layers.{config.num_hidden_layers}"
        tensors.append(HubTensor(f"{layer}.embed_tokens.weight", shared, EMBEDDING, copy=True))
        tensors.append(HubTensor(f"{layer}.shared_head.head.weight", shared, HEAD, copy=True))
    return tensors


def check_tensors(where: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse a file or folder whose tensors are not exactly `expected`; the `UserError` names the first wrong one."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing{_others(missing)}; use the model's own configuration")
    if unknown:
        others = _others(unknown)
        raise UserError(f"{where}: tensor {unknown[0]} is unknown{others}; use the model's own configuration")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{where}: tensor {name} has shape {list(found[name])}, this model needs {list(shape)}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _split(name: str, shape: Shape) -> Iterator[HubTensor]:
    if _EXPERTS not in name:
        yield HubTensor(name, shape, name)
        return
    prefix, projection = name.split(_EXPERTS)
    for expert in range(shape[0]):
        yield HubTensor(f"{prefix}{_EXPERTS}{expert}.{projection}", shape[1:], name, expert)


def _block(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """A transformer block; dense below `first_k_dense_replace`, mixture of experts from there on."""
    prefix = f"model.layers.{layer}."
    parts = {"input_layernorm.weight": (config.hidden_size,), **_attention(config)}
    parts["post_attention_layernorm.weight"] = (config.hidden_size,)
    if layer < config.first_k_dense_replace:
        parts |= _mlp("mlp", config.hidden_size, config.intermediate_size)
    else:
        parts |= _experts(config)
    return {prefix + name: shape for name, shape in parts.items()}


def _attention(config: ModelConfig) -> dict[str, Shape]:
    """Multi-head latent attention (report, eq. 1-11)."""
    width, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes: dict[str, Shape]
    if config.q_lora_rank is None:
        shapes = {"q_proj.weight": (query, width)}
    else:
        shapes = {
            "q_a_proj.weight": (config.q_lora_rank, width),
            "q_a_layernorm.weight": (config.q_lora_rank,),
            "q_b_proj.weight": (query, config.q_lora_rank),
        }
    shapes |= {
        "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + config.qk_rope_head_dim, width),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj.weight": (width, heads * config.v_head_dim),
    }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp(prefix: str, width: int, inner: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (inner, width),
        f"{prefix}.up_proj.weight": (inner, width),
        f"{prefix}.down_proj.weight": (width, inner),
    }


def _experts(config: ModelConfig) -> dict[str, Shape]:
    """Router, shared experts (one MLP of their summed width) and the stacked routed experts."""
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    stacked = {name: (experts, *shape) for name, shape in _mlp("mlp.experts", width, inner).items()}
    return {
        "mlp.gate.weight": (experts, width),
        f"mlp.gate.{BIAS_SUFFIX}": (experts,),
        **_mlp("mlp.shared_experts", width, inner * config.n_shared_experts),
        **stacked,
    }


def _mtp(config: ModelConfig) -> dict[str, Shape]:
    """The MTP module: two norms, the projection of [embedding; hidden], a block, a norm before the shared head."""
    layer, width = config.num_hidden_layers, config.hidden_size
    prefix = f"model.layers.{layer}."
    return {
        f"{prefix}enorm.weight": (width,),
        f"{prefix}hnorm.weight": (width,),
        f"{prefix}eh_proj.weight": (width, 2 * width),
        **_block(config, layer),
        f"{prefix}shared_head.norm.weight": (width,),
    }
