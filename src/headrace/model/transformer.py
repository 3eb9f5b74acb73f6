"""The whole network: embedding, layers, final norm, head, and the multi-token-prediction layer behind them.

Parameters are FP32 and are named as in the Hub checkpoint (experts of a layer stacked); activations are FP32 or BF16 as
`numerics` say, GEMMs inside the layers may be FP8. Embedding and head never are; the router, the norms' arithmetic and
the log-softmax are FP32 in any case.
Shapes: B batch, T tokens, N = B * T, D model width, V vocabulary, L layers with experts, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.config.schema import ModelConfig
from headrace.fp8.gemms import Compute, wide
from headrace.fp8.linear import Linear
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model import rope
from headrace.model.dispatch import Dispatcher, LocalDispatcher
from headrace.model.documents import Shifted
from headrace.model.experts import MoeFeedForward
from headrace.model.layer import Layer
from headrace.model.loss import cross_entropy, log_probabilities
from headrace.model.mtp import MtpLayer
from headrace.model.norm import RMSNorm
from headrace.model.router import Router, Routing, balance_loss


@dataclass(frozen=True)
class Losses:
    """What one forward pass gives: FP32 scalars, nats per token where they are losses of tokens."""

    total: Tensor  # main + mtp_weight * mtp + balance: the one to differentiate
    main: Tensor
    mtp: Tensor  # 0 without an MTP layer
    balance: Tensor  # its weight included, summed over layers
    counts: Tensor  # [L (+1 with MTP), E] int64: tokens that chose each expert


class Embedding(nn.Module):
    """Token embedding; the gradient is added into the rows used, in FP32, without a table of zeros per call."""

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype, store: WeightGradientStore) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=torch.float32))
        self.dtype, self.store = dtype, store

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] to [..., D] in the compute dtype."""
        result: Tensor = _EmbeddingFunction.apply(self.weight, tokens, self)  # type: ignore[no-untyped-call]
        return result


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, tokens: Tensor, layer: Embedding) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer = layer
        return nn.functional.embedding(tokens, weight).to(layer.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (tokens,), layer = ctx.saved_tensors, ctx.layer
        rows, ids = dy.reshape(-1, dy.shape[-1]).to(wide(dy.dtype)), tokens.flatten()

        def work() -> None:
            gradient, fresh = layer.store.gradient(layer.weight)
            (gradient.zero_() if fresh else gradient).index_add_(0, ids, rows)

        layer.store.put(work)
        return None, None, None


class Backbone(nn.Module):
    """Embedding, layers and final norm; with MTP the last of `layers` is the MTP layer."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, store: WeightGradientStore, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, numerics.dtype, store)
        layers: list[Layer] = [
            Layer(config, index, numerics, store, dispatcher) for index in range(config.num_hidden_layers)
        ]
        if config.num_nextn_predict_layers:
            layers.append(MtpLayer(config, numerics, store, dispatcher))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V3 with its training losses.

    Built on the current default device (`with torch.device("meta")` costs nothing); weights are undefined until
    `initialise` or `load_state_dict`. `store` takes the weight gradients (immediate by default), `dispatcher` brings
    tokens to experts (local by default).
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics | Compute,
        store: WeightGradientStore | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        numerics = Numerics.of(numerics)
        self.config, self.numerics = config, numerics
        self.store = store or WeightGradientStore()
        self.dispatcher = dispatcher or LocalDispatcher(numerics.linear)
        self.model = Backbone(config, numerics, self.store, self.dispatcher)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, numerics.plain, self.store)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits [B, T, V], FP32."""
        hidden, _, _ = self.hidden_states(tokens_BT)
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    def hidden_states(
        self, tokens_BT: Tensor, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, rope.Rotation, list[Routing]]:
        """Output after the final norm [B, T, D], the rotation used, and the routing of each layer with experts.

        `starts_BT` says where documents begin that do not see each other (see `rope.Rotation`).
        """
        rotation = rope.rotation(self.config, tokens_BT.shape[1], tokens_BT.device, starts_BT)
        hidden: Tensor = self.model.embed_tokens(tokens_BT)
        routings: list[Routing] = []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            hidden, routing = layer(hidden, rotation)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(hidden), rotation, routings

    def losses(self, tokens_BL: Tensor, mtp_weight: float, balance_weight: float, eos: int | None = None) -> Losses:
        """All losses of rows of T+1+D tokens (int64), D = `num_nextn_predict_layers`: see `Losses`.

        Tokens at the end of a row may be `loss.IGNORED`: they are no targets, and in the input stand for padding.
        With `eos`, the id that ends documents, the documents of a row do not see each other (see `documents`).
        """
        tokens = tokens_BL.shape[1] - 1 - self.config.num_nextn_predict_layers
        assert tokens > 0, "a row must hold at least one token and its targets"
        rows = Shifted(tokens_BL, tokens, eos)
        inputs = rows.inputs()
        hidden, rotation, routings = self.hidden_states(inputs, rows.starts)
        main = cross_entropy(hidden.flatten(0, 1), self.lm_head, rows.targets(1).flatten())
        mtp = torch.zeros_like(main)
        if self.config.num_nextn_predict_layers:
            ahead, routing = self._mtp_states(rows.inputs(1), hidden, rotation)
            mtp = cross_entropy(ahead.flatten(0, 1), self.lm_head, rows.targets(2).flatten())
            routings.append(routing)
        balance = self._balance(routings, inputs.shape, balance_weight)
        return Losses(main + mtp_weight * mtp + balance, main, mtp, balance, self._counts(routings))

    @torch.no_grad()
    def token_log_probabilities(self, tokens_BL: Tensor) -> Tensor:
        """log p(token | tokens before it) in nats for rows of T+1 tokens: [B, T] FP32."""
        hidden, _, _ = self.hidden_states(tokens_BL[:, :-1])
        targets = tokens_BL[:, 1:]
        return log_probabilities(hidden.flatten(0, 1), self.lm_head, targets.flatten()).view(targets.shape)

    def routers(self) -> list[Router]:
        """The routers in the order of `Losses.counts`."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoeFeedForward)]

    def local_experts(self) -> range:
        """The routed experts that this process holds, of every layer."""
        return self.dispatcher.local_experts(self.config.n_routed_experts)

    def update_router_bias(self, counts_LE: Tensor, speed: float) -> None:
        """Move every selection bias by `speed` towards an even load, given the whole global batch's counts."""
        for router, counts_E in zip(self.routers(), counts_LE, strict=True):
            router.update_bias(counts_E, speed)

    def _mtp_states(self, next_BT: Tensor, hidden_BTD: Tensor, rotation: rope.Rotation) -> tuple[Tensor, Routing]:
        layer = self.model.layers[-1]
        assert isinstance(layer, MtpLayer)
        joined = layer.join(self.model.embed_tokens(next_BT), hidden_BTD)
        ahead, routing = layer(joined, rotation)
        assert routing is not None
        return layer.shared_head.norm(ahead), routing

    def _balance(self, routings: list[Routing], shape: torch.Size, weight: float) -> Tensor:
        chosen = self.config.num_experts_per_tok
        if not routings or weight == 0:
            return self.lm_head.weight.new_zeros(())
        return (
            weight
            * torch.stack([balance_loss(routing.scores_NE.view(*shape, -1), chosen) for routing in routings]).sum()
        )

    def _counts(self, routings: list[Routing]) -> Tensor:
        if not routings:
            return torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64)
        return torch.stack([routing.counts_E for routing in routings])
