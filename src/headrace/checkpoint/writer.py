"""Saving: every rank writes what it owns while training goes on; then one rename makes it a checkpoint.

    Writer.begin   on every rank: copies its pieces into memory that is kept for the next save, which is all that
                   training waits for; a thread writes, and hashes, reads back and compares beside the fsync
    publish        on the first rank, once all ranks have written: the table of slices, the state, the manifest, rename
    abandon        on the first rank instead, where one has failed: its files go, older checkpoints are as they were

Files are written into a staging folder `.unfinished-<step>-<token>`. The token is drawn anew for each save, so what a
killed attempt left behind never gets into another one. A crash at any point leaves the checkpoints that were there,
or these and the new one. What is read back comes from the page cache: what the disk itself makes of it is found when
the checkpoint is read. EIO and EROFS are tried again (`artifacts.retry`), a full disk fails at once.
"""

import errno
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headrace.artifacts import manifest
from headrace.artifacts.files import hash_bytes, hash_file, json_bytes, sync_folder, write_all
from headrace.artifacts.manifest import FileEntry
from headrace.artifacts.retry import retried
from headrace.checkpoint.reader import LEFTOVER, STATE, checkpoint_folder, open_checkpoint
from headrace.checkpoint.slices import TABLE, FilePlan, as_bytes, joined
from headrace.errors import UserError
from headrace.parallel.shards import Piece

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """How far this rank's part of a save is; JSON by `asdict`. `files`, once written, is what `publish` needs."""

    step: int
    token: str
    state: Literal["writing", "written", "failed"]
    files: dict[str, Any]
    error: str | None = None
    errno: int | None = None  # of a failed operation on files


class Writer:
    """Writes this rank's pieces under `folder`, one save at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._status: Status | None = None

    def begin(self, step: int, token: str, kinds: Mapping[str, Sequence[Piece]]) -> None:
        """Copy the pieces, by kind, and begin to write them. The save before must have been taken.

        Returns as soon as the copy is made. `token` is the same on all ranks, letters and digits, and new.
        """
        assert self._status is None, "the save before has not been taken"
        assert token.isalnum()
        binding = {"step": str(step), "token": token}
        plans = {kind: FilePlan(pieces, {**binding, "kind": kind}) for kind, pieces in kinds.items()}
        contents = {kind: self._copied(kind, plan) for kind, plan in plans.items()}
        self._status = Status(step, token, "writing", {})
        self._thread = threading.Thread(
            target=self._work, args=(step, token, plans, contents), name="checkpoint", daemon=True
        )
        self._thread.start()

    def status(self) -> Status | None:
        """The save in progress, or the one that is waiting to be taken."""
        return self._status

    def wait(self) -> Status | None:
        """The same, once it is written or has failed."""
        if self._thread is not None:
            self._thread.join()
        return self._status

    def take(self) -> Status:
        """Forget the save, which must be written or have failed, so that the next can begin."""
        status = self._status
        assert status is not None and status.state != "writing", "no save has come to its end"
        self.wait()
        self._status = self._thread = None
        return status

    @torch.no_grad()
    def _copied(self, kind: str, plan: FilePlan) -> Tensor:
        """The file's content, as bytes, in memory that is kept for this kind."""
        on_gpu = any(placed.piece.tensor.is_cuda for placed in plan.placed)
        if kind not in self._memory or len(self._memory[kind]) < plan.size:
            self._memory[kind] = _allocate(plan.size, on_gpu)
        content = self._memory[kind][: plan.size]
        content[: len(plan.header)] = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
        for placed in plan.placed:
            tensor = placed.piece.tensor.detach()
            target = content[placed.offset : placed.offset + placed.bytes].view(tensor.dtype)
            target.view(tensor.shape).copy_(tensor, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return content

    def _work(self, step: int, token: str, plans: Mapping[str, FilePlan], contents: Mapping[str, Tensor]) -> None:
        staging = _staging(self._folder, step, token)
        paths = {kind: staging / f"{kind}-{self._rank:05d}.safetensors" for kind in plans}
        try:
            retried(lambda: staging.mkdir(parents=True, exist_ok=True), str(staging))
            files = {kind: write_planned(path, plans[kind], as_bytes(contents[kind])) for kind, path in paths.items()}
            retried(lambda: sync_folder(staging), str(staging))
            self._status = Status(step, token, "written", files)
        except BaseException as error:
            if isinstance(error, Exception):  # a full disk is not kept full by half a checkpoint
                with suppress(OSError):
                    for path in paths.values():
                        path.unlink(missing_ok=True)
            number, text = getattr(error, "errno", None), f"{type(error).__name__}: {error}"
            self._status = Status(step, token, "failed", {}, text, number)
            if not isinstance(error, Exception):
                raise


def publish(folder: Path, step: int, token: str, said: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> Path:
    """Make a checkpoint of what all ranks have written; returns its folder, which appears by one rename.

    said: `Status.files` of every rank. state: JSON without NaN; `step` is added to it.
    A whole checkpoint of the step that is already there stays (a run's state at a step is one thing only), a damaged
    one is replaced. Where this raises (`OSError`: a full or failing disk) nothing of the save is left.
    """
    assert state.get("step", step) == step, "state and step disagree"
    staging, final = _staging(folder, step, token), checkpoint_folder(folder, step)
    try:
        if final.exists():
            if _is_whole(final):
                manifest.discard(staging)
                return final
            remove(final)
        retried(lambda: _complete(staging, step, token, said, state), str(staging))
        # The manifest came last, and the folder's entries went to the disk with it. Where an earlier attempt to rename
        # got through although it was said to have failed, there is nothing left to rename.
        retried(lambda: staging.rename(final) if staging.exists() else None, str(final))
    except BaseException:
        with suppress(OSError):
            manifest.discard(staging)
        raise
    retried(lambda: sync_folder(folder), str(folder))
    return final


def _complete(
    staging: Path, step: int, token: str, said: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> None:
    """Write everything beside the slices; the manifest comes last, with the hashes that their writers verified."""
    known = {file["file"]: FileEntry(file["bytes"], file["hash"]) for one in said for file in one.values()}
    with ThreadPoolExecutor(1) as beside:
        for name, data in ((TABLE, joined(step, token, said)), (STATE, json_bytes({**state, "step": step}))):
            known[name] = FileEntry(len(data), write_verified(staging / name, memoryview(data), beside))
    present = {path.name for path in staging.iterdir()} - {manifest.NAME}
    assert present == known.keys(), f"{staging}: holds other files than the ranks say: {present ^ known.keys()}"
    manifest.build(
        staging,
        kind="checkpoint",
        producer={"fingerprint": state.get("fingerprint"), "token": token},
        inputs={},
        summary={"step": step},
        known=known,
    )


def abandon(folder: Path, step: int, token: str) -> None:
    """Remove what a save that failed has left; called once no rank writes any more."""
    manifest.discard(_staging(folder, step, token))


def clear_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals have left; called before the first save begins."""
    for path in folder.glob(f"{LEFTOVER}*"):
        manifest.discard(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that a crash in between leaves no half checkpoint behind."""
    aside = folder.with_name(f"{LEFTOVER}remove-{folder.name}")
    manifest.discard(aside)  # of a removal that failed half way
    manifest.discard(folder.rename(aside))


def _staging(folder: Path, step: int, token: str) -> Path:
    return folder / f"{LEFTOVER}{step}-{token}"


def _is_whole(folder: Path) -> bool:
    try:
        open_checkpoint(folder).verify()
    except UserError as error:
        _LOG.warning("replacing a damaged checkpoint: %s", error)
        return False
    return True


def _allocate(size: int, pinned: bool) -> Tensor:
    """Bytes in host memory, pinned where a GPU copies into it."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def write_planned(path: Path, plan: FilePlan, data: memoryview) -> dict[str, Any]:
    """Write a file and verify what the page cache holds of it; what `publish` has to know of it."""
    with ThreadPoolExecutor(1) as beside:
        said = beside.submit(plan.described, path.name, data)
        found = retried(lambda: write_verified(path, data, beside), str(path))
        return {**said.result(), "bytes": len(data), "hash": found}


def write_verified(path: Path, data: memoryview, beside: Executor) -> str:
    """Write and fsync a file; its hash, which what is read back has too. Hashes are taken `beside` the waiting.

    So it is read from the page cache, and perhaps before it is on the disk.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        hashes = beside.submit(lambda: (hash_bytes(data, "xxh3"), hash_file(path, "xxh3")))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    wanted, found = hashes.result()
    if found != wanted:
        raise OSError(errno.EIO, "reads back other bytes than were written", str(path))
    return found
