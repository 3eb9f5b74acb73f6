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
_CHUNK = 1 << 22


class _Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


_HASHERS: dict[str, Callable[[], _Hasher]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` durably; a reader never sees a partial file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented, key-sorted JSON; NaN and Infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; a missing or malformed file or a duplicate key is a `UserError` that names the file."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def hash_bytes(data: bytes, algorithm: Algorithm) -> str:
    """`<algorithm>:<hex digest>` of `data`."""
    hasher = _HASHERS[algorithm]()
    hasher.update(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def hash_file(path: Path, algorithm: Algorithm) -> str:
    """`<algorithm>:<hex digest>` of a file: sha256 for what is published, xxh3 (128 bits) for what is loaded often."""
    hasher = _HASHERS[algorithm]()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
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
