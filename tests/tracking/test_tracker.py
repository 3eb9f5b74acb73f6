"""A tracked run as W&B's own files show it, and every fault that must not reach the stage."""

import json
import logging
import os
import time

import pytest

from headrace.launch.deadline import StopRequested
from headrace.tracking.journal import read_history
from headrace.tracking.mirror import is_busy
from tracking.tracking_fixtures import CANARY, INPUTS, open_tracker, write_manifest
from wandb_file import read_wandb


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        self.logger = logging.Logger("tracking")
        self.logger.addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_wandb_holds_identity_history_and_artifact_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY * 3)
    folder = tmp_path / "tracking"
    warnings = Warnings()
    begun, begun_cpu = time.monotonic(), time.process_time()
    tracker = open_tracker(folder, log=warnings.logger)
    assert time.process_time() - begun_cpu < 0.05  # importing W&B here would take ten times that
    assert time.monotonic() - begun < 1  # usually a millisecond; the machine may be busy
    for step in range(1, 31):
        tracker.log(step, {"loss": 6 - step / 10, "lr": 1e-3})
    tracker.log(30, {"validation": 3.5})
    tracker.summary({"final": {"loss": 3.0}, "note": CANARY})
    tracker.artifact("pretrain-0123456789ab", "checkpoint", write_manifest(tmp_path))
    tracker.close()
    assert warnings.lines == []

    (file,) = folder.rglob("*.wandb")
    run = read_wandb(file)
    assert (run.run_id, run.group, run.job_type) == ("pretrain-0123456789ab", "publish-77", "pretrain")
    assert run.project == "headrace" and run.exit_code == 0
    assert run.config["recipe"] == {"tokens": 1000} and run.config["inputs"] == INPUTS
    assert [row["_step"] for row in run.history] == list(range(1, 31))
    local = read_history(folder / "metrics.jsonl")
    assert [row["loss"] for row in run.history] == [row["loss"] for row in local]
    assert [row["_timestamp"] for row in run.history[:-1]] == [row["time"] for row in local[:-1]]
    assert run.history[-1]["validation"] == 3.5 and run.summary["final"] == {"loss": 3.0}
    assert run.artifacts == [("pretrain-0123456789ab", "checkpoint", ("ef" * 8, "latest"))]
    (staged,) = [path for path in (folder / "wandb" / "artifacts" / "staging").iterdir() if path.is_file()]
    assert json.loads(staged.read_text())["hash"] == "sha256:" + "ef" * 32

    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []


def test_disabled_writes_the_jsonl_only(tmp_path):
    with open_tracker(tmp_path / "t", mode="disabled") as tracker:
        tracker.log(1, {"loss": 1.0})
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"metrics.jsonl", "run.json"}


def test_an_exception_marks_the_run_as_failed(tmp_path):
    with pytest.raises(KeyError), open_tracker(tmp_path, mode="disabled"):
        raise KeyError("gone")
    assert json.loads((tmp_path / "run.json").read_text())["exit_code"] == 1


def fake_wandb(folder, body):
    package = folder / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)
    return os.pathsep.join([str(folder / "fake"), os.environ.get("PYTHONPATH", "")])


def test_a_broken_wandb_costs_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", fake_wandb(tmp_path, "raise ImportError('no W&B today')"))
    warnings = Warnings()
    tracker = open_tracker(tmp_path / "t", log=warnings.logger)
    deadline = time.monotonic() + 30
    step = 0
    while not warnings.lines and time.monotonic() < deadline:
        step += 1
        tracker.log(step, {"loss": 1.0})
        time.sleep(0.02)
    tracker.log(step + 1, {"loss": 0.5})
    tracker.close()
    assert len(warnings.lines) == 1 and "W&B" in warnings.lines[0] and "goes on" in warnings.lines[0]
    assert len(read_history(tmp_path / "t" / "metrics.jsonl")) == step + 1
    assert "no W&B today" in (tmp_path / "t" / "mirror.log").read_text()


@pytest.mark.parametrize("first", ["tracker", "mirror"])
def test_a_wandb_that_hangs_is_ended_in_time_and_leaves_no_process(first, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH",
        fake_wandb(
            tmp_path, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
        ),
    )
    warnings = Warnings()
    tracker = open_tracker(tmp_path / "t", log=warnings.logger, finish_seconds=1.0)
    tracker.log(1, {"loss": 1.0})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    # The mirror has read that it is 1 s; which of the two gives up first is chance otherwise.
    tracker._record.finish_seconds = {"tracker": 0.95, "mirror": 20.0}[first]
    begun = time.monotonic()
    tracker.close()
    assert 0.9 < time.monotonic() - begun < 10
    assert len(warnings.lines) == 1 and f"did not end within {tracker._record.finish_seconds:g} s" in warnings.lines[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("stop", [StopRequested, KeyboardInterrupt])
def test_a_stage_that_was_asked_to_stop_does_not_wait_for_a_wandb_that_hangs(tmp_path, monkeypatch, stop):
    pid = tmp_path / "pid"
    hang = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    monkeypatch.setenv("PYTHONPATH", fake_wandb(tmp_path, hang))
    warnings = Warnings()
    with pytest.raises(stop), open_tracker(tmp_path / "t", log=warnings.logger, finish_seconds=3.0) as tracker:
        tracker.log(1, {"loss": 1.0})
        while not pid.exists() or not pid.read_text():
            time.sleep(0.02)
        begun = time.monotonic()
        raise stop
    assert time.monotonic() - begun < 1 and warnings.lines == []
    assert json.loads((tmp_path / "t" / "run.json").read_text())["exit_code"] == 1
    deadline = time.monotonic() + 30
    while is_busy(tmp_path / "t"):  # it ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_disk_without_room_costs_one_warning_per_file(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    warnings = Warnings()
    tracker = open_tracker(folder, mode="disabled", log=warnings.logger)
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len(warnings.lines) == 1 and "No space left" in warnings.lines[0]


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    warnings = Warnings()
    with open_tracker(tmp_path / "file" / "t", log=warnings.logger) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.summary({"a": 1})
        tracker.artifact("pretrain-1", "checkpoint", write_manifest(tmp_path))
    assert 1 <= len(warnings.lines) <= 3 and all(line.startswith("tracking: ") for line in warnings.lines)


def test_logging_is_cheap(tmp_path):
    with open_tracker(tmp_path, mode="disabled") as tracker:
        metrics = {f"metric/{index}": 1.0 for index in range(20)}
        begun = time.process_time()
        for step in range(1000):
            tracker.log(step, metrics)
        assert time.process_time() - begun < 0.5
