"""The plan of a precision study: pairs share seeds, schedules keep their shape, nonsense is refused."""

from dataclasses import replace

import pytest

from headrace.config.compose import load
from headrace.config.phases import tokens_in
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.recipe.schedule import Schedule
from headrace.training.trials import format_name, recipe_for, trials

WORDS = ("experiment=tiny", "study.pairs=3", "seed.init=5", "seed.data=7")


def config(*words: str) -> Config:
    return load([*WORDS, *words])


def test_pairs_share_seeds_and_ablations_take_the_first_pairs() -> None:
    planned = trials(config())
    seeds = {trial.name: (trial.seed.init, trial.seed.data) for trial in planned}
    assert seeds == {
        **{f"pair-{i}-{role}": (5 + i, 7 + i) for i in range(3) for role in ("baseline", "candidate")},
        **{f"ablation-{name}": (5, 7) for name in ("no_promotion", "per_tensor", "block_gradients")},
    }
    assert [format_name(trial.precision) for trial in planned[:2]] == ["BF16", "FP8"]


def test_an_ablation_changes_what_its_name_says_and_nothing_else() -> None:
    study = config().study
    fp8 = study.candidate.fp8
    assert fp8 is not None
    found = {trial.role: trial.precision for trial in trials(config())[6:]}
    changed = {
        "no_promotion": {"accumulation": "hopper", "promotion": False},
        "per_tensor": {"activation_tile": "tensor", "gradient_tile": "tensor", "weight_tile": "tensor"},
        "block_gradients": {"gradient_tile": "128x128"},
    }
    for name, values in changed.items():
        assert found[name] == replace(study.candidate, fp8=replace(fp8, backend="reference", **values))


def test_schedules_keep_their_shape() -> None:
    """At the same share of the budget the study's plan is the recipe's, whether spans are shares or tokens."""
    words = ["recipe=tiny", "recipe.tokens=61440", "recipe.learning_rate.warmup_steps=0",
             "recipe.learning_rate.tail=[]", "recipe.batch_ramp=null"]  # fmt: skip
    shares = load([*words, "recipe.learning_rate.constant=60%", "recipe.learning_rate.cosine=40%"]).recipe
    tokens = load(
        [*words, "recipe.learning_rate.constant=36864", "recipe.learning_rate.cosine=24576",
         "recipe.balance.bias_update_until=59597", "recipe.mtp.switch=41779"]
    ).recipe  # fmt: skip
    before = Schedule(shares)
    for recipe in (shares, tokens):
        after = Schedule(recipe_for(recipe, shares.tokens // 4))
        assert after.steps == 15
        for step in range(after.steps):
            mine, theirs = after.at(step), before.at(4 * step)
            assert mine.learning_rate == pytest.approx(theirs.learning_rate)
            assert (mine.mtp_weight, mine.bias_update_speed) == (theirs.mtp_weight, theirs.bias_update_speed)


def test_spans_in_tokens_become_the_same_share() -> None:
    whole = load(["recipe=v3_671b"]).recipe
    small = recipe_for(whole, 148_000_000)
    assert small.learning_rate.constant == 100_000_000
    assert [phase.tokens for phase in small.learning_rate.tail] == [3_330_000, 1_670_000]
    assert small.balance.bias_update_until == 143_000_000
    assert tokens_in(small.mtp.switch, small.tokens) == 100_000_000
    assert whole.batch_ramp is not None
    assert small.batch_ramp == replace(whole.batch_ramp, tokens=4_690_000)


def test_what_follows_the_budget_or_stands_beside_it_is_left_out() -> None:
    small = recipe_for(load(["recipe=v3_671b"]).recipe, 148_000_000)
    assert (small.extensions, small.ema_decay) == ((), None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study.tokens=1000"], "study.tokens=1000 is less than one step of 1024 tokens"),
        (["study.tokens=5120"], "gives 5 steps, all within recipe.learning_rate.warmup_steps=5"),
        (["precision@study.candidate=bf16"], "study.ablations=[no_promotion,per_tensor,block_gradients] change FP8"),
        (["train.from=0123456789ab@5"], "train.from=0123456789ab@5"),
    ],
)
def test_an_impossible_study_is_refused_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        trials(config(*words))
    (line,) = str(caught.value).splitlines()
    assert says in line


def test_one_pair_is_refused_with_the_configuration() -> None:
    with pytest.raises(UserError, match=r"study\.pairs: Input should be greater than or equal to 2"):
        load(["study.pairs=1"])


def test_a_candidate_without_fp8_needs_no_ablations() -> None:
    planned = trials(config("precision@study.candidate=fp32", "study.ablations=[]"))
    assert [format_name(trial.precision) for trial in planned] == ["BF16", "FP32"] * 3
