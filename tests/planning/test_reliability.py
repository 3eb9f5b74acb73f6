"""Intervals between saves and expected ETTR, against the table computed independently in the project's references."""

import random
from dataclasses import replace

import pytest

from headrace.config.compose import load
from headrace.planning.reliability import (
    auto_interval,
    availability_optimal,
    ettr,
    expectation,
    machines_of,
    mean_time_between_faults,
    young,
)

MINUTE, HOUR = 60.0, 3600.0
RSC_1 = 6.5 / 1000  # faults of one machine and day, arXiv 2410.21680
TABLE = [  # GPUs, M in hours, T in minutes at stalls of 10 and 60 s, ETTR at (60 s, 10 min) and (2 s, 1 min)
    (2048, 14.4, 17, 42, 0.940, 0.990),
    (16384, 1.8, 6, 15, 0.772, 0.966),
    (131072, 0.23, 2, 5, 0.0, 0.856),
]


@pytest.mark.parametrize(("gpus", "hours", "at_10", "at_60", "slow", "fast"), TABLE)
def test_the_table_of_metas_cluster(
    gpus: int, hours: float, at_10: float, at_60: float, slow: float, fast: float
) -> None:
    mttf = mean_time_between_faults(gpus / 8, RSC_1)
    assert mttf / HOUR == pytest.approx(hours, abs=0.05)
    assert round(young(10, mttf) / MINUTE) == at_10
    assert round(young(60, mttf) / MINUTE) == at_60
    assert ettr(young(60, mttf), 60, mttf, 10 * MINUTE) == pytest.approx(slow, abs=5e-4)
    assert ettr(young(2, mttf), 2, mttf, MINUTE) == pytest.approx(fast, abs=5e-4)


def test_youngs_interval_is_the_best_of_its_formula() -> None:
    stall, mttf, recovery = 3.0, 5000.0, 40.0
    best = young(stall, mttf)
    here = ettr(best, stall, mttf, recovery)
    assert all(ettr(best * factor, stall, mttf, recovery) < here for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_formulas_agree_where_faults_are_rare_and_the_other_is_longer_where_they_are_not() -> None:
    assert availability_optimal(1.0, 1e8, 10.0) == pytest.approx(young(1.0, 1e8), rel=1e-3)
    assert availability_optimal(10.0, 1000.0, 300.0) == pytest.approx(10 + (2 * 1300 * 10 + 100) ** 0.5)


def test_a_simulated_job_spends_the_predicted_share_on_progress() -> None:
    stall, mttf, recovery = 2.0, 4000.0, 30.0
    interval = young(stall, mttf)
    draw = random.Random(0)
    wall = useful = 0.0
    for _ in range(20_000):  # faults; progress since the last save is lost with each
        until = draw.expovariate(1 / mttf)
        saves = int(until // (interval + stall))
        wall += until + recovery
        useful += saves * interval
    assert useful / wall == pytest.approx(ettr(interval, stall, mttf, recovery), abs=0.003)


def test_auto_is_youngs_interval_in_steps() -> None:
    per_day = 86400 / 1000  # a fault in 1,000 s
    assert auto_interval(0.5, 0.2, 1, per_day) == 40  # sqrt(2 x 0.2 x 1000) = 20 s
    assert auto_interval(0.5, 0.2, 4, per_day) == 20
    assert auto_interval(100.0, 0.0, 4, per_day) == 1  # each step where saves cost nothing


def test_a_machine_holds_node_size_ranks() -> None:
    single = load(["experiment=tiny"]).parallel
    assert machines_of(single) == 1
    assert machines_of(replace(single, pipeline=16, data=128, node_size=8)) == 256
    assert machines_of(replace(single, pipeline=3, node_size=2)) == 2


def test_what_is_expected_is_said_in_a_row() -> None:
    label, value = expectation(256, RSC_1)
    assert label == "expected faults"
    assert value.startswith("one in 14.4 h on 256 machines: a save every 7.6 min, ETTR 99.0 %")
    assert "the job cannot progress" in expectation(16384, RSC_1, stall=60, recovery=600)[1]
