"""What a trace records, and on which lane."""

import time

import torch

from headrace.fp8.numerics import Numerics
from headrace.pipeline.timeline import COMMUNICATION, COMPUTE
from headrace.pipeline.trace import PIECES, Trace
from pipeline_runs import ALPHA, MTP, configuration, engine, rows


def test_spans_are_sorted_and_relative_to_the_beginning():
    trace = Trace(3, torch.device("cpu"))
    trace.begin()
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


def test_nothing_is_kept_before_the_beginning_and_after_the_end():
    config = configuration(microbatch=4)
    running = engine(config, Numerics("fp32"))
    running.step(rows(config), MTP, ALPHA, "step 1")
    assert running.trace.spans() == []
    running.begin_timeline()
    running.step(rows(config, 1), MTP, ALPHA, "step 2")
    running.timeline()
    kept = running.trace.spans()
    assert {span.lane for span in kept} == {COMPUTE, PIECES, COMMUNICATION}
    running.step(rows(config, 2), MTP, ALPHA, "step 3")
    assert running.trace.spans() == kept
    running.close()
