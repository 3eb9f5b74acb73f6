"""Bring offline runs to Weights & Biases: upload what is not there yet, then replay who read what.

For every tracked run under a results folder: let the mirror make up for what it missed; if that is W&B's, upload its
offline fragments with `wandb sync` (which marks each with a `.synced` file) and declare its inputs through W&B's public
API, which the run itself could not do offline. What was linked is noted in `synced.json`, so a second call does
nothing. All uploads come before the first link, since a run reads what another one made. trackio links offline and has
an upload of its own (`trackio sync`).
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import UserError
from headrace.tracking import backends, mirror
from headrace.tracking.links import RUN_FILE, RunRecord, alias

_LINKS_FILE = "synced.json"
_API_SECONDS = 60


@dataclass(frozen=True)
class SyncReport:
    """What a call of `sync` did."""

    runs: int  # tracked runs found
    uploaded: int  # fragments
    linked: int  # inputs
    failed: int  # runs of which something could not be uploaded or linked; the log says what


def sync(
    results: Path,
    *,
    log: logging.Logger,
    upload: Callable[[Sequence[Path]], None] | None = None,
    api: Any = None,
) -> SyncReport:
    """Upload every offline run under `results` and replay its links; safe to repeat.

    `upload` gets the `offline-run-*` folders to upload, `api` has W&B's `run(path)` and `artifact(name)`; both default
    to the real ones. Raises `UserError` when W&B has no key for this user.
    """
    runs = {folder: RunRecord.read(folder) for folder in _tracked(results)}
    runs = {folder: record for folder, record in runs.items() if record.wandb != "disabled"}
    if not runs:
        return SyncReport(0, 0, 0, 0)
    hosted = {folder: record for folder, record in runs.items() if record.backend == "wandb"}
    api = _wandb_api() if api is None and hosted else api
    failed = {folder for folder, record in runs.items() if not _caught_up(folder, record, log)}
    waiting = [fragment for folder in hosted for fragment in _unsynced(folder)]
    if waiting:
        (upload or _wandb_sync)(waiting)
    refused = [fragment for fragment in waiting if not _is_synced(fragment)]
    for fragment in refused:
        log.warning(f"sync: {fragment}: W&B did not take it")
        failed.add(fragment.parents[1])
    linked = 0
    for folder, record in hosted.items():
        count, complete = _replay(folder, record, api, log)
        linked += count
        if not complete:
            failed.add(folder)
    return SyncReport(len(runs), len(waiting) - len(refused), linked, len(failed))


def _tracked(results: Path) -> list[Path]:
    """Folders of tracked runs; `results/latest` and other links lead to some of them twice."""
    return sorted(
        {path.parent.resolve() for path in results.rglob(RUN_FILE) if (path.parent / "metrics.jsonl").exists()}
    )


def _caught_up(folder: Path, record: RunRecord, log: logging.Logger) -> bool:
    if not mirror.MirrorState.read(folder, record.backend).is_behind(folder, record):
        return True
    if mirror.is_busy(folder):
        log.warning(f"sync: {folder}: still running; sync again when it has ended")
        return False
    environment = backends.environment(folder, record)
    done = subprocess.run(
        mirror.command(folder), stdin=subprocess.DEVNULL, capture_output=True, env=environment, text=True
    )
    if done.returncode:
        log.warning(f"sync: {folder}: {(done.stderr.strip().splitlines() or ['the mirror failed'])[-1]}")
    return done.returncode == 0


def _unsynced(folder: Path) -> list[Path]:
    """Complete offline fragments that carry no mark of `wandb sync`."""
    fragments = [folder / "wandb" / name for name in mirror.MirrorState.read(folder, "wandb").fragments]
    return [fragment for fragment in fragments if fragment.exists() and not _is_synced(fragment)]


def _is_synced(fragment: Path) -> bool:
    return not fragment.name.startswith("offline-run-") or any(fragment.glob("*.wandb.synced"))


def _replay(folder: Path, record: RunRecord, api: Any, log: logging.Logger) -> tuple[int, bool]:
    """Declare the run's inputs; returns how many were new and whether all are declared."""
    path = folder / _LINKS_FILE
    linked: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    before = len(linked)
    for item in record.inputs:
        if item["hash"] in linked:
            continue
        try:
            name = f"{record.path.removesuffix(record.run_id)}{item['name']}:{alias(item['hash'])}"
            api.run(record.path).use_artifact(api.artifact(name))
        except Exception as error:  # the API raises many kinds; one run must not keep the others from being linked
            log.warning(f"sync: {record.run_id}: cannot link {item['name']}: {type(error).__name__}: {error}")
            continue
        linked.append(item["hash"])
        path.write_text(json.dumps(linked), encoding="utf-8")
    return len(linked) - before, {item["hash"] for item in record.inputs} <= set(linked)


def _wandb_api() -> Any:
    import wandb

    try:
        return wandb.Api(timeout=_API_SECONDS)
    except wandb.errors.UsageError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"sync: W&B refused ({reason}); set WANDB_API_KEY or run `wandb login`") from None


def _wandb_sync(fragments: Sequence[Path]) -> None:
    subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, fragments)], check=False, env=os.environ)
