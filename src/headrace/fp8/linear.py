"""The one linear layer: FP32 master weight, three GEMMs that can be told apart, in FP32, BF16 or FP8 (`Gemms`).

    forward          y  = x W^T
    input gradient   dx = dy W
    weight gradient  dW = dy^T x     through a `WeightGradientStore`, accumulated in FP32

The master weight is cast or quantised once per optimizer step, not once per use. In FP32 there is no copy.
Shapes: S rows (tokens), I inputs, O outputs, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.fp8.activations import Activation, Input
from headrace.fp8.gemms import Compute, Gemms, Group, PlainGemms, Role, stacked
from headrace.fp8.weight_gradients import WeightGradientStore


class Weight(nn.Module):
    """An FP32 parameter named `weight`, its operand (see `Gemms.weight`), and the store for its gradient.

    The operand is made again after a change through the parameter itself (its version counter: `load_state_dict`,
    `copy_` under `no_grad`), and for the first forward pass after gradients were written, since an optimizer may have
    followed; `store.accumulating()` keeps it over the microbatches of a step. A change through `.data` is not seen: do
    not make any.
    """

    def __init__(self, *shape: int, gemms: Gemms | Compute, store: WeightGradientStore) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        self.gemms: Gemms = PlainGemms(gemms) if isinstance(gemms, str) else gemms
        self.dtype = self.gemms.dtype
        self.store = store
        self._operand: tuple[Tensor, ...] | None = None
        self._made: tuple[nn.Parameter, int, int] | None = None

    def operand(self) -> tuple[Tensor, ...]:
        """The weight as its GEMMs want it, detached."""
        if self.store.recomputing and self._operand is not None:
            return self._operand
        of, version, generation = self._made or (None, 0, 0)
        if of is not self.weight or self._operand is None or self._operand[0].device != self.weight.device:
            self._operand = self.gemms.weight(self.weight.detach(), None)
        elif (version, generation) != (self.weight._version, self.store.generation):
            self._operand = self.gemms.weight(self.weight.detach(), self._operand)
        self._made = (self.weight, self.weight._version, self.store.generation)
        return self._operand

    def computed(self) -> Tensor:
        """The weight in the compute dtype, detached, in the weight's shape; for layers that are not in FP8."""
        (weight,) = self.operand()
        return weight


class Linear(Weight):
    """y = x W^T without bias; weight [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, gemms: Gemms | Compute, store: WeightGradientStore) -> None:
        super().__init__(out_features, in_features, gemms=gemms, store=store)

    def forward(self, x: Tensor | Activation, role: Role = "hidden", shared: Input | None = None) -> Tensor:
        """[..., in_features] to [..., out_features], both in the compute dtype.

        `role` says where x comes from; `shared` is the `Input` made of x, with its role, where several layers read it.
        """
        activation = Activation.of(x)
        given = shared or Input(self.gemms, activation, role)
        result: Tensor = _LinearFunction.apply(activation.value, self.weight, self, given)  # type: ignore[no-untyped-call]
        return result


class StackedLinear(Weight):
    """The same layer for every expert: weight [experts, out_features, in_features], used by grouped GEMMs."""

    def __init__(
        self, experts: int, in_features: int, out_features: int, gemms: Gemms | Compute, store: WeightGradientStore
    ) -> None:
        super().__init__(experts, out_features, in_features, gemms=gemms, store=store)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, layer: Linear, given: Input) -> Tensor:
        operand = layer.operand()
        ctx.save_for_backward(*operand, *given.kept)
        ctx.layer, ctx.later, ctx.operands, ctx.shape = layer, given.later, len(operand), x.shape
        y_SO = layer.gemms.forward(given.rows, operand, one_group(x))
        return y_SO.view(*x.shape[:-1], y_SO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        operand, kept = saved[: ctx.operands], saved[ctx.operands :]
        layer, later, groups = ctx.layer, ctx.later, one_group(dy)
        rows, columns = layer.gemms.gradient(dy.reshape(-1, dy.shape[-1]), later.role)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = layer.gemms.input_gradient(rows, operand, groups).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            put_weight_gradient(layer, columns, lambda: later.columns(kept), groups)
        return dx, None, None, None


def one_group(x: Tensor) -> list[Group]:
    """All rows of x [..., D] as one group."""
    rows = x.shape[:-1].numel()
    return [(0, 0, rows)] if rows else []


def put_weight_gradient(layer: Weight, dy: Any, x: Callable[[], Any], groups: Sequence[Group]) -> None:
    """Hand weight.grad[e] += dy_e^T x_e to the layer's store; dy and x() are operands of the layer's `Gemms`."""

    def work() -> None:
        gradient, fresh = layer.store.gradient(layer.weight)
        gradient_EOI = stacked(gradient)
        if fresh:
            used = {group for group, _, _ in groups}
            for group in range(gradient_EOI.shape[0]):
                if group not in used:
                    gradient_EOI[group].zero_()
        layer.gemms.weight_gradient(gradient_EOI, fresh, dy, x(), groups)

    layer.store.put(work)
