"""What holds at each step of a run: learning rates, balancing speed, loss weights, batch.

DeepSeek-V3 changes five things while it trains, each at a stated number of tokens (report, arXiv 2412.19437, section
4.2). `Schedule.at(step)` says what holds at a step, from nothing but the configuration and the tokens seen before
that step. So a resumed run, a run with another batch size and a plot for the report all read the same plan, and
nothing of it has to be saved in a checkpoint.

The learning rate is a shape between 0 and `peak`, made of two factors:

    warm-up   rises linearly over `warmup_steps` steps and is 1 at the last of them; step 0 has 1/warmup_steps, not 0,
              since a step at rate 0 would be wasted
    plan      `peak` while fewer than `constant` tokens are seen, a cosine from `peak` to `final` over the next `cosine`
              tokens, then each phase of `tail` at its own rate; the last of these values holds until the run ends

A boundary belongs to what follows it: the step that starts after exactly `constant` tokens is the first of the decay.
Muon's rate has the same shape scaled to its own peak (`muon_learning_rate`).

It does not apply anything; that is the trainer's work.
"""

import math
from dataclasses import dataclass

from headrace.config.checks import tokens_in
from headrace.config.schema import LearningRateConfig, RecipeConfig


@dataclass(frozen=True)
class Step:
    """What holds during one optimizer step (counted from 0)."""

    step: int
    tokens_before: int  # tokens seen before this step
    learning_rate: float  # AdamW's
    muon_learning_rate: float
    bias_update_speed: float  # gamma
    mtp_weight: float  # lambda
    balance_weight: float  # alpha
    sequences: int  # in this step's batch


class Schedule:
    """The plan of a run. `steps` is the number of whole steps that the budget of `recipe.tokens` pays for."""

    def __init__(self, config: RecipeConfig) -> None:
        self._config = config
        self._step_tokens = config.batch_sequences * config.sequence_length
        self._switch = tokens_in(config.mtp.switch, config.tokens)
        self._balanced = tokens_in(config.balance.bias_update_until, config.tokens)
        self.steps = config.tokens // self._step_tokens

    def at(self, step: int) -> Step:
        """What holds at `step`, 0 <= step < `steps`."""
        assert 0 <= step < self.steps, f"step {step} is outside the plan of {self.steps} steps"
        config, rate = self._config, self._config.learning_rate
        seen = step * self._step_tokens
        learning_rate = _warmup(step, rate.warmup_steps) * planned_rate(seen, rate, config.tokens)
        return Step(
            step=step,
            tokens_before=seen,
            learning_rate=learning_rate,
            muon_learning_rate=learning_rate / rate.peak * config.optimizer.muon_learning_rate,
            bias_update_speed=config.balance.bias_update_speed if seen < self._balanced else 0.0,
            mtp_weight=config.mtp.weight if seen < self._switch else config.mtp.later_weight,
            balance_weight=config.balance.loss_weight,
            sequences=config.batch_sequences,
        )

    def tokens_after(self, steps: int) -> int:
        """Tokens seen after so many steps of the plan."""
        return steps * self._step_tokens

    def table(self, points: int) -> list[Step]:
        """About `points` evenly spaced steps of the plan, the first and the last always among them, for a plot."""
        last = self.steps - 1
        chosen = {round(last * index / max(1, points - 1)) for index in range(points)} | {0, last}
        return [self.at(step) for step in sorted(chosen)]


def planned_rate(seen: int, rate: LearningRateConfig, budget: int) -> float:
    """The learning rate after `seen` tokens, warm-up aside; spans in percent are of `budget` tokens."""
    constant, cosine = tokens_in(rate.constant, budget), tokens_in(rate.cosine, budget)
    if seen < constant:
        return rate.peak
    decayed = seen - constant
    if decayed < cosine:
        return rate.final + 0.5 * (rate.peak - rate.final) * (1 + math.cos(math.pi * decayed / cosine))
    end, value = constant + cosine, rate.final
    for phase in rate.tail:
        if seen >= end:
            value = phase.value
        end += tokens_in(phase.tokens, budget)
    return value


def _warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps) if steps else 1.0
