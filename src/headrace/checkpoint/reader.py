"""Loading: nothing of a checkpoint is believed before its bytes have been verified, and only what is needed is read.

    step-%08d/
        <kind>-<rank>.safetensors   what one rank wrote of the kinds model, optimizer and ema (see `slices`)
        slices.json                 where every slice of every tensor lies, and its hash
        state.json                  all that is no tensor, and whose it is
        manifest.json               size and hash of every file, and its own hash

Opening a checkpoint verifies the manifest, the table, the state and the sizes of all files. Bytes of tensors are
verified as they are read, slice by slice: a rank reads what it needs, under whatever layout it was written.

There is no `latest` file that could be torn or point into nothing: the newest checkpoint is found by step (never by
time) and by validation, falling back to older ones with a warning. A file that goes away, or is replaced, or cannot be
read while loading is an error like damage; what was read before is of no use then.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.artifacts import manifest
from headrace.artifacts.files import hash_bytes, hash_file, parse_json, read_bytes
from headrace.artifacts.manifest import Manifest
from headrace.artifacts.retry import retried
from headrace.artifacts.tensors import TensorInfo, open_tensors
from headrace.checkpoint.slices import TABLE, Entry, Slice, Table, as_bytes, parsed
from headrace.errors import UserError

STATE = "state.json"
LEFTOVER = ".unfinished-"
_NAME = re.compile(r"step-(\d{8,})")
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EBADMSG}
"""Errors of a file, not of this process, for which an older checkpoint may do."""
_WITHHELD = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
"""Those of them behind which the file may be whole all the same."""
_LOG = logging.getLogger(__name__)


class Unreadable(UserError):  # noqa: N818  what happened, not what is raised
    """The file system did not give a file, which need not be damaged."""


class TensorSource(Protocol):
    """Tensors by name, whichever files they are in: a plain safetensors file, or a kind of a checkpoint."""

    @property
    def path(self) -> Path: ...
    def keys(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def get(self, name: str) -> Tensor: ...


class SlicedTensors:
    """The tensors of one kind in a folder of slices. Errors about them are `UserError`s that name file and tensor."""

    def __init__(self, path: Path, table: Table, kind: str) -> None:
        if kind not in table.kinds:
            raise UserError(f"{path}: has no tensors of kind {kind!r}, only {', '.join(sorted(table.kinds))}")
        self.path, self._table, self._entries = path, table, table.kinds[kind]
        self._known: set[str] = set()  # files whose header is verified
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def keys(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """Dtype and whole shape of a tensor."""
        if name not in self._entries:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        return self._entries[name]

    def info(self, name: str) -> TensorInfo:
        """The same as a safetensors file says it."""
        entry = self.entry(name)
        return TensorInfo(entry.spelling, entry.shape, entry.elements * entry.dtype.itemsize)

    def get(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        entry = self.entry(name)
        return self.read(name, 0, entry.elements).view(entry.shape)

    def read(self, name: str, start: int, size: int) -> Tensor:
        """`size` elements from `start` on of the flattened tensor, on the CPU."""
        result = torch.empty(size, dtype=self.entry(name).dtype)
        self.read_into(name, start, result)
        return result

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fill `target`, a contiguous CPU tensor of the same dtype, with the elements from `start` on.

        Reads and verifies the slices that they lie in, and no others. Where this raises, `target` may hold anything.
        """
        entry, end = self.entry(name), start + target.numel()
        assert target.dtype == entry.dtype and 0 <= start <= end <= entry.elements
        data, width = as_bytes(target), entry.dtype.itemsize
        for part in _overlapping(entry, start, end):
            first, last = max(part.start, start), min(part.start + part.size, end)
            into = data[(first - start) * width : (last - start) * width]
            if last - first == part.size:
                self._read(name, part, into)
            else:
                whole = self._room(part.size * width)
                self._read(name, part, whole)
                into[:] = whole[(first - part.start) * width : (last - part.start) * width]

    def _read(self, name: str, part: Slice, into: memoryview) -> None:
        path = self.path / part.file
        if part.file not in self._known:
            header = self._table.files[part.file]
            first = memoryview(bytearray(header.bytes))
            _verified_read(path, 0, first, header.hash, "its header")
            self._known.add(part.file)
        _verified_read(path, part.offset, into, part.hash, f"tensor {name!r}")

    def _room(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return as_bytes(self._scratch)[:size]


class Checkpoint:
    """An opened checkpoint: its state verified, its tensors verified as they are read."""

    def __init__(self, folder: Path, found: Manifest, table: Table, state: dict[str, Any]) -> None:
        self.folder, self.step, self.state, self.manifest_hash = folder, table.step, state, found.hash
        self._manifest = found
        self._tensors = {kind: SlicedTensors(folder, table, kind) for kind in table.kinds}

    @property
    def kinds(self) -> list[str]:
        """Which kinds of tensors it has."""
        return sorted(self._tensors)

    def tensors(self, kind: str) -> SlicedTensors:
        """The tensors of one kind."""
        if kind not in self._tensors:
            raise UserError(f"{self.folder}: has no tensors of kind {kind!r}, only {', '.join(self.kinds)}")
        return self._tensors[kind]

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind, sorted."""
        return self.tensors(kind).keys()

    def info(self, kind: str, name: str) -> Entry:
        """Dtype and whole shape of a tensor."""
        return self.tensors(kind).entry(name)

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """`size` elements from `start` on of the flattened tensor, on the CPU."""
        return self.tensors(kind).read(name, start, size)

    def get(self, kind: str, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.tensors(kind).get(name)

    def verify(self) -> None:
        """Read and verify every byte of every file; a `UserError` names the file that is damaged."""
        for name, entry in self._manifest.files.items():
            path = self.folder / name
            with _told(path):
                if retried(partial(hash_file, path, "xxh3"), str(path)) != entry.hash:
                    raise UserError(f"{path}: damaged (its hash differs from the manifest's)")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; a damaged or foreign one is a `UserError` that names the file."""
    with _told(folder):
        return retried(partial(_opened, folder), str(folder))


def _opened(folder: Path) -> Checkpoint:
    found = manifest.verify(folder, hash_up_to=-1)  # that all files are there, and their sizes
    missing = {TABLE, STATE} - set(found.files)
    if found.kind != "checkpoint" or missing:
        raise UserError(f"{folder}: not a checkpoint: its manifest lacks {', '.join(sorted(missing)) or 'that kind'}")
    table = _table(folder / TABLE, manifest.content(folder, found, TABLE))
    state = parse_json(manifest.content(folder, found, STATE), folder / STATE)
    named = _NAME.fullmatch(folder.name)
    said = {table.step, found.summary.get("step"), state.get("step") if isinstance(state, dict) else None}
    if not named or said != {int(named[1])} or found.producer.get("token") != table.token:
        raise UserError(
            f"{folder}: its files belong to different steps or saves, or to another step than its name says"
        )
    return Checkpoint(folder, found, table, state)


def _table(path: Path, data: bytes) -> Table:
    try:
        return parsed(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def tensors_of(path: Path, kind: str = "model") -> Iterator[TensorSource]:
    """Open tensors for conversion: a plain safetensors file, or one kind of a folder with `slices.json`.

    The folder is a checkpoint, or a part of one: the table, and the files of some of its kinds.
    """
    if not path.is_dir():
        with open_tensors(path) as file:
            yield file
    elif (path / manifest.NAME).exists():
        yield open_checkpoint(path).tensors(kind)
    else:
        with _told(path):
            table = _table(path / TABLE, read_bytes(path / TABLE))
        yield SlicedTensors(path, table, kind)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under `folder`."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder under `folder`, whole or not, ascending; may raise `Unreadable`."""
    with _told(folder):
        try:
            names = retried(partial(os.listdir, folder), str(folder))
        except FileNotFoundError:
            return []
    found = (_NAME.fullmatch(name) for name in names if (folder / name).is_dir())
    return sorted(int(name[1]) for name in found if name)


def at_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, every byte verified; `UserError` where it is missing or damaged."""
    if step not in steps(folder):
        kept = ", ".join(map(str, steps(folder))) or "none"
        raise UserError(f"{folder}: no checkpoint of step {step}; kept steps: {kept}")
    found = open_checkpoint(checkpoint_folder(folder, step))
    found.verify()
    return found


def newest_first(folder: Path) -> Iterator[Checkpoint]:
    """Every checkpoint that can be opened, newest first; the bytes of their tensors are not verified yet.

    A damaged one is named in a warning and passed over.
    """
    for step in reversed(steps(folder)):
        try:
            yield open_checkpoint(checkpoint_folder(folder, step))
        except UserError as error:
            passed_over(step, error)


def passed_over(step: int, error: UserError) -> None:
    """Say loudly that a checkpoint is damaged."""
    _LOG.warning("checkpoint of step %d is not used, falling back to an older one: %s", step, error)


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of which every byte is verified; None, said loudly, where none of those there is whole."""
    for found in newest_first(folder):
        try:
            found.verify()
            return found
        except UserError as error:
            passed_over(found.step, error)
    if count := len(steps(folder)):
        _LOG.warning("%s: none of %d checkpoints is whole; training starts again from its beginning", folder, count)
    return None


def _overlapping(entry: Entry, start: int, end: int) -> Iterator[Slice]:
    for part in entry.slices:
        if start < end and part.start < end and start < part.start + part.size:
            yield part


def _verified_read(path: Path, offset: int, into: memoryview, expected: str, what: str) -> None:
    with _told(path):
        size = retried(partial(_read_at, path, offset, into), str(path))
    if size != len(into):
        raise UserError(f"{path}: cut short: {what} is not all there")
    if hash_bytes(into, "xxh3") != expected:
        raise UserError(f"{path}: damaged: {what} differs from its hash in {TABLE}")


def _read_at(path: Path, offset: int, into: memoryview) -> int:
    """Fill `into` from a file; returns how many bytes there were."""
    descriptor, done = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        while done < len(into) and (size := os.preadv(descriptor, [into[done:]], offset + done)):
            done += size
    finally:
        os.close(descriptor)
    return done


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """An error of the file system at `path` as a `UserError`, like any damage."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
        kind = Unreadable if error.errno in _WITHHELD else UserError
        raise kind(f"{error.filename or path}: cannot be read: {error.strerror}") from None
