"""transformers' model with our weights: what the parity tests compare against."""

import random

import torch
import transformers

from headrace.config.recipe import RopeScaling
from headrace.config.schema import ModelConfig
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer


def random_config(seed: int) -> ModelConfig:
    """A small V3: every combination of groups, YaRN, low-rank queries and dense layers occurs among few seeds."""
    draw = random.Random(seed)
    groups, per_group = draw.choice([(1, 8), (2, 4), (4, 2), (4, 4), (3, 5)])
    chosen_groups = draw.randint(1, groups)
    normalise = draw.random() < 0.75
    scaling = None
    if seed % 2:
        mscale, all_dim = draw.choice([(1.0, 1.0), (0.707, 1.0), (1.0, 0.0)])
        scaling = RopeScaling("yarn", draw.choice([2.0, 40.0]), 32.0, 1.0, mscale, all_dim, 32)
    return ModelConfig(
        vocab_size=draw.choice([61, 96]),
        hidden_size=draw.choice([32, 48]),
        intermediate_size=72,
        moe_intermediate_size=draw.choice([8, 24]),
        num_hidden_layers=3,
        num_attention_heads=draw.choice([1, 3, 4]),
        n_shared_experts=draw.choice([1, 2]),
        n_routed_experts=groups * per_group,
        # one expert of weight s/s = 1 gives the router no gradient at all, only rounding: nothing to compare
        num_experts_per_tok=draw.randint(2 if normalise else 1, min(4, chosen_groups * per_group)),
        n_group=groups,
        topk_group=chosen_groups,
        norm_topk_prob=normalise,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        first_k_dense_replace=seed % 3,
        q_lora_rank=None if (seed // 2) % 2 else 20,
        kv_lora_rank=draw.choice([12, 16]),
        qk_nope_head_dim=draw.choice([8, 12]),
        qk_rope_head_dim=draw.choice([4, 8]),
        v_head_dim=draw.choice([8, 16]),
        num_nextn_predict_layers=0,
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        rope_theta=draw.choice([10000.0, 500.0]),
        rope_scaling=scaling,
        max_position_embeddings=1024,
        initializer_range=0.08,
    )


def hub_config(config: ModelConfig) -> transformers.DeepseekV3Config:
    """The same network in transformers' words."""
    fields = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if name not in ("rope_scaling", "rope_theta", "initializer_range", "num_nextn_predict_layers")
    }
    fields["num_key_value_heads"] = config.num_attention_heads
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= vars(config.rope_scaling) | {"rope_type": "yarn"}
        del rope["type"]
    return transformers.DeepseekV3Config(**fields, rope_parameters=rope, num_mtp_layers=0, use_cache=False)


def peer_of(model: Transformer, attention: str = "sdpa", experts: str = "grouped_mm") -> torch.nn.Module:
    """transformers' model with a copy of `model`'s weights; every one of its tensors is set."""
    hub = hub_config(model.config)
    hub._attn_implementation, hub._experts_implementation = attention, experts
    peer = transformers.DeepseekV3ForCausalLM(hub)
    peer.load_state_dict(to_hub_names(model.state_dict()), strict=True)
    return peer.train()


def to_hub_names(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers fuses an expert's gate and up projections; everything else has the same name."""
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith("experts.gate_proj.weight") and tensor.dim() == 3:
            up = ours[name.replace("gate_proj", "up_proj")]
            theirs[name.replace("gate_proj.weight", "gate_up_proj")] = torch.cat([tensor, up], dim=1)
        elif name.endswith("experts.down_proj.weight") and tensor.dim() == 3:
            theirs[name.removesuffix(".weight")] = tensor
        elif not (name.endswith("experts.up_proj.weight") and tensor.dim() == 3):
            theirs[name] = tensor
    return theirs


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients by name; absent ones (experts without tokens) are zeros."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def random_model(config: ModelConfig, seed: int, compute: str = "fp32") -> Transformer:
    """Random weights, norms not exactly 1, random selection biases of both signs."""
    model = Transformer(config, compute)
    initialise(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for router in model.routers():
            router.weight.mul_(5)
            router.e_score_correction_bias.copy_(torch.randn(router.experts, generator=generator) * 0.5)
    return model
