"""Run a schedule on paper: given how long actions take, when does each run, who idles, what must be held?

The bubble, the memory and the traffic of a schedule are known before a single rank is started, and the executor's own
timeline is judged against this one. Each rank takes its actions in order; nothing is moved, so the answer is that of
the schedule, not of a clever scheduler. Semantics:

- a forward waits for the hidden state of the stage before, a backward for its own forward and for the gradient of the
  stage after; from another rank both must have been received;
- SEND and RECV take no time of their rank. A transfer begins when it is sent, its receive is posted and the one before
  it in the same channel (source, destination, forward or backward) is over, and takes `Costs.transfer`;
- a forward, a backward or an input gradient alone shows its all-to-all in full. In an overlapped pair both directions'
  all-to-all runs beside the computation: the pair takes the longer of the two. That is a lower bound, as if every
  collective found computation to hide under (report, arXiv 2412.19437, section 3.2.1, figure 4). Where
  `Costs.attention` says how a layer divides, pairs and backwards take what the order of `overlap.py` takes;
- a received hidden state is held until B or I of its stage ends, a received gradient until B or W ends (a deferred
  weight gradient may read it); where nothing goes backward, until F ends.

Not modelled: reductions of gradients, the optimizer, ranks or links that contend with each other.
The unit of time is the caller's: 1 for a forward, or seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from headrace.errors import UserError
from headrace.pipeline.communication import with_communication
from headrace.pipeline.schedule import TRANSFERS, Action, Kind, Schedule
from headrace.pipeline.timeline import Span

PerStage = float | Sequence[float]
"""One number for all stages, or one for each."""

_Event = tuple[Kind, int, int | None]
"""(kind, stage, microbatch) of something that has an end; B stands for I too."""

_OPPOSITE = {Kind.SEND_F: (Kind.RECV_F, 1), Kind.SEND_B: (Kind.RECV_B, -1)}


@dataclass(frozen=True)
class Costs:
    """Times per action and bytes per message, each for one microbatch. The defaults are those of the paper's table."""

    forward: PerStage = 1
    backward: PerStage = 2  # whole: input and weights
    input: PerStage = 1
    weight: PerStage = 1
    overlapped: PerStage | None = None  # of the pair with this forward; None: forward + backward of its two stages
    dispatch: PerStage = 0  # all-to-all of a stage's forward; its backward takes the same again
    combine: PerStage = 0
    attention: float | None = None  # its share of all computation, 0 to 1, the experts' being the rest; None: unknown
    transfer: float = 0  # a hidden state from rank to rank
    activation_bytes: int = 0  # of a hidden state
    all_to_all_bytes: int = 0  # that leave a rank in a stage's forward; in its backward the same again

    def time(self, action: Action) -> float:
        """How long an F, B, I, W or overlapped pair keeps its rank."""
        if action.parts:
            return self._pair(*action.parts)
        if action.kind is Kind.W:
            return _at(self.weight, action)
        cost = {Kind.F: self.forward, Kind.B: self.backward, Kind.I: self.input}[action.kind]
        alone = _at(cost, action) + self._all_to_all(action)
        if action.kind is Kind.B and self.attention is not None:  # dispatch' runs under the experts' weight gradients
            alone -= min(_at(self.dispatch, action), (1 - self.attention) * _at(self.weight, action))
        return alone

    def _pair(self, forward: Action, backward: Action) -> float:
        if self.attention is None or self.overlapped is not None:
            alone = _at(self.forward, forward) + _at(self.backward, backward)
            compute = alone if self.overlapped is None else _at(self.overlapped, forward)
            return max(compute, self._all_to_all(forward) + self._all_to_all(backward))
        attention, experts = self._divided(_at(self.forward, forward))
        attention_back, experts_back = self._divided(_at(self.backward, backward))
        _, weights = self._divided(_at(self.weight, backward))
        # Two clocks, the rank's and the channel's, as `overlap.interleave` gives turns.
        now, channel = attention, _at(self.combine, backward)
        now, dispatched = max(now, channel), max(now, channel) + _at(self.dispatch, forward)
        now += experts_back - weights
        channel = max(now, dispatched) + _at(self.dispatch, backward)
        now = max(now + weights, dispatched) + experts
        combined = max(now, channel) + _at(self.combine, forward)
        return max(max(now, channel) + attention_back, combined)

    def _divided(self, time: float) -> tuple[float, float]:
        assert self.attention is not None
        return self.attention * time, (1 - self.attention) * time

    def check(self, stages: int) -> None:
        """Raise `UserError` where a cost per stage is not given for every stage."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Sequence) and len(value) != stages:
                raise UserError(f"costs: {item.name} has {len(value)} entries; the schedule has {stages} stages")

    def _all_to_all(self, action: Action) -> float:
        return _at(self.dispatch, action) + _at(self.combine, action)


def _at(cost: PerStage, action: Action) -> float:
    return cost[action.stage] if isinstance(cost, Sequence) else cost


@dataclass(frozen=True)
class Simulation:
    """What came out; tuples are per rank, times in the unit of the costs, counted from 0 to `makespan`."""

    spans: tuple[Span, ...]  # every F, B, I, W and pair, rank by rank in order
    makespan: float
    busy: tuple[float, ...]  # in actions, all-to-all that shows included
    idle: tuple[float, ...]  # the bubble: makespan - busy
    live_activations: tuple[int, ...]  # peak of forwards begun whose B or I has not ended
    receive_buffers: tuple[int, ...]  # peak held at once
    receive_bytes: tuple[int, ...]  # of that many buffers
    sent_bytes: tuple[int, ...]  # hidden states and their gradients, to other pipeline ranks
    all_to_all_bytes: tuple[int, ...]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """The timeline of a valid schedule. One without SEND and RECV is given them first, each RECV one action ahead.

    Raises `UserError` where an action waits for something that never comes, and for costs that miss a stage.
    """
    costs.check(schedule.stages)
    if not any(action.kind in TRANSFERS for actions in schedule.actions for action in actions):
        schedule = with_communication(schedule)
    spans = _Run(schedule, costs).spans()
    makespan = max((span.end for span in spans), default=0)
    busy = [0.0] * schedule.ranks
    for span in spans:
        busy[span.rank] += span.end - span.start
    buffers = tuple(max(_buffers(schedule, actions)) for actions in schedule.actions)
    return Simulation(
        spans=spans,
        makespan=makespan,
        busy=tuple(busy),
        idle=tuple(makespan - time for time in busy),
        live_activations=tuple(max(_live(actions)) for actions in schedule.actions),
        receive_buffers=buffers,
        receive_bytes=tuple(count * costs.activation_bytes for count in buffers),
        sent_bytes=tuple(
            sum(a.kind in (Kind.SEND_F, Kind.SEND_B) for a in actions) * costs.activation_bytes
            for actions in schedule.actions
        ),
        all_to_all_bytes=tuple(
            sum(part.kind is not Kind.W for a in actions for part in a.computations) * costs.all_to_all_bytes
            for actions in schedule.actions
        ),
    )


def _live(actions: Sequence[Action]) -> Iterator[int]:
    """Activations held while each action runs: a pair's forward is added before its backward lets go."""
    held = 0
    yield held
    for action in actions:
        held += sum(part.kind is Kind.F for part in action.computations)
        yield held
        held -= sum(part.kind in (Kind.B, Kind.I) for part in action.computations)


def _buffers(schedule: Schedule, actions: Sequence[Action]) -> Iterator[int]:
    """Receive buffers in use while each action runs; only the order of a rank's own actions decides."""
    backward = any(part.kind in (Kind.B, Kind.I) for _, part in schedule.computations())
    frees = {Kind.F: [] if backward else [Kind.RECV_F], Kind.B: [Kind.RECV_F, Kind.RECV_B],
             Kind.I: [Kind.RECV_F], Kind.W: [Kind.RECV_B]}  # fmt: skip
    held: set[_Event] = set()
    yield 0
    for action in actions:
        if action.kind in (Kind.RECV_F, Kind.RECV_B):
            held.add((action.kind, action.stage, action.microbatch))
        yield len(held)
        for part in action.computations:
            held -= {(kind, part.stage, part.microbatch) for kind in frees[part.kind]}


class _Run:
    """All ranks walk their lists; one that waits for an event is resumed when the event has a time."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self._schedule, self._costs = schedule, costs
        self._clock: list[float] = [0] * schedule.ranks
        self._position = [0] * schedule.ranks
        self._spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
        self._ends: dict[_Event, float] = {}
        self._waiting: dict[_Event, int] = {}  # a computation or transfer has one reader on another rank
        self._sides: dict[_Event, tuple[int, float]] = {}  # a transfer of which one side is there: (rank, time)
        self._channels: dict[tuple[int, int, Kind], float] = {}  # when each is free
        self._runnable = list(range(schedule.ranks))

    def spans(self) -> tuple[Span, ...]:
        while self._runnable:
            self._advance(self._runnable.pop())
        for rank, (actions, position) in enumerate(zip(self._schedule.actions, self._position, strict=True)):
            if position < len(actions):
                kind, stage, microbatch = next(e for e in self._needs(rank, actions[position]) if e not in self._ends)
                raise UserError(
                    f"schedule {self._schedule.name}: rank {rank} stops at its action {position}, {actions[position]}: "
                    f"{Action(stage, kind, microbatch)} never ends; validate the schedule"
                )
        return tuple(span for spans in self._spans for span in spans)

    def _advance(self, rank: int) -> None:
        """Walk until the end or until something is missing."""
        actions = self._schedule.actions[rank]
        while self._position[rank] < len(actions):
            action = actions[self._position[rank]]
            needs = list(self._needs(rank, action))
            missing = next((event for event in needs if event not in self._ends), None)
            if missing is not None:
                self._waiting[missing] = rank
                return
            if action.computations:
                start = max([self._clock[rank], *(self._ends[event] for event in needs)])
                end = self._clock[rank] = start + self._costs.time(action)
                self._spans[rank].append(Span(rank, start, end, str(action)))
                for part in action.computations:
                    self._ended((Kind.B if part.kind is Kind.I else part.kind, part.stage, part.microbatch), end)
            elif action.kind in TRANSFERS:
                self._transfer(rank, action)
            self._position[rank] += 1

    def _needs(self, rank: int, action: Action) -> Iterator[_Event]:
        """What must have an end before the action can begin."""
        last = self._schedule.stages - 1
        for part in action.computations:
            stage, microbatch = part.stage, part.microbatch
            if part.kind is Kind.F and stage > 0:
                yield self._input(rank, part, stage - 1, Kind.F, Kind.RECV_F)
            if part.kind in (Kind.B, Kind.I):
                yield Kind.F, stage, microbatch
                if stage < last:
                    yield self._input(rank, part, stage + 1, Kind.B, Kind.RECV_B)
            if part.kind is Kind.W:
                yield Kind.B, stage, microbatch
        if action.kind in _OPPOSITE:
            yield (Kind.F if action.kind is Kind.SEND_F else Kind.B), action.stage, action.microbatch

    def _input(self, rank: int, part: Action, source: int, made_by: Kind, received_by: Kind) -> _Event:
        assert part.microbatch is not None
        if self._schedule.rank_of(source, part.microbatch) == rank:
            return made_by, source, part.microbatch
        return received_by, part.stage, part.microbatch

    def _transfer(self, rank: int, action: Action) -> None:
        """Begin the transfer if the other side was there first, or leave word that this side is."""
        kind, step = _OPPOSITE.get(action.kind, (action.kind, 0))
        event = kind, action.stage + step, action.microbatch
        if event not in self._sides:
            self._sides[event] = rank, self._clock[rank]
            return
        other, time = self._sides.pop(event)
        channel = (rank, other, kind) if step else (other, rank, kind)
        begin = max(time, self._clock[rank], self._channels.get(channel, 0))
        self._channels[channel] = begin + self._costs.transfer
        self._ended(event, begin + self._costs.transfer)

    def _ended(self, event: _Event, time: float) -> None:
        self._ends[event] = time
        if event in self._waiting:
            self._runnable.append(self._waiting.pop(event))
