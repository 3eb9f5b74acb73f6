"""Curves over tokens: the small pieces of which every schedule of a recipe is put together.

A curve is a function of the tokens (or steps) seen since its beginning. `Chain` puts curves behind one another, each
for so many tokens, so that a learning rate reads as it is published:

    Chain((10T, Constant(2.2e-4)), (4.3T, Cosine(2.2e-4, 2.2e-5, 4.3T)), (333B, Constant(2.2e-5)),
          last=Constant(7.3e-6))

A boundary belongs to what follows it: after exactly 10T tokens the cosine holds.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Protocol


class Curve(Protocol):
    """A value for each number of tokens seen, 0 or more."""

    def __call__(self, seen: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """One value throughout."""

    value: float

    def __call__(self, seen: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` within `tokens`, then `end`."""

    start: float
    end: float
    tokens: int

    def __call__(self, seen: int) -> float:
        return self.start + (self.end - self.start) * seen / self.tokens if seen < self.tokens else self.end

    def reaches(self, value: float) -> int:
        """The first number of tokens at which it is at least `value`, exactly; start <= value <= end."""
        return math.ceil(Fraction(value - self.start) * self.tokens / Fraction(self.end - self.start))


@dataclass(frozen=True)
class Exponential:
    """From `start` to `end` within `tokens`, by equal factors in equal spans, then `end`."""

    start: float
    end: float
    tokens: int

    def __call__(self, seen: int) -> float:
        return self.start * (self.end / self.start) ** (seen / self.tokens) if seen < self.tokens else self.end

    def reaches(self, value: float) -> int:
        """The first number of tokens at which it is at least `value`, up to FP64's rounding; start <= value <= end."""
        return math.ceil(self.tokens * (math.log(value / self.start) / math.log(self.end / self.start)))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` down to `end` within `tokens`, then `end`."""

    start: float
    end: float
    tokens: int

    def __call__(self, seen: int) -> float:
        if seen >= self.tokens:
            return self.end
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * seen / self.tokens))


@dataclass(frozen=True)
class Switch:
    """One value for so many tokens, another from then on."""

    before: float
    after: float
    tokens: int

    def __call__(self, seen: int) -> float:
        return self.before if seen < self.tokens else self.after

    @property
    def ends(self) -> tuple[int, ...]:
        """Where it turns."""
        return (self.tokens,)


class Chain:
    """Curves one after the other, each for so many tokens and counted from its own beginning; `last` without end."""

    def __init__(self, *parts: tuple[int, Curve], last: Curve) -> None:
        self.ends = tuple(accumulate(tokens for tokens, _ in parts))  # where each part gives way to the next
        self._starts = (0, *self.ends)
        self._curves = (*(curve for _, curve in parts), last)

    def __call__(self, seen: int) -> float:
        part = bisect_right(self.ends, seen)
        return self._curves[part](seen - self._starts[part])


def steps_up(curve: Linear | Exponential, first: int, last: int, multiple: int) -> Iterator[tuple[int, int]]:
    """The rising curve in steps of `multiple`, rounded down: (tokens from which it holds, value), `first` to `last`."""
    for value in range(first, last + 1, multiple):
        yield curve.reaches(value), value
