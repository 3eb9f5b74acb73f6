"""Slow ranks are named within 20 steps, once, and no others are: on drawn timings of ranks that jitter."""

import random

import pytest

from headrace.training.slow import Slow, SlowRanks


class Cluster:
    """Busy seconds of ranks around `base`, with jitter and, now and then, a step that takes several times as long."""

    def __init__(self, base: list[float], seed: int) -> None:
        self.base, self.draw = base, random.Random(seed)

    def step(self, slow: dict[int, float], load: float = 1.0) -> list[float]:
        times = [base * load * slow.get(rank, 1.0) for rank, base in enumerate(self.base)]
        return [t * self.draw.uniform(0.85, 1.15) * (4.0 if self.draw.random() < 0.03 else 1.0) for t in times]


def named(watch: SlowRanks, cluster: Cluster, steps: int, slow: dict[int, float], load: float = 1.0) -> dict[int, int]:
    """After how many steps each rank was named."""
    found: dict[int, int] = {}
    for step in range(1, steps + 1):
        for one in watch.add(cluster.step(slow, load)):
            assert one.rank not in found
            assert one.factor > 1.3
            found[one.rank] = step
    return found


LAYOUTS = {
    "two alike, as in DualPipe": ([1.0, 1.0], [0, 0]),
    "a pipeline of two": ([1.0, 2.1], [0, 1]),
    "a pipeline of four": ([0.5, 1.0, 1.1, 2.0], [0, 1, 2, 3]),
    "data ranks": ([1.0] * 4, [0] * 4),
    "a pipeline of two with data ranks": ([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_rank_half_as_slow_again_is_named_within_twenty_steps(layout: str, seed: int) -> None:
    base, roles = LAYOUTS[layout]
    rank = seed % len(base)
    cluster, watch = Cluster(base, seed), SlowRanks(roles)
    assert named(watch, cluster, 40, {}) == {}
    found = named(watch, cluster, 60, {rank: 1.5})
    assert list(found) == [rank]
    assert found[rank] <= 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_thousand_steps_of_jitter_name_nobody(layout: str) -> None:
    base, roles = LAYOUTS[layout]
    cluster, watch = Cluster(base, 7), SlowRanks(roles)
    assert named(watch, cluster, 10_000, {}) == {}


def test_a_rank_that_is_slow_from_the_start_is_named_by_its_peers() -> None:
    assert list(named(SlowRanks([0, 0]), Cluster([1.0, 1.0], 1), 20, {1: 1.5})) == [1]
    # What it cannot tell: without peers, slow from the first step is a rank's nature.
    assert named(SlowRanks([0, 1]), Cluster([1.0, 1.0], 1), 100, {1: 1.5}) == {}


def test_a_step_that_is_longer_for_all_names_nobody() -> None:
    cluster, watch = Cluster([1.0, 2.0, 1.5], 3), SlowRanks([0, 1, 2])
    assert named(watch, cluster, 40, {}) == {}
    assert named(watch, cluster, 100, {}, load=5.0) == {}


def test_a_rank_alone_is_never_slow() -> None:
    watch = SlowRanks([0])
    assert all(watch.add([seconds]) == [] for seconds in (1.0, 9.0) * 30)


def test_the_factor_is_that_of_the_median() -> None:
    watch = SlowRanks([0, 0, 0])
    found = [one for _ in range(15) for one in watch.add([1.0, 3.0, 1.0])]
    assert found == [Slow(1, 3.0)]
