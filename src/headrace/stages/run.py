"""The run directory: what every stage does around its work, and how it ends.

    results/<stage>/<fingerprint>/
        artifact/         the result, with manifest.json; appears by one rename, never changes
        done              the manifest's hash: the one file that Snakemake knows
        stage.json        what was hashed: name, version, configuration slice, parents
        provenance.json   code, versions, machine, seeds, seconds
        attempts.jsonl    every start and end
        log.txt, tracking/, and for some stages their own state (checkpoints/, shards/)

`main(door, argv)` composes the configuration, finds the directory, takes the lease (or follows the live holder) and
returns at once where the artifact is finished and whole or can be had from the cache `launch.fetch`, runs the door's
body otherwise, and commits the artifact with the manifest as the last act.
Exit codes: 0 done, 2 the user's input is wrong, 75 saved, run me again, 1 anything else.
"""

import dataclasses
import errno
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import Algorithm, read_json, write_atomic, write_json
from headrace.artifacts.manifest import FileEntry, Manifest
from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.corpus.lock import Lock
from headrace.corpus.sources import checked_lock, known_lock
from headrace.errors import UserError
from headrace.launch.blame import RankFailure
from headrace.launch.deadline import Deadline, StopRequested
from headrace.stages import provenance
from headrace.stages.attempts import RUN_AGAIN, Ledger
from headrace.stages.cache import fetched
from headrace.stages.lease import Lease
from headrace.stages.places import Place, places
from headrace.stages.table import MACHINE_GROUPS, readable_groups, stage_named
from headrace.tracking.redact import RedactingFilter, Redactor
from headrace.tracking.tracker import Tracker

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a body returns: one line for people, the key figures for the manifest, and files that it need not hash.

    `known` are files of the output that were hashed and fsynced when they were written (see `manifest.build`).
    """

    line: str
    summary: Mapping[str, Any]
    known: Mapping[str, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class Door:
    """A stage program: its body, how its files are hashed, and how far its state on disk has got."""

    stage: str
    body: Callable[["Run"], Outcome]
    algorithm: Algorithm = "xxh3"
    progress: Callable[[Path], int] = lambda folder: 0
    after: Callable[[Place], None] | None = None  # what to do beside the artifact whenever it is finished


class CoveredConfig:
    """The configuration as one stage may see it: only groups that its fingerprint covers, and the machine's."""

    def __init__(self, config: Config, groups: frozenset[str]) -> None:
        self._config, self._groups = config, groups

    def __getattr__(self, group: str) -> Any:
        assert group in self._groups, (
            f"this stage's fingerprint does not cover the group {group!r}: see stages/table.py"
        )
        return getattr(self._config, group)

    def replaced(self, groups: Mapping[str, Any]) -> "CoveredConfig":
        """The same view with some groups given anew, by a stage that made them of what it may read."""
        return CoveredConfig(dataclasses.replace(self._config, **groups), self._groups | groups.keys())


@dataclass
class Run:
    """What a body is handed: its configuration, its inputs, an empty folder to fill, a log, a tracker, a deadline."""

    place: Place
    config: Config  # a view that refuses groups which the stage's fingerprint does not cover
    lock: Lock
    command: str  # makes the same run again
    overrides: tuple[str, ...]  # that it was asked for with
    parents: dict[str, Place]
    output: Path
    deadline: Deadline
    log: logging.Logger
    tracker: Tracker
    inputs: dict[str, str] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)  # inputs that were verified byte by byte

    @property
    def folder(self) -> Path:
        """The run directory, for state that outlives an attempt (checkpoints, shards)."""
        return self.place.folder

    def config_with(self, **groups: Any) -> Config:
        """The configuration with some groups given anew, made of what this stage may read."""
        return cast(Config, cast(CoveredConfig, self.config).replaced(groups))

    def input(self, parent: str, quick: bool = False) -> Path:
        """A parent's artifact, verified byte by byte, once; `quick` leaves large files to readers that verify them."""
        place = self.parents[parent]
        if parent not in self._whole and not (quick and parent in self.inputs):
            self.inputs[parent] = manifests.verify(place.artifact, manifests.SMALL if quick else None).hash
            if not quick:
                self._whole.add(parent)
        return place.artifact


def main(door: Door, argv: Sequence[str] | None = None) -> int:
    """Run one stage with Hydra overrides as arguments; returns the exit code and never raises for a user's mistake."""
    overrides = tuple(sys.argv[1:] if argv is None else argv)
    if overrides in (("--help",), ("-h",)):
        print(f"usage: python -m headrace.stages.{door.stage} [experiment=tiny] [key=value ...]   (Hydra overrides)")
        return 0
    try:
        return _run(door, load(overrides), overrides)
    except (Exception, KeyboardInterrupt, StopRequested) as error:
        return failed(door.stage, error)


@dataclass(frozen=True)
class _Job:
    """One call of a stage program."""

    door: Door
    config: Config
    overrides: tuple[str, ...]
    lock: Lock
    places: dict[str, Place]
    deadline: Deadline
    began: float = field(default_factory=time.time)

    @property
    def place(self) -> Place:
        return self.places[self.door.stage]


def _run(door: Door, config: Config, overrides: tuple[str, ...]) -> int:
    # Only the stage that reads the sources looks at them; the Snakefile has looked once for the whole run.
    lock = checked_lock(config, overrides)[0] if door.stage == "corpus" else known_lock(config)
    job = _Job(door, config, overrides, lock, places(config, lock.hash), Deadline(config.launch.minutes))
    place = job.place
    place.folder.mkdir(parents=True, exist_ok=True)
    _write_slice(place)
    with job.deadline.watching(), held(place):
        there, line = (True, "already finished") if place.artifact.exists() else fetched(config, place, job.places)
        if not there:
            if line:
                say(place, line)
            return _attempt(job)
        _finish(job, manifests.verify(place.artifact))
        say(place, line)
        return 0


def _attempt(job: _Job) -> int:
    place, ledger = job.place, Ledger(job.place.folder)
    stuck = ledger.start(job.door.progress(place.folder))
    if stuck:
        return fail(place.stage, stuck, 1)
    log = open_log(place.log, job.config.tracking.log_level)
    code, reason = 1, "failed"
    try:
        reason = _work(job, log)
        code = 0
    except BaseException as error:
        code, reason = explain(error)
        log.error("%s", "".join(traceback.format_exception(error)))
        if code == 1:
            reason += f" (traceback in {place.log})"
    finally:
        ledger.end(code, Redactor().text(reason))
        close_log(log)
    return code if code == 0 else fail(place.stage, reason, code)


def _work(job: _Job, log: logging.Logger) -> str:
    row, place, config, started = stage_named(job.door.stage), job.place, job.config, time.monotonic()
    parents = {name: job.places[name] for name in place.slice["parents"]}
    _require_finished(place.stage, parents, job.overrides)
    output = place.folder / "artifact.partial"
    manifests.discard(output)
    output.mkdir()
    facts = provenance.describe({"init": config.seed.init, "data": config.seed.data})
    provenance.write(place.folder, facts)
    log.info("%s %s starts: %s", place.stage, place.fingerprint, facts["code"])
    with _open_tracker(config, place, parents, job.places["report"].fingerprint, log) as tracker:
        seen = cast(Config, CoveredConfig(config, readable_groups(row, config)))
        command = command_for(job.overrides)
        run = Run(place, seen, job.lock, command, job.overrides, parents, output, job.deadline, log, tracker)
        outcome = job.door.body(run)
        manifest = manifests.build(
            output,
            kind=row.name,
            producer={"stage": row.name, "version": row.version, "fingerprint": place.fingerprint},
            inputs=run.inputs,
            summary=dict(outcome.summary),
            algorithm=job.door.algorithm,
            known=outcome.known,
        )
        seconds = time.monotonic() - started
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        ended = {"seconds": round(seconds, 2), "finished": finished, "made": outcome.line}
        # Before the commit: whoever finds the artifact finds its provenance whole, whatever happens afterwards.
        write_json(place.folder / "provenance.json", {**facts, **ended})
        manifests.commit(output, place.artifact)
        tracker.summary(outcome.summary)
        tracker.artifact(f"{row.name}-{place.fingerprint}", row.name, place.artifact / manifests.NAME)
    _finish(job, manifest)
    say(place, outcome.line, seconds)
    log.info("done in %.1f s: %s", seconds, outcome.line)
    return outcome.line


def command_for(overrides: Sequence[str]) -> str:
    """The command that makes the same results; settings of the machine are left out."""
    words = [word for word in overrides if word.split("=")[0].split(".")[0] not in MACHINE_GROUPS]
    return f"snakemake --config set={shlex.quote(' '.join(words))}" if words else "snakemake"


def _write_slice(place: Place) -> None:
    path = place.folder / "stage.json"
    if path.exists():
        if read_json(path) != place.slice:
            raise UserError(f"{path}: differs from the configuration that names this folder; move the folder away")
        return
    write_json(path, place.slice)


@contextmanager
def held(place: Place, name: str = "lease") -> Iterator[None]:
    """Hold the lease; while a live process holds it, wait: where it succeeds, its result is ours."""
    lease, told = Lease(place.folder, name), False
    while holder := lease.try_acquire():
        if not told:
            say(place, f"following process {holder.pid} on {holder.host}, which is at work on it")
            told = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lease.release()


def _require_finished(stage: str, parents: dict[str, Place], overrides: tuple[str, ...]) -> None:
    for name, parent in parents.items():
        if not parent.artifact.exists():
            command = " ".join(["python -m headrace.stages." + name, *overrides])
            raise UserError(f"{stage} needs {name} {parent.fingerprint}, which is not finished; run `{command}` first")


def _finish(job: _Job, manifest: Manifest) -> None:
    """Write `done` where it is missing or differs, point `results/latest/<stage>` here, and tidy up."""
    place = job.place
    if job.door.after:
        job.door.after(place)
    text = manifest.hash + "\n"
    if not place.done.exists() or place.done.read_text() != text:
        write_atomic(place.done, text.encode())
    latest = place.folder.parents[1] / "latest"
    latest.mkdir(exist_ok=True)
    temporary = latest / f".{place.stage}.{place.fingerprint}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("..") / place.stage / place.fingerprint)
    temporary.replace(latest / place.stage)
    _sweep(place.folder, job.began)


def _sweep(folder: Path, before: float) -> None:
    """Remove what processes killed before this one began were writing; those that are alive have written since."""
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < before:
                path.unlink()


def _open_tracker(config: Config, place: Place, parents: dict[str, Place], group: str, log: logging.Logger) -> Tracker:
    inputs = [
        {"name": f"{name}-{parent.fingerprint}", "kind": name, "hash": manifests.read(parent.artifact).hash}
        for name, parent in parents.items()
    ]
    return Tracker(
        place.folder / "tracking",
        run_id=f"{place.stage}-{place.fingerprint}",
        group=group,
        job_type=place.stage,
        config=place.slice,
        inputs=inputs,
        backend=config.tracking.backend,
        wandb_mode=config.tracking.wandb,
        project=config.tracking.project,
        entity=config.tracking.entity,
        log=log,
    )


class _LogFile(logging.FileHandler):
    """A log that cannot be written, as on a full disk, adds no noise: the stage itself says what is wrong."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        """Pass over it."""


def open_log(path: Path, level: str) -> logging.Logger:
    """A log of its own: everything into the file `path`, warnings to the terminal too, secrets nowhere."""
    log = logging.getLogger(f"headrace.{path}")
    log.setLevel(level.upper())
    log.propagate = False
    to_file, to_terminal = _LogFile(path, encoding="utf-8"), logging.StreamHandler(sys.stderr)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_file.addFilter(RedactingFilter())
    to_terminal.setLevel(logging.WARNING)
    to_terminal.addFilter(RedactingFilter())
    # Errors reach the terminal as one line through `fail`; their traceback belongs in the file.
    to_terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    log.addHandler(to_file)
    log.addHandler(to_terminal)
    return log


def close_log(log: logging.Logger) -> None:
    """Close the files of a log."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def say(place: Place, line: str, seconds: float | None = None) -> None:
    """One line for the person at the terminal."""
    took = "" if seconds is None else f"  {seconds:7.1f} s"
    print(f"{place.stage:<9} {place.fingerprint}  {Redactor().text(line):<64}{took}", file=sys.stderr, flush=True)


def fail(stage: str, message: str, code: int) -> int:
    """Say why the stage ends with `code`, and return it."""
    for line in Redactor().text(message).splitlines() or [""]:
        print(f"headrace {stage}: {line}", file=sys.stderr, flush=True)
    return code


def failed(program: str, error: BaseException) -> int:
    """Say why `program` ends with `error`, with the traceback where it is no one's input; returns the exit code."""
    code, reason = explain(error)
    if code == 1:
        print(Redactor().text("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    return fail(program, reason, code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one sentence for whatever ended a stage."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, StopRequested):
        return RUN_AGAIN, f"stopped by {error}; run it again"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command goes on from here"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return 2, f"the disk is full{where}; free some space and run it again: nothing finished is lost"
    if isinstance(error, RankFailure):
        return 1, f"{error}; the same command goes on from the last checkpoint"
    return 1, f"{type(error).__name__}: {error}"
