"""One real step beside its plan: what the report draws, as JSON.

A schedule promises an idle share for durations that nobody has: every forward equally long, nothing to wait for. So
the plan here is the schedule simulated with this step's own durations, the mean of each kind of action on each stage.
Both timelines then hold the same work, and they differ by what the plan leaves out: transfers between ranks, and
actions of one kind that take longer at one time than at another (which can also make the plan the longer one).

An action is busy from its first to its last operation, the wait for its own all-to-all included. The times between
actions, where a rank waits for another one or for a transfer, are idle. What comes after the last action (the rest of
the gradients' reduction, the optimizer) is in neither timeline.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headrace.parallel.mesh import Mesh
from headrace.pipeline.schedule import Action, Kind, Schedule
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, COMPUTE, Span, chrome_trace, idle_shares, window


def timeline(
    schedule: Schedule, reason: str, layers: Sequence[int], mesh: Mesh, spans: Sequence[Span]
) -> dict[str, Any]:
    """The contents of timeline.json. Times are seconds from the step's first action, shares are 0 to 1.

    `schedule` is the one that ran, `reason` says why in one sentence, `layers` are their number by stage, `spans` those
    of all ranks of one pipeline on one clock. A span is written as [rank, start, end, action].
    """
    actions = [span for span in spans if span.lane == COMPUTE]
    # Where experts are not spread over ranks, dispatch and combine are copies in memory.
    collectives = [span for span in spans if span.lane == COMMUNICATION and mesh.expert > 1]
    simulation = simulate(schedule, mean_costs(actions, schedule.stages))
    assert sorted(span.action for span in actions) == sorted(span.action for span in simulation.spans), (
        "the spans are not those of one step of this schedule"
    )
    begin, _ = window(actions)
    return {
        "schedule": schedule.name,
        "reason": reason,
        "pipeline": mesh.pipeline,
        "data": mesh.data,
        "expert": mesh.expert,
        "node_size": mesh.node_size,
        "microbatches": schedule.microbatches,
        "layers": list(layers),
        "live_activations": list(simulation.live_activations),
        "receive_buffers": list(simulation.receive_buffers),
        "planned": _written(simulation.spans, 0.0),
        "measured": {**_written(actions, begin), "collectives": _rows(collectives, begin)},
    }


def traces(found: Mapping[str, Any]) -> dict[str, str]:
    """The plan and the measurement of `found`, which `timeline` made, each as JSON for Perfetto: by name."""
    return {
        name: chrome_trace(
            [
                Span(rank, start, end, action, lane)
                for lane, rows in ((COMPUTE, "spans"), (COMMUNICATION, "collectives"))
                for rank, start, end, action in found[name].get(rows, [])
            ]
        )
        for name in ("planned", "measured")
    }


def mean_costs(spans: Iterable[Span], stages: int) -> Costs:
    """The mean duration of each kind of action on each stage; 0 where there is none. A pair is its forward's stage's.

    A stage with copies on several ranks has one mean over all of them.
    """
    durations: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for span in spans:
        action = Action.parse(span.action)
        durations[action.kind, (action.parts or (action,))[0].stage].append(span.end - span.start)

    def means(kind: Kind) -> list[float]:
        found = [durations.get((kind, stage), [0.0]) for stage in range(stages)]
        return [sum(values) / len(values) for values in found]

    return Costs(
        forward=means(Kind.F),
        backward=means(Kind.B),
        input=means(Kind.I),
        weight=means(Kind.W),
        overlapped=means(Kind.OVERLAP_F_B),
    )


def _written(spans: Sequence[Span], begin: float) -> dict[str, Any]:
    start, end = window(spans)
    return {
        "makespan": round(end - start, 6),
        "idle": [round(share, 6) for _, share in sorted(idle_shares(spans).items())],
        "spans": _rows(spans, begin),
    }


def _rows(spans: Iterable[Span], begin: float) -> list[list[Any]]:
    """By rank and start; to the microsecond, which keeps the file small."""
    ordered = sorted(spans, key=lambda span: (span.rank, span.start))
    return [[span.rank, round(span.start - begin, 6), round(span.end - begin, 6), span.action] for span in ordered]
