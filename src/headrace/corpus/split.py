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


Splits = Sequence[tuple[str, float]]
"""Splits that are not training text, each with its share, in the order in which they are filled."""


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

    def wanted(self) -> Splits:
        """The splits that get any."""
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
    share is not 0 gets at least one. Strata with too few groups for that join the one of the same shares that has most;
    `UserError` if there are too few in all of these.
    """
    if not any(stratum.count for stratum in strata.values()):
        raise UserError("corpus: too small: 0 group(s) of text; add text")
    chosen: dict[str | bytes, str] = {}
    for own in dict.fromkeys(shares[name] for name in sorted(strata)):
        alike = {name: strata[name] for name in sorted(strata) if shares[name] == own}
        chosen |= _divide_alike(alike, own.wanted(), "" if len(alike) == len(strata) else f" in {', '.join(alike)}")
    return chosen


def _divide_alike(strata: Mapping[str, Stratum], wanted: Splits, where: str) -> dict[str | bytes, str]:
    """`divide` strata that have the same shares."""
    if not wanted:
        return {}
    counts = {name: stratum.count for name, stratum in strata.items()}
    largest = max(counts, key=counts.__getitem__)
    if sum(counts.values()) <= len(wanted):
        raise UserError(
            f"corpus: too small: {sum(counts.values())} group(s) of text (folders, or documents){where} cannot be "
            f"divided into {', '.join([TRAIN, *(split for split, _ in wanted)])}; add text, or set shares of 0"
        )
    few = [name for name in counts if counts[name] <= len(wanted) and name != largest]
    chosen: dict[str | bytes, str] = {}
    for name in counts:
        if name not in few:
            chosen |= _divide(joined([strata[each] for each in (name, *(few if name == largest else ()))]), wanted)
    return chosen


def _divide(stratum: Stratum, wanted: Splits) -> dict[str | bytes, str]:
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
