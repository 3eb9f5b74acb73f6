"""The training loop: any layout, exact resume, a checkpoint before every reason to stop.

One step: read the step's rows, let the engine add up the gradient over microbatches and ranks, clip it by its global
norm, apply the optimizer to what this rank owns, move the routers' biases once from the counts of the whole batch. What
holds at a step (rates, weights, speeds) comes from the recipe's schedule; the trainer decides nothing of it.

With several ranks each runs this loop, with the same figures; the first of them writes checkpoints and results, and its
word counts where they could differ (when to stop, which checkpoint to take up).

A step whose losses or gradient norm are not finite is not applied, neither to weights nor biases, and its rows are
passed over; after `MAX_SKIPPED` in a row the run stops with an error, its last checkpoint untouched.

Exact resume: weights, biases, moments, position in the data, random state, counters and the log of metrics come from
the newest whole checkpoint, so a run that was killed any number of times ends bitwise equal to one that was not (the
same machine and number of threads given). Only measured speeds differ.

`train.from` starts a new run from another run's checkpoint: weights, biases, moments and the count of optimizer
updates are taken over, and the position in the data where both runs read the same rows, so that no row is read again
before its epoch is over. Step and tokens start at 0, since the schedule is this run's own.

On CUDA the loop itself waits for the device once a step, when the losses are read (and when metrics are due); each
layer with experts waits for its counts.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.artifacts.files import write_json
from headrace.checkpoint.retain import retain
from headrace.checkpoint.store import checkpoint_folder, load, newest_valid, save
from headrace.config.schema import Config, ModelConfig
from headrace.parallel.assembly import gather
from headrace.recipe.schedule import Schedule, Step
from headrace.training.gemm_peak import gemm_peak
from headrace.training.history import History, max_violation, wants_load
from headrace.training.learner import Learner
from headrace.training.optimizer import Optimizer
from headrace.training.progress import Progress
from headrace.training.results import Results, write_results
from headrace.training.resume import Counters, begin_from, capture, deterministic, resume
from headrace.training.rows import Rows

MAX_SKIPPED = 5
TIMELINE_STEP = 5
RECENT_ROWS = 10
"""The training loss of training.json is the mean over so many logged steps."""


class DivergenceError(RuntimeError):
    """Several steps in a row had a loss or gradient that is no finite number."""


class Tracker(Protocol):
    """Where metrics go while the run goes on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


class Deadline(Protocol):
    """Why to stop now, or None."""

    def reason(self) -> str | None: ...


@dataclass(frozen=True)
class Place:
    """Where a run stands: its folder of checkpoints, its identity, and what it starts from."""

    checkpoints: Path
    fingerprint: str  # a checkpoint of another run is refused
    flops_per_token: float  # model FLOPs of forward and backward, for MFU
    source: Path | None  # train.from: the folder of another run's checkpoint
    same_rows: bool = False  # whether that run read the same rows in the same order, so that this one goes on behind
    timeline: Path | None = None  # where the timeline of one step is written


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


def moe_layers(model: ModelConfig) -> list[str]:
    """Indices, as text, of the layers with experts in the order of `Losses.counts`; the MTP layer is the last."""
    return [
        str(i) for i in range(model.first_k_dense_replace, model.num_hidden_layers + model.num_nextn_predict_layers)
    ]


class Trainer:
    """Trains `learner`, initialised, by `config.recipe` on `rows`."""

    def __init__(self, config: Config, learner: Learner, rows: Rows, place: Place, watchers: Watchers) -> None:
        self._config, self._learner, self._rows, self._place, self._watch = config, learner, rows, place, watchers
        self._optimizer = Optimizer(learner.reduction.pieces, config.recipe.optimizer, config.precision)
        self._schedule = Schedule(config.recipe)
        self._first = learner.mesh.rank == 0
        self._taken = 0  # steps by this process
        self._counters, self._history = Counters(), History()
        self._window = (0, 0.0)  # tokens and seconds since speed was last logged
        self._peak = math.nan

    def run(self) -> Outcome:
        """Train from the newest whole checkpoint, or from the start, to the end of the plan or to the deadline.

        Raises `UserError` where a checkpoint belongs to another run or does not fit, and `DivergenceError`.
        """
        with deterministic(self._learner.device):
            with self._learner.watch.patiently("loading the checkpoint"):
                self._start()
            self._peak = gemm_peak(self._config.precision.compute, self._learner.device)
            self._watch.logger.info("GEMM peak in %s: %.4g FLOP/s", self._config.precision.compute, self._peak)
            try:
                return self._train()
            finally:
                self._watch.progress.close()

    def write_results(self, folder: Path) -> None:
        """Write the files of the pretrain artifact (see `results`) into `folder`; on all ranks, after `run`."""
        assert self._counters.step == self._schedule.steps, "the run has not finished"
        rows = self._rows.agreement
        scores = self._learner.token_log_probabilities(self._to_device(rows), "the agreement rows").cpu()
        if not self._first:
            return
        write_results(
            folder,
            Results(
                checkpoint=load(checkpoint_folder(self._place.checkpoints, self._counters.step)),
                history=self._history,
                summary=self.summary(),
                layers=moe_layers(self._config.model),
                tokens_per_step=self._schedule.tokens_after(1),
                agreement_tokens=rows,
                agreement_log_probabilities=scores,
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
            "device": self._learner.device.type,
            "ranks": self._learner.mesh.world,
            "threads": torch.get_num_threads(),
        }

    def _start(self) -> None:
        place, logger = self._place, self._watch.logger
        found = newest_valid(place.checkpoints) if self._first else None
        step = self._learner.agreed(found and found.step)
        if step is not None:
            found = found or load(checkpoint_folder(place.checkpoints, step), quick=True)
            self._counters, self._history = resume(found, self._learner, self._optimizer, place.fingerprint)
            logger.info("going on after step %d of %d", found.step, self._schedule.steps)
            return
        torch.manual_seed(self._config.seed.init)
        if place.source:
            source = load(place.source, quick=not self._first)
            self._counters = begin_from(source, self._learner, self._optimizer, place.same_rows)
            logger.info("starting from %s, at row %d of the data", place.source, self._counters.position)

    def _train(self) -> Outcome:
        counters = self._counters
        while counters.step < self._schedule.steps:
            reason, traced = self._learner.agreed([self._watch.deadline.reason(), self._wants_timeline()])
            if reason:
                self._save()
                return Outcome(False, counters.step, reason)
            plan = self._schedule.at(counters.step)
            if traced:
                self._learner.begin_timeline()
            started = time.perf_counter()
            figures = self._take_step(plan)
            self._count(plan, time.perf_counter() - started)
            if traced:
                self._write_timeline(plan)
            self._report(plan, figures)
            if counters.step % self._config.checkpoint.every_steps == 0:
                self._save()
        self._save()
        return Outcome(True, counters.step, None)

    def _take_step(self, plan: Step) -> _Figures:
        learner, mesh = self._learner, self._learner.mesh
        share = plan.sequences // mesh.data
        batch = self._to_device(self._rows.batch(self._counters.position + mesh.data_rank * share, share))
        losses = learner.step(batch, plan.mtp_weight, plan.balance_weight, f"step {plan.step + 1}")
        norm = learner.reduction.norm()
        scalars = torch.stack([losses.main.double(), losses.mtp.double(), losses.balance.double(), norm])
        loss, mtp, balance, gradient_norm = scalars.tolist()  # the step's one wait
        figures = _Figures(loss, mtp, balance, gradient_norm, losses.counts)
        if figures.finite:
            limit = self._config.recipe.optimizer.gradient_clip
            learner.reduction.clip(limit, norm)
            self._optimizer.step(plan.learning_rate, plan.muon_learning_rate)
            learner.reduction.share()
            learner.update_router_bias(losses.counts, plan.bias_update_speed)
            self._counters.skipped_in_a_row = 0
        else:
            self._skip(plan, figures)
        learner.recycle()
        return figures

    def _wants_timeline(self) -> bool:
        """Whether the next step is drawn: one of the first that this process takes, but not its first."""
        path, self._taken = self._place.timeline, self._taken + 1
        return self._taken == TIMELINE_STEP and path is not None and not path.exists()

    def _write_timeline(self, plan: Step) -> None:
        found = self._learner.timeline()
        if self._first and self._place.timeline is not None:
            write_json(self._place.timeline, {"step": plan.step + 1, **found})

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
        rows = self._to_device(self._rows.validation)
        measured = self._learner.measure(rows, f"the validation after step {self._counters.step}")
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
        counters, place, learner, settings = self._counters, self._place, self._learner, self._config.checkpoint
        if counters.step == 0:
            return
        with learner.watch.patiently(f"saving step {counters.step}"):
            model = gather(learner.owned(), learner.mesh, learner.device)
            moments = gather(self._optimizer.moments(), learner.mesh, learner.device)
            if not self._first:
                return
            tokens, plan = self._schedule.tokens_after(counters.step), self._schedule.at(counters.step - 1)
            state = capture(counters, tokens, plan, self._optimizer, self._history, place.fingerprint, learner.device)
            save(place.checkpoints, counters.step, model, moments, state)
            retain(place.checkpoints, settings.keep, settings.keep_every)

    def _to_device(self, rows: Tensor) -> Tensor:
        if self._learner.device.type == "cuda":
            return rows.pin_memory().to(self._learner.device, non_blocking=True)
        return rows
