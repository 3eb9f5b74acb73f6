"""The plan against torch's own schedules, and DeepSeek-V3's published values at exact token counts."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from headrace.config.compose import load
from headrace.config.schema import ConstantPhase, RecipeConfig
from headrace.recipe.schedule import Schedule, planned_rate

TRILLION = 10**12


@pytest.fixture(scope="module")
def v3() -> RecipeConfig:
    return load(["recipe=v3_671b", "model.max_position_embeddings=8192"]).recipe


@pytest.fixture(scope="module")
def demo() -> RecipeConfig:
    return load([]).recipe


def test_v3_has_the_published_number_of_steps(v3: RecipeConfig) -> None:
    assert v3.batch_sequences * v3.sequence_length == 62_914_560
    assert Schedule(v3).steps == 235_239  # the report's figures give "235K"


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
    assert planned_rate(tokens, v3.learning_rate, v3.tokens) == pytest.approx(expected, rel=1e-12)


def test_v3_decay_starts_at_its_boundary_and_falls(v3: RecipeConfig) -> None:
    rates = [planned_rate(10 * TRILLION + n * 10**11, v3.learning_rate, v3.tokens) for n in range(44)]
    assert rates[0] == pytest.approx(2.2e-4, rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_v3_warm_up_takes_2000_steps(v3: RecipeConfig) -> None:
    plan = Schedule(v3)
    assert plan.at(0).learning_rate == pytest.approx(2.2e-4 / 2000)
    assert plan.at(999).learning_rate == pytest.approx(1.1e-4)
    assert plan.at(1998).learning_rate < 2.2e-4
    assert plan.at(1999).learning_rate == plan.at(2000).learning_rate == pytest.approx(2.2e-4)


def test_gamma_and_lambda_switch_at_the_first_step_that_starts_beyond_the_boundary() -> None:
    recipe = load(["experiment=tiny"]).recipe  # 60 steps of 1024 tokens
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


def test_v3_gamma_is_zero_for_the_last_500_billion_tokens(v3: RecipeConfig) -> None:
    plan = Schedule(v3)
    first = next(step for step in range(plan.steps) if plan.at(step).bias_update_speed == 0)
    assert (first - 1) * 62_914_560 < 14_300 * 10**9 <= first * 62_914_560


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
    values = [planned_rate(tokens, rate, 1000) for tokens in (99, 299, 300, 399, 400, 999)]
    assert values[0] == rate.peak
    assert values[1] > 1e-4
    assert values[2:] == [5e-5, 5e-5, 2e-5, 2e-5]


def test_steps_never_exceed_the_budget(demo: RecipeConfig) -> None:
    size = demo.batch_sequences * demo.sequence_length
    for tokens, steps in ((size, 1), (2 * size - 1, 1), (2 * size, 2)):
        plan = Schedule(replace(demo, tokens=tokens))
        assert plan.steps == steps
        assert plan.tokens_after(plan.steps) <= tokens


def test_table_holds_both_ends(demo: RecipeConfig) -> None:
    plan = Schedule(demo)
    table = plan.table(100)
    assert (table[0].step, table[-1].step) == (0, plan.steps - 1)
    assert len(table) == 100
    assert len(Schedule(replace(demo, tokens=3 * 2048)).table(100)) == 3
