"""Multi-token prediction: one more layer that predicts the token after next.

    h'_i = eh_proj [ norm(emb(t_i+1)) ; norm(h_i) ]        h_i: the main model after its final norm
    logits of t_i+2 = head(norm(layer(h')_i))

(Report, section 2.2, eq. 21-25. The report prints the two halves in the other order; the released weights and
transformers take the embedding first, and hidden states after the final norm.) Embedding and head are the main model's
own. The layer is stored as number `num_hidden_layers` and always has experts.
Shapes: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from headrace.config.schema import ModelConfig
from headrace.fp8.linear import Linear
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.dispatch import Dispatcher
from headrace.model.layer import Layer
from headrace.model.norm import RMSNorm


class SharedHead(nn.Module):
    """The norm before the shared output head; the head itself belongs to the main model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpLayer(Layer):
    """A mixture-of-experts layer with what joins it to the main model."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, store: WeightGradientStore, dispatcher: Dispatcher
    ) -> None:
        super().__init__(config, config.first_k_dense_replace, numerics, store, dispatcher)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, numerics.mtp_projection, store)
        self.shared_head = SharedHead(config)

    def join(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """The layer's input from the next tokens' embeddings and the main model's normalised output, [B, T, D]."""
        joined: Tensor = self.eh_proj(torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1))
        return joined
