"""What is done about a step whose loss or gradient is no finite number, or whose loss is far above the recent ones.

Not finite: the step is applied on no rank, neither to weights nor to biases, and its rows are passed over. After
`train.rollback_after` such steps in a row training goes back to the newest checkpoint before them and takes the same
steps again: what a fault of the machine did is undone by that. Where the replay comes to the same end, it was none, and
the run stops with a `DivergenceError`.

A loss spike is a finite loss above `train.loss_spike.factor` times the mean of the last `window` applied steps':

    go_on      the step is applied as any other
    skip       it is not applied; `rollback_after` in a row are too many, as above
    rollback   back to the last regular checkpoint, a step that `checkpoint.interval` divides, and on with other rows:
               those read since then are passed over (as PaLM did, arXiv 2204.02311, section 5.1)

All of it follows from figures that are the same on every rank and from `Judged`, which is saved in checkpoints. So all
ranks decide alike, and a run that is killed and goes on decides as one that was not. Where `checkpoint.interval` is
auto, when a regular checkpoint is made depends on measured times, and so does where a spike leads back to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.config.schema import TrainConfig
from headrace.training.learner import Learner

MOST_ROLLBACKS = 3
"""So often a spike leads back to one step; then the rows are not what it comes from."""
_NAMED = 3  # tensors named in a message
Why = Literal["not finite", "spike"]
NOT_FINITE: Why = "not finite"
SPIKE: Why = "spike"


class DivergenceError(RuntimeError):
    """Training does not go on: its steps are not finite, or spike, whatever was tried."""


@dataclass
class Judged:
    """What judgements depend on beside the step's own loss; part of a checkpoint."""

    skipped: int = 0  # steps that were not applied
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last applied steps, at most a window of them


@dataclass(frozen=True)
class Verdict:
    """What to do with a step."""

    apply: bool
    why: Why | None = None  # it is remarkable
    mean: float | None = None  # of the recent losses, for a spike
    streak: int = 0  # so many steps, up to this one, are to be taken again from the checkpoint before them
    other_rows: bool = False  # back to the last regular checkpoint, and on with other rows


class Policies:
    """Judges steps; `judged` is changed accordingly. Steps are numbered from 1."""

    def __init__(self, settings: TrainConfig) -> None:
        self._spike, self._most = settings.loss_spike, settings.rollback_after
        self._replayed = 0  # the last step of the streak that was rolled back

    def judge(self, judged: Judged, step: int, loss: float, finite: bool, diagnose: Callable[[], str]) -> Verdict:
        """The verdict on `step`, whose loss and gradient are given and not yet applied.

        `diagnose` says more about where numbers that are not finite are; it is called on all ranks or on none.
        Raises `DivergenceError` where a streak comes again after it was rolled back.
        """
        if not finite:
            return self._skip(judged, step, NOT_FINITE, None, diagnose)
        mean = self._spikes_above(judged, loss)
        if mean is not None and self._spike.policy == "skip":
            return self._skip(judged, step, SPIKE, mean, diagnose)
        if mean is not None and self._spike.policy == "rollback":
            return Verdict(False, SPIKE, mean, other_rows=True)
        judged.skipped_in_a_row = 0
        judged.recent = [*judged.recent, loss][-self._spike.window :]
        return Verdict(True, None if mean is None else SPIKE, mean)

    def _spikes_above(self, judged: Judged, loss: float) -> float | None:
        """The mean that `loss` is a spike above; None where it is none."""
        if len(judged.recent) < self._spike.window:
            return None
        mean = sum(judged.recent) / len(judged.recent)
        return mean if loss > self._spike.factor * mean else None

    def _skip(self, judged: Judged, step: int, why: Why, mean: float | None, diagnose: Callable[[], str]) -> Verdict:
        judged.skipped += 1
        judged.skipped_in_a_row += 1
        if judged.skipped_in_a_row < self._most:
            return Verdict(False, why, mean)
        if step <= self._replayed:
            raise DivergenceError(
                f"{self._most} steps in a row, up to step {step}, were not applied ({why}), and again after they were "
                f"replayed from a checkpoint, so it is no passing fault of the machine; {diagnose()}; lower "
                "recipe.learning_rate.peak or recipe.optimizer.muon_learning_rate, or use precision=fp32"
            )
        self._replayed = step
        return Verdict(False, why, mean, streak=self._most)


def regular(interval: int | Literal["auto"], step: int, first: int, newest: int) -> int:
    """Where a spike in the step behind `step` steps leads back to: no further than to `first`, where a phase begins.

    `newest` is the step of the newest checkpoint.
    """
    return max(first, newest if interval == "auto" else step // interval * interval)


def passing_over(passed: Sequence[Sequence[int]], to: int, rows: int, step: int) -> list[list[int]]:
    """`Counters.passed` with `rows` more, from step `to` on, because `step` had a spike."""
    if sum(at == to for at, _ in passed) == MOST_ROLLBACKS:
        raise DivergenceError(
            f"the loss spiked at step {step}, and before with other rows: {MOST_ROLLBACKS} times training went back to "
            f"step {to}, so it is not the rows; lower recipe.learning_rate.peak, or raise train.loss_spike.factor"
        )
    return [*map(list, passed), [to, rows]]


def diagnosis(learner: Learner) -> str:
    """Where gradients and weights are not finite, on all ranks; called by all of them, after a step's gradient."""
    pieces = learner.reduction.pieces
    weights = [piece.name for piece in pieces if not piece.tensor.isfinite().all()]
    gradients = [piece.name for piece in pieces if piece.tensor.grad is None or not piece.tensor.grad.isfinite().all()]
    said = learner.agreed_all([[what[:_NAMED], len(what)] for what in (weights, gradients)])
    text = [_listed("weights", [of for of, _ in said]), _listed("gradients", [of for _, of in said])]
    return ", ".join(text)


def _listed(what: str, said: Sequence[tuple[Sequence[str], int]]) -> str:
    count = sum(count for _, count in said)
    named = [f"{name} (rank {rank})" for rank, (names, _) in enumerate(said) for name in names][:_NAMED]
    return f"{what} that are not finite: {', '.join(named)}, {count} in all" if count else f"all {what} are finite"
