"""W&B's history is complete and monotone whatever was killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headrace.launch.deadline import StopRequested
from tracking.tracking_fixtures import open_tracker
from wandb_file import read_wandb

_STAGE = """
import logging, sys, time
from pathlib import Path
from headrace.tracking.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), run_id="pretrain-0123456789ab", group="g", job_type="pretrain", config={},
                  inputs=[], wandb_mode="offline", project="headrace", entity=None, log=logging.getLogger())
for step in range(1, 21):
    tracker.log(step, {"loss": 10.0 - step})
print("logged", flush=True)
time.sleep(600)
"""


def fragments(folder):
    return [read_wandb(path) for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def start_stage(folder):
    stage = subprocess.Popen([sys.executable, "-c", _STAGE, str(folder)], stdout=subprocess.PIPE)
    assert stage.stdout.readline() == b"logged\n"
    return stage


def test_a_killed_stage_is_finished_as_failed_and_a_resumed_one_goes_on_behind_it(tmp_path):
    stage = start_stage(tmp_path)
    stage.kill()
    stage.wait()
    wait_for((tmp_path / "mirror.json").exists)
    (first,) = fragments(tmp_path)
    assert first.exit_code == 1 and [row["_step"] for row in first.history] == list(range(1, 21))

    with open_tracker(tmp_path) as tracker:  # from a checkpoint of step 15
        for step in range(16, 31):
            tracker.log(step, {"loss": 10.0 - step})
    first, second = fragments(tmp_path)
    assert second.exit_code == 0 and second.run_id == first.run_id
    assert [row["_step"] for row in second.history] == list(range(21, 31))
    assert [row["loss"] for row in first.history + second.history] == [10.0 - step for step in range(1, 31)]


def test_what_a_stage_logged_before_it_was_asked_to_stop_is_there_though_it_did_not_wait(tmp_path):
    with pytest.raises(StopRequested), open_tracker(tmp_path) as tracker:
        for step in range(1, 11):
            tracker.log(step, {"loss": 10.0 - step})
        raise StopRequested("SIGTERM")
    assert not (tmp_path / "mirror.json").exists()
    with open_tracker(tmp_path) as tracker:  # at once, as the rule's shell line does
        tracker.log(11, {"loss": -1.0})
    found = fragments(tmp_path)
    assert found[-1].exit_code == 0
    rows = [row for run in found for row in run.history]
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, 10.0 - step) for step in range(1, 12)]


def test_a_killed_mirror_is_made_up_for(tmp_path):
    stage = start_stage(tmp_path)
    wait_for(lambda: list((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    mirrors = subprocess.run(["pgrep", "-P", str(stage.pid)], capture_output=True, text=True, check=True).stdout.split()
    for process in mirrors:
        os.killpg(int(process), signal.SIGKILL)
    stage.kill()
    stage.wait()
    assert not (tmp_path / "mirror.json").exists()

    with open_tracker(tmp_path) as tracker:
        tracker.log(21, {"loss": -11.0})
    (only,) = fragments(tmp_path)
    assert [row["_step"] for row in only.history] == list(range(1, 22))
    state = json.loads((tmp_path / "mirror.json").read_text())
    assert state["step"] == 21 and state["offset"] == (tmp_path / "metrics.jsonl").stat().st_size
