"""The plan of a file, and the table that joins what ranks wrote."""

import json
from typing import Any

import pytest
import torch

from headrace.checkpoint.slices import FilePlan, as_bytes, joined, parsed
from headrace.parallel.shards import Piece


def described(name: str, *pieces: Piece) -> dict[str, Any]:
    plan = FilePlan(pieces, {"step": "3"})
    return plan.described(f"{name}.safetensors", memoryview(plan.header + bytes(plan.size - len(plan.header))))


def rows(start: int, stop: int, name: str = "w", size: int = 10) -> Piece:
    return Piece(name, torch.zeros(stop - start), (size,), start)


def test_a_plan_is_a_whole_file_with_aligned_elements() -> None:
    pieces = [
        Piece("c", torch.zeros(3, dtype=torch.uint8), (3,)),
        Piece("b", torch.zeros(5, dtype=torch.bfloat16), (9,), 4),
        Piece("none", torch.zeros(0, 4), (0, 4)),
        Piece("a", torch.tensor(1.0), ()),
        Piece("d", torch.zeros(2, dtype=torch.int64), (2,)),
    ]
    plan = FilePlan(pieces, {"step": "3", "token": "x"})
    length = int.from_bytes(plan.header[:8], "little")
    header = json.loads(plan.header[8:])
    assert len(plan.header) == 8 + length
    assert len(plan.header) % 64 == 0
    assert header.pop("__metadata__") == {"format": "pt", "step": "3", "token": "x"}
    assert list(header) == ["d/0", "a/0", "b/4", "c/0"]
    end = 0
    for placed in plan.placed:
        assert placed.offset == len(plan.header) + end
        assert placed.offset % placed.piece.tensor.element_size() == 0
        end += placed.bytes
    assert plan.size == len(plan.header) + end
    assert [entry["data_offsets"] for entry in header.values()] == [[0, 16], [16, 20], [20, 30], [30, 33]]


def test_the_table_joins_pieces_in_the_order_of_elements() -> None:
    said = [
        {"model": described("model-00000", rows(6, 10), rows(0, 2))},
        {"model": described("model-00001", rows(2, 6)), "ema": described("ema-00001")},
    ]
    table = parsed(joined(3, "x", said))
    assert (table.step, table.token) == (3, "x")
    assert table.kinds["ema"] == {}
    entry = table.kinds["model"]["w"]
    assert (entry.dtype, entry.shape, entry.elements) == (torch.float32, (10,), 10)
    assert [(part.start, part.size, part.file[6:11]) for part in entry.slices] == [
        (0, 2, "00000"), (2, 4, "00001"), (6, 4, "00000"),
    ]  # fmt: skip
    assert set(table.files) == {"model-00000.safetensors", "model-00001.safetensors", "ema-00001.safetensors"}


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([rows(0, 4), rows(5, 10)], "written by none, or twice"),
        ([rows(0, 5), rows(4, 10)], "written by none, or twice"),
        ([rows(0, 5), rows(0, 5)], "written by none, or twice"),
        ([rows(0, 9)], "written by none, or twice"),
        ([rows(0, 5), rows(5, 11, size=11)], "ranks disagree about w"),
        ([rows(0, 5), Piece("w", torch.zeros(5, dtype=torch.bfloat16), (10,), 5)], "ranks disagree about w"),
    ],
)
def test_ranks_that_do_not_fit_together_are_our_mistake(pieces: list[Piece], says: str) -> None:
    said = [{"model": described(f"model-0000{rank}", piece)} for rank, piece in enumerate(pieces)]
    with pytest.raises(AssertionError, match=says):
        joined(3, "x", said)


def test_two_ranks_with_one_number_are_our_mistake() -> None:
    said = [{"model": described("model-00000", rows(0, 5))}, {"model": described("model-00000", rows(5, 10))}]
    with pytest.raises(AssertionError, match="two ranks wrote"):
        joined(3, "x", said)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../model-00000.safetensors"}, {"file": "model-00001.safetensors"}, {"offset": -1}, {"start": 1},
        {"size": 9}, {"size": 0}, {"more": 1},
    ],
)  # fmt: skip
def test_a_table_that_hashes_right_but_does_not_make_sense_is_refused(change: dict[str, Any]) -> None:
    table = joined(3, "x", [{"model": described("model-00000", rows(0, 10))}])
    raw = json.loads(table)
    raw["kinds"]["model"]["w"]["slices"][0] |= change
    with pytest.raises(ValueError, match=r"do not make it up|not a table"):
        parsed(_rehashed(raw))
    raw = json.loads(table) | {"version": 2}
    with pytest.raises(ValueError, match="version 2"):
        parsed(_rehashed(raw))


def _rehashed(raw: dict[str, Any]) -> bytes:
    from headrace.artifacts.files import hash_bytes
    from headrace.checkpoint.slices import _text

    del raw["hash"]
    return _text({**raw, "hash": hash_bytes(_text(raw), "xxh3")})


@pytest.mark.parametrize("tensor", [torch.ones(2, 3), torch.tensor(1.0).bfloat16(), torch.zeros(0, 3)])
def test_bytes_are_the_tensor_s_own_memory(tensor: torch.Tensor) -> None:
    view = as_bytes(tensor)
    assert len(view) == tensor.nbytes
    view[:] = bytes(len(view))
    assert not tensor.any()
