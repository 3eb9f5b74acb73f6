"""One transformer layer, in steps that can be run apart.

    h = h + MLA(norm(h)), route norm(h)       attend        computation
    send norm(h) to the experts               dispatch      communication (`Dispatcher.send`)
    feed-forward on what was received         feed_forward  computation
    h = h + what comes back                   combine       communication (`Dispatcher.collect`)

A pipeline that overlaps two microbatches (report, section 3.2.1) interleaves the steps; `forward` runs them in order.
Shapes: B batch, T tokens, N = B * T, D model width, S rows received.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.attention import LatentAttention
from headrace.model.dispatch import Dispatcher
from headrace.model.experts import DenseFeedForward, MoeFeedForward
from headrace.model.norm import RMSNorm
from headrace.model.rope import Rotation
from headrace.model.router import Routing


@dataclass(frozen=True)
class Attended:
    """What the first step gives: the residual stream, and what the feed-forward network reads."""

    residual_BTD: Tensor
    x_ND: Activation
    routing: Routing | None  # None for a dense layer


class Layer(nn.Module):
    """Layer number `index`: dense below `first_k_dense_replace`, else a mixture of experts."""

    def __init__(
        self, config: ModelConfig, index: int, numerics: Numerics, store: WeightGradientStore, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        self.again = numerics.recompute.norms
        self.self_attn = LatentAttention(config, numerics, store)
        self.mlp: DenseFeedForward | MoeFeedForward
        if index < config.first_k_dense_replace:
            self.mlp = DenseFeedForward(config.hidden_size, config.intermediate_size, numerics, store)
        else:
            self.mlp = MoeFeedForward(config, numerics, store, dispatcher)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attend(self, hidden_BTD: Tensor, rotation: Rotation) -> Attended:
        """Step 1: attention, then the norm and the router of what follows."""
        attended: Tensor = self.self_attn(self.input_layernorm.normalise(hidden_BTD, self.again), rotation)
        residual_BTD = hidden_BTD + attended
        x_ND = self.post_attention_layernorm.normalise(residual_BTD, self.again).flatten()
        routing = self.mlp.gate(x_ND) if isinstance(self.mlp, MoeFeedForward) else None
        return Attended(residual_BTD, x_ND, routing)

    def forward(self, hidden_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Routing | None]:
        """All steps: hidden states [B, T, D] and the routing, None for a dense layer."""
        attended = self.attend(hidden_BTD, rotation)
        given = (attended.x_ND,) if attended.routing is None else (attended.x_ND, attended.routing)
        return attended.residual_BTD + self.mlp(*given).view_as(attended.residual_BTD), attended.routing
