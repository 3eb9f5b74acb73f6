"""SIGKILL at random moments, of a rank, of the stage's own process, in the middle of a save: nothing of it is left."""

import pytest

from faults.conftest import Fresh
from faults.kills import VICTIMS, Kill, fought, percentile
from faults.product import EXTENDED, STEP_TOKENS, Product

KILLS = 25
SEED = 607  # every victim at every moment, wherever a run ends and the next begins
RECOVERY_SECONDS = 20.0


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(fresh: Fresh, undisturbed: Product) -> None:
    # A save every other step: on a busy machine some are over before anybody sees that they have begun.
    product = fresh("checkpoint.interval=2")
    fight = fought(product, undisturbed, seed=330, numbers=range(3))
    assert [(k.victim, k.moment) for k in fight.kills] == [
        ("rank 0", "training"),
        ("stage", "saving"),
        ("rank 1", "saving"),
    ]
    assert product.differences(undisturbed) == []


@pytest.mark.faults
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_25_kills_cost_no_bit_and_recoveries_are_quick(fresh: Fresh) -> None:
    longer = (EXTENDED, f"recipe.tokens={STEP_TOKENS * 90}")
    undisturbed = fresh(*longer)
    stage = undisturbed.run()
    assert stage.code == 0, stage.said
    kills: list[Kill] = []
    while len(kills) < KILLS:
        # Every second run removes old checkpoints as it goes, so that kills come into that too.
        keep = 2 if len(kills) % 2 else 1000
        product = fresh(*longer, f"checkpoint.keep={keep}", "checkpoint.interval=2")
        kills += fought(product, undisturbed, seed=SEED, numbers=range(len(kills), KILLS)).kills
        assert product.differences(undisturbed) == [], kills
    moments = ("training", "saving", "starting")
    assert {(kill.victim, kill.moment) for kill in kills} == {(who, when) for who in VICTIMS for when in moments}
    recoveries = [kill.recovery for kill in kills if kill.recovery is not None]
    half, most = percentile(recoveries, 0.5), percentile(recoveries, 0.95)
    print(f"{len(kills)} kills, {len(recoveries)} recoveries: p50 {half:.1f} s, p95 {most:.1f} s")
    assert len(recoveries) > KILLS / 2
    assert most < RECOVERY_SECONDS
