"""The training loop: one process, exact resume, a checkpoint before every reason to stop.

One step: read the step's rows, add up the gradient over microbatches, clip it by its global norm, apply the
optimizer, move the routers' biases once from the counts of the whole batch. What holds at a step (rates, weights,
speeds) comes from the recipe's schedule; the trainer decides nothing of it.

A step whose losses or gradient norm are not finite is not applied, neither to weights nor biases, and its rows are
passed over; after `MAX_SKIPPED` in a row the run stops with an error, its last checkpoint untouched.

Exact resume: weights, biases, moments, position in the data, random state, counters and the log of metrics come from
the newest whole checkpoint, so a run that was killed any number of times ends bitwise equal to one that was not (the
same machine and number of threads given). Only measured speeds differ.

`train.from` starts a new run from another run's checkpoint: weights, biases, moments and the count of optimizer
updates are taken over, and the position in the data where both runs read the same rows, so that no row is read again
before its epoch is over. Step and tokens start at 0, since the schedule is this run's own.

On CUDA the loop itself waits for the device once a step, when the losses are read (and when metrics are due); each
layer with experts waits once more, for its counts.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.checkpoint.retain import retain
from headrace.checkpoint.store import load, newest_valid, save
from headrace.config.schema import Config, ModelConfig
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer
from headrace.parallel.shards import pieces_of
from headrace.recipe.schedule import Schedule, Step
from headrace.training.accumulate import Losses, accumulate, measure
from headrace.training.gemm_peak import gemm_peak
from headrace.training.history import History, max_violation, wants_load
from headrace.training.optimizer import Optimizer
from headrace.training.progress import Progress
from headrace.training.results import Results, write_results
from headrace.training.resume import Counters, begin_from, capture, deterministic, resume
from headrace.training.rows import Rows

MAX_SKIPPED = 5
RECENT_ROWS = 10
"""The training loss of training.json is the mean over so many logged steps."""


class DivergenceError(RuntimeError):
    """Several steps in a row had a loss or gradient that is no finite number."""


class Model(Protocol):
    """What the trainer asks of a model; `headrace.model.transformer.Transformer` is one."""

    @property
    def store(self) -> WeightGradientStore: ...
    def losses(self, tokens_BL: Tensor, mtp_weight: float, balance_weight: float, /) -> Losses: ...
    def token_log_probabilities(self, tokens_BL: Tensor, /) -> Tensor: ...
    def update_router_bias(self, counts_LE: Tensor, speed: float, /) -> None: ...
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...


class Tracker(Protocol):
    """Where metrics go while the run goes on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


class Deadline(Protocol):
    """Why to stop now, or None."""

    def reason(self) -> str | None: ...


@dataclass(frozen=True)
class Place:
    """Where a run stands: its folder of checkpoints, its identity, its device, and what it starts from."""

    checkpoints: Path
    fingerprint: str  # a checkpoint of another run is refused
    device: torch.device
    flops_per_token: float  # model FLOPs of forward and backward, for MFU
    source: Path | None  # train.from: the folder of another run's checkpoint
    same_rows: bool = False  # whether that run read the same rows in the same order, so that this one goes on behind


@dataclass(frozen=True)
class Watchers:
    """Who is told what happens, and who may ask the run to stop."""

    tracker: Tracker
    logger: Logger
    deadline: Deadline
    progress: Progress


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.run` ended: all steps done, or saved after `step` of them because of `reason`."""

    finished: bool
    step: int
    reason: str | None


@dataclass(frozen=True)
class _Figures:
    """One step's numbers on the host, and its expert counts still on the device."""

    loss: float
    mtp: float
    balance: float
    gradient_norm: float
    counts: Tensor  # int64 [layers, E]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.mtp, self.balance, self.gradient_norm)))


def build_model(config: Config, device: torch.device) -> Transformer:
    """The model of `config` on `device`, its weights drawn from `seed.init`."""
    numerics = Numerics.resolve(config.precision, device)
    with device:
        model = Transformer(config.model, numerics)
    initialise(model, config.model, config.seed.init)
    return model


def moe_layers(model: ModelConfig) -> list[str]:
    """Indices, as text, of the layers with experts in the order of `Losses.counts`; the MTP layer is the last."""
    return [
        str(i) for i in range(model.first_k_dense_replace, model.num_hidden_layers + model.num_nextn_predict_layers)
    ]


class Trainer:
    """Trains `model` (on `place.device`, initialised) by `config.recipe` on `rows`."""

    def __init__(self, config: Config, model: Model, rows: Rows, place: Place, watchers: Watchers) -> None:
        self._config, self._model, self._rows, self._place, self._watch = config, model, rows, place, watchers
        self._parameters = dict(model.named_parameters())
        self._optimizer = Optimizer(pieces_of(self._parameters.items()), config.recipe.optimizer, config.precision)
        self._schedule = Schedule(config.recipe)
        self._microbatch = config.parallel.microbatch or config.recipe.batch_sequences
        self._counters, self._history = Counters(), History()
        self._window = (0, 0.0)  # tokens and seconds since speed was last logged
        self._peak = math.nan

    def run(self) -> Outcome:
        """Train from the newest whole checkpoint, or from the start, to the end of the plan or to the deadline.

        Raises `UserError` where a checkpoint belongs to another run or does not fit, and `DivergenceError`.
        """
        with deterministic(self._place.device):
            self._start()
            self._peak = gemm_peak(self._config.precision.compute, self._place.device)
            self._watch.logger.info("GEMM peak in %s: %.4g FLOP/s", self._config.precision.compute, self._peak)
            try:
                return self._train()
            finally:
                self._watch.progress.close()

    def write_results(self, folder: Path) -> None:
        """Write the files of the pretrain artifact (see `results`) into `folder`, after `run` finished."""
        assert self._counters.step == self._schedule.steps, "the run has not finished"
        rows = self._rows.agreement
        parts = [self._model.token_log_probabilities(self._to_device(row[None])).cpu() for row in rows]
        write_results(
            folder,
            Results(
                checkpoint=load(self._place.checkpoints / f"step-{self._counters.step:08d}"),
                history=self._history,
                summary=self.summary(),
                layers=moe_layers(self._config.model),
                tokens_per_step=self._schedule.tokens_after(1),
                agreement_tokens=rows,
                agreement_log_probabilities=torch.cat(parts),
            ),
        )

    def summary(self) -> dict[str, Any]:
        """What was trained and how fast, in JSON. Losses in nats per token; `position` counts rows of training data."""
        counters, history = self._counters, self._history
        tokens = self._schedule.tokens_after(counters.step)
        speed = tokens / counters.seconds
        return {
            "steps": counters.step,
            "tokens": tokens,
            "loss": history.recent_mean("loss", RECENT_ROWS),
            "mtp_loss": history.recent_mean("mtp_loss", RECENT_ROWS),
            "validation_loss": history.last("validation_loss"),
            "maxvio": history.recent_mean("maxvio", RECENT_ROWS),
            "skipped_steps": counters.skipped,
            "first_position": counters.first_position,
            "position": counters.position,
            "training_rows": self._rows.training_rows,
            "validation_rows": len(self._rows.validation),
            "seconds": counters.seconds,
            "tokens_per_second": speed,
            "mfu": speed * self._place.flops_per_token / self._peak,
            "gemm_peak_flops": self._peak,
            "flops_per_token": self._place.flops_per_token,
            "compute": self._config.precision.compute,
            "precision": "fp8" if self._config.precision.fp8 else self._config.precision.compute,
            "device": self._place.device.type,
            "threads": torch.get_num_threads(),
        }

    def _start(self) -> None:
        place, logger = self._place, self._watch.logger
        found = newest_valid(place.checkpoints)
        if found:
            restored = resume(found, self._model, self._optimizer, place.fingerprint, place.device)
            self._counters, self._history = restored
            logger.info("going on after step %d of %d", found.step, self._schedule.steps)
            return
        torch.manual_seed(self._config.seed.init)
        if place.source:
            self._counters = begin_from(load(place.source), self._model, self._optimizer, place.same_rows)
            logger.info("starting from %s, at row %d of the data", place.source, self._counters.position)

    def _train(self) -> Outcome:
        counters = self._counters
        while counters.step < self._schedule.steps:
            if reason := self._watch.deadline.reason():
                self._save()
                return Outcome(False, counters.step, reason)
            plan = self._schedule.at(counters.step)
            started = time.perf_counter()
            figures = self._take_step(plan)
            self._count(plan, time.perf_counter() - started)
            self._report(plan, figures)
            if counters.step % self._config.checkpoint.every_steps == 0:
                self._save()
        self._save()
        return Outcome(True, counters.step, None)

    def _take_step(self, plan: Step) -> _Figures:
        batch = self._to_device(self._rows.batch(self._counters.position, plan.sequences))
        with self._model.store.accumulating():
            losses = accumulate(self._model, batch, plan, self._microbatch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        scalars = torch.stack([losses.main, losses.mtp, losses.balance, norm])
        loss, mtp, balance, gradient_norm = scalars.tolist()  # the step's one wait
        figures = _Figures(loss, mtp, balance, gradient_norm, losses.counts)
        if figures.finite:
            limit = self._config.recipe.optimizer.gradient_clip
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), limit, norm)
            self._optimizer.step(plan.learning_rate, plan.muon_learning_rate)
            self._model.update_router_bias(losses.counts, plan.bias_update_speed)
            self._counters.skipped_in_a_row = 0
        else:
            self._skip(plan, figures)
        self._model.store.recycle(self._parameters.values())
        return figures

    def _skip(self, plan: Step, figures: _Figures) -> None:
        counters = self._counters
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        self._watch.logger.warning(
            "step %d not applied: loss %g, gradient norm %g", plan.step + 1, figures.loss, figures.gradient_norm
        )
        if counters.skipped_in_a_row == MAX_SKIPPED:
            raise DivergenceError(
                f"{MAX_SKIPPED} steps in a row, up to step {plan.step + 1}, had no finite loss or gradient; lower "
                "recipe.learning_rate.peak or recipe.optimizer.muon_learning_rate, or use precision=fp32"
            )

    def _count(self, plan: Step, seconds: float) -> None:
        self._counters.step += 1
        self._counters.position += plan.sequences
        self._counters.seconds += seconds
        self._window = (self._window[0] + self._schedule.tokens_after(1), self._window[1] + seconds)

    def _report(self, plan: Step, figures: _Figures) -> None:
        step, steps = self._counters.step, self._schedule.steps
        tokens, speed = self._schedule.tokens_after(step), self._window[0] / self._window[1]
        # What the artifact records must not depend on how often somebody wants to be told.
        recorded = figures.finite and wants_load(step, steps)
        told = figures.finite and (step in (1, steps) or step % self._config.tracking.log_every == 0)
        metrics: dict[str, float] = {}
        if recorded or told:
            metrics |= self._training_metrics(plan, figures, speed)
            self._window = (0, 0.0)
        validated: dict[str, float] = {}
        if step == steps or step % self._config.train.validate_every == 0:
            validated = self._finite(self._validation_metrics())
        if recorded or validated:
            self._history.add(step, tokens, {**(metrics if recorded else {}), **validated})
        if told or validated:
            self._watch.tracker.log(step, {"tokens": tokens, **metrics, **validated, **self._violations(figures)})
        if recorded:
            self._history.add_load(step, figures.counts.tolist())
        self._watch.progress.update(step, steps, tokens, {"loss": figures.loss, "tokens_per_second": speed})

    def _training_metrics(self, plan: Step, figures: _Figures, speed: float) -> dict[str, float]:
        violations = max_violation(figures.counts.tolist())
        return {
            "loss": figures.loss,
            "mtp_loss": figures.mtp,
            "balance_loss": figures.balance,
            "gradient_norm": figures.gradient_norm,
            "learning_rate": plan.learning_rate,
            "muon_learning_rate": plan.muon_learning_rate,
            "skipped_steps": self._counters.skipped,
            "tokens_per_second": speed,
            "mfu": speed * self._place.flops_per_token / self._peak,
            **({"maxvio": sum(violations) / len(violations)} if violations else {}),
        }

    def _violations(self, figures: _Figures) -> dict[str, float]:
        """MaxVio by layer, for the tracker; the history keeps the loads themselves, at fewer steps."""
        values = max_violation(figures.counts.tolist())
        return {f"maxvio_layer_{name}": v for name, v in zip(moe_layers(self._config.model), values, strict=True)}

    def _validation_metrics(self) -> dict[str, float]:
        measured = measure(self._model, self._to_device(self._rows.validation), self._microbatch)
        violations = max_violation(measured.counts.tolist())
        return {
            "validation_loss": measured.main.item(),
            "validation_mtp_loss": measured.mtp.item(),
            **({"validation_maxvio": sum(violations) / len(violations)} if violations else {}),
        }

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        """Without values that no JSON can hold; the log names what is left out."""
        kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if len(kept) < len(metrics):
            self._watch.logger.warning("not finite, left out: %s", sorted(metrics.keys() - kept.keys()))
        return kept

    def _save(self) -> None:
        counters, place, settings = self._counters, self._place, self._config.checkpoint
        if counters.step == 0:
            return
        tokens, plan = self._schedule.tokens_after(counters.step), self._schedule.at(counters.step - 1)
        state = capture(counters, tokens, plan, self._optimizer, self._history, place.fingerprint, place.device)
        save(place.checkpoints, counters.step, self._model.state_dict(), self._optimizer.state_tensors(), state)
        retain(place.checkpoints, settings.keep, settings.keep_every)

    def _to_device(self, rows: Tensor) -> Tensor:
        if self._place.device.type == "cuda":
            return rows.pin_memory().to(self._place.device, non_blocking=True)
        return rows
