"""Multi-head latent attention (MLA): keys and values are expanded from one narrow vector per token.

    c_q = norm(x W_DQ)        q = c_q W_UQ              per head: plain part and rotated part
    c_kv, k_R = x W_DKV,KR    k, v = norm(c_kv) W_UKV   k_R is rotated and shared by all heads
    out = softmax(q k^T * scale) v W_O

(Report, section 2.1.1, eq. 1-11.) With `q_lora_rank` null the queries are projected directly. The two latent norms use
eps = 1e-6 whatever `rms_norm_eps` says: so do the released code and transformers.
Shapes: B batch, T tokens, D model width, H heads.
"""

from torch import Tensor, nn

from headrace.config.schema import ModelConfig
from headrace.fp8.linear import Compute, Linear
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model import rope
from headrace.model.causal import causal_attention
from headrace.model.norm import RMSNorm

_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA with causal masking; module names are the Hub's."""

    def __init__(self, config: ModelConfig, compute: Compute, store: WeightGradientStore) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.latent, self.rotated = config.kv_lora_rank, config.qk_rope_head_dim
        self.scale = rope.softmax_scale(config)
        width, queries = config.hidden_size, self.heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries, compute, store)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, compute, store)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries, compute, store)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rotated, compute, store)
        self.kv_a_layernorm = RMSNorm(self.latent, _LATENT_EPS)
        expanded = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(self.latent, expanded, compute, store)
        self.o_proj = Linear(self.heads * config.v_head_dim, width, compute, store)
        self.direct = config.q_lora_rank is None

    def forward(self, x_BTD: Tensor, rotation: rope.Rotation) -> Tensor:
        """Normalised hidden states [B, T, D] to the attention's output [B, T, D], residual not added."""
        batch, tokens, _ = x_BTD.shape
        q = self.q_proj(x_BTD) if self.direct else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([self.latent, self.rotated], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        shape = (batch, tokens, self.heads, -1)
        queries, keys, values = rope.heads(q.view(shape), kv.view(shape), k_rope, rotation, self.scale)
        out = causal_attention(queries, keys, values)
        result: Tensor = self.o_proj(out.reshape(batch, tokens, -1))
        return result
