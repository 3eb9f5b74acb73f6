"""A schedule is data: for every rank of a pipeline, the list of its actions in order.

    2F0                        forward of microbatch 0 on pipeline stage 2
    2B0                        its backward, whole; or in halves:
    2I0  2W0                   gradient of the input (what the stage before waits for), gradient of the weights
    (0F3;5B1)OVERLAP_F_B       a forward and a backward whose computation and communication interleave
    2SEND_F0  3RECV_F0         stage 2 sends its output, stage 3 receives it
    3SEND_B0  2RECV_B0         stage 3 sends the gradient of its input, stage 2 receives it
    2REDUCE_GRAD               the gradient of stage 2 on this rank is complete: sum it over the stage's copies

The spelling, and CSV with one row per rank, are those of `torch.distributed.pipelining`, so schedules can be exchanged
with it. What torch's cannot express needs no new word: a stage may have copies on several ranks. In DualPipe (report,
arXiv 2412.19437, section 3.2.1) stage s lies on rank s for the microbatches that enter at rank 0 and on rank PP-1-s for
those that enter at the other end. So the place of a stage depends on the microbatch, and is read off the actions:
`rank_of(stage, microbatch)` is the rank that runs its forward.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from headrace.errors import UserError


class Kind(StrEnum):
    """What an action does; the values are torch's spelling."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 (torch's name)
    W = "W"
    OVERLAP_F_B = "OVERLAP_F_B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
TRANSFERS = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
_ACTION = re.compile(r"([0-9]{1,9})([A-Z_]+?)([0-9]{0,9})")
_PARAMETERS = re.compile(r"[0-9]{1,9}(UNSHARD|RESHARD)")
"""What torch's FSDP does with a stage's parameters; here they are whole all the time."""


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list. An overlapped pair has `parts` (forward, backward) and no stage of its own."""

    stage: int
    kind: Kind
    microbatch: int | None = None
    parts: tuple["Action", ...] = field(default=())

    @staticmethod
    def parse(text: str) -> "Action":
        """The action that `str` prints so; raises `UserError`."""
        text = text.strip()
        if text.startswith("(") and text.endswith(f"){Kind.OVERLAP_F_B}"):
            inner = text[1 : text.rindex(")")]
            return overlap(*(Action.parse(part) for part in inner.split(";")))
        match = _ACTION.fullmatch(text)
        if match is None or match[2] not in Kind.__members__.values() or match[2] == Kind.OVERLAP_F_B:
            raise UserError(
                f"{text!r} is no action; actions look like 2F0, 1SEND_B3, 2REDUCE_GRAD, (0F3;5B1)OVERLAP_F_B"
            )
        kind = Kind(match[2])
        if (kind is Kind.REDUCE_GRAD) == bool(match[3]):
            wanted = "takes no microbatch" if match[3] else "needs a microbatch"
            raise UserError(f"{text!r} is no action: {kind} {wanted}")
        return Action(int(match[1]), kind, int(match[3]) if match[3] else None)

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @property
    def computations(self) -> tuple["Action", ...]:
        """The F, B, I and W in it: both parts of a pair, itself, or none for a transfer or reduction."""
        return self.parts or ((self,) if self.kind in COMPUTE else ())


def overlap(*parts: Action) -> Action:
    """A forward and a whole backward, interleaved; raises `UserError` for anything else."""
    if [part.kind for part in parts] != [Kind.F, Kind.B]:
        raise UserError(f"an overlapped pair is one F and one B, not {';'.join(map(str, parts))}")
    return Action(-1, Kind.OVERLAP_F_B, None, parts)


@dataclass(frozen=True)
class Schedule:
    """Actions by rank. `name` is for people; nothing depends on it."""

    name: str
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline (PP)."""
        return len(self.actions)

    @cached_property
    def stages(self) -> int:
        """Pipeline stages: PP, or more where a rank holds several of one chain."""
        return 1 + max((action.stage for _, action in self.computations()), default=-1)

    @cached_property
    def microbatches(self) -> int:
        """Microbatches of one optimizer step (N)."""
        return 1 + max((action.microbatch or 0 for _, action in self.computations()), default=-1)

    def computations(self) -> Iterator[tuple[int, Action]]:
        """(rank, F, B, I or W), rank by rank in order."""
        for rank, actions in enumerate(self.actions):
            for action in actions:
                for part in action.computations:
                    yield rank, part

    @cached_property
    def _placement(self) -> dict[tuple[int, int | None], int]:
        return {(a.stage, a.microbatch): rank for rank, a in self.computations() if a.kind is Kind.F}

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs this stage for this microbatch."""
        return self._placement[stage, microbatch]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, ascending."""
        return tuple(sorted({stage for (stage, _), holder in self._placement.items() if holder == rank}))

    def holders(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of a stage, ascending."""
        return tuple(sorted({rank for (of, _), rank in self._placement.items() if of == stage}))

    def to_csv(self) -> str:
        """One line per rank, actions separated by commas."""
        return "".join(",".join(map(str, actions)) + "\n" for actions in self.actions)

    @staticmethod
    def from_csv(text: str, name: str = "from file") -> "Schedule":
        """What `to_csv` wrote, or torch's own file, with transfers or without; raises `UserError` with the line.

        Torch's empty cells are left out, and its UNSHARD and RESHARD, which mean nothing here.
        """
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            cells = (cell.strip() for cell in line.split(","))
            try:
                rows.append(tuple(Action.parse(cell) for cell in cells if cell and not _PARAMETERS.fullmatch(cell)))
            except UserError as error:
                raise UserError(f"line {number}: {error}") from None
        return Schedule(name, tuple(rows))
