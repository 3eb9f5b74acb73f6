"""The plan of owners: every element has one, cuts respect units, owners get equal amounts."""

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.parallel.shards import ALIGNMENT, Claim, plan, unit_of

sizes = st.integers(1, 80)
shapes = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(st.integers(1, 6), sizes, sizes))


def claims(shapes: list[tuple[int, ...]], copies: int) -> dict[int, list[Claim]]:
    ranks = tuple(range(copies))
    said = [Claim(f"p{i:02d}", 0, ranks, 0, prod(shape), shape) for i, shape in enumerate(shapes)]
    return dict.fromkeys(ranks, said)


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=12), st.integers(1, 9), st.booleans())
def test_every_element_has_one_owner_and_no_unit_is_cut(
    shapes: list[tuple[int, ...]], copies: int, matrices: bool
) -> None:
    buckets = plan(claims(shapes, copies), lambda name, shape: matrices and len(shape) > 1)
    assert sorted(part.name for bucket in buckets for part in bucket.parts) == [f"p{i:02d}" for i in range(len(shapes))]
    for bucket in buckets:
        largest = max(part.unit for part in bucket.parts)
        for begin, end in pairwise(bucket.cuts):
            assert abs((end - begin) - bucket.size / copies) <= largest + ALIGNMENT
        for part, offset in zip(bucket.parts, bucket.offsets, strict=True):
            owners = [0] * part.size
            for rank in range(copies):
                begin, end = bucket.owned(part, rank)
                assert begin % part.unit == end % part.unit == 0
                for element in range(begin, end):
                    owners[element] += 1
            assert set(owners) == {1}
            assert offset % ALIGNMENT == 0
            if matrices and len(part.shape) > 1:
                assert part.unit == prod(part.shape[-2:])


def test_units_follow_from_the_whole_shape_alone() -> None:
    assert unit_of((7168, 2048), whole=False) == 7168 * 2048 // 256
    assert unit_of((256, 64, 32), whole=False) == 64 * 32
    assert unit_of((8, 64, 32), whole=False) == 64
    assert unit_of((8, 64, 32), whole=True) == 64 * 32
    assert unit_of((7,), whole=False) == 7


def test_a_shared_parameter_has_a_bucket_of_its_own_and_experts_one_per_expert_rank() -> None:
    """Two ranks, a stage each; the embedding is on both, the experts of stage 0 are not shared."""
    tied = [Claim("embed", stage, (0, 1), 0, 320, (20, 16)) for stage in (0, 1)]
    own = [Claim("a", 0, (0,), 0, 16, (16,)), Claim("b", 1, (1,), 0, 16, (16,))]
    buckets = plan({0: [tied[0], own[0]], 1: [tied[1], own[1]]}, lambda name, shape: False)
    assert [(bucket.stages, bucket.copies) for bucket in buckets] == [((1,), (1,)), ((0, 1), (0, 1)), ((0,), (0,))]
    halves = {rank: [Claim("e", 0, (rank,), 64 * rank, 64, (4, 2, 16))] for rank in (0, 1)}
    assert [[part.start for part in bucket.parts] for bucket in plan(halves, lambda name, shape: False)] == [[64], [0]]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({0: [Claim("a", 0, (0, 1), 0, 4, (4,))], 1: []}, "held by ranks"),
        ({0: [Claim("a", 0, (0,), 0, 4, (8,))]}, "held by none"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(said: dict[int, list[Claim]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        plan(said, lambda name, shape: False)
