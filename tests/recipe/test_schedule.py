"""The plan against torch's own schedules, and DeepSeek-V3's published values at exact token counts."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from headrace.config.compose import load
from headrace.config.recipe import BatchRampConfig, ConstantPhase, ExtensionConfig, RecipeConfig
from headrace.recipe.schedule import Schedule, Step, learning_rate

BILLION, TRILLION = 10**9, 10**12
FULL = 15_360 * 4096


@pytest.fixture(scope="module")
def v3() -> RecipeConfig:
    return load(["experiment=v3_671b"]).recipe


@pytest.fixture(scope="module")
def plan(v3: RecipeConfig) -> Schedule:
    return Schedule(v3)


@pytest.fixture(scope="module")
def demo() -> RecipeConfig:
    return without_phases(load([]).recipe)


def without_phases(recipe: RecipeConfig) -> RecipeConfig:
    return replace(recipe, batch_ramp=None, extensions=())


def around(plan: Schedule, tokens: int) -> tuple[Step, Step]:
    """The last step that begins before so many tokens, and the first that does not; found without the plan's search."""
    low, high = 0, plan.steps - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if plan.at(middle).tokens_before < tokens else (low, middle)
    before, after = plan.at(low - 1), plan.at(low)
    assert before.tokens_before < tokens <= after.tokens_before
    return before, after


def one_by_one(recipe: RecipeConfig) -> Iterator[tuple[int, int]]:
    """(tokens before, sequences) of each step within the budget of a recipe with a linear ramp, by exact arithmetic."""
    ramp, seen = recipe.batch_ramp, 0
    assert ramp is not None and isinstance(ramp.tokens, int)
    while True:
        grown = Fraction(recipe.batch_sequences - ramp.from_sequences) * seen / ramp.tokens
        wanted = min(ramp.from_sequences + grown, Fraction(recipe.batch_sequences))
        sequences = int(wanted // ramp.multiple) * ramp.multiple
        if seen + sequences * recipe.sequence_length > recipe.tokens:
            return
        yield seen, sequences
        seen += sequences * recipe.sequence_length


def test_v3_batches_are_the_ramps_at_every_step(v3: RecipeConfig, plan: Schedule) -> None:
    """3,072 to 15,360 sequences over 469B tokens (report, section 4.2), linear, in multiples of 256."""
    main = next(phase for phase in plan.phases if phase.name == "main")
    expected = list(one_by_one(v3))
    assert len(expected) == main.end == 243_098
    position = 0
    for number, (seen, sequences) in enumerate(expected):
        step = plan.at(number)
        assert (step.tokens_before, step.sequences, step.position) == (seen, sequences, position)
        position += sequences
    assert (expected[0][1], expected[-1][1]) == (3072, 15_360)
    assert {sequences for _, sequences in expected} == set(range(3072, 15_361, 256))
    before, after = around(plan, 469 * BILLION)
    assert (before.sequences, before.phase, after.sequences, after.phase) == (15_104, "ramp", 15_360, "main")


def test_v3_spends_its_budget_to_less_than_one_step(v3: RecipeConfig, plan: Schedule) -> None:
    main = plan.phases[1]
    assert 0 <= 14_800 * BILLION - plan.tokens_after(main.end) < FULL
    assert Schedule(without_phases(v3)).steps == 235_239  # without the ramp; the report's figures give "235K"


@pytest.mark.parametrize(
    ("tokens", "before", "after"),
    [
        (10_000 * BILLION, 2.2e-4, 2.2e-4),  # the constant rate ends, and the cosine begins at the same value
        (14_300 * BILLION, 2.2e-5, 2.2e-5),  # the cosine ends at the value that holds for 333B
        (14_633 * BILLION, 2.2e-5, 7.3e-6),
    ],
)
def test_v3_rate_at_its_boundaries(plan: Schedule, tokens: int, before: float, after: float) -> None:
    found = [step.learning_rate for step in around(plan, tokens)]
    assert found == pytest.approx([before, after], rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 2.2e-4),
        (10 * TRILLION - 1, 2.2e-4),
        (10 * TRILLION + 4300 * 10**9 // 2, (2.2e-4 + 2.2e-5) / 2),  # half of a cosine is the mean of its ends
        (14_300 * 10**9, 2.2e-5),
        (14_633 * 10**9 - 1, 2.2e-5),
        (14_633 * 10**9, 7.3e-6),
        (14_800 * 10**9 - 1, 7.3e-6),
    ],
)
def test_v3_rate_at_exact_token_counts(v3: RecipeConfig, tokens: int, expected: float) -> None:
    assert learning_rate(v3.learning_rate, v3.tokens)(tokens) == pytest.approx(expected, rel=1e-12)


def test_v3_decay_starts_at_its_boundary_and_falls(v3: RecipeConfig) -> None:
    rates = [learning_rate(v3.learning_rate, v3.tokens)(10 * TRILLION + n * 10**11) for n in range(44)]
    assert rates[0] == pytest.approx(2.2e-4, rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_v3_warm_up_takes_2000_steps_whatever_the_batch(plan: Schedule) -> None:
    assert plan.at(0).learning_rate == pytest.approx(2.2e-4 / 2000)
    assert plan.at(999).learning_rate == pytest.approx(1.1e-4)
    assert plan.at(1998).learning_rate < 2.2e-4
    assert plan.at(1999).learning_rate == plan.at(2000).learning_rate == pytest.approx(2.2e-4)


def test_v3_gamma_is_zero_for_the_last_500_billion_tokens(plan: Schedule) -> None:
    assert [step.bias_update_speed for step in around(plan, 14_300 * BILLION)] == [0.001, 0.0]
    assert (plan.at(0).bias_update_speed, plan.at(plan.steps - 1).bias_update_speed) == (0.001, 0.0)


def test_v3_lambda_falls_after_10_trillion_tokens(plan: Schedule) -> None:
    assert [step.mtp_weight for step in around(plan, 10_000 * BILLION)] == [0.3, 0.1]
    assert (plan.at(0).mtp_weight, plan.at(plan.steps - 1).mtp_weight) == (0.3, 0.1)
    assert {step.balance_weight for step in plan.table(1000)} == {1e-4}


def test_v3_is_updated_by_adamw_with_the_published_values() -> None:
    """Report, section 4.2; moments in BF16: section 3.3."""
    config = load(["experiment=v3_671b"])
    found = config.recipe.optimizer
    assert (found.name, found.beta1, found.beta2, found.weight_decay) == ("adamw", 0.9, 0.95, 0.1)
    assert found.gradient_clip == 1.0
    assert config.precision.optimizer_moments == "bf16"


def test_v3_is_extended_twice(plan: Schedule) -> None:
    """1,000 steps each of 1,920 x 32K and 480 x 128K at 7.3e-6, both of 62.9M tokens (report, section 4.3)."""
    ramp, main, first, second = plan.phases
    assert (ramp.name, main.name, first.name, second.name) == ("ramp", "main", "context_32k", "context_128k")
    assert (ramp.first, main.first, first.first, second.first) == (0, ramp.end, main.end, first.end)
    assert (ramp.sequences_least, ramp.sequences_most) == (3072, 15_104)
    assert ramp.rope_scaling is main.rope_scaling is None
    for phase, sequences, length in ((first, 1920, 32_768), (second, 480, 131_072)):
        assert phase.end - phase.first == 1000
        assert phase.rope_scaling is not None and phase.rope_scaling.factor == 40.0
        for number in (phase.first, phase.first + 1, phase.end - 1):
            step = plan.at(number)
            assert (step.sequences, step.sequence_length, step.phase) == (sequences, length, phase.name)
            assert step.tokens_before == plan.tokens_after(main.end) + (number - main.end) * FULL
            assert step.position == (number - phase.first) * sequences  # rows of a length have an order of their own
            assert (step.learning_rate, step.bias_update_speed, step.mtp_weight) == (7.3e-6, 0.0, 0.1)
    assert second.end == plan.steps
    assert plan.phase_at(first.end) == second


@pytest.mark.alone
def test_all_of_v3_is_resolved_in_a_second_and_at_first_almost_nothing(v3: RecipeConfig) -> None:
    def seconds() -> tuple[float, float]:
        started = time.process_time()
        plan = Schedule(v3)
        made = time.process_time()
        tokens = sum(step.sequences * step.sequence_length for step in map(plan.at, range(plan.steps)))
        assert tokens == plan.tokens_after(plan.steps)
        return made - started, time.process_time() - made

    made, resolved = map(min, zip(*(seconds() for _ in range(10)), strict=True))  # whatever else the machine does
    assert made < 0.02
    assert resolved < 1


def test_cumulative_tokens_and_positions_are_the_sums_of_the_steps() -> None:
    """With a steep ramp that passes over some batches, and extensions of which two have the same length."""
    recipe = load(["experiment=tiny"]).recipe
    scaling = load(["model=v3_671b_128k"]).model.rope_scaling
    assert scaling is not None

    def extension(name: str, steps: int, length: int, sequences: int) -> ExtensionConfig:
        return ExtensionConfig(name, steps, length, sequences, 1e-5, scaling)

    recipe = replace(
        recipe,
        tokens=100_000,
        sequence_length=128,
        batch_sequences=24,
        batch_ramp=BatchRampConfig(from_sequences=2, tokens="7%", shape="exponential", multiple=2),
        extensions=(extension("a", 3, 256, 5), extension("b", 2, 512, 3), extension("c", 4, 256, 2)),
    )
    plan, tokens, rows = Schedule(recipe), 0, Counter[int]()
    for number in range(plan.steps):
        step = plan.at(number)
        assert (step.tokens_before, step.position) == (tokens, rows[step.sequence_length])
        assert (plan.tokens_before(number), plan.tokens_after(number), plan.position(number)) == (
            tokens, tokens, step.position,
        )  # fmt: skip
        assert step.sequences % 2 == 0 or step.phase in ("a", "b", "c")
        tokens, rows[step.sequence_length] = (
            tokens + step.sequences * step.sequence_length,
            rows[step.sequence_length] + step.sequences,
        )
    assert plan.tokens_after(plan.steps) == tokens
    batches = [plan.at(number).sequences for number in range(plan.phases[1].first + 1)]
    assert batches == sorted(batches) and (batches[0], batches[-1]) == (2, 24)
    assert set(batches) < set(range(2, 25, 2))
    assert plan.at(plan.phases[0].end).tokens_before >= 7000 > plan.at(plan.phases[0].end - 1).tokens_before
    assert [phase.name for phase in plan.phases] == ["ramp", "main", "a", "b", "c"]


def test_a_budget_that_ends_within_the_ramp_ends_the_run_there() -> None:
    recipe = without_phases(load(["experiment=tiny"]).recipe)
    ramp = BatchRampConfig(from_sequences=1, tokens=100_000, shape="linear", multiple=1)
    plan = Schedule(replace(recipe, tokens=1000, sequence_length=128, batch_sequences=8, batch_ramp=ramp))
    assert [phase.name for phase in plan.phases] == ["ramp"]
    assert (plan.steps, plan.tokens_after(plan.steps)) == (7, 896)


def test_gamma_and_lambda_switch_at_the_first_step_that_starts_beyond_the_boundary() -> None:
    recipe = replace(without_phases(load(["experiment=tiny"]).recipe), tokens=61_440)  # 60 steps of 1024 tokens
    recipe = replace(
        recipe,
        balance=replace(recipe.balance, bias_update_until=10_240, bias_update_speed=0.001),
        mtp=replace(recipe.mtp, switch=20_481),
    )
    plan = Schedule(recipe)
    assert [plan.at(step).bias_update_speed for step in (0, 9, 10, 59)] == [0.001, 0.001, 0.0, 0.0]
    assert [plan.at(step).mtp_weight for step in (0, 20, 21, 59)] == [0.3, 0.3, 0.1, 0.1]
    assert plan.at(10).tokens_before == 10_240
    assert {plan.at(step).balance_weight for step in range(60)} == {recipe.balance.loss_weight}


def test_agrees_with_torch_schedulers(demo: RecipeConfig) -> None:
    """Warm-up, constant and cosine composed of torch.optim.lr_scheduler on a plan without tail."""
    steps, warmup, constant = 200, 20, 120
    size = demo.batch_sequences * demo.sequence_length
    rate = replace(demo.learning_rate, warmup_steps=warmup, constant="60%", cosine="40%")
    plan = Schedule(replace(demo, tokens=steps * size, learning_rate=rate))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate.peak)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - constant, rate.final),
        ],
        [constant],
    )
    for step in range(steps):
        assert plan.at(step).learning_rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_muon_follows_the_same_shape(demo: RecipeConfig) -> None:
    for step in Schedule(demo).table(50):
        expected = step.learning_rate / demo.learning_rate.peak * demo.optimizer.muon_learning_rate
        assert step.muon_learning_rate == pytest.approx(expected)


def test_percentages_are_of_the_budget_and_the_last_value_holds(demo: RecipeConfig) -> None:
    rate = replace(
        demo.learning_rate,
        warmup_steps=0,
        constant="10%",
        cosine="20%",
        tail=(ConstantPhase("10%", 5e-5), ConstantPhase("10%", 2e-5)),
    )
    values = [learning_rate(rate, 1000)(tokens) for tokens in (99, 299, 300, 399, 400, 999)]
    assert values[0] == rate.peak
    assert values[1] > 1e-4
    assert values[2:] == [5e-5, 5e-5, 2e-5, 2e-5]


def test_steps_never_exceed_the_budget(demo: RecipeConfig) -> None:
    size = demo.batch_sequences * demo.sequence_length
    for tokens, steps in ((size, 1), (2 * size - 1, 1), (2 * size, 2)):
        plan = Schedule(replace(demo, tokens=tokens))
        assert plan.steps == steps
        assert plan.tokens_after(plan.steps) <= tokens


def test_table_holds_both_ends_and_every_turn(demo: RecipeConfig) -> None:
    plan = Schedule(demo)
    table = plan.table(100)
    assert (table[0].step, table[-1].step) == (0, plan.steps - 1)
    assert 100 <= len(table) <= 120
    assert len(Schedule(replace(demo, tokens=3 * 2048)).table(100)) == 3
    for before, after in pairwise(table):
        if before.mtp_weight != after.mtp_weight or before.bias_update_speed != after.bias_update_speed:
            assert after.step == before.step + 1


def test_table_holds_the_ends_of_phases(plan: Schedule) -> None:
    chosen = {step.step for step in plan.table(10)}
    assert chosen >= {number for phase in plan.phases for number in (phase.first, phase.end - 1)}
