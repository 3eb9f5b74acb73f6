"""The plan of a dataset: which documents become which shard, decided before any of them is read.

A unit of work makes one shard of one source. Units are cut from a source's text in its reading order, with equally many
bytes each: pieces of the corpus and what they hold are known, so a unit reads its own pieces and no others, but for the
two that it may share with its neighbours. Sources have shards by their share of the text, and one at least. The plan is
a pure function of the corpus and of the number of shards, whoever does the work, and however many do.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import read_json, write_json
from headrace.errors import UserError
from headrace.tokens.order import apportioned

Ints = NDArray[np.int64]
TRAIN, FIXED = "train", ("validation", "heldout")


class Text(NamedTuple):
    """The training text of a corpus: what each of its pieces [P], in reading order, holds of it."""

    sources: Sequence[str]
    documents: Ints
    bytes: Ints


@dataclass(frozen=True)
class Unit:
    """One shard: number `index` of the `count` shards of `split`, or of one source's part of it.

    It holds `documents` documents of the split in reading order: in training text from piece `first_piece` on, without
    the first `skip` of that piece. `source` is named where the corpus names its sources.
    """

    split: str
    index: int
    count: int
    source: str = ""
    first_piece: int = 0
    last_piece: int = 0
    skip: int = 0
    documents: int = 0
    expected_tokens: int = 0
    files: str = ""  # a hash of the locked files that it is read from

    @property
    def name(self) -> str:
        """The shard's file name without its suffix."""
        where = f"{self.source}.{self.split}" if self.source else self.split
        return f"{where}-{self.index:05d}-of-{self.count:05d}"


def plan(
    text: Text,
    fixed: dict[str, tuple[int, int]],
    shards: int,
    bytes_per_token: float,
    files: Callable[[int, int], str] = lambda first, last: "",
    named: bool = False,
) -> list[Unit]:
    """All units: `shards` of training text, then one of validation and one of held-out text.

    `fixed` has (documents, bytes) of these two; `files(first, last)` the hash of the files of pieces first to last.
    `named`: shards say their source even where all are of one, so that a mixture finds it by its name.
    Raises `UserError` where there are fewer shards than sources.
    """
    names = list(dict.fromkeys(np.array(text.sources)[text.documents > 0].tolist()))
    if shards < len(names):
        raise UserError(f"tokens.shards={shards} is less than the {len(names)} sources of the corpus; raise it")
    units, named = [], named or len(names) > 1
    for name, count in zip(names, _shards_of(text, names, shards), strict=True):
        mine = np.flatnonzero((np.array(text.sources) == name) & (text.documents > 0))
        units += _cut(text, mine, count, name if named else "", bytes_per_token)
    units = [replace(unit, files=files(unit.first_piece, unit.last_piece)) for unit in units]
    for split in FIXED:
        documents, size = fixed[split]
        units.append(Unit(split, 0, 1, documents=documents, expected_tokens=_tokens(size, documents, bytes_per_token)))
    return units


def _shards_of(text: Text, names: Sequence[str], shards: int) -> list[int]:
    """Shards of each source: one, and of the rest its share of the bytes."""
    if not names:
        return []
    sources = np.array(text.sources)
    sizes = [max(1, int(text.bytes[sources == name].sum())) for name in names]
    return [1 + more for more in apportioned(shards - len(names), sizes)]


def _cut(text: Text, pieces: Ints, count: int, source: str, bytes_per_token: float) -> list[Unit]:
    """The units of one source, whose pieces these are."""
    documents, sizes = text.documents[pieces], text.bytes[pieces]
    ends, size_ends = np.cumsum(documents), np.cumsum(sizes)
    total, last = int(size_ends[-1]), int(ends[-1])
    begins = [0]
    for index in range(1, count):
        at = total * index // count
        place = int(np.searchsorted(size_ends, at, side="right"))
        before = int(size_ends[place]) - int(sizes[place])
        within = int(documents[place]) * (at - before) // max(1, int(sizes[place]))
        begins.append(int(ends[place]) - int(documents[place]) + within)
    units = []
    for index, (begin, end) in enumerate(zip(begins, [*begins[1:], last], strict=True)):
        first = min(int(np.searchsorted(ends, begin, side="right")), len(pieces) - 1)
        final = max(first, int(np.searchsorted(ends, end, side="left")))
        skip = begin - (int(ends[first]) - int(documents[first]))
        share = total * (index + 1) // count - total * index // count
        expected = _tokens(share, end - begin, bytes_per_token)
        units.append(
            Unit(
                TRAIN, index, count, source, int(pieces[first]), int(pieces[final]), skip, end - begin, expected
            )
        )  # fmt: skip
    return units


def _tokens(size: int, documents: int, bytes_per_token: float) -> int:
    """About how many tokens so much text becomes: each document has an end of sequence too."""
    return round(size / bytes_per_token) + documents


def write_plan(path: Path, units: Sequence[Unit]) -> None:
    """Write a plan as JSON, with what it adds up to."""
    tokens, documents = (sum(getattr(unit, key) for unit in units) for key in ("expected_tokens", "documents"))
    write_json(path, {"expected_tokens": tokens, "documents": documents, "units": [asdict(unit) for unit in units]})


def read_plan(path: Path) -> list[Unit]:
    """What `write_plan` wrote; `UserError` for anything else."""
    try:
        units: list[dict[str, Any]] = read_json(path)["units"]
        return [Unit(**unit) for unit in units]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a plan of token shards; remove it, and it is made again") from None
