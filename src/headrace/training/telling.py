"""What is told of each step: to the history, which checkpoints keep, to the tracker, and to whoever watches.

What the artifact records does not depend on how often somebody wants to be told.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import Logger
from typing import Any, Protocol

from torch import Tensor

from headrace.config.schema import Config, ModelConfig
from headrace.pipeline.engine import Losses
from headrace.recipe.schedule import Schedule, Step
from headrace.training.history import History, max_violation, wants_load
from headrace.training.progress import Progress
from headrace.training.router_alarms import RouterAlarms

Ledger = Callable[[str, Mapping[str, Any]], None]
"""Takes an event and its facts, in JSON."""


class Tracker(Protocol):
    """Where metrics go while the run goes on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Figures:
    """One step's numbers on the host, and its expert counts still on the device."""

    loss: float
    mtp: float
    balance: float
    gradient_norm: float
    counts: Tensor  # int64 [layers, E]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.mtp, self.balance, self.gradient_norm)))


class Telling:
    """Tells of steps as they are taken; `flops_per_token` and `peak` (FLOP/s) make MFU."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        flops_per_token: float,
        tracker: Tracker,
        progress: Progress,
        log: Logger,
        ledger: Ledger,
    ) -> None:
        self._schedule, self._flops = schedule, flops_per_token
        self._log_every, self._validate_every = config.tracking.log_every, config.train.validate_every
        self._layers = moe_layers(config.model)
        self._alarms = RouterAlarms(self._layers, config.model.num_experts_per_tok)
        self._tracker, self._progress, self._log, self._ledger = tracker, progress, log, ledger
        self._window = (0, 0.0)  # tokens and seconds since speed was last told
        self.peak = math.nan

    def took(self, plan: Step, seconds: float) -> None:
        """A step was taken in so many seconds."""
        self._window = (self._window[0] + plan.sequences * plan.sequence_length, self._window[1] + seconds)

    def wants_validation(self, step: int) -> bool:
        """Whether the validation loss after `step` steps is told."""
        return step == self._schedule.steps or step % self._validate_every == 0

    def step(self, plan: Step, figures: Figures, skipped: int, validation: Losses | None, history: History) -> None:
        """Tell of the step just taken, with `validation` after it where that was measured; `skipped` so far."""
        step, steps = plan.step + 1, self._schedule.steps
        for alarm in self._alarms.after_step(figures.counts.tolist()) if figures.finite else ():
            self._log.warning("step %d: %s", step, alarm)
            self._ledger("router", {"step": step, "what": alarm})
        tokens, speed = self._schedule.tokens_after(step), self._window[0] / self._window[1]
        recorded = figures.finite and wants_load(step, steps)
        told = figures.finite and (step in (1, steps) or step % self._log_every == 0)
        metrics: dict[str, float] = {}
        if recorded or told:
            metrics |= self._of_training(plan, figures, skipped, speed)
            self._window = (0, 0.0)
        validated = self._finite(_of_validation(validation)) if validation else {}
        if recorded or validated:
            history.add(step, tokens, {**(metrics if recorded else {}), **validated})
        if told or validated:
            self._tracker.log(step, {"tokens": tokens, **metrics, **validated, **self._violations(figures)})
        if recorded:
            history.add_load(step, figures.counts.tolist())
        self._progress.update(step, steps, tokens, {"loss": figures.loss, "tokens_per_second": speed})

    def _of_training(self, plan: Step, figures: Figures, skipped: int, speed: float) -> dict[str, float]:
        violations = max_violation(figures.counts.tolist())
        return {
            "loss": figures.loss,
            "mtp_loss": figures.mtp,
            "balance_loss": figures.balance,
            "gradient_norm": figures.gradient_norm,
            "learning_rate": plan.learning_rate,
            "muon_learning_rate": plan.muon_learning_rate,
            "sequences": plan.sequences,
            "skipped_steps": skipped,
            "tokens_per_second": speed,
            "mfu": speed * self._flops / self.peak,
            **({"maxvio": sum(violations) / len(violations)} if violations else {}),
        }

    def _violations(self, figures: Figures) -> dict[str, float]:
        """MaxVio by layer, for the tracker; the history keeps the loads themselves, at fewer steps."""
        values = max_violation(figures.counts.tolist())
        return {f"maxvio_layer_{name}": value for name, value in zip(self._layers, values, strict=True)}

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        """Without values that no JSON can hold; the log names what is left out."""
        kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if len(kept) < len(metrics):
            self._log.warning("not finite, left out: %s", sorted(metrics.keys() - kept.keys()))
        return kept


def _of_validation(measured: Losses) -> dict[str, float]:
    violations = max_violation(measured.counts.tolist())
    return {
        "validation_loss": measured.main.item(),
        "validation_mtp_loss": measured.mtp.item(),
        **({"validation_maxvio": sum(violations) / len(violations)} if violations else {}),
    }


def moe_layers(model: ModelConfig) -> list[str]:
    """Indices, as text, of the layers with experts in the order of `Losses.counts`; the MTP layer is the last."""
    return [
        str(i) for i in range(model.first_k_dense_replace, model.num_hidden_layers + model.num_nextn_predict_layers)
    ]
