"""The lock of a corpus: which source files it has, with size and sha256, so that text cannot change unnoticed.

`headrace index` writes it, the first run makes it where it is missing, and its hash is part of the corpus fingerprint.
Neither the hash nor the file holds times or places: the same files give the same lock on every machine. Beside the lock
lies `<lock>.seen` (see `seen`): a file that looks as it did is not hashed again, and a file that looks different has
changed only if its sha256 has. Light on imports: the Snakefile calls `ensure` at each parse.
"""

import hashlib
import json
import shlex
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from headrace.artifacts.files import hash_file, read_json, write_json
from headrace.config.schema import CorpusConfig
from headrace.corpus.environment import list_environment
from headrace.corpus.listing import Found, list_user_files
from headrace.corpus.seen import look_at, recall, remember
from headrace.errors import UserError

_SCHEMA = 1
_THREADS = 8  # hashing leaves the interpreter lock; more threads than cores hide the latency of remote disks


@dataclass(frozen=True)
class Source:
    """One locked file: its logical name, its size in bytes, its `sha256:<hex>`."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Lock:
    """Locked source files, sorted by name."""

    files: tuple[Source, ...]

    @cached_property
    def hash(self) -> str:
        """sha256 over names, sizes and hashes: what the corpus fingerprint holds."""
        return hashlib.sha256("\n".join(self._lines()).encode("utf-8", "surrogateescape")).hexdigest()

    def _lines(self) -> list[str]:
        return [f"{file.sha256} {file.size} {file.name}" for file in self.files]

    def write(self, path: Path) -> None:
        """Write the lock as JSON, one line per file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": _SCHEMA, "hash": self.hash, "files": self._lines()})


def read(path: Path) -> Lock:
    """Read a lock; raises `UserError` that names the file if it is missing, damaged or of another version."""
    tree = read_json(path)
    try:
        schema, stated = tree["schema"], tree["hash"]
        rows = [line.split(" ", 2) for line in tree["files"]]
        lock = Lock(tuple(Source(name, int(size), sha256) for sha256, size, name in rows))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a lock of source files; delete it and run `headrace index` again") from None
    if schema != _SCHEMA:
        raise UserError(f"{path}: lock version {schema} is not {_SCHEMA}; run `headrace index` again")
    if lock.hash != stated:
        raise UserError(f"{path}: the lock was edited or damaged (its hash differs); run `headrace index` again")
    return lock


def list_sources(config: CorpusConfig) -> list[Found]:
    """The corpus's files as they are now, sorted by name; raises `UserError` when there is none."""
    if config.source == "environment":
        found = list_environment(config.packages, config.licences)
    else:
        found = list_user_files(config.paths)
    if not found:
        raise UserError(f"corpus.source={config.source}: no source files; check corpus.paths and corpus.licences")
    return found


def build_lock(config: CorpusConfig) -> Lock:
    """Hash every source file, in parallel threads."""
    return _lock(list_sources(config), {})


def index(config: CorpusConfig, lock_path: Path) -> Lock:
    """Accept the sources as they are now: what `headrace index` does. Files that look unchanged keep their hashes."""
    found = list_sources(config)
    looks = look_at(file.path for file in found)
    known = _unchanged(read(lock_path), config, lock_path, found, looks) if lock_path.exists() else {}
    lock = _lock(found, known)
    lock.write(lock_path)
    remember(lock_path, _key(lock, config), looks, [])
    return lock


def ensure(config: CorpusConfig, lock_path: Path, overrides: Sequence[str] = ()) -> tuple[Lock, list[str]]:
    """The lock for this run, and the names of files that are there but not in it (a notice, not an error).

    Makes the lock where it is missing; otherwise checks it (see `check`).
    """
    if not lock_path.exists():
        return index(config, lock_path), []
    lock = read(lock_path)
    return lock, check(lock, config, lock_path, overrides)


def check(lock: Lock, config: CorpusConfig, lock_path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Compare the sources with the lock, hashing only files whose size or time differ from what was seen last.

    Returns the names of files that are not in the lock. Raises `UserError` that names the first file that changed or is
    missing, and the command that accepts it; `overrides` are repeated in that command.
    """
    seen = recall(lock_path, _key(lock, config))
    if seen.files and seen.still():
        return list(seen.new)
    found = list_sources(config)
    paths = {file.name: file.path for file in found}
    command = shlex.join(["headrace", "index", *overrides])
    gone = [source.name for source in lock.files if source.name not in paths]
    if gone:
        raise UserError(f"{gone[0]}{_others(gone)}: indexed but no longer there; run `{command}` to go on without")
    looks = look_at(paths.values())
    known = _unchanged(lock, config, lock_path, found, looks)
    doubtful = [source for source in lock.files if source.name not in known]
    hashes = _hash_all(paths[source.name] for source in doubtful)
    changed = [source.name for source, now in zip(doubtful, hashes, strict=True) if now != source.sha256]
    if changed:
        raise UserError(
            f"{changed[0]}{_others(changed)} changed since it was indexed; run `{command}` to accept the new text"
        )
    locked = {source.name for source in lock.files}
    new = [name for name in paths if name not in locked]
    remember(lock_path, _key(lock, config), looks, new)
    return new


def _lock(found: Sequence[Found], known: Mapping[str, Source]) -> Lock:
    fresh = [file for file in found if file.name not in known]
    hashes = _hash_all(file.path for file in fresh)
    sources = [Source(file.name, Path(file.path).stat().st_size, now) for file, now in zip(fresh, hashes, strict=True)]
    return Lock(tuple(sorted([*known.values(), *sources], key=lambda source: source.name)))


def _hash_all(paths: Iterable[str]) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_hash, paths))


def _hash(path: str) -> str:
    try:
        return hash_file(Path(path), "sha256")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _unchanged(
    lock: Lock, config: CorpusConfig, lock_path: Path, found: Sequence[Found], looks: Mapping[str, str]
) -> dict[str, Source]:
    """The locked files that look exactly as they did when this machine last hashed them against this very lock."""
    before = recall(lock_path, _key(lock, config)).files
    locked = {source.name: source for source in lock.files}
    return {
        file.name: locked[file.name]
        for file in found
        if file.name in locked and before.get(file.path) == looks[file.path]
    }


def _key(lock: Lock, config: CorpusConfig) -> str:
    """What a look at the sources is good for: this lock, these sources, this interpreter, this working folder."""
    places = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path.cwd())]
    which = [config.source, config.paths, config.packages, config.licences, *places, lock.hash]
    return hashlib.sha256(json.dumps(which).encode()).hexdigest()


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
