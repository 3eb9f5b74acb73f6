"""Who owns what: every element of a parameter has one owner among the ranks that hold it (ZeRO, arXiv 1910.02054, 5.1).

All ranks that hold a parameter need its whole value and see a part of its gradient, but only one of them has to keep
the optimizer's moments of an element and to update it. So parameters held by the same ranks lie one behind the other
in flat memory, a bucket, and the bucket is cut into one run per copy:

    bucket     | embedding       | norm | q_a_proj      | q_b_proj   | ...
    owner      | copy 0            | copy 1             | copy 2 ...

A cut never goes through a unit. Where the optimizer works on whole matrices (Muon), the unit is a matrix or one expert
of a stack. Elsewhere a matrix is divided into up to 256 units, depending on nothing but its whole shape: sums of
squares are taken by unit, so the norm of the gradient is the same to the last bit wherever the cuts are
(`reduction.GradientReduction.norm`). Parameters, and units smaller than a matrix, begin at multiples of 16 elements, so
that a cut changes neither the alignment nor the vector instruction of any element.

This is the plan alone, the same on every rank; it holds no memory and sends nothing.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor

ALIGNMENT = 16
UNITS = 256
Whole = Callable[[str, Sequence[int]], bool]
"""Whether the optimizer needs the matrices of a parameter (name, whole shape) in one piece."""


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's elements that is here: `tensor` has those from `start` on of the flattened whole `shape`."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0

    def of(self, name: str, tensor: Tensor) -> "Piece":
        """The same run of elements of another tensor of this shape, as a moment is to its parameter."""
        return Piece(name, tensor, self.shape, self.start)


def pieces_of(tensors: Iterable[tuple[str, Tensor]]) -> list[Piece]:
    """Tensors that are here as a whole, each its own piece."""
    return [Piece(name, tensor, tuple(tensor.shape)) for name, tensor in tensors]


@dataclass(frozen=True, order=True)
class Part:
    """A parameter, or the experts of one that the same ranks hold: `size` elements from `start` on of the whole."""

    name: str
    start: int
    size: int
    shape: tuple[int, ...]  # of the whole
    unit: int  # elements that stay together; divides size


@dataclass(frozen=True)
class Bucket:
    """Parts that are reduced together, in flat memory at `offsets`; copy i owns the elements from cuts[i] to cuts[i+1].

    `stages` are those the parts belong to: one, or both ends of the pipeline for a shared embedding.
    """

    stages: tuple[int, ...]
    copies: tuple[int, ...]
    parts: tuple[Part, ...]
    offsets: tuple[int, ...]
    cuts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the flat memory."""
        return self.cuts[-1]

    def owned(self, part: Part, rank: int) -> tuple[int, int]:
        """The range of the part's own elements that `rank` owns; an empty one is (0, 0)."""
        offset, copy = self.offsets[self.parts.index(part)], self.copies.index(rank)
        begin, end = max(self.cuts[copy] - offset, 0), min(self.cuts[copy + 1] - offset, part.size)
        return (begin, end) if begin < end else (0, 0)


@dataclass(frozen=True)
class Claim:
    """What a rank says it holds: one parameter of one stage, in values that JSON has."""

    name: str
    stage: int
    copies: tuple[int, ...]
    start: int
    size: int
    shape: tuple[int, ...]


def unit_of(shape: Sequence[int], whole: bool) -> int:
    """Elements of a parameter of the whole `shape` that are never cut apart: at most a matrix, or one expert's."""
    matrix = prod(shape[-2:])
    if whole:
        return matrix
    most = max(1, UNITS // prod(shape[:-2]))
    return next((matrix // count for count in range(most, 1, -1) if matrix % (count * ALIGNMENT) == 0), matrix)


def plan(claims: Mapping[int, Sequence[Claim]], whole: Whole) -> list[Bucket]:
    """The buckets of all ranks from what each of them claims, in the order that all follow: the last stages first.

    The last stages end their backward passes first. Parts of one bucket are in order of their names.
    """
    stages: dict[tuple[Part, tuple[int, ...]], set[int]] = {}
    holders: dict[tuple[Part, tuple[int, ...]], set[int]] = {}
    for rank, said in claims.items():
        for claim in said:
            unit = unit_of(claim.shape, whole(claim.name, claim.shape))
            key = Part(claim.name, claim.start, claim.size, claim.shape, unit), claim.copies
            stages.setdefault(key, set()).add(claim.stage)
            holders.setdefault(key, set()).add(rank)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[Part]] = {}
    sizes: dict[str, int] = {}
    for (part, copies), held_by in holders.items():
        sizes[part.name] = sizes.get(part.name, 0) + part.size
        assert held_by == set(copies), f"{part.name}: held by ranks {sorted(held_by)}, said to be on {copies}"
        at = tuple(sorted(stages[part, copies]))
        groups.setdefault((at, copies, whole(part.name, part.shape)), []).append(part)
    for part, _ in holders:
        assert sizes[part.name] == prod(part.shape), f"{part.name}: some of its elements are held by none, or twice"
    return [_bucket(at, copies, sorted(groups[at, copies, kind])) for at, copies, kind in sorted(groups, reverse=True)]


def _bucket(stages: tuple[int, ...], copies: tuple[int, ...], parts: Sequence[Part]) -> Bucket:
    offsets, end = [], 0
    for part in parts:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + part.size
    inner = [_nearest_cut(parts, offsets, end * copy / len(copies)) for copy in range(1, len(copies))]
    cuts = (0, *inner, end)
    assert all(a <= b for a, b in pairwise(cuts))
    return Bucket(stages, copies, tuple(parts), tuple(offsets), cuts)


def _nearest_cut(parts: Sequence[Part], offsets: Sequence[int], ideal: float) -> int:
    """The boundary between units that is nearest to `ideal`."""
    index = bisect_right(offsets, ideal) - 1
    part, offset = parts[index], offsets[index]
    return offset + min(part.size, round((ideal - offset) / part.unit) * part.unit)
