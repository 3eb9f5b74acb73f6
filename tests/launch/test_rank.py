"""A rank's own side: what it takes for another rank's fault. The rest is in test_supervisor.py."""

import time
from collections.abc import Iterator

import pytest
from torch import distributed
from torch.distributed import TCPStore

from headrace.launch import wire
from headrace.launch.heartbeat import Heartbeat
from headrace.launch.rank import another_left
from headrace.launch.store import host_store
from headrace.launch.wire import Mood


def chained(cause: Exception) -> Exception:
    error = ValueError("the action failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38433"), True),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), True),
        (ConnectionResetError("reset"), True),
        (distributed.DistNetworkError("failed to recv"), True),
        (chained(RuntimeError("Read error [127.0.0.1]:3: Connection reset by peer")), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (RuntimeError("[enforce fail at pair.cc:490] op.preamble.length <= op.nbytes. 16 vs 8"), False),
        (ValueError("socket"), False),
        (chained(KeyError("layer")), False),
    ],
)
def test_only_lost_connections_are_another_ranks_fault(error: Exception, expected: bool) -> None:
    assert another_left(error) is expected


@pytest.fixture
def heart() -> Iterator[Heartbeat]:
    store, _ = host_store(1)
    store.set(wire.ORDERS, '{"stop": null, "end": false}')
    found = Heartbeat(TCPStore("127.0.0.1", store.port, is_master=False), 0, None)
    yield found
    found.close()


def test_time_at_work_is_counted_and_time_waiting_is_not(heart: Heartbeat) -> None:
    before = heart.busy_seconds()
    for mood in (Mood.BUSY, Mood.WAITING, Mood.PATIENT, Mood.WAITING, Mood.BUSY):
        heart.mark("something", mood)
        time.sleep(0.05)
    busy = heart.busy_seconds() - before
    assert 0.15 <= busy < 0.15 + 0.08
    heart.mark("a wait", Mood.WAITING)
    said = heart.busy_seconds()
    time.sleep(0.02)
    assert heart.busy_seconds() == said


def test_a_mark_costs_next_to_nothing(heart: Heartbeat) -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        heart.mark("1B3 of step 17", Mood.BUSY)
    assert (time.perf_counter() - began) / 10_000 < 20e-6
