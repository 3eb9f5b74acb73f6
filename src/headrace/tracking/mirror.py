"""The process that copies a tracked run into Weights & Biases: `python -m headrace.tracking.mirror FOLDER`.

The tracker starts it and holds its standard input; the end of that input is the signal to finish, also when the stage
was killed. It reads only `run.json` and `metrics.jsonl`, so whatever it loses is still there, and running it again
goes on where the last finished fragment ended (`mirror.json`):

- offline, a fragment (one `offline-run-*` folder) that was not finished is thrown away and made again from the JSONL;
- online, steps that the server already has are skipped.

Steps never go backwards in what W&B gets: a run that was killed and repeats steps repeats them in the JSONL only.
"""

import fcntl
import json
import os
import select
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.tracking.journal import read_lines
from headrace.tracking.links import METRICS_FILE, RunRecord, alias
from headrace.tracking.redact import is_secret_name

LOG_FILE = "mirror.log"
_STATE_FILE, _LOCK_FILE = "mirror.json", "mirror.lock"
_POLL_SECONDS = 1.0
_NICENESS = 10  # the stage needs the cores more


@dataclass
class MirrorState:
    """What W&B has of a run."""

    offset: int = 0  # bytes of metrics.jsonl
    step: int = -1
    artifacts: list[str] = field(default_factory=list)  # hashes of those logged
    fragments: list[str] = field(default_factory=list)  # offline-run-* folders that are complete
    exit_code: int | None = None

    @classmethod
    def read(cls, folder: Path) -> "MirrorState":
        """Read `mirror.json`; a run that was never mirrored has none."""
        path = folder / _STATE_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        """Replace `mirror.json` in one step."""
        temporary = folder / f".{_STATE_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(folder / _STATE_FILE)

    def is_behind(self, folder: Path, record: RunRecord) -> bool:
        """Whether the run holds something that W&B has not."""
        made = {artifact["hash"] for artifact in record.artifacts}
        size = (folder / METRICS_FILE).stat().st_size
        return not self.fragments or size > self.offset or not made <= set(self.artifacts)


def command(folder: Path) -> list[str]:
    """The command line of a mirror for this folder."""
    return [sys.executable, "-m", "headrace.tracking.mirror", str(folder)]


def environment(folder: Path, mode: str) -> dict[str, str]:
    """The environment of a mirror: no secrets (online keeps W&B's key), and W&B's folders inside `folder`."""
    kept = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
    if mode == "online" and "WANDB_API_KEY" in os.environ:
        kept["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"]
    return kept | {"WANDB_DATA_DIR": str(folder / "wandb"), "WANDB_CACHE_DIR": str(folder / "wandb" / "cache")}


def is_busy(folder: Path) -> bool:
    """Whether a mirror of this run is at work."""
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def mirror(folder: Path) -> None:
    """Follow the run in `folder` until standard input ends, then finish the W&B run and note how far it came."""
    stage = os.getppid()
    os.nice(_NICENESS)
    with _alone(folder):
        state = MirrorState.read(folder)
        record = RunRecord.read(folder)
        if record.wandb == "offline":
            _drop_unfinished(folder, state)
        run = _start(folder, record)
        floor = max(state.step, run.step - 1 if run.resumed else -1)
        ended = False
        while not ended:
            ended = _stage_ended(stage)
            _copy(folder / METRICS_FILE, run, state, floor)
        record = RunRecord.read(folder)
        _give_up_after(record.finish_seconds)
        _finish(folder, run, record, state)
        state.write(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for an earlier mirror of the same run to end; the lock goes when its holder dies."""
    with (folder / _LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _drop_unfinished(folder: Path, state: MirrorState) -> None:
    for fragment in (folder / "wandb").glob("offline-run-*"):
        if fragment.name not in state.fragments:
            shutil.rmtree(fragment)


def _start(folder: Path, record: RunRecord) -> Any:
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
    return wandb.init(
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


def _copy(journal: Path, run: Any, state: MirrorState, floor: int) -> None:
    for offset, item in read_lines(journal, state.offset):
        state.offset = offset
        step, seconds = item.pop("step"), item.pop("time")
        if step > floor and step >= state.step:
            state.step = step
            run.log({"_timestamp": seconds, **{name: float(value) for name, value in item.items()}}, step=step)


def _finish(folder: Path, run: Any, record: RunRecord, state: MirrorState) -> None:
    import wandb

    run.summary.update(record.summary)
    for made in record.artifacts:
        if made["hash"] not in state.artifacts:
            artifact = wandb.Artifact(made["name"], type=made["kind"], metadata={"hash": made["hash"]})
            artifact.add_file(str(folder / made["file"]), name="manifest.json")
            run.log_artifact(artifact, aliases=["latest", alias(made["hash"])])
            state.artifacts.append(made["hash"])
    state.exit_code = 1 if record.exit_code is None else record.exit_code
    state.fragments.append(Path(run.settings.sync_dir).name)
    run.finish(exit_code=state.exit_code)


def _stage_ended(stage: int) -> bool:
    """Wait a moment for a word or the end of standard input, or for the death of the process that started us."""
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
    return bool(readable) or os.getppid() != stage


def _give_up_after(seconds: float) -> None:
    """End the process when W&B does not, whatever it hangs in: nothing must outlive the stage for long."""
    timer = threading.Timer(seconds, os._exit, args=(3,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    mirror(Path(sys.argv[1]))
