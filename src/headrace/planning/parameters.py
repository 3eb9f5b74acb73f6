"""Parameters of a model by component, from its configuration.

The published model has 671,026,404,352 of them, and 14,848 selection biases that no gradient trains. What is
*activated* per token counts the head, which every token passes, and leaves out the embedding, of which a token reads
one row; of the routed experts it counts `num_experts_per_tok`. The MTP module (report, section 2.2) is counted apart:
it is dropped for ordinary inference, and it shares embedding and head with the main model.
"""

from dataclasses import dataclass

from headrace.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; all but `mtp` and `mtp_router_bias` belong to the main model."""

    embedding: int
    head: int
    attention: int  # with the norms of the latents
    dense_mlps: int  # of the first layers
    routers: int
    shared_experts: int
    routed_experts: int
    norms: int  # two per layer and the final one
    router_bias: int  # updated by rule, not by gradient
    mtp: int  # the MTP module's own
    mtp_router_bias: int
    activated_experts: int  # of `routed_experts`, per token

    @property
    def total(self) -> int:
        """The main model's parameters, as model names state them."""
        experts = self.shared_experts + self.routed_experts
        return self.embedding + self.head + self.attention + self.dense_mlps + self.routers + experts + self.norms

    @property
    def activated(self) -> int:
        """Parameters that one token passes: with the head, without the embedding."""
        return self.total - self.embedding - self.routed_experts + self.activated_experts

    @property
    def stored(self) -> int:
        """Elements of a training checkpoint's model file."""
        return self.total + self.router_bias + self.mtp + self.mtp_router_bias


def count(config: ModelConfig) -> ParameterCount:
    """Count the parameters of `config` by component."""
    layers, width, experts = config.num_hidden_layers, config.hidden_size, config.n_routed_experts
    moe_layers, mtp = layers - config.first_k_dense_replace, config.num_nextn_predict_layers
    expert = mlp(width, config.moe_intermediate_size)
    block = attention(config) + experts * width + (config.n_shared_experts + experts) * expert + 2 * width
    return ParameterCount(
        embedding=config.vocab_size * width,
        head=config.vocab_size * width,
        attention=layers * attention(config),
        dense_mlps=config.first_k_dense_replace * mlp(width, config.intermediate_size),
        routers=moe_layers * experts * width,
        shared_experts=moe_layers * config.n_shared_experts * expert,
        routed_experts=moe_layers * experts * expert,
        norms=(2 * layers + 1) * width,
        router_bias=moe_layers * experts,
        mtp=mtp * (block + 2 * width * width + 3 * width),
        mtp_router_bias=mtp * experts,
        activated_experts=moe_layers * config.num_experts_per_tok * expert,
    )


def muon_parameters(config: ModelConfig) -> int:
    """Weights that Muon orthogonalises: matrices of attention, feed-forward and experts, and the MTP projection."""
    mtp, width = config.num_nextn_predict_layers, config.hidden_size
    blocks = config.num_hidden_layers + mtp
    experts = config.n_shared_experts + config.n_routed_experts
    return (
        blocks * attention_matrices(config)
        + config.first_k_dense_replace * mlp(width, config.intermediate_size)
        + (blocks - config.first_k_dense_replace) * experts * mlp(width, config.moe_intermediate_size)
        + mtp * 2 * width * width
    )


def attention(config: ModelConfig) -> int:
    """Weights of one attention block (MLA; report, eq. 1-11), with the norms of its latents."""
    return attention_matrices(config) + config.kv_lora_rank + (config.q_lora_rank or 0)


def attention_matrices(config: ModelConfig) -> int:
    """Weights of the projections of one attention block."""
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    from_width = width * queries if config.q_lora_rank is None else config.q_lora_rank * (width + queries)
    compress = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    expand = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return from_width + compress + expand + heads * config.v_head_dim * width


def mlp(width: int, inner: int) -> int:
    """Weights of a SwiGLU feed-forward: gate, up and down projection."""
    return 3 * width * inner
