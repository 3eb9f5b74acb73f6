"""The one linear layer: FP32 master weight, compute in FP32 or BF16, three GEMMs that can be told apart.

    forward          y  = x W^T
    input gradient   dx = dy W
    weight gradient  dW = dy^T x     through a `WeightGradientStore`, accumulated in FP32

The master weight is cast to the compute dtype once per optimizer step, not once per use. In FP32 there is no copy.
Shapes: S rows (tokens), I inputs, O outputs, E experts.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.fp8.weight_gradients import WeightGradientStore, add_product

Compute = Literal["fp32", "bf16"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(compute: Compute) -> torch.dtype:
    """The torch dtype of activations and GEMM operands under `compute`."""
    return _DTYPES[compute]


class Weight(nn.Module):
    """An FP32 parameter named `weight` with its copy in the compute dtype, and the store for its gradient.

    The copy is made again after a change through the parameter itself (its version counter: `load_state_dict`, `copy_`
    under `no_grad`), and for the first forward pass after gradients were written, since an optimizer may have followed;
    `store.accumulating()` keeps it over the microbatches of a step. A change through `.data` is not seen: do not make
    any.
    """

    def __init__(self, *shape: int, compute: Compute, store: WeightGradientStore) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        self.dtype = dtype_of(compute)
        self.store = store
        self._copy: Tensor | None = None
        self._copied: tuple[nn.Parameter, int, int] | None = None

    def computed(self) -> Tensor:
        """The weight in the compute dtype, detached, in the weight's shape."""
        if self.dtype == torch.float32:
            return self.weight.detach()
        of, version, generation = self._copied or (None, 0, 0)
        if self._copy is None or of is not self.weight or self._copy.device != self.weight.device:
            self._copy = self.weight.detach().to(self.dtype)
        elif (version, generation) != (self.weight._version, self.store.generation):
            self._copy.copy_(self.weight.detach())
        self._copied = (self.weight, self.weight._version, self.store.generation)
        return self._copy


class Linear(Weight):
    """y = x W^T without bias; weight [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, compute: Compute, store: WeightGradientStore) -> None:
        super().__init__(out_features, in_features, compute=compute, store=store)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], both in the compute dtype."""
        computed = self.computed()
        result: Tensor = _LinearFunction.apply(x, self.weight, computed, self.store)  # type: ignore[no-untyped-call]
        return result


class StackedLinear(Weight):
    """The same layer for every expert: weight [experts, out_features, in_features], used by grouped GEMMs."""

    def __init__(
        self, experts: int, in_features: int, out_features: int, compute: Compute, store: WeightGradientStore
    ) -> None:
        super().__init__(experts, out_features, in_features, compute=compute, store=store)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, computed: Tensor, store: WeightGradientStore) -> Tensor:
        ctx.save_for_backward(x, computed)
        ctx.weight, ctx.store = weight, store
        return nn.functional.linear(x, computed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, computed = ctx.saved_tensors
        dy_SO, x_SI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = torch.mm(dy_SO, computed).view_as(x) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            put_weight_gradient(ctx.store, ctx.weight, dy_SO, x_SI)
        return dx, None, None, None


def put_weight_gradient(store: WeightGradientStore, weight: nn.Parameter, dy_SO: Tensor, x_SI: Tensor) -> None:
    """Hand weight.grad += dy^T x to the store; weight [O, I]."""

    def work() -> None:
        add_product(*store.gradient(weight), dy_SO, x_SI)

    store.put(work)
