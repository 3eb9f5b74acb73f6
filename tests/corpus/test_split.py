"""Splits: whole groups, near their fractions, never empty, the same every time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.corpus.split import TRAIN, Shares, divide, of_directories
from headrace.errors import UserError

SIZES = {f"folder/{i}": 100 + 37 * i % 500 for i in range(400)}


def assign(
    sizes: dict[str, int], strata: dict[str, str], validation: float, heldout: float, **others: Shares
) -> dict[str, str]:
    """The split of each directory; `others` are strata with shares of their own."""
    kinds = set(strata.values())
    divided = {kind: of_directories({name: sizes[name] for name in sizes if strata[name] == kind}) for kind in kinds}
    chosen = divide(divided, {**dict.fromkeys(kinds, Shares(validation, heldout)), **others})
    return {name: chosen.get(name, TRAIN) for name in sizes}


def bytes_of(splits: dict[str, str], sizes: dict[str, int], split: str) -> int:
    return sum(size for group, size in sizes.items() if splits[group] == split)


def test_fractions_are_met_in_bytes() -> None:
    splits = assign(SIZES, dict.fromkeys(SIZES, "code"), 0.03, 0.05)
    total = sum(SIZES.values())
    assert 0.04 < bytes_of(splits, SIZES, "heldout") / total < 0.0625
    assert 0.024 < bytes_of(splits, SIZES, "validation") / total < 0.0375
    assert splits == assign(dict(reversed(SIZES.items())), dict.fromkeys(SIZES, "code"), 0.03, 0.05)


def test_every_kind_is_in_every_split_where_it_has_groups_enough() -> None:
    strata = {group: "docs" if number % 40 == 0 else "code" for number, group in enumerate(SIZES)}
    strata["folder/399"] = "rare"
    splits = assign(SIZES, strata, 0.01, 0.02)
    for split in ("train", "validation", "heldout"):
        assert {strata[group] for group, where in splits.items() if where == split} >= {"code", "docs"}


def test_a_zero_fraction_leaves_its_split_empty() -> None:
    assert set(assign(SIZES, dict.fromkeys(SIZES, "code"), 0.0, 0.0).values()) == {"train"}
    assert set(assign(SIZES, dict.fromkeys(SIZES, "code"), 0.1, 0.0).values()) == {"train", "validation"}


def test_each_source_has_the_shares_that_it_asks_for() -> None:
    strata = {group: ("web", "books", "logs")[number % 3] for number, group in enumerate(SIZES)}
    splits = assign(SIZES, strata, 0.02, 0.04, books=Shares(0.2, 0.1), logs=Shares(0.0, 0.0))
    for source, validation, heldout in (("web", 0.02, 0.04), ("books", 0.2, 0.1), ("logs", 0, 0)):
        own = {group: size for group, size in SIZES.items() if strata[group] == source}
        for split, share in (("validation", validation), ("heldout", heldout)):
            assert bytes_of(splits, own, split) / sum(own.values()) == pytest.approx(share, rel=0.25)


def test_sources_too_small_join_those_of_the_same_shares() -> None:
    sizes = {"a": 5, "b": 6, "c": 7}  # three groups are needed, and no source has them alone
    splits = assign(sizes, {"a": "web", "b": "web", "c": "notes"}, 0.2, 0.2)
    assert sorted(splits.values()) == ["heldout", "train", "validation"]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_source_too_small_for_its_own_shares_is_named(groups: int) -> None:
    own = {f"own/{number}": 50 for number in range(groups)}
    sizes, strata = {**SIZES, **own}, {**dict.fromkeys(SIZES, "web"), **dict.fromkeys(own, "notes")}
    with pytest.raises(UserError, match=rf"{groups} group\(s\) of text \(folders, or documents\) in notes cannot"):
        assign(sizes, strata, 0.02, 0.02, notes=Shares(0.1, 0.1))
    assert {assign(sizes, strata, 0.02, 0.02, notes=Shares(0, 0))[group] for group in own} == {"train"}
    if groups == 2:  # enough for training text and one split
        splits = assign(sizes, strata, 0.02, 0.02, notes=Shares(0, 0.1))
        assert sorted(splits[group] for group in own) == ["heldout", "train"]


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.sampled_from(["code", "docs", "text"])), min_size=3, max_size=40),
    st.floats(0.001, 0.45),
    st.floats(0.001, 0.45),
)
def test_no_split_is_ever_empty(groups: list[tuple[int, str]], validation: float, heldout: float) -> None:
    sizes = {f"g{number}": size for number, (size, _) in enumerate(groups)}
    strata = {f"g{number}": kind for number, (_, kind) in enumerate(groups)}
    splits = assign(sizes, strata, validation, heldout)
    assert set(splits) == set(sizes)
    assert set(splits.values()) == {"train", "validation", "heldout"}


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"corpus: too small: 2 group"):
        assign({"a": 1, "b": 2}, {"a": "text", "b": "text"}, 0.1, 0.1)
    with pytest.raises(UserError, match="too small"):
        assign({}, {}, 0.0, 0.0)
