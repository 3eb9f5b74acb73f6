"""One microbatch on its way through the parts of a stage, in steps that two microbatches can take in turns.

A pass cuts the network where it communicates: each piece between two collectives is differentiated on its own, from
detached inputs, so that its backward can be run when its output's gradient has arrived. Forward and backward are
generators: they start a collective on a channel, `yield`, and wait for it when they are resumed. Run alone, nothing
happens between start and wait. `interleave` gives turns to a backward and a forward of two microbatches, and the order
is that of DeepSeek-V3's own trace (report, arXiv 2412.19437, section 3.2.1; profile-data of DualPipe):

    backward   start combine'                     wait combine' | experts' | start dispatch' | experts W     wait ...
    forward          attention | start dispatch                                wait dispatch | experts | start combine

(' marks the backward: combine' sends gradients to experts, dispatch' brings them back.) So each collective runs under
the other microbatch's computation. Weight gradients go through the store: at once, or into `later` for a W action.

What is recomputed (norms, MLA's up projections, SwiGLU) is recomputed inside these pieces by autograd itself; routing,
counts and the balance loss are computed once, in the forward.
Shapes: B batch, T tokens, N = B * T, D model width, S rows received.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from headrace.fp8.activations import Activation
from headrace.fp8.weight_gradients import WeightGradientStore, Work
from headrace.model.dispatch import carrier
from headrace.model.experts import MoeFeedForward
from headrace.model.layer import Attended, Layer
from headrace.model.rope import Rotation
from headrace.model.router import balance_loss
from headrace.parallel.channel import Channel
from headrace.pipeline.record import Record
from headrace.pipeline.trace import Trace

T = TypeVar("T")
Steps = Generator[None, None, T]


def run(steps: Steps[T]) -> T:
    """All steps in a row; what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def interleave(backward: Steps[T], forward: Steps[T]) -> tuple[T, T]:
    """The steps of both in turns, the backward first; what they return."""
    results: dict[int, T] = {}
    turns = {0: backward, 1: forward}
    while turns:
        for index, steps in list(turns.items()):
            try:
                next(steps)
            except StopIteration as end:
                results[index] = end.value
                del turns[index]
    return results[0], results[1]


@dataclass(frozen=True)
class Surroundings:
    """What every pass on a rank shares; `trace` records what happens when, `record` what comes out, if anybody asks."""

    channel: Channel
    store: WeightGradientStore
    trace: Trace | None = None
    record: Record = field(default_factory=Record)

    def compute(self, label: str, work: Callable[[], T]) -> T:
        """Run `work`, a piece of computation."""
        return self.trace.compute(label, work) if self.trace and self.trace.on else work()


@dataclass(frozen=True)
class Weights:
    """How a microbatch's losses weigh in the step's gradient, and whether there is a gradient at all."""

    share: float  # of this microbatch in the mean over the step: 1 / (microbatches x data ranks)
    mtp: float  # lambda
    balance: float  # alpha
    train: bool  # False: no gradients, nothing is kept


Do = Callable[[list[Work]], None]
"""Takes the work of weight gradients, to do it now or later."""


class Piece:
    """Runs a piece of the network forward, and backward when the gradients of its outputs are there."""

    def __init__(self, around: Surroundings, train: bool) -> None:
        self._around, self._train = around, train

    def leaf(self, value: Tensor) -> Tensor:
        """`value` as an input whose gradient is wanted."""
        leaf, record = value.detach().requires_grad_(self._train), self._around.record
        if record.on and self._train:
            leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda made: record.note("input gradient", made.grad)
            )
        return leaf

    def forward(self, label: str, function: Callable[[], T]) -> T:
        """Compute, with autograd on where there are gradients to come."""

        def work() -> T:
            with torch.set_grad_enabled(self._train):
                return function()

        result = self._around.compute(label, work)
        self._around.record.note(label, result)
        return result

    def backward(self, label: str, outputs: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> list[Work]:
        """Gradients of all inputs into their `.grad`; those of the weights are returned as work to do."""

        def work() -> list[Work]:
            with self._around.store.deferred():
                torch.autograd.backward(outputs, gradients)
            return self._around.store.take()

        return self._around.compute(label, work)


class LayerPass:
    """One microbatch in one layer."""

    def __init__(self, layer: Layer, rotation: Rotation, around: Surroundings, weights: Weights) -> None:
        self._layer, self._rotation, self._around, self._weights = layer, rotation, around, weights
        self._piece = Piece(around, weights.train)
        self.balance: Tensor | None = None  # alpha included; of this microbatch alone
        self.counts_E: Tensor | None = None  # tokens that chose each expert

    def forward(self, hidden_BTD: Tensor) -> Steps[Tensor]:
        """[B, T, D] to [B, T, D], detached."""
        self._hidden = self._piece.leaf(hidden_BTD)
        if isinstance(self._layer.mlp, MoeFeedForward):
            return (yield from self._forward_moe(self._layer.mlp))
        out, _ = self._piece.forward("layer", lambda: self._layer(self._hidden, self._rotation))
        if self._weights.train:
            self._out = get_gradient_edge(out)
        result: Tensor = out.detach()
        return result

    def backward(self, dhidden_BTD: Tensor, do: Do) -> Steps[Tensor]:
        """The gradient of the output to that of the input, [B, T, D]."""
        if isinstance(self._layer.mlp, MoeFeedForward):
            yield from self._backward_moe(self._layer.mlp, dhidden_BTD, do)
        else:
            do(self._piece.backward("layer'", [self._out], [dhidden_BTD]))
            del self._out
        gradient = self._hidden.grad
        assert gradient is not None
        del self._hidden
        return gradient

    def _attend(self) -> Attended:
        attended = self._layer.attend(self._hidden, self._rotation)
        assert attended.routing is not None
        self.counts_E = attended.routing.counts_E
        if self._weights.balance:
            scores_BTE = attended.routing.scores_NE.view(*self._hidden.shape[:2], -1)
            chosen = attended.routing.experts_NK.shape[1]
            self.balance = self._weights.balance * balance_loss(scores_BTE, chosen)
        return attended

    def _forward_moe(self, mlp: MoeFeedForward) -> Steps[Tensor]:
        attended = self._piece.forward("attention", self._attend)
        routing, tokens = attended.routing, attended.x_ND.value.detach()
        assert routing is not None
        sending = self._around.channel.start("dispatch", lambda: mlp.dispatcher.send(tokens, routing))
        yield
        received = sending.wait()
        inputs = carrier(tokens, len(tokens)), carrier(tokens, received.rows), received.weights_S
        own, rows, weights_S = map(self._piece.leaf, inputs)

        def feed_forward() -> tuple[Tensor, Tensor]:
            x = Activation(_Values.apply(own, tokens), attended.x_ND.again)  # type: ignore[no-untyped-call]
            return mlp.experts(rows, weights_S, received), mlp.shared_experts(x)

        rows_out, shared_out = self._piece.forward("experts", feed_forward)
        results = rows_out.detach()
        collecting = self._around.channel.start("combine", lambda: mlp.dispatcher.collect(results, received))
        if self._weights.train:
            outputs = [attended.residual_BTD, attended.x_ND.value, routing.weights_NK]
            outputs += [] if self.balance is None else [self.balance]
            self._attention_out = [get_gradient_edge(output) for output in outputs]
            self._experts_in = own, rows, weights_S
            self._experts_out = [get_gradient_edge(output) for output in (rows_out, shared_out)]
            self._received = replace(received, operand=None)  # what the backward needs of it, autograd keeps
        yield
        out_ND = collecting.wait().add_(shared_out.detach())
        return out_ND.view_as(attended.residual_BTD).add_(attended.residual_BTD.detach())

    def _backward_moe(self, mlp: MoeFeedForward, dhidden_BTD: Tensor, do: Do) -> Steps[None]:
        dispatcher, received = mlp.dispatcher, self._received
        dout_ND = dhidden_BTD.reshape(-1, dhidden_BTD.shape[-1])
        sending = self._around.channel.start("combine'", lambda: dispatcher.send_gradient(dout_ND, received))
        yield
        work = self._piece.backward("experts'", self._experts_out, [sending.wait(), dout_ND])
        down, drows, dweights_S = (leaf.grad for leaf in self._experts_in)
        assert down is not None
        assert drows is not None
        assert dweights_S is not None
        collect = partial(dispatcher.collect_gradient, drows, dweights_S, received)
        collecting = self._around.channel.start("dispatch'", collect)
        del collect, drows, dweights_S, self._experts_in, self._experts_out  # attention' is to find their memory free
        do(work)
        del work
        yield
        dx_ND, dweights_NK = collecting.wait()
        gradients = [dhidden_BTD, dx_ND.add_(down), dweights_NK]
        if self.balance is not None:
            gradients.append(torch.full_like(self.balance, self._weights.share))
        do(self._piece.backward("attention'", self._attention_out, gradients))
        del self._attention_out, self._received


class _Values(torch.autograd.Function):
    """Gives a thin leaf its values without keeping them: autograd holds a leaf, and its memory, until the backward."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
