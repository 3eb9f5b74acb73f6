"""Multi-head latent attention (MLA): keys and values are expanded from one narrow vector per token.

    c_q = norm(x W_DQ)        q = c_q W_UQ              per head: plain part and rotated part
    c_kv, k_R = x W_DKV,KR    k, v = norm(c_kv) W_UKV   k_R is rotated and shared by all heads
    out = softmax(q k^T * scale) v W_O

(Report, section 2.1.1, eq. 1-11.) With `q_lora_rank` null the queries are projected directly. The two latent norms use
eps = 1e-6 whatever `rms_norm_eps` says: so do the released code and transformers. With `recompute.up_projections` the
queries, keys and values are not kept for the backward pass but expanded again from the latents (report, section 3.2.3).
Shapes: B batch, T tokens, D model width, H heads.
"""

import torch
from torch import Tensor, nn

from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation, Input
from headrace.fp8.linear import Linear
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model import rope
from headrace.model.causal import Expand, causal_attention
from headrace.model.norm import RMSNorm

_LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA with causal masking; module names are the Hub's."""

    def __init__(self, config: ModelConfig, numerics: Numerics, store: WeightGradientStore) -> None:
        super().__init__()
        self.heads, self.recompute, self.store = config.num_attention_heads, numerics.recompute, store
        gemms = numerics.linear
        self.latent, self.rotated = config.kv_lora_rank, config.qk_rope_head_dim
        self.scale = rope.softmax_scale(config)
        width, queries = config.hidden_size, self.heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries, gemms, store)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, gemms, store)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries, gemms, store)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rotated, gemms, store)
        self.kv_a_layernorm = RMSNorm(self.latent, _LATENT_EPS)
        expanded = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(self.latent, expanded, gemms, store)
        self.o_proj = Linear(self.heads * config.v_head_dim, width, gemms, store)
        self.direct = config.q_lora_rank is None

    def forward(self, x_BTD: Tensor | Activation, rotation: rope.Rotation) -> Tensor:
        """Normalised hidden states [B, T, D] to the attention's output [B, T, D], residual not added."""
        x = Activation.of(x_BTD)
        first = self.q_proj if self.direct else self.q_a_proj
        shared = Input(first.gemms, x, "hidden", users=2)
        query, compressed = first(x, shared=shared), self.kv_a_proj_with_mqa(x, shared=shared)
        again = self._again(query, compressed, rotation)
        out = causal_attention(*self.expand(query, compressed, rotation), again, rotation.starts_BT)
        result: Tensor = self.o_proj(out.flatten(2), "attention")
        return result

    def expand(self, query: Tensor, compressed: Tensor, rotation: rope.Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, H, T, N+R] and values [B, H, T, V] from what the down projections gave.

        `query` is the latent [B, T, d_c'], or the queries themselves without `q_lora_rank`; `compressed` is
        [B, T, d_c + R].
        """
        latent, k_rope = torch.split(compressed, [self.latent, self.rotated], dim=-1)
        q = query if self.direct else self.q_b_proj(self._normalise(self.q_a_layernorm, query), "latent")
        kv = self.kv_b_proj(self._normalise(self.kv_a_layernorm, latent), "latent")
        shape = (*query.shape[:2], self.heads, -1)
        return rope.heads(q.view(shape), kv.view(shape), k_rope, rotation, self.scale)

    def _normalise(self, norm: RMSNorm, x: Tensor) -> Activation:
        return norm.normalise(x, again=self.recompute.norms)

    def _again(self, query: Tensor, compressed: Tensor, rotation: rope.Rotation) -> Expand | None:
        if not self.recompute.up_projections:
            return None
        query, compressed = query.detach(), compressed.detach()

        def again() -> tuple[Tensor, Tensor, Tensor]:
            with self.store.recomputation():
                return self.expand(query, compressed, rotation)

        return again
