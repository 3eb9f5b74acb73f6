"""Upload and lineage replay against a stand-in for the uploader and for W&B's public API."""

import logging
import subprocess
import sys

import pytest

from headrace.errors import UserError
from headrace.tracking import mirror
from headrace.tracking.sync import SyncReport, sync
from tracking.tracking_fixtures import INPUTS, open_tracker, write_manifest
from wandb_file import read_wandb
from wandb_stand_in import calls, install

_LOG = logging.Logger("sync")


class FakeApi:
    """Knows the artifacts of uploaded runs; records who used what."""

    def __init__(self, broken=()):
        self.used = []
        self.broken = set(broken)

    def artifact(self, name):
        if name in self.broken:
            raise ValueError(f"artifact {name} not found")
        return f"artifact {name}"

    def run(self, path):
        class Run:
            use_artifact = staticmethod(lambda artifact: self.used.append((path, artifact)))

        return Run()


class FakeUploader:
    """Reads each fragment, as W&B would, and marks it as `wandb sync` does."""

    def __init__(self):
        self.calls = []

    def __call__(self, fragments):
        files = [file for fragment in fragments for file in fragment.glob("*.wandb")]
        self.calls.append([read_wandb(file) for file in files])
        for file in files:
            file.with_suffix(".wandb.synced").touch()


def tracked_run(results, mode="offline"):
    folder = results / "pretrain" / "0123456789ab" / "tracking"
    with open_tracker(folder, mode=mode) as tracker:
        tracker.log(1, {"loss": 1.0})
        results.mkdir(exist_ok=True)
        tracker.artifact("pretrain-0123456789ab", "checkpoint", write_manifest(results))
    return folder


def told_wandb(upload):
    """What W&B has been told by all uploads of the one run."""
    ((run,),) = upload.calls
    assert (run.run_id, run.group, run.job_type, run.project) == (_NAME, "publish-77", "pretrain", "headrace")
    assert [(row["_step"], row["loss"]) for row in run.history] == [(1, 1.0)] and run.exit_code == 0
    assert run.config["inputs"] == INPUTS and run.artifacts == [(_NAME, "checkpoint", ("ef" * 8, "latest"))]
    return True


_NAME = "pretrain-0123456789ab"
_USED = ("headrace/pretrain-0123456789ab", "artifact headrace/tokenize-0011:" + "cd" * 8)


def test_runs_are_uploaded_and_linked_once(tmp_path):
    results = tmp_path / "results"
    tracked_run(results)
    (results / "latest").mkdir()
    (results / "latest" / "pretrain").symlink_to(results / "pretrain" / "0123456789ab")
    api, upload = FakeApi(), FakeUploader()
    assert sync(results, log=_LOG, upload=upload, api=api) == SyncReport(runs=1, uploaded=1, linked=1, failed=0)
    assert api.used == [_USED] and told_wandb(upload)
    assert sync(results, log=_LOG, upload=upload, api=api) == SyncReport(runs=1, uploaded=0, linked=0, failed=0)
    assert api.used == [_USED] and len(upload.calls) == 1


def test_what_the_mirror_missed_is_made_up_for_and_refusals_are_counted_and_tried_again(tmp_path, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setattr(mirror, "command", lambda folder: ["false"])
    folder = tracked_run(results)  # W&B saw nothing of this run
    assert not (folder / "wandb").exists()
    monkeypatch.undo()

    def refuse(fragments):
        assert len(fragments) == 1

    api = FakeApi(broken=["headrace/tokenize-0011:" + "cd" * 8])
    assert sync(results, log=_LOG, upload=refuse, api=api) == SyncReport(runs=1, uploaded=0, linked=0, failed=1)
    api, upload = FakeApi(), FakeUploader()
    assert sync(results, log=_LOG, upload=upload, api=api) == SyncReport(runs=1, uploaded=1, linked=1, failed=0)
    assert api.used == [_USED] and told_wandb(upload)


def test_the_real_wandb_would_take_what_it_is_handed_and_pass_over_what_is_marked(tmp_path, monkeypatch):
    folder = tracked_run(tmp_path / "results")

    def listed():
        command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(fragment)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr

    (fragment,) = (folder / "wandb").glob("offline-run-*")
    assert "Would sync 1 run" in listed()
    with monkeypatch.context() as patch:
        told = install(tmp_path, patch)
        assert sync(tmp_path / "results", log=_LOG, api=FakeApi()) == SyncReport(runs=1, uploaded=1, linked=1, failed=0)
    assert calls(told, "program") == [["sync", str(fragment)]]
    assert "No runs to sync" in listed()


def test_disabled_runs_and_empty_folders_need_no_account(tmp_path):
    tracked_run(tmp_path, mode="disabled")
    assert sync(tmp_path, log=_LOG) == SyncReport(0, 0, 0, 0)


def test_without_a_key_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "command", lambda folder: ["true"])
    tracked_run(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"^sync: .*WANDB_API_KEY.*$"):
        sync(tmp_path, log=_LOG)
