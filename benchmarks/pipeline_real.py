"""One of two ranks of `pipeline.py`'s first part: real stages, our schedules and torch's, step by step in turn.

Both run the modules that our engine built, on the same rows, with the same loss. Ours is a whole `Engine.step`: the sum
of DualPipe's two copies, and of the losses over all ranks, is in it. torch gets its documented hook for deferred weight
gradients (`dw_builder`), filled by our store, so that each GEMM runs once: without it, torch's split of a backward runs
the GEMMs of a custom autograd function in both halves.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from headrace.config.compose import load
from headrace.config.schema import Config, ModelConfig
from headrace.fp8.numerics import Numerics
from headrace.model import rope
from headrace.model.loss import cross_entropy
from headrace.parallel.mesh import Mesh
from headrace.pipeline.engine import Engine
from headrace.pipeline.stages import Stage
from headrace.pipeline.timeline import COMPUTE

OURS = ("1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v")
TORCH = {"1f1b": pipelining.Schedule1F1B, "zb_v": ScheduleZBVZeroBubble, "dualpipe_v": ScheduleDualPipeV}
CPU = torch.device("cpu")
WARM_UP = 2


@dataclass
class Measured:
    """One step on one rank; moments are `time.perf_counter`, which all processes of a machine share."""

    begun: float
    computed: float  # the end of the last F, B, I or W
    ended: float
    busy: float  # seconds in F, B, I and W
    spans: list[dict[str, Any]]  # of ours, from `begun`
    loss: float | None  # where it is known


class Contestant(ABC):
    """Takes a step when told."""

    name: str
    engine: Engine

    @abstractmethod
    def step(self, rows_RL: Tensor) -> Measured:
        """Forward and backward of a batch, from a barrier on."""

    def norm(self) -> float:
        """Of the whole gradient, on all ranks; forgets it."""
        norm = float(self.engine.reduction.norm())
        self.engine.recycle()
        return norm


class Ours(Contestant):
    """`Engine.step`."""

    def __init__(self, schedule: str, config: Config, rank: int) -> None:
        self.name, self.engine = f"ours {schedule}", engine_of(schedule, config, rank)

    def step(self, rows_RL: Tensor) -> Measured:
        """One step with a trace."""
        trace = self.engine.trace
        distributed.barrier()
        begun = time.perf_counter()
        trace.begin()
        losses = self.engine.step(rows_RL, 0.0, 0.0, "the benchmark")
        ended = time.perf_counter()
        spans = [span for span in trace.spans() if span.lane == COMPUTE]
        busy, last = sum(span.end - span.start for span in spans), max(span.end for span in spans)
        return Measured(begun, begun + last, ended, busy, [asdict(span) for span in spans], losses.main.item())


class Torchs(Contestant):
    """The same stages under torch's runtime."""

    def __init__(self, schedule: str, config: Config, rank: int, microbatches: int) -> None:
        self.name, self.engine = f"torch {schedule}", engine_of(schedule, config, rank)
        self._store, self._share = self.engine.store, 1 / microbatches
        self._busy = self._computed = 0.0
        number = self.engine.schedule(microbatches).stages
        self._first, self._last = 0 in self.engine.stages, number - 1 in self.engine.stages
        stages = [self._stage(stage, number) for stage in self.engine.stages.values()]
        arguments = {"loss_fn": self._timed(partial(self._loss, number - 1)), "scale_grads": False}
        given = stages[0] if schedule == "1f1b" else stages
        self._schedule = TORCH[schedule](given, microbatches, **arguments)

    def step(self, rows_RL: Tensor) -> Measured:
        """One step; each `*_one_chunk` is timed."""
        losses: list[Tensor] = []
        given = (rows_RL[:, :-1],) if self._first else ()
        target = {"target": rows_RL[:, 1:], "losses": losses} if self._last else {}
        distributed.barrier()
        self._busy, begun = 0.0, time.perf_counter()
        with self._store.accumulating(), self._store.deferred():
            self._schedule.step(*given, **target, return_outputs=False)
        ended = time.perf_counter()
        loss = float(torch.stack(losses).sum()) if losses else None
        return Measured(begun, self._computed, ended, self._busy, [], loss)

    def _stage(self, stage: Stage, number: int) -> pipelining.PipelineStage:
        made = pipelining.PipelineStage(StageModule(stage), stage.index, number, CPU, dw_builder=self._weights)
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            setattr(made, name, self._timed(getattr(made, name)))
        return made

    def _weights(self) -> Callable[[], None]:
        return partial(self._store.do, self._store.take())

    def _loss(self, last: int, normed_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        head = self.engine.stages[last].head
        assert head is not None
        return cross_entropy(normed_BTD.flatten(0, 1), head, targets_BT.flatten()) * self._share

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments, **named)
            self._computed = time.perf_counter()
            self._busy += self._computed - begun
            return result

        return timed


class StageModule(nn.Module):
    """A stage as one module: tokens or hidden states to hidden states, the last normalised; the loss has the head."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.embed, self.norm, self.config = stage.embed, stage.norm, stage.config
        self.layers = nn.ModuleList(stage.layers.values())

    def forward(self, given: Tensor) -> Tensor:
        """[B, T] or [B, T, D] to [B, T, D]."""
        hidden_BTD = given if self.embed is None else self.embed(given)
        rotation = rope.rotation(self.config, hidden_BTD.shape[1], CPU)
        for layer in self.layers:
            hidden_BTD, _ = layer(hidden_BTD, rotation)
        return hidden_BTD if self.norm is None else self.norm(hidden_BTD)


def model_of(quick: bool) -> ModelConfig:
    """V3's shape: a dense layer and seven with experts, about equally expensive; MTP off."""
    small = load(["model=small_100m"]).model
    sizes = {
        "vocab_size": 1024, "intermediate_size": 1280, "n_routed_experts": 8, "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
    }  # fmt: skip
    if quick:
        sizes |= {"hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 32}
    return replace(small, **sizes)


def configuration(tokens: int, microbatches: int, quick: bool) -> Config:
    """One row of `tokens` per microbatch, two ranks, FP32."""
    config = load(["experiment=tiny"])
    recipe = replace(config.recipe, batch_sequences=microbatches, sequence_length=tokens)
    parallel = replace(config.parallel, pipeline=2, microbatch=1)
    return replace(config, model=model_of(quick), recipe=recipe, parallel=parallel)


def engine_of(schedule: str, config: Config, rank: int) -> Engine:
    """Its stages have the same weights whatever the schedule."""
    config = replace(config, parallel=replace(config.parallel, schedule=schedule))
    return Engine(config, Numerics("fp32"), Mesh.of(config.parallel, rank), CPU, lambda *_: False)


def measure(rank: int, world: int, tokens: int, microbatches: int, rounds: int, quick: bool) -> dict[str, Any]:
    """By contestant, its measured steps and the gradient's norm; and seconds that a hidden state takes to the other."""
    pin(rank)
    config = configuration(tokens, microbatches, quick)
    contestants: list[Contestant] = [Ours(name, config, rank) for name in OURS]
    contestants += [Torchs(name, config, rank, microbatches) for name in TORCH]
    generator = torch.Generator().manual_seed(1)
    rows_RL = torch.randint(config.model.vocab_size, (microbatches, tokens + 1), generator=generator)
    found: dict[str, Any] = {one.name: {"steps": []} for one in contestants}
    for turn in range(WARM_UP + rounds):
        for one in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
            measured = one.step(rows_RL)
            found[one.name]["norm"] = one.norm()
            if turn >= WARM_UP:
                found[one.name]["steps"].append(asdict(measured))
    return {"contestants": found, "transfer": transfer_time(rank, (1, tokens, config.model.hidden_size))}


def pin(rank: int) -> None:
    """This process, with the threads that it has already, to a core of its own."""
    core = sorted(os.sched_getaffinity(0))[rank]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def transfer_time(rank: int, shape: tuple[int, ...]) -> float:
    """Seconds from one rank to the other, of a tensor that goes back and forth; the median of 20."""
    tensor, seconds = torch.zeros(shape), []
    for _ in range(20):
        begun = time.perf_counter()
        for sender in (0, 1):
            distributed.send(tensor, 1 - rank) if sender == rank else distributed.recv(tensor, 1 - rank)
        seconds.append((time.perf_counter() - begun) / 2)
    return sorted(seconds)[10]
