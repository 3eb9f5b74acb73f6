"""Single-bit faults for tests: one bit of one element, in memory or in the middle of a training step."""

import random
from dataclasses import replace

import torch

from headrace.model.experts import MoeFeedForward
from headrace.pipeline.communication import FINAL_GRADIENTS
from headrace.pipeline.engine import Unwatched
from headrace.pipeline.schedule import Action
from headrace.training.integrity import CorruptionError, Integrity
from headrace.training.optimizer import Optimizer
from pipeline_runs import ALPHA, MTP, engine, local, numerics_of

KINDS = ["activation", "input gradient", "weight gradient"]
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flip(tensor, rng):
    """Flip one bit of one element in place; returns the change over the tensor's root mean square before."""
    flat, width = tensor.detach().view(-1), 8 * tensor.element_size()
    element, bit = rng.randrange(len(flat)), rng.randrange(width)
    scale, before = flat.double().square().mean().sqrt().item(), flat[element].item()
    flat.view(_INTEGER[tensor.element_size()])[element] ^= (1 << bit) - ((1 << width) if bit == width - 1 else 0)
    change = abs(flat[element].item() - before)
    return change / scale if scale and change == change else float("inf")


class _Flipped(torch.autograd.Function):
    """The identity, but for one bit of the value or of the gradient."""

    @staticmethod
    def forward(ctx, value, struck, backward):
        ctx.struck = struck if backward else None
        value = value.clone()
        if not backward:
            struck.strike(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if ctx.struck:
            ctx.struck.strike(gradient)
        return gradient, None, None


class Struck(Unwatched):
    """An engine on this rank, of which one value is struck by a flip once: the n-th of a kind that comes by.

    Values are the outputs of embeddings, attention, feed-forwards, experts and the final norm; their gradients; and the
    weight gradients that an action has added up.
    """

    def __init__(self, config, precision, batch, rank=0):
        self.running = engine(config, numerics_of(precision, config), rank, watch=self)
        self.batch = local(self.running, batch)
        optimizer = Optimizer(self.running.reduction.pieces, config.recipe.optimizer, config.precision)
        settings = replace(config.launch, verify_every=1, recompute_every=1)
        self.integrity = Integrity(self.running, optimizer, settings, 0)
        self._hook()
        self._action, self._kind, self._left, self._rng = "", None, 0, random.Random()
        self.where, self.size = None, None  # of the strike: the action, and the change relative to its tensor
        self._passes = dict.fromkeys(KINDS, 0)
        self.step()
        self.running.recycle()
        self.passes = self._passes | {}  # values of each kind in a step

    def doing(self, label):
        self._action = label.split(" of ")[0]

    def step(self):
        return self.running.step(self.batch, MTP, ALPHA, "step 1")

    def aim(self, kind, seed):
        """Strike a random value of this kind in the next step."""
        self._rng, self._kind = random.Random(seed), kind
        self._left, self.where, self.size = self._rng.randrange(self.passes[kind]), None, None

    def strike(self, tensor):
        self.size, self.where = flip(tensor, self._rng), self._action

    def twice(self):
        """The corruption found by computing a step twice, or None."""
        try:
            self.integrity.recompute(self.step, 0)
        except CorruptionError as error:
            return error.found
        finally:
            self.running.recycle()
        return None

    def result(self):
        """All numbers that a step gives on this rank, in memory of their own."""
        losses = self.step()
        numbers = [losses.main, losses.mtp, losses.balance, *(p.tensor.grad for p in self.running.reduction.pieces)]
        numbers = [number.clone() for number in numbers]
        self.running.recycle()
        return numbers

    def _hook(self):
        for stage in self.running.stages.values():
            layers = [*stage.layers.values(), *([stage.mtp] if stage.mtp else [])]
            modules = [stage.embed, stage.mtp_embed, stage.norm, *(layer.self_attn for layer in layers)]
            for mlp in (layer.mlp for layer in layers):
                modules += [mlp.shared_experts, mlp.experts] if isinstance(mlp, MoeFeedForward) else [mlp]
            for module in modules:
                if module is not None:
                    module.register_forward_hook(self._output)
        store = self.running.store
        self._do, store.do = store.do, self._work

    def _comes(self, *kinds):
        """The kind of those here that is to be struck now, or None."""
        for kind in kinds:
            self._passes[kind] += 1
        if self._kind not in kinds:
            return None
        self._left -= 1
        return self._kind if self._left == -1 else None

    def _output(self, _module, _inputs, value):
        kind = self._comes("activation", "input gradient")
        return _Flipped.apply(value, self, kind == "input gradient") if kind else None

    def _work(self, works):
        self._do(works)
        if self._comes("weight gradient"):
            stage = next(part.stage for part in Action.parse(self._action).computations if part.kind in FINAL_GRADIENTS)
            parameters = [parameter for _, parameter in self.running.stages[stage].named_parameters()]
            made = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.strike(self._rng.choice(made))
