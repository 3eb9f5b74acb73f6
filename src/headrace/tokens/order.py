"""The order of training rows: a permutation that is a function, so that nothing is stored and any position is a start.

A Feistel network is a bijection whatever its round function is. Six rounds over the smallest even number of bits that
can count the rows permute a range of at most 4 x rows; values outside are sent through again until they fall inside
("cycle walking"), which makes it a bijection on the rows. The key is derived from seed and epoch, so each epoch has
its own order.

A mixture of sources is as little stored. Weights are whole numbers, W their sum; every block of W positions draws from
source k exactly `weights[k]` times, in an order that is another such permutation. So proportions are exact in every
block and never drift, and how often a source has been drawn before a position is a multiplication. Draw j of a source
is row `row_at(its own seed, j, its rows)`: each of its epochs meets every row once, however often it is repeated. New
weights begin a new segment wherever they are asked for; it carries how often each source had been drawn before. The
block that they cut short becomes a segment of its own, whose weights are its share of the old ones in whole rows: so
draws stay gapless and a change is on time, however many rows a block has. What a loader must remember is `State`: a
position and the segments.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import UserError

Ints = NDArray[np.int64]

_ROUNDS = 6
_FEW = 16  # positions for which plain Python is faster than starting NumPy's operations
_MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's multipliers


def row_at(seed: int, position: int, rows: int) -> int:
    """The row that is read at `position` of the endless stream of epochs over `rows` rows.

    Positions [e * rows, (e + 1) * rows) are epoch e and meet every row once. A pure function of its arguments.
    """
    assert rows >= 1, "an empty split has no order"
    assert position >= 0, "positions count from 0"
    epoch, index = divmod(position, rows)
    half, keys = _half(rows), _row_keys(seed, epoch)
    index = _permute(index, half, keys)
    while index >= rows:
        index = _permute(index, half, keys)
    return index


def rows_at(seed: int, positions: Ints, rows: int) -> Ints:
    """`row_at` for many positions at once: int64 [N] to int64 [N]."""
    assert rows >= 1, "an empty split has no order"
    assert not len(positions) or positions.min() >= 0, "positions count from 0"
    if len(positions) <= _FEW:
        return np.array([row_at(seed, position, rows) for position in positions.tolist()], dtype=np.int64)
    epochs, index = np.divmod(positions, rows)
    different, which = np.unique(epochs, return_inverse=True)
    table = np.array([_row_keys(seed, int(epoch)) for epoch in different], dtype=np.uint64).reshape(-1, _ROUNDS)
    return _walk(index, rows, table, which)


@dataclass(frozen=True)
class Segment:
    """Weights that hold from a position on. `drawn`: how often each source was drawn before it."""

    position: int
    weights: tuple[int, ...]
    drawn: tuple[int, ...]

    @property
    def block(self) -> int:
        """W: positions in which every source is drawn `weights` times."""
        return sum(self.weights)

    def drawn_at(self, position: int) -> tuple[int, ...]:
        """How often each source was drawn before a position, which ends a block of this segment."""
        blocks, rest = divmod(position - self.position, self.block)
        assert not rest, "within a block some draws of each source are still to come"
        return tuple(before + blocks * weight for before, weight in zip(self.drawn, self.weights, strict=True))


@dataclass(frozen=True)
class State:
    """All that a loader must remember: the next position, and the segments of the mixture in their order."""

    position: int
    segments: tuple[Segment, ...]

    @staticmethod
    def start(weights: Sequence[int]) -> "State":
        """At the beginning. Weights are whole numbers; `UserError` unless one is positive and none negative."""
        return State(0, (Segment(0, _checked(weights), (0,) * len(weights)),))

    def advanced(self, rows: int) -> "State":
        """After `rows` more rows."""
        return replace(self, position=self.position + rows)

    def reweighted(self, weights: Sequence[int]) -> "State":
        """With other weights from the position on.

        The block in which it lies ends there, and its rows are drawn in another order than they would have been.
        """
        kept, last = self.segments, self.segments[-1]
        assert self.position >= last.position, "the past cannot be mixed anew"
        assert len(weights) == len(last.weights), "a source that is not drawn has weight 0"
        if rest := (self.position - last.position) % last.block:
            start = self.position - rest
            last = Segment(start, apportioned(rest, last.weights), last.drawn_at(start))
            kept = (*kept, last)
        begun = Segment(self.position, _checked(weights), last.drawn_at(self.position))
        return replace(self, segments=(*kept, begun))

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "State":
        """What `to_json` gave; `UserError` for anything else."""
        try:
            given = value["segments"]
            segments = tuple(Segment(int(s["position"]), _whole(s["weights"]), _whole(s["drawn"])) for s in given)
            state = State(int(value["position"]), segments)
            continued = [
                after.drawn == before.drawn_at(after.position) for before, after in itertools.pairwise(segments)
            ]
            first = segments[0].position == 0 and not any(segments[0].drawn)
        except (KeyError, TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError):
            raise UserError("the state of the data order cannot be read; go on from another checkpoint") from None
        if not (first and all(continued) and state.position >= 0):
            raise UserError("the state of the data order contradicts itself; go on from another checkpoint")
        return state


class Mixture:
    """Which source, and which of its rows, is read at each position.

    `names` and `rows` are those of the sources; `segments` those of `State`. Raises `UserError` where a source without
    rows has a weight.
    """

    def __init__(self, seed: int, names: Sequence[str], rows: Sequence[int], segments: Sequence[Segment]) -> None:
        assert len(names) == len(rows) == len(segments[0].weights) and segments[0].position == 0
        for segment in segments:
            for name, count, weight in zip(names, rows, segment.weights, strict=True):
                if weight and not count:
                    raise UserError(f"source {name!r} has weight {weight} and no rows; give it text or weight 0")
        self._seed, self._rows, self._segments = seed, rows, list(segments)
        self._starts = np.array([segment.position for segment in segments], dtype=np.int64)
        self._seeds = [_number(f"headrace source {name} {seed}") for name in names]

    def draw(self, positions: Ints) -> tuple[Ints, Ints]:
        """Positions int64 [N] to sources int64 [N] and rows of those sources int64 [N]; a pure function."""
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        segment_of = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(segment_of):
            inside = segment_of == number
            sources[inside], draws[inside] = self._draws(self._segments[number], positions[inside])
        rows = np.empty_like(positions)
        for source in np.unique(sources):
            inside = sources == source
            rows[inside] = rows_at(self._seeds[source], draws[inside], self._rows[source])
        return sources, rows

    def _draws(self, segment: Segment, positions: Ints) -> tuple[Ints, Ints]:
        """For positions of one segment: the source of each, and which of its draws it is."""
        passed = positions - segment.position
        blocks: Ints = passed // segment.block
        different, which = np.unique(blocks, return_inverse=True)
        label = f"headrace mixture {self._seed} {segment.position}"
        table = np.array([_keys(f"{label} {block}") for block in different], dtype=np.uint64).reshape(-1, _ROUNDS)
        places = _walk(passed - blocks * segment.block, segment.block, table, which)
        weights = np.array(segment.weights, dtype=np.int64)
        ends = np.cumsum(weights)
        sources = np.searchsorted(ends, places, side="right")
        within = places - (ends - weights)[sources]
        draws: Ints = np.array(segment.drawn, dtype=np.int64)[sources] + blocks * weights[sources] + within
        return sources.astype(np.int64), draws


def whole_weights(shares: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of `shares`, as they are written: (0.5, 0.3, 0.2) to (5, 3, 2)."""
    exact = [Fraction(str(share)) for share in shares]
    if not any(exact) or min(exact) < 0:
        raise UserError(f"weights {list(shares)} of sources: none may be negative, and one must be positive")
    common = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * common) for share in exact]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


def apportioned(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` things by weights, in whole numbers that add up to it: by largest remainders, the first of equal ones."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: (-(total * weights[place] % whole), place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def scattered(label: str, count: int) -> Ints:
    """A permutation of `count` things, int64 [count], that depends on `label` alone, on no library's generator."""
    keys = [np.uint64(key) for key in _keys(label)[:2]]
    values = _mix_many(_mix_many(np.arange(count, dtype=np.uint64) ^ keys[0]) + keys[1])
    return np.argsort(values, kind="stable")


def _checked(weights: Sequence[int]) -> tuple[int, ...]:
    if not any(weights) or min(weights) < 0:
        raise UserError(f"weights {list(weights)} of sources: none may be negative, and one must be positive")
    return tuple(weights)


def _whole(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _half(rows: int) -> int:
    """Bits of each half of the network."""
    return max(1, ((rows - 1).bit_length() + 1) // 2)


def _permute(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """Spread every bit of a 64-bit value over all bits (the finaliser of SplitMix64)."""
    value = (value ^ value >> 30) * _FIRST & _MASK
    value = (value ^ value >> 27) * _SECOND & _MASK
    return value ^ value >> 31


def _walk(index: Ints, rows: int, table: NDArray[np.uint64], which: Ints) -> Ints:
    """Permute each index within [0, rows) by the keys in row `which` of `table` [K, rounds]."""
    half = np.uint64(_half(rows))
    values = index.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        keys = table[which[outside]].T if len(table) > 1 else table.T
        values[outside] = _permute_many(values[outside], half, keys)
        outside = outside[values[outside] >= rows]
    return values.astype(np.int64)


def _permute_many(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_permute` of [N] values; keys are [rounds, N], or [rounds, 1] where all values have the same."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_many(right ^ key) & mask)
    return left << half | right


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(_FIRST)  # unsigned products wrap, as they should
    values = (values ^ values >> np.uint64(27)) * np.uint64(_SECOND)
    return values ^ values >> np.uint64(31)


def _row_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return _keys(f"headrace row order {seed} {epoch}")


def _keys(label: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(label.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _number(label: str) -> int:
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")
