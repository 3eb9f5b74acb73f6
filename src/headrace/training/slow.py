"""Which rank has become slow, from the seconds that each spends at work in a step: named once, and nothing else done.

A step takes as long as its slowest rank; the others wait. So how long a step takes tells nothing about who is slow, but
how long each rank was busy (`launch.rank.Rank.busy_seconds`) does. Two comparisons, over the last `WINDOW` steps:

    with peers    ranks that do equal work: busy seconds over the median of the other peers'
    with itself   a pipeline's ranks differ by nature, so what counts is how a rank's share of the work has grown: busy
                  seconds over the median of all others', divided by the same ratio in the run's first steps

A rank is slow where the median of the window is above `LIMIT`. A rank half as slow again (+50 %) is there within a
window of steps; jitter of single steps, saves and collections of garbage are not.

What this cannot tell: a rank that is slow from its first step and has no peer; all ranks slow alike; ranks that wait
for each other inside an action (an all-to-all between experts counts as work for all of a group, so a slow member makes
its whole group look slow, and only beside other groups); work outside the pipeline's actions (optimizer, data, saves).
Of two peers the slower one is named; that the other is fast instead, nobody could tell. On GPUs it is the hosts that
are compared, since an action ends for the host when its kernels are queued: a slow GPU beside a good host is not seen.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median

LIMIT = 1.3
"""Of the ratio; a rank half as slow again has 1.5, give or take what steps vary by."""
SETTLING = 2
"""The first steps compile and warm up; they are passed over."""
EARLY = 8
"""Steps after these whose median is a rank's own measure."""
WINDOW = 12


@dataclass(frozen=True)
class Slow:
    """A rank that is slow, and how many times as long as expected it is at work."""

    rank: int
    factor: float


class SlowRanks:
    """Fed on one rank with every step's busy seconds of all; `roles[rank]` is equal where ranks do equal work."""

    def __init__(self, roles: Sequence[Hashable]) -> None:
        ranks = range(len(roles))
        self._peers = [[r for r in ranks if r != rank and roles[r] == roles[rank]] for rank in ranks]
        self._others = [[r for r in ranks if r != rank] for rank in ranks]
        self._seen = 0
        self._early: list[list[float]] = [[] for _ in ranks]
        self._window: list[deque[float]] = [deque(maxlen=WINDOW) for _ in ranks]
        self._named: set[int] = set()

    def add(self, busy: Sequence[float]) -> list[Slow]:
        """Take in one step; the ranks that are now slow and were not named before."""
        self._seen += 1
        if self._seen <= SETTLING or len(busy) < 2 or min(busy) <= 0:
            return []
        found = []
        for rank in range(len(busy)):
            ratios = self._ratios(rank, busy)
            if len(ratios) == WINDOW and (factor := median(ratios)) > LIMIT and rank not in self._named:
                self._named.add(rank)
                found.append(Slow(rank, factor))
        return found

    def _ratios(self, rank: int, busy: Sequence[float]) -> Sequence[float]:
        """Those of the window, this step's included."""
        if self._peers[rank]:
            ratio = busy[rank] / median(busy[peer] for peer in self._peers[rank])
        else:
            ratio = busy[rank] / median(busy[other] for other in self._others[rank])
            if len(self._early[rank]) < EARLY:
                self._early[rank].append(ratio)
                return ()
            ratio /= median(self._early[rank])
        self._window[rank].append(ratio)
        return self._window[rank]
