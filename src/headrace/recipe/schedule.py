"""What holds at each step of a run: phase, batch, learning rates, balancing speed, loss weights, position in the data.

DeepSeek-V3 changes six things while it trains, each at a stated number of tokens (report, arXiv 2412.19437, sections
4.2 and 4.3). `Schedule` is the one table of them: `at(step)` says what holds at a step, from nothing but the
configuration. The trainer, a resumed run, the planner and the report's plots all read it, and nothing of it has to be
saved in a checkpoint.

A run has these phases, one after the other:

    ramp    the batch grows from `batch_ramp.from_sequences` in multiples of `batch_ramp.multiple`: at each step the
            largest multiple that the ramp's curve has reached
    main    `batch_sequences` for the rest of `recipe.tokens`; a step that the budget cannot pay in full is not taken
    ...     the context extensions: so many steps at their own length, batch and constant learning rate, everything else
            as in the last step of main

Each quantity is a curve over tokens (`curves.py`). Only the warm-up is counted in steps: it is 1 at the last of
`warmup_steps`, and step 0 has 1/warmup_steps, not 0, since a step at rate 0 would be wasted. Muon's rate has the shape
of AdamW's scaled to its own peak (`muon_learning_rate`).

Steps of equal batch and length are one *level*; there are few, so a step is found by bisection. It does not apply
anything; that is the trainer's work.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from headrace.config.phases import MAIN, RAMP, tokens_in
from headrace.config.recipe import LearningRateConfig, RecipeConfig, RopeScaling
from headrace.recipe.curves import Chain, Constant, Cosine, Exponential, Linear, Switch, steps_up


class Step(NamedTuple):
    """What holds during one optimizer step (counted from 0)."""

    step: int
    tokens_before: int  # tokens seen before this step
    phase: str  # its name
    sequences: int  # in this step's batch
    sequence_length: int  # tokens of each
    learning_rate: float  # AdamW's
    muon_learning_rate: float
    bias_update_speed: float  # gamma
    mtp_weight: float  # lambda
    balance_weight: float  # alpha
    position: int  # of its first row among the rows of this length


@dataclass(frozen=True)
class Phase:
    """Consecutive steps `first` to `end` - 1 under one name."""

    name: str
    first: int
    end: int
    sequence_length: int
    sequences_least: int  # in the batch of a step
    sequences_most: int
    rope_scaling: RopeScaling | None  # of the model from this phase on; None: as configured


class _Level(NamedTuple):
    """Consecutive steps with equal batch and length."""

    phase: str
    first: int
    end: int
    sequences: int
    sequence_length: int
    tokens_before: int
    position: int
    learning_rate: float | None  # a context extension's own
    step_tokens: int


class Schedule:
    """The plan of a run. `steps` is the number of its steps, those of the context extensions included."""

    def __init__(self, config: RecipeConfig) -> None:
        self._rate = learning_rate(config.learning_rate, config.tokens)
        self._warmup = config.learning_rate.warmup_steps
        self._muon = config.optimizer.muon_learning_rate / config.learning_rate.peak
        speed, until = config.balance.bias_update_speed, tokens_in(config.balance.bias_update_until, config.tokens)
        self._bias_speed = Switch(speed, 0.0, until)
        self._mtp = Switch(config.mtp.weight, config.mtp.later_weight, tokens_in(config.mtp.switch, config.tokens))
        self._balance_weight = config.balance.loss_weight
        self._levels = tuple(_levels(config))
        self._firsts = [level.first for level in self._levels]
        self.steps = self._levels[-1].end
        self.phases = tuple(_phases(self._levels, config))
        own = [level for level in self._levels if level.learning_rate is None]
        self._last_of_main = own[-1].tokens_before + (own[-1].end - own[-1].first - 1) * own[-1].step_tokens

    def at(self, step: int) -> Step:
        """What holds at `step`, 0 <= step < `steps`."""
        assert 0 <= step < self.steps, f"step {step} is outside the plan of {self.steps} steps"
        # Unpacked, and passed in the order of the fields: by name it takes twice as long, and a run has 10^5 steps.
        phase, first, _, sequences, length, seen, position, rate, step_tokens = self._level(step)
        done = step - first
        seen += done * step_tokens
        if rate is None:
            rate = self._rate(seen)
            if step < self._warmup:
                rate *= (step + 1) / self._warmup
        of_main = seen if seen < self._last_of_main else self._last_of_main
        return Step(
            step,
            seen,
            phase,
            sequences,
            length,
            rate,
            rate * self._muon,
            self._bias_speed(of_main),
            self._mtp(of_main),
            self._balance_weight,
            position + done * sequences,
        )

    def tokens_before(self, step: int) -> int:
        """Tokens seen before `step`, 0 <= step <= `steps`; the same as after so many steps."""
        level = self._level(step)
        return level.tokens_before + (step - level.first) * level.step_tokens

    def tokens_after(self, steps: int) -> int:
        """Tokens seen after so many steps of the plan."""
        return self.tokens_before(steps)

    def position(self, step: int) -> int:
        """The row at which `step` begins; rows of each sequence length are counted from 0 in an order of their own."""
        level = self._level(step)
        return level.position + (step - level.first) * level.sequences

    def phase_at(self, step: int) -> Phase:
        """The phase of a step."""
        return next(phase for phase in self.phases if phase.first <= step < phase.end)

    def table(self, points: int) -> list[Step]:
        """About `points` evenly spaced steps of the plan, and the steps on both sides of every boundary, for a plot."""
        last = self.steps - 1
        chosen = {round(last * index / max(1, points - 1)) for index in range(points)} | {0, last}
        for tokens in {end for curve in (self._rate, self._bias_speed, self._mtp) for end in curve.ends}:
            chosen |= self._around(tokens)
        for phase in self.phases:
            chosen |= {phase.first, phase.end - 1}
        return [self.at(step) for step in sorted(chosen)]

    def _level(self, step: int) -> _Level:
        return self._levels[bisect_right(self._firsts, step) - 1]

    def _around(self, tokens: int) -> set[int]:
        """The first step that begins after so many tokens, and the one before it."""
        first = bisect_right(range(self.steps), tokens - 1, key=self.tokens_before)
        return {step for step in (first - 1, first) if 0 <= step < self.steps}


def learning_rate(config: LearningRateConfig, budget: int) -> Chain:
    """AdamW's rate, warm-up aside: `peak`, a cosine to `final`, then the tail, whose last value holds on."""
    constant, cosine = tokens_in(config.constant, budget), tokens_in(config.cosine, budget)
    tail = [(tokens_in(phase.tokens, budget), Constant(phase.value)) for phase in config.tail]
    return Chain(
        (constant, Constant(config.peak)),
        (cosine, Cosine(config.peak, config.final, cosine)),
        *tail,
        last=tail[-1][1] if tail else Constant(config.final),
    )


def batch_steps(config: RecipeConfig) -> list[tuple[int, int]]:
    """(tokens from which it holds, sequences per step) within the budget, ascending."""
    ramp, full = config.batch_ramp, config.batch_sequences
    if ramp is None:
        return [(0, full)]
    curve = (Linear if ramp.shape == "linear" else Exponential)(
        ramp.from_sequences, full, tokens_in(ramp.tokens, config.tokens)
    )
    return list(steps_up(curve, ramp.from_sequences, full, ramp.multiple))


def _levels(config: RecipeConfig) -> Iterator[_Level]:
    step = tokens = 0
    rows = Counter[int]()  # read so far, by sequence length
    for phase, length, sequences, steps, rate in [*_within_budget(config), *_extensions(config)]:
        yield _Level(phase, step, step + steps, sequences, length, tokens, rows[length], rate, sequences * length)
        step, tokens = step + steps, tokens + steps * sequences * length
        rows[length] += steps * sequences


def _within_budget(config: RecipeConfig) -> Iterator[tuple[str, int, int, int, float | None]]:
    """Ramp and main: (phase, sequence length, sequences, steps, no rate of its own)."""
    batches, seen = batch_steps(config), 0
    ends = [*(tokens for tokens, _ in batches[1:]), config.tokens]
    for (_, sequences), end in zip(batches, ends, strict=True):
        size = sequences * config.sequence_length
        until_end, affordable = -((seen - end) // size), (config.tokens - seen) // size
        steps = min(until_end, affordable)
        if steps > 0:
            phase = MAIN if sequences == config.batch_sequences else RAMP
            yield phase, config.sequence_length, sequences, steps, None
            seen += steps * size


def _extensions(config: RecipeConfig) -> Iterator[tuple[str, int, int, int, float | None]]:
    for ext in config.extensions:
        yield ext.name, ext.sequence_length, ext.batch_sequences, ext.steps, ext.learning_rate


def _phases(levels: tuple[_Level, ...], config: RecipeConfig) -> Iterator[Phase]:
    scaling = {extension.name: extension.rope_scaling for extension in config.extensions}
    for name in dict.fromkeys(level.phase for level in levels):
        its = [level for level in levels if level.phase == name]
        yield Phase(
            name=name,
            first=its[0].first,
            end=its[-1].end,
            sequence_length=its[0].sequence_length,
            sequences_least=its[0].sequences,
            sequences_most=its[-1].sequences,
            rope_scaling=scaling.get(name),
        )
