"""Train, validation and held-out: whole groups go to one split, chosen by hash until each has its share of the text.

A group is a second-level directory (neighbouring files repeat each other: a document-wise split would test on copies of
the training text, or nearly) or, in JSONL and Parquet, a document. The groups of each named source are divided apart,
with its own shares; of the others, code, headers, documentation and text. So each of them is in each split where it has
groups enough. Validation chooses settings; held-out text is for the reported figures and nothing else.

Groups are taken in the order of their ranks: the hash of a directory's name, the digest of a document. They are read
from an iterator, and only those that are chosen are remembered: documents that are groups may be billions.
"""

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.errors import UserError

TRAIN, VALIDATION, HELDOUT = "train", "validation", "heldout"
SPLITS = (TRAIN, VALIDATION, HELDOUT)
RANK_BYTES = 16


class Group(NamedTuple):
    """What is never divided: its place in the order, its bytes of text, and its name (a document's is its rank)."""

    rank: bytes
    size: int
    name: str | bytes


@dataclass(frozen=True)
class Stratum:
    """All groups of a kind: how many, their bytes, and a function that yields them in the order of their ranks."""

    count: int
    size: int
    in_order: Callable[[], Iterator[Group]]


class Shares(NamedTuple):
    """What part of a stratum's text goes into the splits that are not training text."""

    validation: float
    heldout: float

    def wanted(self) -> list[tuple[str, float]]:
        """The splits that get any, in the order in which they are filled."""
        return [(split, share) for split, share in ((HELDOUT, self.heldout), (VALIDATION, self.validation)) if share]


def rank(name: str) -> bytes:
    """The rank of a directory."""
    return hashlib.sha256(name.encode()).digest()[:RANK_BYTES]


def of_directories(sizes: Mapping[str, int]) -> Stratum:
    """A stratum that is held in memory."""
    ordered = sorted(Group(rank(name), size, name) for name, size in sizes.items())
    return Stratum(len(ordered), sum(sizes.values()), lambda: iter(ordered))


def joined(strata: Sequence[Stratum]) -> Stratum:
    """Several strata as one."""
    return Stratum(
        sum(each.count for each in strata),
        sum(each.size for each in strata),
        lambda: heapq.merge(*(each.in_order() for each in strata)),
    )


def divide(strata: Mapping[str, Stratum], shares: Mapping[str, Shares]) -> dict[str | bytes, str]:
    """The split of each group that is not training text, by name; `shares` are those of each stratum.

    In each stratum groups are taken in the order of their ranks: into held-out until it has its share of the stratum's
    bytes, then into validation. A group that would overfill a split by over a quarter is passed over, but a split whose
    share is not 0 gets at least one. Strata with too few groups for that join the one that has most; `UserError` if
    there are too few in all.
    """
    wanted = {name: shares[name].wanted() for name in sorted(strata)}
    counts = {name: strata[name].count for name in sorted(strata) if wanted[name]}
    if not any(stratum.count for stratum in strata.values()):
        raise UserError("corpus: too small: 0 group(s) of text; add text")
    if not counts:
        return {}
    largest = max(counts, key=counts.__getitem__)
    if sum(counts.values()) <= len(wanted[largest]):
        raise UserError(
            f"corpus: too small: {sum(counts.values())} group(s) of text (folders, or documents) cannot be divided "
            f"into {', '.join([TRAIN, *(split for split, _ in wanted[largest])])}; add text"
        )
    few = [name for name in counts if counts[name] <= len(wanted[name]) and name != largest]
    chosen: dict[str | bytes, str] = {}
    for name in counts:
        if name not in few:
            together = joined([strata[each] for each in (name, *(few if name == largest else ()))])
            chosen |= _divide(together, wanted[name])
    return chosen


def _divide(stratum: Stratum, wanted: Sequence[tuple[str, float]]) -> dict[str | bytes, str]:
    splits: dict[str | bytes, str] = {}
    for index, (split, fraction) in enumerate(wanted):
        after = len(wanted) - index  # groups that the later splits and train need at least
        most = stratum.count - len(splits) - after
        splits |= dict.fromkeys(_fill(stratum, splits, stratum.size * fraction, most), split)
    return splits


def _fill(stratum: Stratum, taken: Collection[str | bytes], target: float, most: int) -> list[str | bytes]:
    """At most `most` free groups in order until `target` bytes are reached; the smallest one if none fits."""
    assert most > 0, "a stratum has a group for every split"
    chosen: list[str | bytes] = []
    filled, smallest = 0, Group(b"", 0, b"")
    for group in stratum.in_order():
        if filled >= target or len(chosen) == most:
            break
        if group.name in taken:
            continue
        if filled + group.size <= 1.25 * target:
            chosen.append(group.name)
            filled += group.size
        elif not smallest.rank or group.size < smallest.size:
            smallest = group
    return chosen or [smallest.name]
