"""What the trainer asks of a model that learns, whatever the layout: `headrace.pipeline.engine.Engine` is one.

All ranks of a layout make the same calls in the same order, and get the same losses, norms and counts. What each holds
and owns of the state differs. `build_engine` makes the engine of a configuration.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.config.phases import MAIN, layout_of
from headrace.config.schema import Config
from headrace.fp8.numerics import Numerics
from headrace.parallel.mesh import Mesh
from headrace.parallel.reduction import GradientReduction
from headrace.parallel.shards import Piece
from headrace.pipeline.engine import Engine, Losses
from headrace.pipeline.execute import Watch
from headrace.pipeline.record import Record
from headrace.training.optimizer import stays_whole


class Learner(Protocol):
    """A model with its gradients. Rows are int64 [R, L]."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dispatch(self) -> str: ...
    @property
    def reduction(self) -> GradientReduction: ...
    @property
    def watch(self) -> Watch: ...
    @property
    def record(self) -> Record: ...
    def step(self, rows_RL: Tensor, mtp_weight: float, balance_weight: float, label: str, /) -> Losses: ...
    def measure(self, rows_RL: Tensor, label: str, /) -> Losses: ...
    def token_log_probabilities(self, rows_RL: Tensor, label: str, /) -> Tensor: ...
    def update_router_bias(self, counts_ME: Tensor, speed: float, /) -> None: ...
    def owned(self) -> list[Piece]: ...
    def everything(self) -> list[Piece]: ...
    def replicas(self) -> list[list[Piece]]: ...
    def recycle(self) -> None: ...
    def agreed_all(self, value: Any, /) -> list[Any]: ...
    def roles(self) -> list[tuple[int, ...]]: ...
    def initialise(self) -> None: ...
    def begin_timeline(self) -> None: ...
    def timeline(self) -> dict[str, Any]: ...


def build_engine(
    config: Config,
    device: torch.device,
    rank: int = 0,
    watch: Watch | None = None,
    phase: str = MAIN,
    eos: int | None = None,
) -> Engine:
    """The engine of `config` on this rank for a phase of the recipe, its weights drawn from `seed.init`.

    `eos` is `rows.Rows.eos`: it ends documents that do not see each other.
    """
    numerics = Numerics.resolve(config.precision, device)
    mesh = Mesh.of(layout_of(config.parallel, phase), rank)
    return Engine(config, numerics, mesh, device, partial(stays_whole, config.recipe.optimizer), watch, phase, eos)
