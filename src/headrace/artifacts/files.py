"""Durable files: written under a temporary name, flushed, fsynced, renamed, and the parent folder fsynced.

After a crash at any point a reader sees the old file or the new one, never a part of either. JSON is strict: no NaN on
the way out, no duplicate keys on the way in.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import xxhash

from headrace.errors import UserError

Algorithm = Literal["sha256", "xxh3"]
_CHUNK = 1 << 18  # fits into a core's cache: hashed while it is warm
_BLOCK = 16 << 20


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


_HASHERS: dict[str, Callable[[], _Hasher]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` durably; a reader never sees a partial file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_synced(temporary, memoryview(data))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: memoryview) -> None:
    """Write the file `path` and force its content to the disk; its folder's entry is not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data` to an open file."""
    for begin in range(0, len(data), _BLOCK):
        block = data[begin : begin + _BLOCK]
        while block:
            block = block[os.write(descriptor, block) :]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented, key-sorted JSON; NaN and Infinity are refused."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def read_json(path: Path) -> Any:
    """Read JSON; a missing or malformed file or a duplicate key is a `UserError` that names the file."""
    return parse_json(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """A file's content; a missing file is a `UserError` that names it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def parse_json(data: bytes, path: Path) -> Any:
    """`data`, read from `path`, as JSON; malformed text or a duplicate key is a `UserError` that names the file."""
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def hash_bytes(data: bytes | memoryview, algorithm: Algorithm) -> str:
    """`<algorithm>:<hex digest>` of `data`."""
    hasher = _HASHERS[algorithm]()
    hasher.update(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def hash_file(path: Path, algorithm: Algorithm, stopped: Callable[[], bool] = lambda: False) -> str:
    """`<algorithm>:<hex digest>` of a file: sha256 for what is published, xxh3 (128 bits) for what is loaded often.

    Raises `InterruptedError` as soon as `stopped` says so.
    """
    hasher, chunk = _HASHERS[algorithm](), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            if stopped():
                raise InterruptedError(f"{path}: nobody needs its hash any more")
            hasher.update(chunk[:size])
    return f"{algorithm}:{hasher.hexdigest()}"


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`, or copy it where the file system cannot link."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that a rename in it survives a crash."""
    sync_file(path)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen[key] = value
    return seen
