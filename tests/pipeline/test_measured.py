"""A step's timeline beside its plan: equal where nothing was waited for, apart by what was."""

import json

import pytest

from headrace.parallel.mesh import Mesh
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import generate
from headrace.pipeline.measured import mean_costs, timeline, traces
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, Span
from headrace.pipeline.trace import PIECES

NAMES = ["1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]


def mesh(ranks, expert=1):
    return Mesh(ranks, expert, expert, 1, 0)


def ran(name, ranks, microbatches, costs=None, clock=5.0):
    """A schedule, and its spans as a perfect machine would have recorded them."""
    schedule = with_communication(generate(name, ranks, microbatches))
    stages = range(schedule.stages)
    costs = costs or Costs(
        forward=[0.010 + 0.001 * s for s in stages],
        backward=[0.021 + 0.002 * s for s in stages],
        input=[0.012 - 0.001 * s for s in stages],
        weight=[0.009 + 0.003 * s for s in stages],
        overlapped=[0.030 + 0.001 * s for s in stages],
    )
    spans = simulate(schedule, costs).spans
    return schedule, [Span(s.rank, s.start + clock, s.end + clock, s.action) for s in spans]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_waiting_equals_its_plan(name):
    schedule, spans = ran(name, 4, 8)
    found = timeline(schedule, "as configured", [1] * schedule.stages, mesh(4), spans)
    assert found["measured"].pop("collectives") == []
    assert [row[::3] for row in found["measured"]["spans"]] == [row[::3] for row in found["planned"]["spans"]]
    times = [[time for row in found[part]["spans"] for time in row[1:3]] for part in ("measured", "planned")]
    assert times[0] == pytest.approx(times[1], abs=2e-6)
    assert found["measured"]["idle"] == pytest.approx(found["planned"]["idle"], abs=2e-4)
    assert found["measured"]["makespan"] == pytest.approx(found["planned"]["makespan"], abs=2e-6)


def test_the_plan_has_the_measured_work_and_no_waiting():
    schedule, spans = ran("dualpipe", 4, 8, Costs(1, 2, 1, 1))  # idle 2 of 26 on each rank
    late = [Span(s.rank, 2 * s.start, 2 * s.start + s.end - s.start, s.action) for s in spans]  # as long a wait again
    found = timeline(schedule, "as configured", [1] * 4, mesh(4), late)
    assert found["planned"]["makespan"] == 26
    assert found["planned"]["idle"] == pytest.approx([2 / 26] * 4, abs=1e-4)
    assert found["measured"]["makespan"] > 49
    assert min(found["measured"]["idle"]) > 0.5
    assert found["live_activations"] == [5] * 4  # PP + 1
    assert found["receive_buffers"] == list(simulate(schedule, Costs()).receive_buffers)


def test_costs_are_means_by_kind_and_stage_over_all_copies():
    spans = [
        Span(0, 0.0, 1.0, "0F0"),
        Span(1, 3.0, 6.0, "0F1"),
        Span(0, 0.0, 5.0, "1F0"),
        Span(0, 0.0, 7.0, "(1F2;0B3)OVERLAP_F_B"),
        Span(0, 0.0, 4.0, "1W0"),
    ]
    costs = mean_costs(spans, 2)
    assert costs.forward == [2, 5]
    assert costs.overlapped == [0, 7]
    assert costs.weight == [0, 4]
    assert costs.backward == costs.input == [0, 0]


def test_collectives_are_kept_where_experts_are_spread_and_pieces_never():
    schedule, spans = ran("dualpipe", 2, 4)
    extra = [Span(0, 5.01, 5.02, "dispatch", COMMUNICATION), Span(1, 5.0, 5.001, "attention", PIECES)]
    arguments = (schedule, "as configured", [2, 1])
    assert timeline(*arguments, mesh(2), spans + extra)["measured"]["collectives"] == []
    found = timeline(*arguments, mesh(2, expert=2), spans + extra)
    assert found["measured"]["collectives"] == [[0, 0.01, 0.02, "dispatch"]]
    assert len(found["measured"]["spans"]) == len(spans)
    assert (found["data"], found["expert"], found["microbatches"], found["layers"]) == (2, 2, 4, [2, 1])


def test_traces_hold_what_the_timeline_holds():
    schedule, spans = ran("dualpipe", 2, 4)
    extra = [Span(0, 5.01, 5.02, "dispatch", COMMUNICATION)]
    found = json.loads(json.dumps(timeline(schedule, "as configured", [2, 1], mesh(2, expert=2), spans + extra)))
    events = {name: json.loads(text)["traceEvents"] for name, text in traces(found).items()}
    for name in ("planned", "measured"):
        rows = [
            [e["pid"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["name"]]
            for e in events[name]
            if (e["ph"], e.get("cat")) == ("X", "compute")
        ]
        assert sorted(row[::3] for row in rows) == sorted(row[::3] for row in found[name]["spans"])
        for ours, theirs in zip(sorted(rows), sorted(found[name]["spans"]), strict=True):
            assert ours[1:3] == pytest.approx(theirs[1:3], abs=1e-8)
    (collective,) = (event for event in events["measured"] if event.get("cat") == "communication")
    assert (collective["pid"], collective["ts"], collective["dur"]) == (0, 10_000, 10_000)
    assert all(event.get("cat") != "communication" for event in events["planned"])


def test_they_are_json_and_small_at_the_published_layout():
    schedule, spans = ran("dualpipe", 16, 120, Costs(1 / 3, 2 / 3, 1 / 3, 1 / 3))
    found = timeline(schedule, "as configured", [4] * 16, mesh(16), spans)
    text = json.dumps(found)
    assert len(text) < 400_000
    assert all(len(trace) < 300_000 for trace in traces(found).values())
    assert json.loads(text)["planned"]["idle"] == pytest.approx([14 / 374] * 16, abs=1e-4)


def test_spans_of_another_schedule_are_our_mistake():
    schedule, spans = ran("zb1p", 2, 4)
    with pytest.raises(AssertionError, match="not those of one step"):
        timeline(schedule, "as configured", [2, 1], mesh(2), spans[1:])
