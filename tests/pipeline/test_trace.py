"""What a trace records, and on which lane."""

import time

import torch

from headrace.pipeline.timeline import COMMUNICATION, COMPUTE
from headrace.pipeline.trace import PIECES, Trace


def test_spans_are_sorted_and_relative_to_the_beginning():
    trace = Trace(3, torch.device("cpu"))
    trace.compute("forgotten", lambda: None)
    trace.begin()
    issued, begun = time.perf_counter(), trace.now()
    assert trace.compute("attention", lambda: 7) == 7
    waited = time.perf_counter()
    trace.collective("dispatch", issued, waited, waited, waited + 1)
    trace.action("0F1", begun)
    spans = trace.spans()
    assert [(span.action, span.lane) for span in spans] == [
        ("dispatch", COMMUNICATION), ("0F1", COMPUTE), ("attention", PIECES)
    ]  # fmt: skip
    assert {span.rank for span in spans} == {3}
    dispatch, action, attention = spans
    assert 0 <= dispatch.start <= action.start <= attention.start <= attention.end <= action.end < 1 < dispatch.end
    assert dispatch.end - dispatch.start == waited + 1 - issued
