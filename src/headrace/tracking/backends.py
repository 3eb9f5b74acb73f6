"""Where the mirror copies a run to: Weights & Biases or trackio, behind one interface.

Both are imported and called in the mirror's process only, so that neither can stop or slow the stage. What a service
has no place for is put where it can be seen: trackio knows no summary, exit code or time of a row, so the summary's
numbers and the exit code become metrics `summary/...` of the last step, and a row bears the time of its copying.

Offline, W&B writes fragments into the run's folder, which `sync` uploads; trackio writes its local database
(`TRACKIO_DIR`, shown by `trackio show`). Online, trackio sends to the server or the Space that `TRACKIO_SERVER_URL`
(with `TRACKIO_WRITE_TOKEN`) or `TRACKIO_SPACE_ID` names, and a Space that it makes is private.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headrace.errors import UserError
from headrace.tracking.links import Backend, RunRecord, alias
from headrace.tracking.redact import is_secret_name

TITLES = {"wandb": "W&B", "trackio": "trackio"}
_KEYS = {"wandb": ("WANDB_API_KEY",), "trackio": ("TRACKIO_WRITE_TOKEN", "HF_TOKEN")}
_TRACKIO_REMOTE = ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")


class Remote(Protocol):
    """One run at a service, begun or gone on with."""

    last_step: int  # the last one that the service has already; -1: none
    fragment: str  # a name for what this process adds

    def log(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """One row; `seconds` since 1970."""

    def artifact(self, made: Mapping[str, str], manifest: Path) -> None:
        """An entry of `RunRecord.artifacts`, and the manifest that stands for it."""

    def finish(self, record: RunRecord, exit_code: int) -> None:
        """Summary and inputs as `record` has them now; returns when the service has everything."""


def require(backend: Backend, mode: str) -> None:
    """Raise `UserError` where the service that was asked for cannot be used at all."""
    if mode == "disabled" or backend == "wandb":
        return
    if importlib.util.find_spec(backend) is None:
        raise UserError(f"tracking.backend={backend}: not installed; pip install {backend}, or tracking.backend=wandb")
    if mode == "online" and not {"TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"} & os.environ.keys():
        raise UserError("tracking.backend=trackio: online to where? Set TRACKIO_SERVER_URL or TRACKIO_SPACE_ID")


def environment(folder: Path, record: RunRecord) -> dict[str, str]:
    """The environment of a mirror: no secrets (online keeps the service's keys), and W&B's folders inside `folder`."""
    kept = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
    if record.wandb == "online":
        kept |= {name: os.environ[name] for name in _KEYS[record.backend] if name in os.environ}
    else:
        kept = {name: value for name, value in kept.items() if name not in _TRACKIO_REMOTE}
    return kept | {"WANDB_DATA_DIR": str(folder / "wandb"), "WANDB_CACHE_DIR": str(folder / "wandb" / "cache")}


def begin(folder: Path, record: RunRecord) -> Remote:
    """Begin the run at its service, or go on with it."""
    return _Trackio(record) if record.backend == "trackio" else _Wandb(folder, record)


class _Wandb:
    def __init__(self, folder: Path, record: RunRecord) -> None:
        import wandb

        settings = wandb.Settings(
            root_dir=str(folder),
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            symlink=False,
            silent=True,
            stop_fn=lambda: None,  # a stop requested in the web UI must not interrupt anything
            finish_timeout=record.finish_seconds,
            init_timeout=record.finish_seconds,
            x_disable_meta=True,  # provenance is the run directory's business
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._wandb = wandb
        self._run = wandb.init(
            id=record.run_id,
            name=record.run_id,
            group=record.group,
            job_type=record.job_type,
            project=record.project,
            entity=record.entity,
            config=record.config | {"inputs": record.inputs},
            mode=record.wandb,
            resume="allow",
            settings=settings,
        )
        self.last_step: int = self._run.step - 1 if self._run.resumed else -1
        self.fragment = Path(self._run.settings.sync_dir).name

    def log(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self._run.log({"_timestamp": seconds, **metrics}, step=step)

    def artifact(self, made: Mapping[str, str], manifest: Path) -> None:
        artifact = self._wandb.Artifact(made["name"], type=made["kind"], metadata={"hash": made["hash"]})
        artifact.add_file(str(manifest), name="manifest.json")
        self._run.log_artifact(artifact, aliases=["latest", alias(made["hash"])])

    def finish(self, record: RunRecord, exit_code: int) -> None:
        self._run.summary.update(record.summary)
        self._run.finish(exit_code=exit_code)


class _Trackio:
    fragment = "trackio"

    def __init__(self, record: RunRecord) -> None:
        self._trackio = importlib.import_module("trackio")  # not a dependency of ours
        self._run = self._trackio.init(
            project=record.project,
            name=record.run_id,
            group=record.group,
            config=record.config | {"inputs": record.inputs, "job_type": record.job_type},
            resume="allow",
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # No public call of 0.43 tells it; without it, the rows of a mirror that was killed would stand there twice.
        self.last_step: int = getattr(self._run, "_next_step", 0) - 1
        self._step = max(self.last_step, 0)

    def log(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._run.log(dict(metrics), step=step)

    def artifact(self, made: Mapping[str, str], manifest: Path) -> None:
        artifact = self._trackio.Artifact(made["name"], type=made["kind"], metadata={"hash": made["hash"]})
        artifact.add_file(str(manifest), name="manifest.json")
        self._run.log_artifact(artifact, aliases=[alias(made["hash"])])

    def finish(self, record: RunRecord, exit_code: int) -> None:
        self._run.log(_numbers(record.summary | {"exit_code": exit_code}, "summary"), step=self._step)
        for item in record.inputs:
            try:
                self._run.use_artifact(f"{item['name']}:{alias(item['hash'])}")
            except Exception as error:  # made before trackio was asked for, or elsewhere: `run.json` has the link
                print(f"{item['name']}: not linked: {type(error).__name__}: {error}", file=sys.stderr)
        self._run.finish()


def _numbers(tree: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a tree, by path."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = float(value)
    return found
