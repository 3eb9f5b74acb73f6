"""A manifest makes a folder an artifact: every file with size and hash, what made it, what it was made from.

`build` hashes a finished folder, `commit` publishes it by one rename, `verify` checks every byte before use. The
manifest's own hash covers all its fields; children record it as the identity of their inputs.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from headrace.artifacts.files import (
    Algorithm,
    hash_bytes,
    hash_file,
    json_bytes,
    parse_json,
    read_bytes,
    sync_file,
    sync_folder,
    write_json,
)
from headrace.errors import UserError

NAME = "manifest.json"
SCHEMA = 1
SMALL = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)
_REMEDY = "remove this folder, and the file `done` beside it where there is one, to make it again"


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: size in bytes and `<algorithm>:<hex>`."""

    size: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: `files` by relative path, `inputs` as manifest hashes by name, `summary` for people."""

    schema: int
    kind: str
    producer: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    summary: dict[str, Any]
    hash: str

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files.values())


def build(
    folder: Path,
    *,
    kind: str,
    producer: dict[str, Any],
    inputs: dict[str, str],
    summary: dict[str, Any],
    algorithm: Algorithm = "sha256",
    known: Mapping[str, FileEntry] = {},
) -> Manifest:
    """Hash every file of `folder` and write its manifest. Files are fsynced first, the manifest last.

    `known` are files that whoever wrote them has hashed and fsynced already: they are not read again.
    """
    files = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name in known:
            files[name] = known[name]
            assert path.stat().st_size == known[name].size, f"{path}: its size is not what its writer said"
            continue
        sync_file(path)
        files[name] = FileEntry(path.stat().st_size, hash_file(path, algorithm))
    assert known.keys() <= files.keys(), f"{folder}: lacks {sorted(known.keys() - files.keys())}"
    body = _body(kind, producer, inputs, files, summary)
    manifest = Manifest(SCHEMA, kind, producer, inputs, files, summary, _hash(body))
    write_json(folder / NAME, {**body, "hash": manifest.hash})
    return manifest


def commit(staging: Path, final: Path) -> None:
    """Publish a folder that `build` has finished: fsync its folders, rename, fsync the parent. Never overwrites."""
    assert (staging / NAME).exists(), "build the manifest before committing"
    if final.exists():
        raise UserError(f"{final}: already exists; an artifact is never overwritten")
    for folder, _, _ in os.walk(staging, topdown=False):
        sync_folder(Path(folder))
    staging.rename(final)
    sync_folder(final.parent)


def read(folder: Path) -> Manifest:
    """Read a manifest and check its schema and its own hash, without reading the other files."""
    path = folder / NAME
    data = read_bytes(path)
    raw = parse_json(data, path)
    try:
        files = {name: FileEntry(int(entry["size"]), str(entry["hash"])) for name, entry in raw["files"].items()}
        body = _body(raw["kind"], raw["producer"], raw["inputs"], files, raw["summary"])
        stored, schema = raw["hash"], raw["schema"]
        # The hash is of what the text says; the text itself, too, must be as it was written.
        whole = stored == _hash(body) and data == json_bytes({**body, "hash": stored})
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not a manifest; {_REMEDY}") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: written by schema {schema}, this version reads {SCHEMA}")
    if not whole:
        raise UserError(f"{path}: damaged (its hash does not match its content); {_REMEDY}")
    return Manifest(SCHEMA, raw["kind"], raw["producer"], raw["inputs"], files, raw["summary"], stored)


def verify(folder: Path, hash_up_to: int | None = None) -> Manifest:
    """Check every file against the manifest: nothing missing, nothing more, every size and hash equal.

    With `hash_up_to` only JSON and files of at most so many bytes are hashed. The reader of the others does it itself,
    by what JSON tells of them: so that is verified here, however large.
    """
    manifest = read(folder)
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(set(present) - set(manifest.files)):
        raise UserError(f"{folder / name}: not listed in {NAME}; {_REMEDY}")
    for name in manifest.files:
        if name not in present:
            raise UserError(f"{folder / name}: missing; {_REMEDY}")
    enough = Event()
    with ThreadPoolExecutor(_THREADS) as threads:  # reading and sha256 leave the interpreter to others
        checks = [
            threads.submit(_verify_file, present[name], entry, hash_up_to, enough.is_set)
            for name, entry in manifest.files.items()
        ]
        try:
            for check in checks:
                check.result()
        except BaseException:  # a signal to stop, too
            enough.set()
            threads.shutdown(cancel_futures=True)
            raise
    return manifest


def content(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file, verified; they are read once, so that what is used is what was verified."""
    data = read_bytes(folder / name)
    if len(data) != manifest.files[name].size or hash_bytes(data, _algorithm(manifest.files[name])) != (
        manifest.files[name].hash
    ):
        raise UserError(f"{folder / name}: damaged (it differs from its manifest); {_REMEDY}")
    return data


def _verify_file(path: Path, entry: FileEntry, hash_up_to: int | None, stopped: Callable[[], bool]) -> None:
    size = path.stat().st_size
    if size != entry.size:
        raise UserError(f"{path}: {size} bytes, its manifest says {entry.size}; {_REMEDY}")
    if hash_up_to is not None and size > hash_up_to and path.suffix != ".json":
        return
    if hash_file(path, _algorithm(entry), stopped) != entry.hash:
        raise UserError(f"{path}: damaged (hash differs from its manifest); {_REMEDY}")


def _algorithm(entry: FileEntry) -> Algorithm:
    return "sha256" if entry.hash.startswith("sha256:") else "xxh3"


def discard(folder: Path) -> None:
    """Remove an unfinished folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path}: a link inside an artifact; copy the file instead")
        if path.is_file() and path != folder / NAME:
            found.append(path)
    return found


def _body(
    kind: str,
    producer: dict[str, Any],
    inputs: dict[str, str],
    files: dict[str, FileEntry],
    summary: dict[str, Any],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": kind,
        "producer": producer,
        "inputs": inputs,
        "files": {name: asdict(entry) for name, entry in files.items()},
        "summary": summary,
    }


def _hash(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hash_bytes(canonical.encode(), "sha256")
