"""Ranges of digests: together they are the sorted whole, each is small, and repetitions meet."""

from pathlib import Path

import numpy as np
import pytest

from headrace.corpus.digest_ranges import RECORD, DigestRanges, Records, first_of_each


def records(digests: list[int]) -> Records:
    made = np.zeros(len(digests), dtype=RECORD)
    made["high"] = np.array(digests, dtype=np.uint64)
    made["ordinal"] = np.arange(len(digests))
    return made


@pytest.mark.parametrize("most", [10, 64, 5000])
def test_ranges_are_the_sorted_whole(tmp_path: Path, most: int) -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64).tolist()
    ranges = DigestRanges(tmp_path, 2000, most)
    whole = records(digests)
    for begin in range(0, 2000, 300):
        assert not len(ranges.add(whole[begin : begin + 300]))
    ranges.flush()
    found = [part for _, part in ranges]
    assert np.concatenate([np.sort(part, order="high") for part in found])["high"].tolist() == sorted(digests)
    assert sorted(np.concatenate(found)["ordinal"].tolist()) == list(range(2000))
    if most == 64:
        assert len(found) > 20 and max(map(len, found)) <= 1.5 * 64


def test_the_first_of_equal_digests_stays() -> None:
    made = records([7, 3, 7, 7, 3, 1])
    made["low"] = [0, 0, 0, 1, 0, 0]
    kept, again = first_of_each(made)
    assert kept["ordinal"].tolist() == [5, 1, 0, 3] and again.tolist() == [4, 2]


def test_a_flood_of_one_digest_is_reduced_before_it_is_written(tmp_path: Path) -> None:
    ranges = DigestRanges(tmp_path, 1000, 100)
    made = records([9] * 1000)
    repeated = [ranges.add(made[begin : begin + 100]) for begin in range(0, 1000, 100)]
    assert sum(map(len, repeated)) == 990
    assert sum(len(part) for _, part in ranges) == 10
