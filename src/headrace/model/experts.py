"""Feed-forward networks: SwiGLU, dense or as a mixture of shared and routed experts.

    E(x) = W_down (silu(W_gate x) * W_up x)         y = sum over the shared experts + sum_i w_i E_i(x)

All of them are one autograd function over grouped rows: a dense network is a single group. The routing weight
multiplies the narrow activations before the down projection, where it costs least and where the report applies it too.
Like the report (section 3.2.3, "recomputation"), the backward pass computes the SwiGLU output again instead of keeping
it, from gate and up projection as they were kept: in FP8 these are rounded (`swiglu_input_cache`).

A mixture in one piece is `MoeFeedForward.forward`; a pipeline takes its parts and puts computation of another
microbatch between them.
Shapes: N tokens, S rows sorted by expert, D model width, I intermediate width, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation, Input
from headrace.fp8.gemms import groups_of, wide
from headrace.fp8.linear import Linear, StackedLinear, Weight, put_weight_gradient
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.dispatch import Dispatcher, Received, as_rows, as_tokens
from headrace.model.router import Router, Routing

_BLOCK = 1 << 17  # elements of an activation worked on at a time on the CPU, so that they stay in the cache


class DenseFeedForward(nn.Module):
    """One SwiGLU network for all tokens."""

    def __init__(self, width: int, intermediate: int, numerics: Numerics, store: WeightGradientStore) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate, numerics.linear, store)
        self.up_proj = Linear(width, intermediate, numerics.linear, store)
        self.down_proj = Linear(intermediate, width, numerics.linear, store)
        self.keep_hidden = not numerics.recompute.swiglu

    def forward(self, x_ND: Tensor | Activation) -> Tensor:
        """[N, D] to [N, D]."""
        x = Activation.of(x_ND)
        shared = Input(self.gate_proj.gemms, x, "hidden", users=2)
        return gated_mlp(
            x.value, None, [x.value.shape[0]], shared, self.keep_hidden, self.gate_proj, self.up_proj, self.down_proj
        )


class Experts(nn.Module):
    """The routed experts of a layer, stacked: weights [E, I, D], [E, I, D], [E, D, I]."""

    def __init__(
        self, count: int, width: int, intermediate: int, numerics: Numerics, store: WeightGradientStore
    ) -> None:
        super().__init__()
        self.gate_proj = StackedLinear(count, width, intermediate, numerics.linear, store)
        self.up_proj = StackedLinear(count, width, intermediate, numerics.linear, store)
        self.down_proj = StackedLinear(count, intermediate, width, numerics.linear, store)
        self.keep_hidden = not numerics.recompute.swiglu

    def forward(self, rows_SD: Tensor, weights_S: Tensor, received: Received) -> Tensor:
        """Results [S, D] of the rows received, times their routing weights.

        `rows_SD` and `weights_S` carry the gradients (`dispatch.as_rows`); the rows' values are in `received`.
        """
        shared = Input(self.gate_proj.gemms, Activation(rows_SD), "dispatched", users=2, rows=received.operand)
        return gated_mlp(
            rows_SD,
            weights_S,
            received.counts,
            shared,
            self.keep_hidden,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
        )


class MoeFeedForward(nn.Module):
    """Router, shared experts, and those of the routed experts that `dispatcher` says are here."""

    def __init__(
        self, config: ModelConfig, numerics: Numerics, store: WeightGradientStore, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        width, intermediate = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.local = dispatcher.local_experts(config.n_routed_experts)
        self.experts = Experts(len(self.local), width, intermediate, numerics, store)
        self.shared_experts = DenseFeedForward(width, intermediate * config.n_shared_experts, numerics, store)
        self.dispatcher = dispatcher

    def forward(self, x_ND: Activation, routing: Routing) -> Tensor:
        """[N, D] to [N, D] in one piece, differentiable."""
        received = self.dispatcher.send(x_ND.value.detach(), routing)
        rows_SD = self.experts(*as_rows(self.dispatcher, received, x_ND.value, routing.weights_NK), received)
        shared_ND: Tensor = self.shared_experts(x_ND)
        return shared_ND + as_tokens(self.dispatcher, received, rows_SD)


def gated_mlp(
    rows_SD: Tensor,
    weights_S: Tensor | None,
    counts: Sequence[int],
    given: Input,
    keep_hidden: bool,
    gate: Weight,
    up: Weight,
    down: Weight,
) -> Tensor:
    """(silu(x W_gate^T) * x W_up^T * w) W_down^T by groups of rows, [S, D] in the compute dtype.

    `counts` are the rows of each group (one group for ordinary linear layers); `weights_S` FP32, or None for w = 1.
    `given` is the `Input` made of `rows_SD` for two users; `rows_SD` itself only carries the gradient. `keep_hidden`
    keeps SwiGLU's output instead of computing it again.
    """
    settings = (counts, given, keep_hidden, (gate, up, down))
    result: Tensor = _GatedMlp.apply(rows_SD, weights_S, settings, gate.weight, up.weight, down.weight)  # type: ignore[no-untyped-call]
    return result


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        settings: tuple[Sequence[int], Input, bool, tuple[Weight, Weight, Weight]],
        *parameters: nn.Parameter,  # so that autograd knows about them; used through `settings`
    ) -> Tensor:
        counts, given, keep_hidden, layers = settings
        groups, gemms = groups_of(counts), layers[0].gemms
        w_gate, w_up, w_down = (layer.operand() for layer in layers)
        gate, up = gemms.forward(given.rows, w_gate, groups), gemms.forward(given.rows, w_up, groups)
        column = None if weights is None else weights.detach().to(gate.dtype)[:, None]
        hidden_SI = _swiglu(gate, up, column)
        rows = gemms.rows(hidden_SI, "swiglu")
        parts = (
            w_gate, w_up, w_down, given.kept, gemms.keep_elementwise(gate), gemms.keep_elementwise(up),
            gemms.keep(hidden_SI, rows, "swiglu") if keep_hidden else (), () if column is None else (column,),
        )  # fmt: skip
        ctx.save_for_backward(*(tensor for part in parts for tensor in part))
        ctx.lengths = [len(part) for part in parts]
        ctx.groups, ctx.layers, ctx.later = groups, layers, given.later
        return gemms.forward(rows, w_down, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        parts = [tuple(next(saved) for _ in range(length)) for length in ctx.lengths]
        w_gate, w_up, w_down, kept, gate, up, kept_hidden, column = parts
        layer_gate, layer_up, layer_down = ctx.layers
        groups, later, gemms = ctx.groups, ctx.later, layer_gate.gemms

        dy_rows, dy_columns = gemms.gradient(dy.contiguous(), "swiglu")
        dhidden = gemms.input_gradient(dy_rows, w_down, groups)
        hidden, dgate, dup, dweights = _swiglu_backward(
            dhidden, gemms.restore_elementwise(gate), gemms.restore_elementwise(up), column[0] if column else None
        )
        kept_hidden = kept_hidden or gemms.keep(hidden, gemms.rows(hidden, "swiglu"), "swiglu")
        put_weight_gradient(layer_down, dy_columns, lambda: gemms.columns(kept_hidden, "swiglu"), groups)

        role = later.role
        gate_rows, gate_columns = gemms.gradient(dgate, role)
        dx = gemms.input_gradient(gate_rows, w_gate, groups)
        put_weight_gradient(layer_gate, gate_columns, lambda: later.columns(kept), groups)
        up_rows, up_columns = gemms.gradient(dup, role)
        dx = gemms.input_gradient(up_rows, w_up, groups, add_to=dx)
        put_weight_gradient(layer_up, up_columns, lambda: later.columns(kept), groups)
        return dx, dweights, None, None, None, None


def _swiglu(gate: Tensor, up: Tensor, column: Tensor | None) -> Tensor:
    hidden = torch.empty_like(gate)
    for rows in _blocks(gate):
        block = functional.silu(gate[rows]).mul_(up[rows])
        hidden[rows] = block if column is None else block.mul_(column[rows])
    return hidden


def _swiglu_backward(
    dhidden: Tensor, gate: Tensor, up: Tensor, column: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The SwiGLU output again, and the gradients of gate, up and routing weights; `dhidden` is overwritten by dgate."""
    hidden, dup = torch.empty_like(gate), torch.empty_like(up)
    dweights = None if column is None else gate.new_empty(gate.shape[0], dtype=wide(gate.dtype))
    for rows in _blocks(gate):
        activated = functional.silu(gate[rows])
        product = activated * up[rows]
        incoming = dhidden[rows]
        if column is None or dweights is None:
            hidden[rows] = product
        else:
            dweights[rows] = torch.linalg.vecdot(incoming, product)
            torch.mul(product, column[rows], out=hidden[rows])
            incoming.mul_(column[rows])
        torch.mul(incoming, activated, out=dup[rows])
        incoming.copy_(torch.ops.aten.silu_backward(incoming.mul_(up[rows]), gate[rows]))
    return hidden, dhidden, dup, dweights


def _blocks(x: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
