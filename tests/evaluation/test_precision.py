"""study.json: the right runs are compared, divergence is kept, curves are thinned, the headline says what was found."""

import json
from typing import Any

import pytest

from headrace.evaluation.precision import POINTS, headline, side_by_side, study_facts, verdict
from headrace.evaluation.statistics import Estimate


def made(role: str, pair: int, losses: list[float | None], validation: float | None, stopped: int | None = None) -> Any:
    return {
        "name": f"pair-{pair}-{role}" if role in ("baseline", "candidate") else f"ablation-{role}",
        "role": role,
        "pair": pair,
        "format": "BF16" if role == "baseline" else "FP8",
        "losses": losses,
        "validation_loss": validation,
        "diverged_at": stopped,
        "tokens_per_second": 100.0,
    }


RUNS = [
    made("candidate", 1, [8.0, 4.04], 5.05),
    made("baseline", 0, [8.0, 2.0], 4.0),
    made("per_tensor", 0, [8.0, 3.0], 6.0),
    made("candidate", 0, [8.0, 2.0], 4.0),
    made("no_promotion", 0, [8.0], 4.5, stopped=2),
    made("baseline", 1, [8.0, 4.0], 5.0),
]


def test_runs_are_compared_within_their_pair() -> None:
    facts = study_facts(RUNS, 0.0, (1000, 2000))
    difference = facts["difference"]
    assert difference["second_half"]["each"] == pytest.approx([0.0, 0.01])
    assert difference["second_half"]["value"] == pytest.approx(0.005)
    assert difference["validation"]["each"] == pytest.approx([0.0, 0.01])
    assert (facts["baseline"], facts["candidate"], facts["pairs"], facts["tokens"]) == ("BF16", "FP8", 2, 2000)
    assert facts["spread"]["validation"] == pytest.approx((0.5**0.5) / 4.5)


def test_ablations_are_compared_with_the_first_baseline() -> None:
    ablations = study_facts(RUNS, 0.0, (1000, 2000))["ablations"]
    assert ablations["per_tensor"] == {"second_half": 0.5, "end": 0.5, "validation": 0.5, "diverged_at": None}
    assert ablations["no_promotion"] == {"second_half": None, "end": None, "validation": None, "diverged_at": 2}


def test_the_facts_are_json_without_nan_and_hold_the_runs() -> None:
    facts = study_facts(RUNS, 0.9, (1000, 2000))
    json.dumps(facts, allow_nan=False)
    assert facts["curves"]["losses"]["ablation-no_promotion"] == [8.0, None]
    assert [run["tokens_per_second"] for run in facts["runs"]] == [100.0] * 6
    assert not any("losses" in run for run in facts["runs"])


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    runs = [made(role, pair, [float(5000 - i) for i in range(4000)], 1.0) for role in ("baseline", "candidate")
            for pair in (0, 1)]  # fmt: skip
    curves = study_facts(runs, 0.0, range(10, 40_001, 10))["curves"]
    assert len(curves["tokens"]) == len(curves["each"][0]) == POINTS
    assert (curves["tokens"][0], curves["tokens"][-1]) == (10, 40_000)
    assert (curves["losses"]["pair-0-baseline"][0], curves["losses"]["pair-0-baseline"][-1]) == (5000.0, 1001.0)


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.001, -0.001, 0.0024, "within"),
        (-0.001, -0.0026, 0.001, "mean within"),
        (0.0026, 0.002, 0.0032, "beyond"),
        (-0.0026, -0.004, 0.001, "beyond"),
    ],
)
def test_verdict(value: float, low: float, high: float, expected: str) -> None:
    assert verdict(Estimate(value, low, high, 3)) == expected


def test_the_headline() -> None:
    facts = study_facts(RUNS, 0.0, (1000, 2000))
    # mean 0.5 %, half-width 12.706 * 0.5 %; seeds at 2 and 4
    assert headline(facts) == "FP8 - BF16: +0.50 % [-5.85, +6.85] over 2 pairs; line 0.25 %; seed spread 47.14 %"


def test_the_headline_of_a_study_that_diverged() -> None:
    runs = [*(run for run in RUNS if run["name"] != "pair-1-candidate"), made("candidate", 1, [8.0], None, stopped=2)]
    facts = study_facts(runs, 0.0, (1000, 2000))
    assert facts["difference"]["verdict"] == "diverged"
    assert headline(facts) == "FP8 - BF16: no difference, since pair-1-candidate diverged"


def test_tables_of_formats_stand_side_by_side() -> None:
    before = [{"what": "layers", "format": "BF16"}, {"what": "head", "format": "BF16"}]
    after = [{"what": "back end", "format": "reference"}, {"what": "layers", "format": "E4M3"}]
    assert side_by_side(before, after) == [
        ["back end", "", "reference"],
        ["layers", "BF16", "E4M3"],
        ["head", "BF16", ""],
    ]
