"""The training loop: any layout, exact resume, checkpoints written beside it.

One step: read the step's rows, let the engine add up the gradient over microbatches and ranks, clip it by its global
norm, apply the optimizer to what this rank owns, move the routers' biases once from the counts of the whole batch. What
holds at a step (batch, rates, weights, speeds) comes from the recipe's schedule, what is done about a step that is not
as it should be from `policies`; the trainer decides nothing of it.

With several ranks each runs this loop, with the same figures. At the top of it they exchange a few words: what the
first rank wants (stop, save, draw a timeline), how each one's part of a save has got on, how long each was at work.

A trainer takes the steps of one phase of the recipe, whose model, layout and sequence length its learner and rows have,
and of those behind it that have the same.
It begins and ends with a checkpoint, from which the next phase, or another trainer of the same, goes on.

Exact resume: weights, biases, moments, the average of the weights, position in the data, random state, counters and the
log of metrics come from the newest checkpoint that is whole, so a run that was killed any number of times ends bitwise
equal to one that was not (the same machine, layout and number of threads given). Only measured speeds differ.

`train.from` starts a new run from another run's checkpoint: weights, biases, moments and the count of optimizer
updates are taken over, and the position in the data where both runs read the same rows, so that no row is read again
before its epoch is over. Step and tokens start at 0, since the schedule is this run's own.

On CUDA the loop itself waits for the device once a step, when the losses are read (and when metrics are due); each
layer with experts waits for its counts.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.files import write_json
from headrace.checkpoint.reader import Checkpoint, checkpoint_folder, open_checkpoint
from headrace.config.schema import Config
from headrace.recipe.schedule import Schedule, Step
from headrace.training.ema import Ema
from headrace.training.gemm_peak import gemm_peak
from headrace.training.history import History
from headrace.training.integrity import CorruptionError, Integrity
from headrace.training.learner import Learner
from headrace.training.optimizer import Optimizer
from headrace.training.place import Outcome as Outcome
from headrace.training.place import Place as Place
from headrace.training.place import Watchers as Watchers
from headrace.training.policies import DivergenceError as DivergenceError
from headrace.training.policies import Policies, Verdict, diagnosis, passing_over, regular
from headrace.training.results import Results, write_results
from headrace.training.resume import (
    EMA,
    MODEL,
    Counters,
    Identity,
    Parts,
    begin_from,
    capture,
    deterministic,
    load_weights,
    take_up,
)
from headrace.training.rows import Rows
from headrace.training.saving import Rhythm, Saver
from headrace.training.slow import SlowRanks
from headrace.training.telling import Figures, Telling
from headrace.training.telling import moe_layers as moe_layers

TIMELINE_STEP = 5
RECENT_ROWS = 10
"""The training loss of training.json is the mean over so many logged steps."""


class Trainer:
    """Trains `learner`, initialised, by a phase of `config.recipe` on `rows`."""

    def __init__(self, config: Config, learner: Learner, rows: Rows, place: Place, watchers: Watchers) -> None:
        self._config, self._learner, self._rows, self._place, self._watch = config, learner, rows, place, watchers
        self._schedule = Schedule(config.recipe)
        phases = {phase.name: phase for phase in self._schedule.phases}
        self._first_step, self._end = phases[place.phase].first, phases[place.until or place.phase].end
        self._optimizer = Optimizer(learner.reduction.pieces, config.recipe.optimizer, config.precision)
        decay = config.recipe.ema_decay
        self._ema = Ema(learner.owned(), decay) if decay is not None else None
        self._parts = Parts(learner, self._optimizer, self._ema)
        self._identity = Identity(place.fingerprint, place.slice, place.data, place.code)
        self._integrity = Integrity(learner, self._optimizer, config.launch, config.seed.data)
        self._policies = Policies(config.train)
        self._saver = Saver(place.checkpoints, config.checkpoint, learner, watchers.logger, watchers.ledger)
        self._rhythm = Rhythm(config.checkpoint, config.parallel)
        self._slow = SlowRanks(learner.roles())
        tell = watchers.tracker, watchers.progress, watchers.logger
        self._telling = Telling(config, self._schedule, place.flops_per_token, *tell, watchers.ledger)
        self._first = learner.mesh.rank == 0
        self._taken, self._busy = 0, 0.0  # steps by this process; seconds at work in the last of them
        self._draw_after = TIMELINE_STEP - 1  # steps by this process
        self._counters, self._history = Counters(), History()
        self._ema_loss: float | None = None

    def run(self) -> Outcome:
        """Train from the newest whole checkpoint, or from the start, to the end of the phase or to the deadline.

        Raises `UserError` where a checkpoint belongs to another run or does not fit, `DivergenceError`,
        `CorruptionError`, and `SaveFailed` where the state at the end could not be saved.
        """
        with deterministic(self._learner.device):
            began = time.perf_counter()
            with self._learner.watch.patiently("loading the checkpoint"):
                self._start()
            loaded = time.perf_counter() - began
            if self._elsewhere():
                return self._outcome(None)
            self._telling.peak = gemm_peak(self._config.precision.compute, self._learner.device)
            self._watch.logger.info("GEMM peak in %s: %.4g FLOP/s", self._config.precision.compute, self._telling.peak)
            self._watch.ledger("resumed", {"step": self._counters.step, "load": round(loaded, 6)})
            try:
                return self._train()
            except CorruptionError as error:
                self._doubt(error)
                raise
            except DivergenceError:
                self._saver.settle()
                raise
            finally:
                self._saver.leave()
                self._watch.progress.close()

    def write_results(self, folder: Path) -> None:
        """Write the files of the pretrain artifact (see `results`) into `folder`; on all ranks, after `run`."""
        assert self._counters.step == self._schedule.steps, "the run has not finished"
        rows = self._rows.agreement
        scores = self._learner.token_log_probabilities(self._to_device(rows), "the agreement rows").cpu()
        found = open_checkpoint(checkpoint_folder(self._place.checkpoints, self._counters.step))
        if self._ema:
            self._ema_loss = self._measure_average(found)
        if not self._first:
            return
        write_results(
            folder,
            Results(
                checkpoint=found,
                history=self._history,
                summary=self.summary(),
                layers=moe_layers(self._config.model),
                tokens_after=self._schedule.tokens_after,
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
            "phases": [[phase.name, phase.first, phase.end] for phase in self._schedule.phases],
            "loss": history.recent_mean("loss", RECENT_ROWS),
            "mtp_loss": history.recent_mean("mtp_loss", RECENT_ROWS),
            "validation_loss": history.last("validation_loss"),
            "validation_loss_ema": self._ema_loss,
            "maxvio": history.recent_mean("maxvio", RECENT_ROWS),
            "skipped_steps": counters.judged.skipped,
            "first_position": counters.first_position,
            "position": counters.next_position(self._schedule),
            "training_rows": self._rows.training_rows,
            "validation_rows": len(self._rows.validation),
            "seconds": counters.seconds,
            "tokens_per_second": speed,
            "mfu": speed * self._place.flops_per_token / self._telling.peak,
            "gemm_peak_flops": self._telling.peak,
            "flops_per_token": self._place.flops_per_token,
            "compute": self._config.precision.compute,
            "precision": "fp8" if self._config.precision.fp8 else self._config.precision.compute,
            "device": self._learner.device.type,
            "ranks": self._learner.mesh.world,
            "dispatch": self._learner.dispatch,
            "threads": torch.get_num_threads(),
        }

    def _start(self) -> None:
        """Take up the newest checkpoint, or begin."""
        if self._load(None):
            self._watch.logger.info("going on after step %d of %d", self._counters.step, self._schedule.steps)
            return
        self._begin()

    def _load(self, at_most: int | None) -> bool:
        """Load the newest checkpoint, of step `at_most` or before; whether there is one."""
        place, accept = self._place, self._config.checkpoint.accept_other
        found = take_up(place.checkpoints, self._identity, self._parts, at_most, accept, self._watch.logger)
        if found:
            self._counters, self._history = found
            self._integrity.replaced(self._counters.step)
            self._saver.trust(self._counters.step)
            self._rhythm.saved(self._counters.step)
        return found is not None

    def _begin(self) -> None:
        """The state before the first step; the learner is initialised."""
        torch.manual_seed(self._config.seed.init)
        self._rhythm.saved(0)
        self._counters, self._history = Counters(), History()
        self._integrity.replaced(0)
        if source := self._place.source:
            self._counters = begin_from(source, self._parts, self._place.same_rows)
            self._watch.logger.info("starting from %s, at row %d of the data", source, self._counters.first_position)

    def _train(self) -> Outcome:
        while True:
            reason, save, traced = self._meet()
            step = self._counters.step
            if reason or step == self._end or self._elsewhere():
                if step and not self._elsewhere():
                    self._saver.last(step, self._parts.owned(), self._state(), self._back_to())
                return self._outcome(reason)
            if save:
                self._saver.begin(step, self._parts.owned(), self._state(), self._back_to())
                self._rhythm.saved(step)
            plan = self._schedule.at(step)
            if traced:
                self._learner.begin_timeline()
            self._take_step(plan, traced)

    def _meet(self) -> tuple[str | None, bool, bool]:
        """The step's one exchange among ranks: why to stop, whether to save, and whether to draw the next step."""
        wanted = None
        if self._first:
            save = self._rhythm.due(self._counters.step, self._saver.stall)
            wanted = [self._watch.deadline.reason(), save, self._wants_timeline()]
        self._learner.watch.waiting(f"all ranks after step {self._counters.step}")
        said = self._learner.agreed_all([wanted, self._saver.word(), round(self._busy, 6)])
        self._saver.look([word for _, word, _ in said])
        for slow in self._slow.add([busy for _, _, busy in said]) if self._taken else ():
            self._watch.logger.warning("rank %d is slow: at work %.2f times as long as others", slow.rank, slow.factor)
            facts = {"step": self._counters.step, "rank": slow.rank, "factor": round(slow.factor, 3)}
            self._watch.ledger("slow_rank", facts)
        reason, save, traced = said[0][0]
        return reason, save, traced

    def _take_step(self, plan: Step, traced: bool) -> None:
        """Take a step, apply it if it is as it should be, and tell of it; or go back to a checkpoint."""
        started, busy = time.perf_counter(), self._watch.busy()
        figures, norm = self._gradient(plan)
        self._busy, self._taken = self._watch.busy() - busy, self._taken + 1
        judged, number = self._counters.judged, plan.step + 1
        diagnose = partial(diagnosis, self._learner)
        verdict = self._policies.judge(judged, number, figures.loss, figures.finite, diagnose)
        if verdict.apply:
            self._apply(plan, figures, norm)
        self._learner.recycle()
        if traced:  # before anything else runs through the pipeline, such as a validation
            self._write_timeline(plan)
        self._remark(plan, figures, verdict)
        if verdict.streak or verdict.other_rows:
            self._go_back(plan, verdict)
            return
        seconds = time.perf_counter() - started
        self._counters.step = number
        self._counters.seconds += seconds
        self._rhythm.took(seconds)
        self._telling.took(plan, seconds)
        validation = None
        if self._telling.wants_validation(number):
            rows = self._to_device(self._rows.validation)
            validation = self._learner.measure(rows, f"the validation after step {number}")
        self._telling.step(plan, figures, judged.skipped, validation, self._history)

    def _gradient(self, plan: Step) -> tuple[Figures, Tensor]:
        """The step's figures and the norm of its gradient, which the learner holds."""
        learner, mesh = self._learner, self._learner.mesh
        share = plan.sequences // mesh.data
        position = self._counters.position(self._schedule, plan.step)
        learner.watch.doing(f"the rows of step {plan.step + 1}")
        batch = self._to_device(self._rows.batch(position + mesh.data_rank * share, share))
        step = partial(learner.step, batch, plan.mtp_weight, plan.balance_weight, f"step {plan.step + 1}")
        twice = self._integrity.recomputes(plan.step)
        losses = self._integrity.recompute(step, plan.step) if twice else step()
        norm = learner.reduction.norm()
        scalars = torch.stack([losses.main.double(), losses.mtp.double(), losses.balance.double(), norm])
        loss, mtp, balance, gradient_norm = scalars.tolist()  # the step's one wait
        return Figures(loss, mtp, balance, gradient_norm, losses.counts), norm

    def _apply(self, plan: Step, figures: Figures, norm: Tensor) -> None:
        """Update weights and biases."""
        learner, number = self._learner, plan.step + 1
        learner.watch.doing(f"the update of step {number}")
        learner.reduction.clip(self._config.recipe.optimizer.gradient_clip, norm)
        self._integrity.before_update(plan.step)
        if self._ema:
            self._ema.wait()
        self._optimizer.step(plan.learning_rate, plan.muon_learning_rate)
        learner.watch.waiting(f"the weights of step {number}")
        learner.reduction.share()
        learner.update_router_bias(figures.counts, plan.bias_update_speed)
        self._integrity.after_update(plan.step)
        if self._ema:
            self._ema.begin()

    def _remark(self, plan: Step, figures: Figures, verdict: Verdict) -> None:
        """Write down what is remarkable about a step."""
        if verdict.why is None:
            return
        number = plan.step + 1
        facts = {"step": number, "loss": str(figures.loss), "gradient_norm": str(figures.gradient_norm)}
        how = f"loss {figures.loss:g}, gradient norm {figures.gradient_norm:g}"
        if verdict.mean is not None:
            how += f", {figures.loss / verdict.mean:.2f} times the mean of the steps before"
            self._watch.ledger("spike", {**facts, "mean": verdict.mean, "policy": self._config.train.loss_spike.policy})
        if not verdict.apply:
            self._watch.ledger("skipped", {**facts, "why": verdict.why})
        applied = "applied all the same" if verdict.apply else "not applied"
        self._watch.logger.warning("step %d %s: %s (%s)", number, applied, how, verdict.why)

    def _go_back(self, plan: Step, verdict: Verdict) -> None:
        """Load the newest checkpoint before what went wrong, and go on from there."""
        self._saver.settle()
        passed, to = self._counters.passed, plan.step + 1 - verdict.streak
        if verdict.other_rows:
            to = regular(self._config.checkpoint.interval, plan.step, self._first_step, self._saver.newest)
            rows = self._schedule.position(plan.step) + plan.sequences - self._schedule.position(to)
            passed = passing_over(passed, to, rows, plan.step + 1)
        with self._learner.watch.patiently(f"going back from step {plan.step + 1} to step {to}"):
            self._saver.forget_after(to)
            if not self._load(to):
                self._parts.reset()
                self._begin()
        found = self._counters.step
        if verdict.other_rows:
            self._counters.passed = passed
        self._watch.logger.warning("went back from step %d to the checkpoint of step %d", plan.step + 1, found)
        rows = sum(rows for _, rows in passed)
        self._watch.ledger("rollback", {"step": plan.step + 1, "to": found, "why": verdict.why, "rows_passed": rows})

    def _doubt(self, error: CorruptionError) -> None:
        """Nothing that was saved since the state was last known to be good is to be gone on from."""
        self._watch.ledger("corruption", error.facts)
        if self._saver.step == self._counters.step:
            self._saver.drop()
        self._saver.settle()
        self._saver.forget_after(self._integrity.leads_back_to(error.found))

    def _back_to(self) -> set[int]:
        """Steps that a policy or a check may lead back to from here on."""
        step, interval = self._counters.step, self._config.checkpoint.interval
        spike, streak = regular(interval, step, self._first_step, step), self._counters.judged.skipped_in_a_row
        return {spike, step - streak} | self._integrity.may_lead_back_to(step)

    def _elsewhere(self) -> bool:
        """Whether the run stands in another phase."""
        return not self._first_step <= self._counters.step <= self._end

    def _outcome(self, reason: str | None) -> Outcome:
        step = self._counters.step
        if step == self._schedule.steps and not self._elsewhere():
            return Outcome(True, step, None)
        *_, phase = (phase.name for phase in self._schedule.phases if phase.first <= step)
        return Outcome(False, step, reason, None if reason else phase)

    def _state(self) -> dict[str, Any]:
        """What is no tensor of a checkpoint, on the first rank."""
        if not self._first:
            return {}
        return capture(self._counters, self._schedule, self._parts, self._history, self._identity)

    def _measure_average(self, found: Checkpoint) -> float:
        """The validation loss of the average of the weights; the weights are as before afterwards."""
        with self._learner.watch.patiently("loading the average of the weights"):
            load_weights(found, EMA, self._learner)
        rows = self._to_device(self._rows.validation)
        loss = self._learner.measure(rows, "the validation of the average of the weights").main.item()
        with self._learner.watch.patiently("loading the weights"):
            load_weights(found, MODEL, self._learner)
        return loss

    def _wants_timeline(self) -> bool:
        """Whether the next step is drawn: one of the first that this process takes, but not its first."""
        path = self._place.timeline
        if self._taken < self._draw_after or self._integrity.recomputes(self._counters.step):
            return False
        return path is not None and not path.exists()

    def _write_timeline(self, plan: Step) -> None:
        found = self._learner.timeline()
        if self._first and self._place.timeline is not None:
            try:
                write_json(self._place.timeline, {"step": plan.step + 1, **found})
            except OSError as error:  # a full disk ends no training; a later step is drawn instead
                self._watch.logger.warning("the timeline of step %d could not be written: %s", plan.step + 1, error)
                self._draw_after = self._taken + TIMELINE_STEP - 1

    def _to_device(self, rows: Tensor) -> Tensor:
        if self._learner.device.type == "cuda":
            return rows.pin_memory().to(self._learner.device, non_blocking=True)
        return rows
