"""The plan: every document in one unit, units of equal bytes, sources apart, and no unit reads what it need not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.tokens.plan import Text, Unit, plan, read_plan, write_plan

FIXED = {"validation": (7, 700), "heldout": (9, 1800)}


def text(*pieces: tuple[str, list[int]]) -> Text:
    """Pieces by source and the sizes of their documents."""
    counts = np.array([len(sizes) for _, sizes in pieces], dtype=np.int64)
    totals = np.array([sum(sizes) for _, sizes in pieces], dtype=np.int64)
    return Text([source for source, _ in pieces], counts, totals)


def documents_of(unit: Unit, pieces: list[tuple[str, list[int]]]) -> list[tuple[int, int]]:
    """(piece, place) of each document, read as a reader does."""
    all_of = [
        (number, place)
        for number in range(unit.first_piece, unit.last_piece + 1)
        if not unit.source or pieces[number][0] == unit.source
        for place in range(len(pieces[number][1]))
    ]
    return all_of[unit.skip : unit.skip + unit.documents]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 99), max_size=6)), min_size=1, max_size=12),
    st.integers(2, 9),
)
def test_every_document_is_in_one_unit_and_in_its_sources(pieces: list[tuple[str, list[int]]], shards: int) -> None:
    pieces = sorted(pieces, key=lambda piece: piece[0])  # sources lie one behind the other
    units = plan(text(*pieces), FIXED, shards, 4.0)
    training = [unit for unit in units if unit.split == "train"]
    found = [document for unit in training for document in documents_of(unit, pieces)]
    assert found == [(number, place) for number, (_, sizes) in enumerate(pieces) for place in range(len(sizes))]
    assert len(training) == (shards if found else 0)
    for unit in training:
        mine = documents_of(unit, pieces)
        assert len(mine) == unit.documents
        if mine:
            assert mine[0][0] == unit.first_piece
            assert mine[-1][0] == unit.last_piece
    assert len({unit.name for unit in units}) == len(units)


def test_units_have_equal_bytes_whatever_the_pieces_hold() -> None:
    generator = np.random.default_rng(0)
    pieces = [("web", generator.integers(100, 5000, 200).tolist()) for _ in range(50)]
    units = [unit for unit in plan(text(*pieces), FIXED, 16, 4.0) if unit.split == "train"]
    sizes = [sum(pieces[piece][1][place] for piece, place in documents_of(unit, pieces)) for unit in units]
    # Within a piece documents are taken for equally long: here that is wrong by 14 kB a unit (one standard deviation).
    assert all(abs(size - np.mean(sizes)) < 4 * 14_000 for size in sizes)
    for unit, size in zip(units, sizes, strict=True):
        assert unit.expected_tokens == pytest.approx(size / 4.0 + unit.documents, rel=0.04)
    # Pieces are read by one unit, but for those at a border.
    assert sum(unit.last_piece - unit.first_piece + 1 for unit in units) <= 50 + 15


def test_sources_have_shards_by_their_share_and_one_at_least() -> None:
    units = plan(text(("code", [10] * 5), ("empty", []), ("web", [1000] * 90), ("wiki", [1000] * 30)), FIXED, 9, 4.0)
    assert [unit.name for unit in units] == [
        "code.train-00000-of-00001",
        *(f"web.train-0000{index}-of-00005" for index in range(5)),
        *(f"wiki.train-0000{index}-of-00003" for index in range(3)),
        "validation-00000-of-00001",
        "heldout-00000-of-00001",
    ]
    assert sum(unit.documents for unit in units if unit.source == "web") == 90
    with pytest.raises(UserError, match=r"tokens\.shards=2 is less than the 3 sources"):
        plan(text(("a", [1]), ("b", [1]), ("c", [1])), FIXED, 2, 4.0)


def test_a_single_source_is_named_where_the_corpus_names_its_sources() -> None:
    for named, name in ((False, "train-00000-of-00001"), (True, "web.train-00000-of-00001")):
        units = plan(text(("web", [10] * 5), ("empty", [])), FIXED, 1, 4.0, named=named)
        assert [unit.name for unit in units] == [name, "validation-00000-of-00001", "heldout-00000-of-00001"]


def test_validation_and_held_out_text_are_one_shard_each() -> None:
    *_, validation, heldout = plan(text(("web", [10] * 5)), FIXED, 1, 4.0)
    assert (validation.documents, validation.expected_tokens) == (7, 182)
    assert (heldout.documents, heldout.expected_tokens) == (9, 459)


def test_a_plan_is_written_and_read(tmp_path: Path) -> None:
    units = plan(text(("web", [10] * 5)), FIXED, 2, 4.0, lambda first, last: f"{first}-{last}")
    write_plan(tmp_path / "plan.json", units)
    assert read_plan(tmp_path / "plan.json") == units
    assert units[0].files == "0-0"
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json: not a plan"):
        read_plan(tmp_path / "plan.json")
