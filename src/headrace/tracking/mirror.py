"""The process that copies a tracked run to W&B or trackio (`backends`): `python -m headrace.tracking.mirror FOLDER`.

The tracker starts it and holds its standard input; the end of that input is the signal to finish, also when the stage
was killed. It reads only `run.json` and `metrics.jsonl`, so whatever it loses is still there, and running it again
goes on where the last finished fragment ended (`mirror.json`):

- W&B offline: a fragment (an `offline-run-*` folder) that was not finished is thrown away and made again;
- W&B online, trackio: steps that the service already has are skipped.

Steps never go backwards in what a service gets: a run that was killed and repeats steps repeats them in the JSONL only.
"""

import fcntl
import json
import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headrace.tracking.backends import Remote, begin
from headrace.tracking.journal import read_lines
from headrace.tracking.links import METRICS_FILE, Backend, RunRecord

LOG_FILE = "mirror.log"
GAVE_UP = 3
"""Exit code of a mirror that got no further for as long as the tracker waits for it."""
_STATE_FILE, _LOCK_FILE = "mirror.json", "mirror.lock"
_POLL_SECONDS = 1.0
_NICENESS = 10  # the stage needs the cores more


@dataclass
class MirrorState:
    """What the service has of a run."""

    offset: int = 0  # bytes of metrics.jsonl
    step: int = -1
    artifacts: list[str] = field(default_factory=list)  # hashes of those logged
    fragments: list[str] = field(default_factory=list)  # those that are complete; of W&B offline: their folders
    exit_code: int | None = None
    backend: Backend = "wandb"

    @classmethod
    def read(cls, folder: Path, backend: Backend) -> "MirrorState":
        """Read `mirror.json`; a run that was never mirrored to this back end has none, or another one's."""
        path = folder / _STATE_FILE
        found = cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()
        return found if found.backend == backend else cls(backend=backend)

    def write(self, folder: Path) -> None:
        """Replace `mirror.json` in one step."""
        temporary = folder / f".{_STATE_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.replace(folder / _STATE_FILE)

    def is_behind(self, folder: Path, record: RunRecord) -> bool:
        """Whether the run holds something that the service has not."""
        made = {artifact["hash"] for artifact in record.artifacts}
        size = (folder / METRICS_FILE).stat().st_size
        return not self.fragments or size > self.offset or not made <= set(self.artifacts)


def command(folder: Path) -> list[str]:
    """The command line of a mirror for this folder."""
    return [sys.executable, "-m", "headrace.tracking.mirror", str(folder)]


def is_busy(folder: Path) -> bool:
    """Whether a mirror of this run is at work."""
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def mirror(folder: Path) -> None:
    """Follow the run in `folder` until standard input ends, then finish there and note how far it came."""
    record, state, ended = RunRecord.read(folder), MirrorState(), threading.Event()
    os.nice(_NICENESS)
    watched = (os.getppid(), ended, record.finish_seconds, lambda: state.offset)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    with _alone(folder):
        state = MirrorState.read(folder, record.backend)
        if record.backend == "wandb" and record.wandb == "offline":
            _drop_unfinished(folder, state)
        remote = begin(folder, record)
        floor = max(state.step, remote.last_step)
        last = False
        while not last:
            last = ended.wait(_POLL_SECONDS)
            _copy(folder / METRICS_FILE, remote, state, floor)
        _finish(folder, remote, RunRecord.read(folder), state)
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


def _copy(journal: Path, remote: Remote, state: MirrorState, floor: int) -> None:
    for offset, item in read_lines(journal, state.offset):
        state.offset = offset
        step, seconds = item.pop("step"), item.pop("time")
        if step > floor and step >= state.step:
            state.step = step
            remote.log(step, seconds, {name: float(value) for name, value in item.items()})


def _finish(folder: Path, remote: Remote, record: RunRecord, state: MirrorState) -> None:
    for made in record.artifacts:
        if made["hash"] not in state.artifacts:
            remote.artifact(made, folder / made["file"])
            state.artifacts.append(made["hash"])
    state.exit_code = 1 if record.exit_code is None else record.exit_code
    state.fragments.append(remote.fragment)
    remote.finish(record, state.exit_code)


def _stage_ended(stage: int) -> bool:
    """Wait a moment for a word or the end of standard input, or for the death of the process that started us."""
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
    return bool(readable) or os.getppid() != stage


def _watch(stage: int, ended: threading.Event, seconds: float, progress: Callable[[], int]) -> None:
    """Note the stage's end; then end this process once it gets no further for `seconds`, whatever it hangs in.

    A stage that was killed or asked to stop does not wait for it, and nothing must outlive the stage for long.
    """
    while not _stage_ended(stage):
        pass
    ended.set()
    before = -1
    while (now := progress()) != before:
        before = now
        time.sleep(seconds)
    os._exit(GAVE_UP)


if __name__ == "__main__":
    mirror(Path(sys.argv[1]))
