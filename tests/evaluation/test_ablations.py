"""Ablations differ from their baseline by what they say, and have its text, rows, seeds, budget and items."""

import pytest

from headrace.config.compose import load, to_dict
from headrace.planning.parameters import count
from headrace.reporting.runs import differences
from headrace.stages.table import slices

CHANGED = {
    "ablations_no_mtp": ["model.num_nextn_predict_layers=0"],
    "ablations_aux_loss": ["recipe.balance.bias_update_speed=0", "recipe.balance.loss_weight=0.001"],
    "ablations_dense": ["model.intermediate_size=448", "model.first_k_dense_replace=3"],
    "ablations_adamw": ["recipe.optimizer.name=adamw"],
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_ablation_changes_what_its_name_says_and_nothing_else(name: str) -> None:
    baseline, ablation = load(["experiment=ablations"]), load([f"experiment={name}"])
    assert differences(to_dict(ablation), to_dict(baseline)) == CHANGED[name]
    before, after = slices(baseline, "sources"), slices(ablation, "sources")
    assert before["tokenize"] == after["tokenize"] and before["pretrain"] != after["pretrain"]
    assert before["evaluate"]["config"] == after["evaluate"]["config"]


def test_the_baseline_trains_as_the_demo_does() -> None:
    assert load().parallel == load(["experiment=ablations"]).parallel  # not a part of fingerprints, but of results
    demo, baseline = slices(load(), "sources"), slices(load(["experiment=ablations"]), "sources")
    assert demo["pretrain"] == baseline["pretrain"] and demo["convert"] == baseline["convert"]


def test_the_dense_twin_has_as_many_weights_per_token_but_for_the_routers() -> None:
    moe, dense = (count(load([f"experiment={name}"]).model) for name in ("ablations", "ablations_dense"))
    assert dense.activated == moe.activated - moe.routers and dense.routers == dense.routed_experts == 0
    assert dense.mtp == moe.mtp
