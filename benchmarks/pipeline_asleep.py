"""A rank of `pipeline.py`'s second part: it sleeps where others compute, so many ranks fit on two cores.

Executor, stage passes, overlap, channel, weight-gradient store and gloo transfers are the real ones. A stage is real
too, with an embedding and a head of a few numbers, but its layers sleep: attention and experts each for their forward,
their input gradient and their weight gradient. Nothing is sent to experts on other ranks; where a delay is wanted,
every all-to-all of a layer sleeps in the channel's thread.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation
from headrace.fp8.gemms import PlainGemms
from headrace.fp8.linear import Linear
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.dispatch import LocalDispatcher
from headrace.model.experts import MoeFeedForward
from headrace.model.layer import Attended
from headrace.model.norm import RMSNorm
from headrace.model.router import Routing
from headrace.model.transformer import Embedding
from headrace.parallel.channel import DelayedChannel, ThreadChannel
from headrace.parallel.mesh import Groups, Mesh
from headrace.pipeline.communication import with_communication
from headrace.pipeline.engine import Unwatched
from headrace.pipeline.execute import Executor, Plan
from headrace.pipeline.generators import generate
from headrace.pipeline.overlap import Surroundings, Weights
from headrace.pipeline.simulate import Costs
from headrace.pipeline.stages import Microbatch, Stage
from headrace.pipeline.timeline import COMPUTE
from headrace.pipeline.trace import Trace
from headrace.pipeline.transfer import Transfers, open_transfers

CPU, TOKENS = torch.device("cpu"), 4
ATTENTION, EXPERTS = 0.4, 0.6  # of a layer's time


@dataclass(frozen=True)
class Sleeps:
    """Seconds of a layer (F, and as long again for I and for W), layers of a stage, and of each all-to-all."""

    layer: float
    layers: int
    delay: float

    def costs(self) -> Costs:
        """The same for the simulator."""
        one, shown = self.layer * self.layers, self.delay * self.layers
        return Costs(one, 2 * one, one, one, dispatch=shown, combine=shown, attention=ATTENTION)


class Attention(nn.Module):
    """Stands for a layer's first step, with a router that sends every token to the only expert."""

    def __init__(self, sleeps: Sleeps, config: ModelConfig, store: WeightGradientStore) -> None:
        super().__init__()
        self.seconds, self.store = ATTENTION * sleeps.layer, store
        self.mlp = Experts(sleeps, config, store)

    def attend(self, hidden_BTD: Tensor, rotation: Any) -> Attended:
        """Sleep, and pass the hidden state on."""
        residual_BTD = Sleep.apply(hidden_BTD, self.seconds, self.store)
        x_ND = residual_BTD.flatten(0, 1)
        only = torch.zeros(TOKENS, 1, dtype=torch.long)
        return Attended(
            residual_BTD, Activation(x_ND), Routing(only, x_ND[:, :1] * 0 + 1, x_ND, torch.tensor([TOKENS]))
        )


class Experts(MoeFeedForward):
    """Stands for the routed experts; the shared one is free."""

    def __init__(self, sleeps: Sleeps, config: ModelConfig, store: WeightGradientStore) -> None:
        nn.Module.__init__(self)
        self.seconds, self.store, self.dispatcher = EXPERTS * sleeps.layer, store, LocalDispatcher(PlainGemms("fp32"))

    def experts(self, rows_SD: Tensor, weights_S: Tensor, received: Any) -> Tensor:  # type: ignore[override]
        """Sleep."""
        return Sleep.apply(rows_SD * weights_S[:, None], self.seconds, self.store)

    def shared_experts(self, x: Activation) -> Tensor:  # type: ignore[override]
        """Nothing."""
        return x.value * 1


class Sleep(torch.autograd.Function):
    """Sleeps forward, as long for the gradient of the input, and as long for that of weights, which the store has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, store: WeightGradientStore) -> Tensor:
        ctx.seconds, ctx.store = seconds, store
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        ctx.store.put(lambda: time.sleep(ctx.seconds))
        return dy.clone(), None, None


def stage_of(index: int, last: int, sleeps: Sleeps, config: ModelConfig, store: WeightGradientStore) -> Stage:
    """One of a pipeline's stages 0..last."""
    vocabulary, width = config.vocab_size, config.hidden_size
    embed = Embedding(vocabulary, width, torch.float32, store) if index == 0 else None
    norm = RMSNorm(width, 1e-6) if index == last else None
    head = Linear(width, vocabulary, "fp32", store) if index == last else None
    layers: Mapping[int, Any] = {
        index * sleeps.layers + n: Attention(sleeps, config, store) for n in range(sleeps.layers)
    }
    stage = Stage(index, config, embed, dict(layers), norm, head, None, None, {})
    for module in stage.modules():
        for parameter in module.parameters():
            nn.init.ones_(parameter)
    return stage


def measure(rank: int, world: int, cases: Sequence[Mapping[str, Any]], turns: int) -> list[list[dict[str, float]]]:
    """This rank's seconds {makespan: from a barrier to its last action's end, busy: in actions} by case and turn.

    A case is {schedule, microbatches, layer, layers, delay}; see `Sleeps`.
    """
    tiny = load(["experiment=tiny"]).model
    config = replace(tiny, vocab_size=8, hidden_size=8, num_nextn_predict_layers=0)
    mesh = Mesh(world, 1, 1, 1, rank)
    groups = Groups(mesh, timedelta(seconds=60))
    schedules = [with_communication(generate(case["schedule"], world, case["microbatches"])) for case in cases]
    open_transfers(groups, mesh, schedules)
    found = []
    given = Microbatch(torch.zeros(1, TOKENS + 1, dtype=torch.long), Weights(1, 0, 0, train=True))
    for case, schedule in zip(cases, schedules, strict=True):
        wanted, seconds = Sleeps(case["layer"], case["layers"], case["delay"]), []
        for sleeps in (replace(wanted, layer=0, delay=0), *[wanted] * turns):  # the first opens gloo's connections
            store, trace = WeightGradientStore(), Trace(rank, CPU)
            stages = {s: stage_of(s, schedule.stages - 1, sleeps, config, store) for s in schedule.stages_of(rank)}
            channel = DelayedChannel(ThreadChannel(), sleeps.delay)
            transfers = Transfers(groups, mesh, given.shape(config), torch.float32, CPU)
            executor = Executor(rank, stages, Surroundings(channel, store, trace), transfers, Unwatched())
            distributed.barrier()
            trace.begin()
            with store.accumulating():
                executor.run(Plan(schedule, lambda _: given, True, lambda _: None, case["schedule"]))
            channel.close()
            spans = [span for span in trace.spans() if span.lane == COMPUTE]
            busy = sum(span.end - span.start for span in spans)
            seconds.append({"makespan": max(span.end for span in spans), "busy": busy})
        found.append(seconds[1:])
    return found
