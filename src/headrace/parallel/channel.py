"""Where collectives run while a rank computes something else.

    pending = channel.start("dispatch", work)     returns at once
    ...                                           computation of another microbatch
    result = pending.wait()                       what `work` returned; raises what it raised

Works run one after the other in the order they were started, which all ranks of a group must agree on. On CPUs they
run in a thread: gloo's blocking calls let go of the interpreter. On GPUs they run on a stream of their own, as the
report's communication kernels do (section 3.2.2). A channel knows nothing of what is sent.

`wait` may be called once and lets go of the result, so that a pending kept somewhere keeps no memory.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
Covariant = TypeVar("Covariant", covariant=True)

Record = Callable[[str, float, float, float, float], None]
"""Who listens is told at the end of every `wait`: label, then when the work was issued, when `wait` was entered, when
the work finished, and when `wait` returned, all of `time.perf_counter`."""


class Pending(Protocol[Covariant]):
    """Work that was started."""

    def wait(self) -> Covariant:
        """Its result, once it is there; raises what the work raised. At most one call."""
        ...


class Channel(Protocol):
    """Runs works in the order they were started."""

    def start(self, label: str, work: Callable[[], T]) -> Pending[T]:
        """Start `work` after those before it. An exception is kept for `wait`."""
        ...

    def listen(self, record: Record | None) -> None:
        """Tell `record` of every work that is started from now on; None tells nobody."""
        ...

    def close(self) -> None:
        """Finish what was started; nothing may be started afterwards."""
        ...


class _Work(Generic[T]):
    """A work with its outcome."""

    def __init__(self, label: str, work: Callable[[], T], record: Record | None) -> None:
        self._label, self._work, self._record = label, work, record
        self._issued, self._finished = time.perf_counter(), 0.0
        self._over = threading.Lock()  # released when the work is over; an Event costs more than some works
        self._over.acquire()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:  # whatever it is belongs to whoever waits
            self._error = error
        del self._work  # and the tensors that it holds
        self._finished = time.perf_counter()
        self._over.release()

    def wait(self) -> T:
        waited = time.perf_counter()
        self._over.acquire()
        if self._record is not None:
            self._record(self._label, self._issued, waited, self._finished, time.perf_counter())
        if self._error is not None:
            raise self._error
        return self._results.pop()


class InlineChannel:
    """Runs everything at once: for one process, which has nothing to hide."""

    def __init__(self) -> None:
        self._record: Record | None = None

    def listen(self, record: Record | None) -> None:
        """Tell `record` of every work."""
        self._record = record

    def start(self, label: str, work: Callable[[], T]) -> Pending[T]:
        """Run `work` now."""
        started = _Work(label, work, self._record)
        started.run()
        return started

    def close(self) -> None:
        """Nothing is open."""


class ThreadChannel:
    """Runs works in one thread: for CPUs. The thread does not keep a process alive whose work hangs."""

    def __init__(self) -> None:
        self._record: Record | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="channel", daemon=True)
        self._thread.start()

    def listen(self, record: Record | None) -> None:
        """Tell `record` of every work."""
        self._record = record

    def start(self, label: str, work: Callable[[], T]) -> Pending[T]:
        """Queue `work`."""
        assert self._thread.is_alive(), "the channel is closed"
        started = _Work(label, work, self._record)
        self._queue.put(started.run)
        return started

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (run := self._queue.get()) is not None:
            run()
            del run  # else the last work's tensors live until the next one comes


class StreamChannel:
    """Runs works on a CUDA stream of its own. `start` returns as soon as the work's kernels are launched.

    The stream first waits for what was launched before `start`, and the caller's stream waits in `wait`. The work, and
    with it what it reads, is held until then. So memory is never used again too early: the caller's tensors are freed
    after its stream has waited for the work, and results are freed before a later `start` makes this stream wait for
    their readers. That holds for every tensor, however deep in a result, without telling the allocator of each; it asks
    the caller to use one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._record: Record | None = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._zero = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._zero_time = 0.0

    def listen(self, record: Record | None) -> None:
        """Tell `record` of every work; each then costs a wait for the device."""
        self._record = record
        if record is not None:
            self._zero.record(self._stream)
            self._zero.synchronize()
            self._zero_time = time.perf_counter()

    def start(self, label: str, work: Callable[[], T]) -> Pending[T]:
        """Launch `work`; the host waits only for what `work` itself waits for."""
        return _Launched(self, label, work)

    def close(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


class _Launched(Generic[T]):
    def __init__(self, channel: StreamChannel, label: str, work: Callable[[], T]) -> None:
        self._channel, self._label, self._work = channel, label, work
        self._issued, self._record = time.perf_counter(), channel._record
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._event = torch.cuda.Event(enable_timing=channel._record is not None)  # type: ignore[no-untyped-call]
        channel._stream.wait_stream(torch.cuda.current_stream(channel._device))
        with torch.cuda.stream(channel._stream):
            try:
                self._results.append(work())
            except BaseException as error:
                self._error = error
            self._event.record(channel._stream)

    def wait(self) -> T:
        waited, channel = time.perf_counter(), self._channel
        torch.cuda.current_stream(channel._device).wait_event(self._event)
        del self._work
        if self._record is not None:  # a trace needs the time on the device, and pays for it by waiting
            self._event.synchronize()
            finished = channel._zero_time + channel._zero.elapsed_time(self._event) / 1000
            self._record(self._label, self._issued, waited, finished, time.perf_counter())
        if self._error is not None:
            raise self._error
        return self._results.pop()


class DelayedChannel:
    """Makes every work of a channel take `seconds` longer, by sleeping: for tests and benchmarks of overlap."""

    def __init__(self, channel: Channel, seconds: float) -> None:
        self._channel, self._seconds = channel, seconds

    def start(self, label: str, work: Callable[[], T]) -> Pending[T]:
        """Sleep, then run `work`, on the channel inside."""

        def later() -> T:
            time.sleep(self._seconds)
            return work()

        return self._channel.start(label, later)

    def listen(self, record: Record | None) -> None:
        """Passed on."""
        self._channel.listen(record)

    def close(self) -> None:
        """Close the channel inside."""
        self._channel.close()
