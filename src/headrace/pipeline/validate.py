"""Is a schedule correct? Answered before a step runs, because a wrong one hangs or, worse, trains on wrong gradients.

First what can be seen without running: every computation is there once, on the rank that ran the forward; every
transfer that the placement asks for is there once and nothing else; both ends of a channel (source, destination,
forward or backward) agree on the order, for a channel is a queue; so do ranks that reduce the same stages. Then all
ranks are run with counters instead of tensors: whatever is needed must be there, and if nobody can go on, it is a
deadlock.

What is assumed of the executor: a send never blocks, for each has its receive; a receive takes a buffer when its turn
comes, at most one computation ahead of the one that needs it (so the pool is small and known); a computation waits for
its own receives only. A schedule without any backward is for validation losses: its activations die at once. Times are
not looked at: that is the simulator's part (`pipeline/simulate.py`).
"""

from collections import defaultdict, deque
from itertools import combinations, product

from headrace.errors import UserError
from headrace.pipeline.communication import FINAL_GRADIENTS, GRADIENTS, needed_receive, resulting_send
from headrace.pipeline.schedule import TRANSFERS, Action, Kind, Schedule

_Places = dict[
    Action, int
]  # an action (of a pair, its parts) and its rank; reductions, which have copies, not among them


def validate(schedule: Schedule, live_bound: int | None = None) -> None:
    """Accepts a schedule, compute-only or with all its transfers and reductions, or raises a `UserError` of one line.

    It names the rank, the first offending action and the reason. `live_bound`: activations (stage and microbatch, from
    F to the end of B or I; both of an overlapped pair count) that any rank may hold at once.
    """
    places = _places(schedule)
    _check_computations(schedule, places)
    lowered = any(
        action.kind in TRANSFERS or action.kind is Kind.REDUCE_GRAD for row in schedule.actions for action in row
    )
    if lowered:
        _check_transfers(schedule, places)
        _check_reductions(schedule, places)
    _Run(schedule, places, lowered, live_bound).run()


def _refuse(rank: int, action: Action, why: str) -> UserError:
    return UserError(f"rank {rank}: {action} {why}")


def _places(schedule: Schedule) -> _Places:
    places: _Places = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            for part in action.parts or (action,):
                if part.kind is Kind.REDUCE_GRAD:
                    continue
                if part in places:
                    raise _refuse(rank, part, f"is there already, on rank {places[part]}")
                places[part] = rank
            if action.parts and action.parts[0].microbatch == action.parts[1].microbatch:
                raise _refuse(rank, action, "overlaps a microbatch with itself; one part would wait for the other")
    return places


def _check_computations(schedule: Schedule, places: _Places) -> None:
    if not schedule.microbatches:
        raise UserError("the schedule computes nothing")
    trains = _trains(places)
    for stage, microbatch in product(range(schedule.stages), range(schedule.microbatches)):
        of = {kind: Action(stage, kind, microbatch) for kind in (Kind.F, Kind.B, Kind.I, Kind.W)}
        there = [kind for kind, action in of.items() if action in places]
        rank = next((places[of[kind]] for kind in there), None)
        if rank is None:
            raise UserError(f"no rank runs {of[Kind.F]}; stages 0..{schedule.stages - 1} see every microbatch")
        if Kind.F not in there:
            raise _refuse(rank, of[there[0]], f"has no {of[Kind.F]}")
        for kind in there:
            if places[of[kind]] != rank:
                raise _refuse(places[of[kind]], of[kind], f"is not on rank {rank}, where {of[Kind.F]} is")
        if there not in ([[Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]] if trains else [[Kind.F]]):
            found = ", ".join(str(of[kind]) for kind in there[1:]) or "neither"
            raise _refuse(rank, of[Kind.F], f"wants {of[Kind.B]}, or {of[Kind.I]} and {of[Kind.W]}; there is {found}")


def _trains(places: _Places) -> bool:
    return any(action.kind in GRADIENTS or action.kind in FINAL_GRADIENTS for action in places)


def _check_transfers(schedule: Schedule, places: _Places) -> None:
    """All that are needed, no others, and in the same order at both ends of each channel."""
    wanted: dict[Action, tuple[int, int]] = {}  # a transfer, its rank and the rank at the other end
    for rank, part in schedule.computations():
        for found in needed_receive(schedule, part, rank), resulting_send(schedule, part, rank):
            if found is not None:
                wanted[found[0]] = rank, found[1]
    channels: dict[tuple[int, int, str], tuple[list[Action], list[Action]]] = defaultdict(lambda: ([], []))
    for action, rank in places.items():
        if action.kind in TRANSFERS:
            if action not in wanted or wanted[action][0] != rank:
                raise _refuse(rank, action, "moves nothing that is on this rank and needed on another, or the reverse")
            other = wanted[action][1]
            if action.kind in (Kind.SEND_F, Kind.SEND_B):
                channels[rank, other, action.kind[-1]][0].append(action)
            else:
                channels[other, rank, action.kind[-1]][1].append(action)
    for action, (rank, _) in wanted.items():
        if action not in places:
            raise _refuse(rank, action, "is missing")
    for (source, rank, direction), (sent, received) in channels.items():
        step = 1 if direction == "F" else -1
        for send, receive in zip(sent, received, strict=True):
            if (send.stage + step, send.microbatch) != (receive.stage, receive.microbatch):
                raise _refuse(rank, receive, f"is due when rank {source} sends {send}: a channel keeps its order")


def _check_reductions(schedule: Schedule, places: _Places) -> None:
    orders = []
    for rank, row in enumerate(schedule.actions):
        order = [action.stage for action in row if action.kind is Kind.REDUCE_GRAD]
        held = schedule.stages_of(rank) if _trains(places) else ()
        for place, stage in enumerate(order):
            if stage not in held or stage in order[:place]:
                why = "is there twice" if stage in held else "has no gradient on this rank"
                raise _refuse(rank, Action(stage, Kind.REDUCE_GRAD), why)
        for stage in held:
            if stage not in order:
                raise _refuse(rank, Action(stage, Kind.REDUCE_GRAD), "is missing")
        orders.append(order)
    for (one, first), (other, second) in combinations(enumerate(orders), 2):
        common = [stage for stage in first if stage in second]
        for wanted, found in zip(common, (stage for stage in second if stage in first), strict=True):
            if wanted != found:
                wanted_action = Action(wanted, Kind.REDUCE_GRAD)
                raise _refuse(other, Action(found, Kind.REDUCE_GRAD), f"is where rank {one} has {wanted_action}")


class _Run:
    """All ranks at once, each as far as it can go; a blocked rank is woken by the action that it waits for."""

    def __init__(self, schedule: Schedule, places: _Places, lowered: bool, live_bound: int | None) -> None:
        self._schedule, self._places, self._lowered = schedule, places, lowered
        self._live_bound = live_bound if _trains(places) else None
        self._done: set[Action] = set()
        self._waiting: dict[Action, list[int]] = defaultdict(list)
        self._next = [0] * schedule.ranks
        self._live = [0] * schedule.ranks
        self._computed = [0] * schedule.ranks
        self._posted: dict[Action, int] = {}  # a receive, and how many computations its rank had done then
        self._gradients_left: dict[tuple[int, int], int] = defaultdict(int)  # by rank and stage
        for rank, part in schedule.computations():
            self._gradients_left[rank, part.stage] += part.kind in FINAL_GRADIENTS

    def run(self) -> None:
        """Raises `UserError` at the first violation, or where no rank can go on."""
        ready = deque(range(self._schedule.ranks))
        while ready:
            rank = ready.popleft()
            row = self._schedule.actions[rank]
            while self._next[rank] < len(row):
                action = row[self._next[rank]]
                awaited = self._awaited(rank, action)
                if awaited is not None:
                    self._waiting[awaited].append(rank)
                    break
                self._next[rank] += 1
                for part in action.parts or (action,):
                    self._perform(rank, part)
                    ready.extend(self._waiting.pop(part, ()))
                self._computed[rank] += bool(action.computations)
        for awaited, ranks in sorted(self._waiting.items(), key=lambda entry: min(entry[1])):
            rank = min(ranks)
            action = self._schedule.actions[rank][self._next[rank]]
            raise _refuse(
                rank, action, f"waits for {awaited} of rank {self._places[awaited]}, which never comes: deadlock"
            )

    def _awaited(self, rank: int, action: Action) -> Action | None:
        """The action of whatever rank that has to come first; raises where this rank itself should have done more."""
        if action.kind is Kind.REDUCE_GRAD and self._gradients_left[rank, action.stage]:
            raise _refuse(rank, action, "comes before the stage's last gradient on this rank")
        for part in action.parts or (action,):
            own = self._own_predecessor(part)
            if own is not None and own not in self._done:
                raise _refuse(rank, action, f"comes before {own}")
        for part in action.computations:
            source = self._source(rank, part)
            if source is not None and source not in self._done:
                return source
        return None

    def _own_predecessor(self, part: Action) -> Action | None:
        """What must be done on the same rank before."""
        match part.kind:
            case Kind.B | Kind.I | Kind.SEND_F:
                return Action(part.stage, Kind.F, part.microbatch)
            case Kind.W:
                return Action(part.stage, Kind.I, part.microbatch)
            case Kind.SEND_B:
                return self._gradient(part.stage, part.microbatch)
        return None

    def _gradient(self, stage: int, microbatch: int | None) -> Action:
        whole = Action(stage, Kind.B, microbatch)
        return whole if whole in self._places else Action(stage, Kind.I, microbatch)

    def _source(self, rank: int, part: Action) -> Action | None:
        """What makes the input of a computation available: a neighbour stage's computation, or its send."""
        found = needed_receive(self._schedule, part, rank) if self._lowered else None
        if found is not None:
            receive = found[0]
            if receive not in self._posted:
                raise _refuse(rank, part, f"needs {receive} before it")
            if self._computed[rank] - self._posted[receive] > 1:
                raise _refuse(rank, receive, f"holds a buffer for more than one action before {part} needs it")
            forward = part.kind is Kind.F
            return Action(part.stage + (-1 if forward else 1), Kind.SEND_F if forward else Kind.SEND_B, part.microbatch)
        if part.kind is Kind.F and part.stage > 0:
            return Action(part.stage - 1, Kind.F, part.microbatch)
        if part.kind in GRADIENTS and part.stage + 1 < self._schedule.stages:
            return self._gradient(part.stage + 1, part.microbatch)
        return None

    def _perform(self, rank: int, part: Action) -> None:
        self._done.add(part)
        if part.kind in (Kind.RECV_F, Kind.RECV_B):
            self._posted[part] = self._computed[rank]
        if part.kind in FINAL_GRADIENTS:
            self._gradients_left[rank, part.stage] -= 1
        if part.kind in GRADIENTS:
            self._live[rank] -= 1
        if part.kind is Kind.F:
            self._live[rank] += 1
            if self._live_bound is not None and self._live[rank] > self._live_bound:
                raise _refuse(
                    rank, part, f"makes {self._live[rank]} live activations; at most {self._live_bound} may be"
                )
