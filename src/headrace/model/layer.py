"""One transformer layer, in four steps that can be run apart.

    h = h + MLA(norm(h))                      attention     computation
    send norm(h) to the experts               dispatch      communication
    feed-forward on what was received         experts       computation
    h = h + what comes back                   combine       communication

A pipeline that overlaps two microbatches (report, section 3.2.1) interleaves the steps; `forward` runs them in order.
Shapes: B batch, T tokens, D model width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from headrace.config.schema import ModelConfig
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.attention import LatentAttention
from headrace.model.dispatch import Dispatcher
from headrace.model.experts import DenseFeedForward, FeedForwardInput, FeedForwardOutput, MoeFeedForward
from headrace.model.norm import RMSNorm
from headrace.model.rope import Rotation
from headrace.model.router import Routing


@dataclass(frozen=True)
class LayerState:
    """Between `dispatch` and `combine`: the residual stream, and what the feed-forward network was given."""

    residual_BTD: Tensor
    given: FeedForwardInput


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

    def attention(self, hidden_BTD: Tensor, rotation: Rotation) -> Tensor:
        """Step 1: hidden states [B, T, D] plus attention's output."""
        attended: Tensor = self.self_attn(self.input_layernorm.normalise(hidden_BTD, self.again), rotation)
        return hidden_BTD + attended

    def dispatch(self, hidden_BTD: Tensor) -> LayerState:
        """Step 2: normalise, route, and send to the experts."""
        x = self.post_attention_layernorm.normalise(hidden_BTD, self.again)
        return LayerState(hidden_BTD, self.mlp.dispatch(x.flatten()))

    def experts(self, state: LayerState) -> FeedForwardOutput:
        """Step 3: the feed-forward computation on this rank."""
        return self.mlp.compute(state.given)

    def combine(self, state: LayerState, out: FeedForwardOutput) -> Tensor:
        """Step 4: fetch the results and add them to the residual stream, [B, T, D]."""
        return state.residual_BTD + self.mlp.combine(state.given, out).view_as(state.residual_BTD)

    def forward(self, hidden_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Routing | None]:
        """All four steps: hidden states [B, T, D] and the routing, None for a dense layer."""
        state = self.dispatch(self.attention(hidden_BTD, rotation))
        return self.combine(state, self.experts(state)), state.given.routing
