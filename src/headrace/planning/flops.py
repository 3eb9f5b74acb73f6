"""Floating-point operations per trained token, the numerator of MFU.

Conventions, because every published figure has its own: forward and backward together, a multiplication and an addition
counted as two, so 6 per weight of a matrix that the token passes (2 forward, 4 backward). Counted are the projections
of attention, dense layers, shared and chosen experts, the router and the head; not the embedding (a look-up), norms,
softmax, or recomputation. Attention scores and values add 6 * (qk + v dims) per head and visible position; a causal
token sees half of the sequence on average, non-causal counting takes all of it. The MTP module is left out unless asked
for: DeepSeek's own MFU leaves it out (arXiv 2505.09343, table 4: 250 GFLOPs a token for V3 at 4,096 tokens).
"""

from headrace.config.schema import ModelConfig
from headrace.planning.parameters import attention_matrices, mlp

_PER_WEIGHT = 6  # 2 forward, 2 for the gradient of the input, 2 for the gradient of the weight


def training_flops(config: ModelConfig, sequence_length: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs per token of one training step (forward and backward) at `sequence_length` tokens."""
    dense = config.first_k_dense_replace
    blocks = config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    matrices = head + blocks * attention_matrices(config)
    matrices += dense * mlp(config.hidden_size, config.intermediate_size) + (blocks - dense) * _moe_matrices(config)
    if mtp:
        modules = config.num_nextn_predict_layers
        joined = 2 * config.hidden_size**2
        matrices += modules * (joined + attention_matrices(config) + _moe_matrices(config) + head)
        blocks += modules
    return _PER_WEIGHT * (matrices + blocks * _scores(config, sequence_length, causal))


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of `peak_flops` (per second) that the counted operations make up."""
    return tokens_per_second * flops_per_token / peak_flops


def _moe_matrices(config: ModelConfig) -> int:
    """Weights that one token passes in a mixture-of-experts layer: router, shared and chosen experts."""
    passed = config.n_shared_experts + config.num_experts_per_tok
    router = config.n_routed_experts * config.hidden_size
    return router + passed * mlp(config.hidden_size, config.moe_intermediate_size)


def _scores(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Multiplications of one token's attention in one layer: scores over qk dimensions, then the sum of values."""
    visible = sequence_length / 2 if causal else sequence_length
    dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_attention_heads * visible * dims
