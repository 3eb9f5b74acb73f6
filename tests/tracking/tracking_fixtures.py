"""One tracked run as a stage would open it, and a manifest for it to log."""

import json
import logging

from headrace.tracking.tracker import Tracker

CANARY = "canary-9f3b7c1d5e"
INPUTS = [{"name": "tokenize-0011", "kind": "tokens", "hash": "sha256:" + "cd" * 32}]


def open_tracker(folder, mode="offline", log=None, **more):
    return Tracker(
        folder,
        run_id="pretrain-0123456789ab",
        group="publish-77",
        job_type="pretrain",
        config={"recipe": {"tokens": 1000}, "note": f"a {CANARY} in the config"},
        inputs=INPUTS,
        wandb_mode=mode,
        project="headrace",
        entity=None,
        log=log or logging.Logger("tracking"),
        **more,
    )


def write_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({"schema": 1, "hash": "sha256:" + "ef" * 32}))
    return path
