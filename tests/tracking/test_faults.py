"""How long one `log` takes while the service sleeps, refuses or dies and while the disk is full."""

import logging
import time

import pytest

from headrace.tracking.journal import read_history
from tracking.tracking_fixtures import open_tracker
from tracking.trackio_stand_in import install

MOST_SECONDS = 1.0  # the issue's: tracking never blocks training for longer
CALLS = 200
_METRICS = {"a metric of some length " * 12: 1.0}

_SERVICE = """
import os, time
def fault():
    open(os.environ["FAULT_SEEN"], "w").close()
    {fault}
class Settings:
    sync_dir = "fragment"
    def __init__(self, **settings): pass
class Run:
    resumed, step, settings, summary = False, 0, Settings(), {{}}
    def log(self, metrics, step=None): {on_log}
    def finish(self, exit_code=0): pass
def init(**settings):
    {on_init}
    return Run()
"""
_FAULTS = {
    "sleeps": "time.sleep(600)",
    "429": "raise RuntimeError('429 Client Error: Too Many Requests')",
    "timeout": "raise TimeoutError('read timed out')",
    "full disk": "raise OSError(28, 'No space left on device')",
    "dies": "os._exit(9)",
}


def timed_calls(tracker, first):
    """The longest of CALLS calls of `log`, in seconds."""
    longest = 0.0
    for step in range(first, first + CALLS):
        begun = time.monotonic()
        tracker.log(step, _METRICS)
        longest = max(longest, time.monotonic() - begun)
    return longest


@pytest.mark.parametrize("fault", _FAULTS)
@pytest.mark.parametrize(("backend", "moment"), [("wandb", "init"), ("wandb", "log"), ("trackio", "log")])
def test_no_fault_of_a_service_holds_up_a_step(tmp_path, monkeypatch, backend, fault, moment):
    on = {"on_init": "pass", "on_log": "pass", f"on_{moment}": "fault()"}
    install(tmp_path, monkeypatch, _SERVICE.format(fault=_FAULTS[fault], **on), backend)
    monkeypatch.setenv("FAULT_SEEN", str(tmp_path / "seen"))
    log = logging.getLogger("tracking.faults")
    tracker = open_tracker(tmp_path / "t", backend=backend, log=log, finish_seconds=0.5)
    longest, deadline = timed_calls(tracker, 0), time.monotonic() + 30
    while not (tmp_path / "seen").exists():
        assert time.monotonic() < deadline, "the service was never called"
        time.sleep(0.02)
    longest = max(longest, timed_calls(tracker, CALLS))
    tracker.close(0)
    assert longest < MOST_SECONDS
    assert [row["step"] for row in read_history(tmp_path / "t" / "metrics.jsonl")] == list(range(2 * CALLS))


def test_a_full_disk_holds_up_no_step(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    tracker = open_tracker(folder, mode="disabled", log=logging.getLogger("tracking.faults"))
    longest = max(timed_calls(tracker, first) for first in range(0, 20 * CALLS, CALLS))  # beyond a megabyte
    tracker.close()
    assert longest < MOST_SECONDS
