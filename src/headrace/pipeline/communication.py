"""From computations to everything a rank does: transfers between ranks and reductions of finished gradients.

A schedule's generator says what is computed where. What must travel follows from that: the output of a stage goes to
the rank of the next stage, the gradient of its input to the rank of the one before, and nothing travels where both lie
on one rank (the bottom of a V). A receive is posted one action ahead, before the computation that precedes the one that
needs it, so the transfer runs under that computation and yet few buffers are held; a send starts as soon as its tensor
exists. Those of an overlapped pair stand around the pair.

How a transfer is done is not decided here: that is the executor's part (`pipeline/execute.py`).
"""

from headrace.pipeline.schedule import Action, Kind, Schedule

GRADIENTS = frozenset({Kind.B, Kind.I})  # these make the gradient of the input, which travels
FINAL_GRADIENTS = frozenset({Kind.B, Kind.W})  # after the last of these a stage's gradient is complete


def with_communication(schedule: Schedule) -> Schedule:
    """A compute-only schedule with SEND, RECV and REDUCE_GRAD added; `validate` accepts what it accepted before.

    REDUCE_GRAD of a stage follows its last B or W on the rank, and what this sends. Stages with copies on several ranks
    are reduced in descending order, so a lower one waits for the higher one's place: ranks that share two stages
    (DualPipe's mirror pairs) then meet in the same order. There the higher stage ends first, and is summed while the
    lower one's last gradients are computed. Without backwards (validation) there are no reductions.
    """
    return Schedule(schedule.name, tuple(_lower(schedule, rank) for rank in range(schedule.ranks)))


def needed_receive(schedule: Schedule, part: Action, rank: int) -> tuple[Action, int] | None:
    """The receive that a computation on `rank` waits for, and the rank it comes from; None where nothing travels."""
    forward = part.kind is Kind.F
    if not forward and part.kind not in GRADIENTS:
        return None
    return _transfer(schedule, part, rank, -1 if forward else 1, Kind.RECV_F if forward else Kind.RECV_B)


def resulting_send(schedule: Schedule, part: Action, rank: int) -> tuple[Action, int] | None:
    """The send of what a computation on `rank` makes, and the rank it goes to; None where nothing travels."""
    forward = part.kind is Kind.F
    if not forward and part.kind not in GRADIENTS:
        return None
    return _transfer(schedule, part, rank, 1 if forward else -1, Kind.SEND_F if forward else Kind.SEND_B)


def _transfer(schedule: Schedule, part: Action, rank: int, step: int, kind: Kind) -> tuple[Action, int] | None:
    assert part.microbatch is not None
    if not 0 <= part.stage + step < schedule.stages:
        return None
    other = schedule.rank_of(part.stage + step, part.microbatch)
    return None if other == rank else (Action(part.stage, kind, part.microbatch), other)


def _lower(schedule: Schedule, rank: int) -> tuple[Action, ...]:
    actions = schedule.actions[rank]
    receives = [
        [found[0] for part in a.computations if (found := needed_receive(schedule, part, rank))] for a in actions
    ]
    reductions = _reductions(schedule, rank)
    lowered = receives[0][:] if receives else []
    for place, action in enumerate(actions):
        if place + 1 < len(actions):
            lowered += receives[place + 1]
        lowered.append(action)
        lowered += [found[0] for part in action.computations if (found := resulting_send(schedule, part, rank))]
        lowered += [Action(stage, Kind.REDUCE_GRAD) for stage in reductions.get(place, [])]
    return tuple(lowered)


def _reductions(schedule: Schedule, rank: int) -> dict[int, list[int]]:
    """The stages to reduce after each action of a rank, by the action's place."""
    last = {
        part.stage: place
        for place, action in enumerate(schedule.actions[rank])
        for part in action.computations
        if part.kind in FINAL_GRADIENTS
    }
    after: dict[int, list[int]] = {}
    earliest = 0
    for stage in sorted(last, reverse=True):  # as `parallel.shards.plan` orders buckets
        place = last[stage]
        if len(schedule.holders(stage)) > 1:
            place = earliest = max(place, earliest)
        after.setdefault(place, []).append(stage)
    return after
