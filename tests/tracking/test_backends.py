"""The same run at trackio as at W&B, against a stand-in with trackio's signatures."""

import json
import logging

import pytest

from headrace.errors import UserError
from headrace.tracking.backends import environment, require
from headrace.tracking.journal import read_history
from headrace.tracking.links import RunRecord
from headrace.tracking.mirror import MirrorState
from headrace.tracking.sync import SyncReport, sync
from tracking.tracking_fixtures import CANARY, INPUTS, open_tracker, write_manifest
from tracking.trackio_stand_in import calls, install


def test_trackio_gets_identity_history_summary_artifact_and_links(tmp_path, monkeypatch):
    data = install(tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    folder = tmp_path / "t"
    with open_tracker(folder, backend="trackio") as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": 6.0 - step})
        tracker.summary({"final": {"loss": 1.0}, "note": "no number"})
        tracker.artifact("pretrain-0123456789ab", "checkpoint", write_manifest(tmp_path))
    (told, variables), = calls(data, "init")  # fmt: skip
    assert (told["project"], told["name"], told["group"]) == ("headrace", "pretrain-0123456789ab", "publish-77")
    assert (told["resume"], told["private"], told["config"]["job_type"]) == ("allow", True, "pretrain")
    assert told["config"]["recipe"] == {"tokens": 1000} and told["config"]["inputs"] == INPUTS
    assert not {"HF_TOKEN", "TRACKIO_SPACE_ID"} & set(variables)  # offline: no keys, and nowhere to send to
    *rows, (last, step) = calls(data, "log")
    local = read_history(folder / "metrics.jsonl")
    assert rows == [[{"loss": row["loss"]}, row["step"]] for row in local] and len(rows) == 5
    assert (last, step) == ({"summary/final/loss": 1.0, "summary/exit_code": 0.0}, 5)
    (artifact, aliases), = calls(data, "log_artifact")  # fmt: skip
    assert (artifact["name"], artifact["type"], aliases) == ("pretrain-0123456789ab", "checkpoint", ["ef" * 8])
    assert artifact["file"][0] == "manifest.json" and json.loads(artifact["file"][1])["hash"].endswith("ef" * 32)
    assert calls(data, "use_artifact") == [["tokenize-0011:" + "cd" * 8]]
    assert len(calls(data, "finish")) == 1  # also though the link was refused
    assert "tokenize-0011: not linked" in (folder / "mirror.log").read_text()


def test_rows_that_trackio_has_are_not_sent_again(tmp_path, monkeypatch):
    data = install(tmp_path, monkeypatch)
    with open_tracker(tmp_path / "t", backend="trackio") as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": 1.0})
    (tmp_path / "t" / "mirror.json").unlink()  # as if it had been killed before it could note how far it came
    with open_tracker(tmp_path / "t", backend="trackio") as tracker:
        for step in range(4, 9):
            tracker.log(step, {"loss": 1.0})
    assert [step for metrics, step in calls(data, "log") if "loss" in metrics] == list(range(1, 9))


def test_what_one_back_end_has_says_nothing_of_the_other(tmp_path):
    MirrorState(offset=900, step=7, fragments=["offline-run-1"]).write(tmp_path)
    assert MirrorState.read(tmp_path, "wandb").step == 7
    assert MirrorState.read(tmp_path, "trackio") == MirrorState(backend="trackio")


def test_what_was_asked_for_and_cannot_be_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracking\.backend=trackio: not installed; pip install trackio, or .*$"):
        open_tracker(tmp_path / "t", backend="trackio")
    assert not (tmp_path / "t").exists()
    require("trackio", "disabled")
    monkeypatch.undo()
    install(tmp_path, monkeypatch)
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    with pytest.raises(UserError, match="online to where"):
        require("trackio", "online")
    require("trackio", "offline")


def test_each_service_gets_its_own_keys_and_only_online(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "TRACKIO_WRITE_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "https://example.org")

    def given(backend, mode):
        record = RunRecord("r", "g", "j", mode, "p", None, 1.0, {}, [], backend=backend)
        kept = environment(tmp_path, record)
        return {"WANDB_API_KEY", "TRACKIO_WRITE_TOKEN", "HF_TOKEN", "TRACKIO_SERVER_URL"} & set(kept)

    assert given("wandb", "offline") == given("trackio", "offline") == set()
    assert given("wandb", "online") == {"WANDB_API_KEY", "TRACKIO_SERVER_URL"}
    assert given("trackio", "online") == {"TRACKIO_WRITE_TOKEN", "HF_TOKEN", "TRACKIO_SERVER_URL"}


def test_sync_makes_up_for_trackio_too_and_needs_no_account_for_it(tmp_path, monkeypatch):
    data = install(tmp_path, monkeypatch)
    with open_tracker(tmp_path / "t", backend="trackio") as tracker:
        tracker.log(1, {"loss": 1.0})
    (tmp_path / "t" / "mirror.json").unlink()
    log = logging.Logger("sync")
    assert sync(tmp_path, log=log, upload=lambda fragments: pytest.fail("W&B's")) == SyncReport(1, 0, 0, 0)
    size = (tmp_path / "t" / "metrics.jsonl").stat().st_size
    assert MirrorState.read(tmp_path / "t", "trackio").offset == size and len(calls(data, "finish")) == 2
