"""Channels: order, results, exceptions, and that work runs while the caller does something else."""

import gc
import threading
import time
import weakref

import pytest
import torch

from headrace.parallel.channel import DelayedChannel, InlineChannel, StreamChannel, ThreadChannel

pytestmark = pytest.mark.alone

KINDS = [InlineChannel, ThreadChannel]


@pytest.mark.parametrize("kind", KINDS)
def test_works_run_in_the_order_they_were_started_and_results_come_back(kind):
    channel, seen = kind(), []
    pending = [channel.start(str(n), lambda n=n: seen.append(n) or n * n) for n in range(20)]
    assert [p.wait() for p in reversed(pending)] == [n * n for n in reversed(range(20))]
    channel.close()
    assert seen == list(range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_reaches_whoever_waits_and_later_works_still_run(kind):
    channel = kind()

    def fail():
        raise ZeroDivisionError("in the work")

    failing, fine = channel.start("bad", fail), channel.start("good", lambda: 7)
    with pytest.raises(ZeroDivisionError, match="in the work"):
        failing.wait()
    assert fine.wait() == 7
    channel.close()


def test_a_thread_works_while_the_caller_goes_on_and_the_record_shows_it():
    records, go = [], threading.Event()
    channel = ThreadChannel()
    channel.listen(lambda *times: records.append(times))
    before = time.perf_counter()
    pending = channel.start("dispatch", lambda: go.wait(10))
    go.set()  # an inline work would have waited for this in vain
    assert pending.wait()
    ((label, issued, waited, finished, returned),) = records
    assert label == "dispatch"
    assert before <= issued <= waited <= returned <= time.perf_counter()
    assert issued <= finished <= returned
    channel.close()


def test_a_delayed_work_hides_under_computation():
    records = []
    channel = DelayedChannel(ThreadChannel(), 0.3)
    channel.listen(lambda *times: records.append(times))
    pending = channel.start("combine", lambda: 1)
    time.sleep(0.6)  # the computation
    assert pending.wait() == 1
    _, issued, waited, finished, returned = records[0]
    assert finished - issued >= 0.3
    assert finished < waited
    assert returned - waited < 0.3
    channel.close()


def test_nothing_is_started_on_a_closed_channel_and_closing_finishes_what_was_started():
    channel, seen = ThreadChannel(), []
    channel.start("slow", lambda: time.sleep(0.1) or seen.append(1))
    channel.close()
    assert seen == [1]
    with pytest.raises(AssertionError):
        channel.start("late", lambda: None)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_finished_work_nor_a_pending_waited_for_keeps_memory(kind):
    channel, tensor = kind(), torch.zeros(3)
    alive = weakref.ref(tensor)
    pending = channel.start("hold", lambda held=tensor: held)
    del tensor
    pending.wait()
    channel.start("next", lambda: None).wait()
    gc.collect()
    assert alive() is None
    channel.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would overlap two CUDA streams; there is no GPU")
def test_a_stream_works_beside_the_callers_and_waits_for_what_came_before():
    device, records = torch.device("cuda"), []
    channel = StreamChannel(device)
    channel.listen(lambda *times: records.append(times))
    for _ in range(20):  # memory is used again and again
        x = torch.full((1 << 20,), 1.0, device=device)
        torch.cuda._sleep(1_000_000)
        x.add_(1)
        pending = channel.start("double", lambda x=x: x * 2)
        del x
        torch.full((1 << 20,), -1.0, device=device)
        y = pending.wait()
        assert bool((y == 4).all())
    assert all(issued <= waited <= returned for _, issued, waited, _, returned in records)
    with pytest.raises(ZeroDivisionError):
        channel.start("bad", lambda: 1 / 0).wait()
    channel.close()
