"""Idle shares, lines that do not cover each other, and traces that say what the spans say."""

import json

import pytest

from headrace.pipeline.generators import generate
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, Span, chrome_trace, idle_shares, tracks

SPANS = [
    Span(1, 12.0, 13.0, "1F0"),
    Span(0, 10.0, 12.0, "0F0"),
    Span(0, 12.5, 14.0, "0B0"),
    Span(0, 10.5, 11.5, "dispatch", COMMUNICATION),
    Span(0, 11.0, 12.5, "combine", COMMUNICATION),
    Span(0, 11.5, 13.0, 'a "quoted" <one>', COMMUNICATION),
]


def test_idle_shares_are_those_of_the_simulation() -> None:
    result = simulate(generate("dualpipe", 4, 8), Costs())
    assert idle_shares(result.spans) == pytest.approx(dict.fromkeys(range(4), 2 / 26))


def test_idle_counts_from_the_first_start_and_leaves_communication_out() -> None:
    assert idle_shares(SPANS) == {0: pytest.approx(0.125), 1: pytest.approx(0.75)}
    assert idle_shares([]) == {}


def test_tracks_keep_spans_apart_and_use_no_more_lines_than_needed() -> None:
    lines = tracks(span for span in SPANS if span.lane == COMMUNICATION)
    assert [[span.action for span in line] for line in lines] == [["dispatch", 'a "quoted" <one>'], ["combine"]]


def test_a_trace_holds_every_span_with_its_time_and_duration() -> None:
    events = json.loads(chrome_trace(SPANS))["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    found = {(e["pid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in complete}
    assert found == {(s.rank, s.action, s.lane, (s.start - 10) * 1e6, (s.end - s.start) * 1e6) for s in SPANS}
    assert len(complete) == len(SPANS)


def test_a_trace_names_ranks_and_lanes_and_nothing_overlaps_in_a_thread() -> None:
    events = json.loads(chrome_trace(SPANS))["traceEvents"]
    named = [(e["name"], e["pid"], e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert named == [
        ("process_name", 0, 0, "rank 0"),
        ("thread_name", 0, 0, "compute"),
        ("thread_name", 0, 1, "communication"),
        ("thread_name", 0, 2, "communication"),
        ("process_name", 1, 0, "rank 1"),
        ("thread_name", 1, 0, "compute"),
    ]
    ends: dict[tuple[int, int], float] = {}
    for event in (e for e in events if e["ph"] == "X"):
        assert event["ts"] >= ends.get((event["pid"], event["tid"]), 0)
        ends[event["pid"], event["tid"]] = event["ts"] + event["dur"]


def test_the_length_of_the_unit_is_the_callers() -> None:
    events = json.loads(chrome_trace([Span(0, 0, 3, "0F0")], microseconds=1000))["traceEvents"]
    assert events[-1]["dur"] == 3000


def test_times_are_written_to_the_nanosecond() -> None:
    events = json.loads(chrome_trace([Span(0, 0.1, 0.4, "0F0"), Span(0, 0.4, 0.7000001234, "0B0")]))["traceEvents"]
    assert [(e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0, 300_000), (300_000, 300_000.123)]
