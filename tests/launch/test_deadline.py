"""Deadlines: SIGTERM and the time budget, for code that polls and for code that does not."""

import signal
import time

import pytest

from headrace.launch.deadline import Deadline, StopRequested


def test_sigterm_raises_around_code_that_does_not_poll() -> None:
    with pytest.raises(StopRequested, match="SIGTERM"), Deadline(None).watching():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)


def test_code_that_polls_is_told_and_not_interrupted() -> None:
    deadline = Deadline(None)
    with deadline.watching(), deadline.polled():
        assert deadline.reason() is None
        signal.raise_signal(signal.SIGTERM)
        assert deadline.reason() == "SIGTERM"


def test_the_budget_ends_with_its_own_reason() -> None:
    started = time.monotonic()
    with pytest.raises(StopRequested, match=r"launch\.minutes"), Deadline(0.01).watching():
        time.sleep(10)
    assert time.monotonic() - started < 5


def test_the_former_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Deadline(None).watching():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
