"""What a rank computed in a step, as digests in the order it was computed: to find where two runs of one step part.

A processor that multiplies wrongly once in a while raises no error and mostly gives a plausible number (`docs/
reliability.md`). But computing the same thing twice on the same inputs must give the same bits; so a step is run twice
while a record is on, and the first entry that differs says where. An entry is made for

    what arrived        the hidden states or gradients that an action reads
    attention, ...      the outputs of a piece of a forward pass (`overlap.Piece`), before anything is sent
    input gradient      what a piece of a backward pass gives to the piece before it
    output              what the action hands on
    weight gradients    all of the stage's, as added up so far, after B, W and pairs

Entries lie between two collectives each, so what one rank spoils and sends to the others of its expert group is noted
on that rank first. Between ranks the order is that of the schedule's simulation: an action that depends on another one
starts later there. Off, a record costs a comparison per piece.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from headrace.parallel.digest import digest


@dataclass(frozen=True)
class Entry:
    """Something an action made; `start` is the action's in the simulation."""

    action: str
    start: float
    label: str
    digest: int


@dataclass(frozen=True, order=True)
class Difference:
    """Where a rank's two records part: the `index`-th entry of an action. The first one of all ranks is the least."""

    start: float
    index: int
    rank: int
    action: str
    label: str

    @property
    def json(self) -> dict[str, Any]:
        """`Difference(**json)` is this one."""
        return asdict(self)


class Record:
    """The entries of one rank. Nothing is noted, and nothing hashed, before `begin` and after `end`."""

    def __init__(self) -> None:
        self.on = False
        self._entries: list[Entry] = []
        self.action("", 0.0)

    def begin(self) -> None:
        """Note from now on."""
        self.on, self._entries = True, []
        self.action("", 0.0)

    def end(self) -> list[Entry]:
        """What was noted since `begin`; nothing more is."""
        self.on = False
        entries, self._entries = self._entries, []
        return entries

    def action(self, action: str, start: float) -> None:
        """What follows belongs to this action."""
        self._action, self._start = action, start

    def note(self, label: str, value: Any) -> None:
        """An entry for all tensors in `value` (tensors, sequences and dataclasses of them), where the record is on."""
        if self.on:
            self._entries.append(Entry(self._action, self._start, label, digest(*_tensors(value))))


def first_difference(one: Sequence[Entry], other: Sequence[Entry], rank: int) -> Difference | None:
    """Where two records of one step part; None where they are the same."""
    index, action = 0, ""
    for place in range(max(len(one), len(other))):
        pair = [entries[place] for entries in (one, other) if place < len(entries)]
        entry = pair[-1]
        index = index + 1 if entry.action == action else 0
        action = entry.action
        if len(pair) < 2 or pair[0] != pair[1]:
            return Difference(entry.start, index, rank, entry.action, entry.label)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
