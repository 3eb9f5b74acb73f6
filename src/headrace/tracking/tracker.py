"""The tracked run of one stage: metrics, summary and artifacts, written locally first and mirrored to W&B or trackio.

Nothing here can stop the stage or slow its work. The JSONL is written and flushed at once; a disk that is full, a
service that is broken, slow, unreachable or killed costs one warning, after which the run goes on. The service is
imported, started and ended by another process (`mirror`), beside the stage and not in it; what it missed is made up for
by the next start or by `headrace.tracking.sync`. Only when the work is done or has failed does the stage wait for the
service, `finish_seconds` at most; one that was asked to stop does not, since whoever asked may soon kill it.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headrace.tracking import backends, mirror
from headrace.tracking.journal import Journal
from headrace.tracking.links import METRICS_FILE, RUN_FILE, Backend, RunRecord, WandbMode
from headrace.tracking.redact import Redactor


class Tracker:
    """One tracked run; a context manager. An exception that leaves the block marks the run as failed.

    `folder` is the run's own and is used again when the stage goes on after a stop: same id, same files.
    `run_id` is `<stage>-<fingerprint>`, `group` names the pipeline run, `job_type` the stage, `config` the stage's
    slice, `inputs` the artifacts that it reads as {"name": "<stage>-<fingerprint>", "kind", "hash": manifest hash}.
    `backend` is where `wandb_mode` sends it, beside the JSONL. `close` waits at most `finish_seconds` for that to end;
    where a stop was asked for, as by `StopRequested` and `KeyboardInterrupt`, leaving the block waits for nothing.
    Raises `UserError` where the back end is not installed: one that is asked for is never left out silently.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        group: str,
        job_type: str,
        config: Mapping[str, Any],
        inputs: Sequence[Mapping[str, str]],
        wandb_mode: WandbMode,
        project: str,
        entity: str | None,
        log: logging.Logger,
        finish_seconds: float = 30.0,
        backend: Backend = "wandb",
    ) -> None:
        backends.require(backend, wandb_mode)
        self._folder, self._log = folder.resolve(), log
        self._redactor = Redactor()
        self._warned: set[str] = set()
        self._journal: Journal | None = None
        self._mirror: subprocess.Popen[bytes] | None = None
        clean = self._redactor.tree
        self._record = RunRecord(
            run_id=run_id,
            group=group,
            job_type=job_type,
            wandb=wandb_mode,
            project=project,
            entity=entity,
            finish_seconds=finish_seconds,
            config=clean(config),
            inputs=clean(list(inputs)),
            backend=backend,
        )
        self._service = backends.TITLES[backend]
        self._guard("metrics.jsonl", self._open_journal)
        self._guard("run.json", self._open_record)
        if wandb_mode != "disabled":
            self._guard(self._service, self._start_mirror)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` (name to number) of one step; steps count up, and one step may be logged in parts."""
        assert not {"step", "time"} & metrics.keys(), "metrics named 'step' or 'time' would hide the journal's own"
        journal = self._journal
        if journal is not None:
            self._guard("metrics.jsonl", lambda: journal.write(step, time.time(), metrics))
        if self._mirror is not None and self._mirror.poll() is not None:
            self._warn(self._service, f"its process ended early; see {self._folder / mirror.LOG_FILE}")

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Record JSON-ready values that describe the whole run; later ones replace earlier ones."""
        self._record.summary |= self._redactor.tree(metrics)
        self._guard("run.json", lambda: self._record.write(self._folder))

    def artifact(self, name: str, kind: str, manifest_path: Path) -> None:
        """Record that this run made an artifact; a copy of its manifest (not of its files) goes to W&B."""
        self._guard("run.json", lambda: self._add_artifact(name, kind, manifest_path))

    def close(self, exit_code: int = 0, *, wait: bool = True) -> None:
        """End the run with the stage's exit code: 0 is finished, anything else failed. The mirror ends by itself."""
        self._record.exit_code = exit_code
        self._guard("run.json", lambda: self._record.write(self._folder))
        if self._journal is not None:
            self._guard("metrics.jsonl", self._journal.flush)
            self._journal.close()
            self._journal = None
        if self._mirror is not None:
            self._guard(self._service, self._tell_mirror)
            if wait:
                self._guard(self._service, self._await_mirror)
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is no `Exception` is a request to stop.
        self.close(0 if kind is None else 1, wait=kind is None or issubclass(kind, Exception))

    def _open_journal(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self._folder / METRICS_FILE)

    def _open_record(self) -> None:
        if (self._folder / RUN_FILE).exists():
            earlier = RunRecord.read(self._folder)
            self._record.summary, self._record.artifacts = earlier.summary, earlier.artifacts
        self._record.write(self._folder)

    def _add_artifact(self, name: str, kind: str, manifest_path: Path) -> None:
        text = manifest_path.read_text(encoding="utf-8")
        entry = {"name": name, "kind": kind, "hash": str(json.loads(text)["hash"]), "file": f"artifacts/{name}.json"}
        target = self._folder / entry["file"]
        target.parent.mkdir(exist_ok=True)
        target.write_text(self._redactor.text(text), encoding="utf-8")
        self._record.artifacts = [made for made in self._record.artifacts if made["name"] != name] + [entry]
        self._record.write(self._folder)

    def _start_mirror(self) -> None:
        with (self._folder / mirror.LOG_FILE).open("ab") as errors:
            self._mirror = subprocess.Popen(
                mirror.command(self._folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=backends.environment(self._folder, self._record),
                start_new_session=True,  # an interrupt at the terminal is for the stage, which then ends the mirror
            )

    def _tell_mirror(self) -> None:
        assert self._mirror is not None and self._mirror.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._mirror.stdin as pipe:
            pipe.write(b".")  # closing alone says nothing while a forked worker holds the pipe too

    def _await_mirror(self) -> None:
        assert self._mirror is not None
        try:
            code = self._mirror.wait(self._record.finish_seconds)
        except subprocess.TimeoutExpired:
            code = mirror.GAVE_UP  # it waits as long itself: which of the two is first, a busy machine decides
        if code == mirror.GAVE_UP:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._mirror.pid, signal.SIGKILL)  # with whatever it has started
            self._mirror.wait()
            self._warn(self._service, f"did not end within {self._record.finish_seconds:g} s")
        elif code:
            self._warn(self._service, f"its process failed with {code}; see {self._folder / mirror.LOG_FILE}")

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._warn(what, f"{type(error).__name__}: {error}")

    def _warn(self, what: str, reason: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._log.warning(self._redactor.text(f"tracking: {what}: {reason}; the run goes on"))
