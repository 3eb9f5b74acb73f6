"""The runs of a precision study: one model, one recipe and one corpus, trained in several number formats.

    pair-<i>-baseline     `study.baseline`, seeds seed.init + i and seed.data + i
    pair-<i>-candidate    `study.candidate` with the same seeds: the same initial weights, the same rows in one order
    ablation-<name>       the candidate with one change, with the seeds of pair 0

Each run gets `study.tokens`. The schedules keep their shape: shares of the budget stay shares, and a span that the
recipe gives in tokens becomes the same share of the smaller budget. Warm-up is counted in steps and stays as it is.
Context extension and the moving average of the weights are left out: they come after what is compared, or beside it.

The ablations undo one of the report's choices each (arXiv 2412.19437, section 3.3 and appendix B.2): partial sums that
stay in Hopper's 14-bit accumulators, one scale for a whole tensor, gradients quantised in 128x128 blocks. This module
plans and trains nothing; it imports nothing heavy, since the Snakefile asks it whether a study is possible.
"""

from dataclasses import dataclass, replace

from headrace.config.phases import tokens_in
from headrace.config.recipe import ConstantPhase, RecipeConfig
from headrace.config.schema import Config, Fp8Config, PrecisionConfig, SeedConfig, StudyConfig
from headrace.config.values import TokenSpan
from headrace.errors import UserError
from headrace.recipe.schedule import Schedule

BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass(frozen=True)
class Trial:
    """One run of the study; `role` is baseline, candidate or the name of an ablation."""

    name: str
    role: str
    pair: int
    precision: PrecisionConfig
    seed: SeedConfig
    recipe: RecipeConfig


def trials(config: Config) -> tuple[Trial, ...]:
    """All runs in the order in which they are trained; an impossible study is a `UserError`, one line per reason."""
    wrong = problems(config)
    if wrong:
        raise UserError("\n".join(wrong))
    study, recipe = config.study, recipe_for(config.recipe, config.study.tokens)
    planned = [
        Trial(f"pair-{pair}-{role}", role, pair, precision, seed_of(config.seed, pair), recipe)
        for pair in range(study.pairs)
        for role, precision in ((BASELINE, study.baseline), (CANDIDATE, study.candidate))
    ]
    for name in dict.fromkeys(study.ablations):
        precision = replace(study.candidate, fp8=ablated(study.candidate.fp8, name))
        planned.append(Trial(f"ablation-{name}", name, 0, precision, config.seed, recipe))
    return tuple(planned)


def problems(config: Config) -> list[str]:
    """Why the study cannot be run, one sentence each."""
    study, wrong = config.study, []
    step = config.recipe.sequence_length * config.recipe.batch_sequences
    warmup = config.recipe.learning_rate.warmup_steps
    if study.tokens < step:
        wrong.append(f"study.tokens={study.tokens} is less than one step of {step} tokens; raise it")
    elif (steps := Schedule(recipe_for(config.recipe, study.tokens)).steps) <= warmup:
        wrong.append(
            f"study.tokens={study.tokens} gives {steps} steps, all within recipe.learning_rate.warmup_steps={warmup}; "
            "raise the one or lower the other"
        )
    if study.ablations and study.candidate.fp8 is None:
        wrong.append(
            f"study.ablations={_listed(study)} change FP8, and study.candidate has none; "
            "set study.ablations=[] or precision@study.candidate=fp8"
        )
    if config.train.from_ is not None:
        wrong.append(f"train.from={config.train.from_}: precision_study starts from fresh weights; leave it null")
    return wrong


def recipe_for(recipe: RecipeConfig, tokens: int) -> RecipeConfig:
    """The recipe with a budget of `tokens` and schedules of the same shape."""

    def span(given: TokenSpan) -> TokenSpan:
        return given if isinstance(given, str) else round(tokens_in(given, recipe.tokens) / recipe.tokens * tokens)

    rate, ramp = recipe.learning_rate, recipe.batch_ramp
    return replace(
        recipe,
        tokens=tokens,
        batch_ramp=ramp and replace(ramp, tokens=span(ramp.tokens)),
        extensions=(),
        ema_decay=None,
        learning_rate=replace(
            rate,
            constant=span(rate.constant),
            cosine=span(rate.cosine),
            tail=tuple(ConstantPhase(span(phase.tokens), phase.value) for phase in rate.tail),
        ),
        balance=replace(recipe.balance, bias_update_until=span(recipe.balance.bias_update_until)),
        mtp=replace(recipe.mtp, switch=span(recipe.mtp.switch)),
    )


def seed_of(seed: SeedConfig, pair: int) -> SeedConfig:
    """The seeds of a pair."""
    return SeedConfig(init=seed.init + pair, data=seed.data + pair)


def ablated(fp8: Fp8Config | None, name: str) -> Fp8Config:
    """The candidate's FP8 with one change, on the back end that can do it."""
    assert fp8 is not None, "trials() refuses ablations without FP8"
    fp8 = replace(fp8, backend="reference")  # the kernels do what the report does and nothing else
    changes = {
        "no_promotion": replace(fp8, accumulation="hopper", promotion=False),
        "per_tensor": replace(fp8, activation_tile="tensor", gradient_tile="tensor", weight_tile="tensor"),
        "block_gradients": replace(fp8, gradient_tile="128x128"),
    }
    return changes[name]


def format_name(precision: PrecisionConfig) -> str:
    """FP8, BF16 or FP32."""
    return "FP8" if precision.fp8 is not None else precision.compute.upper()


def _listed(study: StudyConfig) -> str:
    return f"[{','.join(study.ablations)}]"
