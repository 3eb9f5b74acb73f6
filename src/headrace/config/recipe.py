"""The schema of the recipe: everything that changes with tokens seen. See `schema.py` for the rest."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from headrace.config.values import (
    CLOSED,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
    TokenSpan,
)


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071), in the keys of the Hub's config.json."""

    __pydantic_config__ = CLOSED
    type: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    beta_fast: PositiveFloat
    beta_slow: PositiveFloat
    mscale: NonNegativeFloat
    mscale_all_dim: NonNegativeFloat
    original_max_position_embeddings: Positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices (stacked experts included) with AdamW for the rest."""

    __pydantic_config__ = CLOSED
    name: Literal["adamw", "muon"]
    beta1: Fraction
    beta2: Fraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    muon_learning_rate: PositiveFloat  # peak for Muon's matrices; follows the same shape as learning_rate
    muon_momentum: Fraction
    gradient_clip: PositiveFloat  # global norm


@dataclass(frozen=True)
class ConstantPhase:
    """A learning rate held for so many tokens at the end of the run."""

    __pydantic_config__ = CLOSED
    tokens: TokenSpan
    value: PositiveFloat


@dataclass(frozen=True)
class LearningRateConfig:
    """Linear warm-up in steps; constant, cosine and tail in tokens (report, section 4.2)."""

    __pydantic_config__ = CLOSED
    peak: PositiveFloat
    warmup_steps: Count
    constant: TokenSpan  # tokens from the run's start to the start of the decay
    cosine: TokenSpan  # tokens over which the rate falls from peak to final
    final: NonNegativeFloat
    tail: tuple[ConstantPhase, ...]  # phases after the decay


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing: the selection bias (arXiv 2408.15664) and the sequence-wise loss (report, eq. 17-20)."""

    __pydantic_config__ = CLOSED
    bias_update_speed: NonNegativeFloat  # gamma
    bias_update_until: TokenSpan  # tokens after which gamma is 0
    loss_weight: NonNegativeFloat  # alpha


@dataclass(frozen=True)
class MtpConfig:
    """Weight of the multi-token-prediction loss (lambda), which changes once."""

    __pydantic_config__ = CLOSED
    weight: NonNegativeFloat
    later_weight: NonNegativeFloat
    switch: TokenSpan


@dataclass(frozen=True)
class BatchRampConfig:
    """Growth of the batch at the run's beginning (report, section 4.2, which does not publish its shape)."""

    __pydantic_config__ = CLOSED
    from_sequences: Positive  # sequences of the first step
    tokens: TokenSpan  # tokens over which the batch grows to recipe.batch_sequences
    shape: Literal["linear", "exponential"]  # in tokens seen
    multiple: Positive  # every batch of the ramp is a multiple of it, so that it divides over the layout


@dataclass(frozen=True)
class ExtensionConfig:
    """One phase of context extension after the budget is used up (report, section 4.3)."""

    __pydantic_config__ = CLOSED
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    steps: Positive
    sequence_length: Positive
    batch_sequences: Positive
    learning_rate: PositiveFloat  # constant
    rope_scaling: RopeScaling  # of the model from this phase on


@dataclass(frozen=True)
class MixtureConfig:
    """Weights of the sources of the corpus from a number of tokens on."""

    __pydantic_config__ = CLOSED
    since: TokenSpan  # tokens seen; the first entry has 0
    weights: dict[str, NonNegativeFloat]  # of rows, by name of the source


@dataclass(frozen=True)
class RecipeConfig:
    """Everything that changes with tokens seen."""

    __pydantic_config__ = CLOSED
    tokens: Positive  # the run's budget, context extension not counted
    sequence_length: Positive
    batch_sequences: Positive  # sequences per optimizer step, after the ramp
    batch_ramp: BatchRampConfig | None  # null: the same batch from the first step on
    mixture: tuple[MixtureConfig, ...]  # weights of corpus.sources; none: rows of all sources alike
    extensions: tuple[ExtensionConfig, ...]  # phases of context extension, in order
    ema_decay: Share | None  # of the moving average of the weights, per step; null keeps none
    optimizer: OptimizerConfig
    learning_rate: LearningRateConfig
    balance: BalanceConfig
    mtp: MtpConfig
