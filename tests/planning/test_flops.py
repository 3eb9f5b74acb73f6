"""FLOPs per token against the published figures and against torch's own counter on a running network."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from headrace.config.compose import load
from headrace.planning.flops import mfu, training_flops


def model_of(*overrides):
    return load(["experiment=tiny", *overrides]).model


@pytest.mark.parametrize(
    ("causal", "mtp", "published"),
    [(True, False, 250.4), (False, False, 281.2), (True, True, 260.6), (False, True, 291.8)],
)
def test_the_published_model_at_4096_tokens(causal, mtp, published):
    config = model_of("model=v3_671b")
    flops = training_flops(config, 4096, causal=causal, mtp=mtp)
    assert flops / 1e9 == pytest.approx(published, abs=0.05)


def test_the_published_utilisation():
    """180K GPU hours per T tokens on H800 (report, table 1), with 989 TFLOPS as the BF16 peak."""
    config = model_of("model=v3_671b")
    tokens_per_second = 1e12 / (180_000 * 3600)
    assert mfu(tokens_per_second, training_flops(config, 4096), 989e12) == pytest.approx(0.391, abs=0.0005)
    # Table 4 of arXiv 2505.09343: 272.8B tokens a day on 2,048 GPUs.
    rate = 272.8e9 / 86_400 / 2048
    assert mfu(rate, training_flops(config, 4096), 989e12) == pytest.approx(0.3894, abs=0.002)
    assert mfu(rate, training_flops(config, 4096, causal=False), 989e12) == pytest.approx(0.4373, abs=0.002)


def test_twice_the_length_doubles_only_the_scores():
    config = model_of()
    short, long = (training_flops(config, length, causal=False) for length in (100, 200))
    causal = training_flops(config, 200)
    assert causal == pytest.approx(short)
    per_layer = (
        6 * config.num_attention_heads * 100 * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    )
    assert long - short == pytest.approx(config.num_hidden_layers * per_layer)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}])
def test_torch_counts_the_same_operations_in_transformers_network(changes):
    """Eager attention and a plain loop over experts, so that every multiplication is one that torch can see."""
    config = replace(model_of(), **changes)
    network = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            n_shared_experts=config.n_shared_experts,
            n_routed_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            first_k_dense_replace=config.first_k_dense_replace,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
        ),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    length = 48
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    embedded = network.model.embed_tokens(tokens).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        network(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() / length == pytest.approx(training_flops(config, length, causal=False), rel=1e-3)
