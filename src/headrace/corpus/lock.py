"""The lock of a corpus: which source files it has, with size and hash, so that text cannot change unnoticed.

`headrace index` writes it, the first run makes it where it is missing, and its hash is part of the corpus fingerprint.
Neither the hash nor the file holds times or places: the same files give the same lock on every machine. It is text, one
line a file in the order in which everything is read: sources as configured, then roots, then names. A Parquet file's
line also has the bytes of its row groups, so that units of work follow from the lock alone. A file in an object store
has the store's own hash or version where it keeps one, and is not fetched.

Beside the lock lies `<lock>.seen` (see `seen`): a file that looks as it did is not hashed again, and a file that looks
different has changed only if its hash has. Light on imports: the Snakefile calls `ensure` at each parse.
"""

import hashlib
import itertools
import json
import os
import shlex
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from headrace.artifacts.files import hash_bytes, hash_file, read_bytes, write_atomic
from headrace.config.schema import CorpusConfig
from headrace.corpus.environment import environment_path, list_environment
from headrace.corpus.listing import ENVIRONMENT, HERE, Found, below, list_user_files, named_sources
from headrace.corpus.remote import STREAM, is_remote, open_remote
from headrace.corpus.seen import folders_of, look_at, recall, remember
from headrace.errors import UserError

T = TypeVar("T")

_MAGIC = "headrace lock 2"
_THREADS = 8  # hashing leaves the interpreter lock; more threads than cores hide the latency of remote disks
_TASK = 64  # files
_SMALL = 1 << 16  # bytes that are read in one go
_CHUNK = 1 << 22


class LockedFile(NamedTuple):
    """One locked file: `hash` is `sha256:<hex>`, or `etag:`, `generation:`, `git:`, `revision:` of a store."""

    name: str
    root: str
    source: str
    size: int
    hash: str
    row_groups: tuple[int, ...]  # bytes of text in each row group of a Parquet file; of a streamed one, 0 a shard

    @property
    def found(self) -> Found:
        """Where this machine has it."""
        path = environment_path(self.name) if self.source == ENVIRONMENT else self.name
        return Found(self.name, path, self.root, self.source)


@dataclass(frozen=True)
class Lock:
    """Locked source files in reading order. It holds the lock's text; the files are parsed when they are needed."""

    body: bytes

    @classmethod
    def of(cls, files: Iterable[LockedFile]) -> "Lock":
        """The lock of these files, which are in order."""
        sections = itertools.groupby(files, key=lambda file: (file.source, file.root))
        lines = itertools.chain.from_iterable(
            [f"= {source} {root}", *(_line(file) for file in inside)] for (source, root), inside in sections
        )
        return cls("".join(line + "\n" for line in lines).encode())

    @cached_property
    def files(self) -> tuple[LockedFile, ...]:
        """All files; raises `ValueError` for text that is no lock's."""
        files: list[LockedFile] = []
        source = root = prefix = ""
        for line in self.body.decode().split("\n")[:-1]:
            if line.startswith("= "):
                _, source, root = line.split(" ", 2)
                prefix = "" if root == HERE else root + "/"
            else:
                hash_, size, groups, name = line.split(" ", 3)
                counts = () if groups == "-" else tuple(map(int, groups.split(",")))
                files.append(LockedFile(prefix + name, root, source, int(size), hash_, counts))
        return tuple(files)

    @cached_property
    def hash(self) -> str:
        """sha256 over names, sizes and hashes: what the corpus fingerprint holds."""
        return hashlib.sha256(self.body).hexdigest()

    def write(self, path: Path) -> None:
        """Write the lock: a line with version and hash, then the text."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{_MAGIC} {self.hash}\n".encode() + self.body)


def _line(file: LockedFile) -> str:
    groups = ",".join(map(str, file.row_groups)) or "-"
    return f"{file.hash} {file.size} {groups} {below(file.name, file.root)}"


def read(path: Path) -> Lock:
    """Read a lock; raises `UserError` that names the file if it is missing, damaged or of another version."""
    head, _, body = read_bytes(path).partition(b"\n")
    magic, _, stated = head.decode("utf-8", "replace").rpartition(" ")
    if not magic.startswith("headrace lock"):
        raise UserError(f"{path}: not a lock of source files; delete it and run `headrace index` again")
    if magic != _MAGIC:
        raise UserError(f"{path}: {magic!r} is not {_MAGIC!r}; run `headrace index` again")
    lock = Lock(body)
    if lock.hash != stated:
        raise UserError(f"{path}: the lock was edited or damaged (its hash differs); run `headrace index` again")
    return lock


def list_sources(config: CorpusConfig) -> list[Found]:
    """The corpus's files as they are now, in the lock's order; raises `UserError` when there is none."""
    if config.source == "environment":
        found = list_environment(config.packages, config.licences)
    else:
        found = [file for source in named_sources(config) for file in list_user_files(source.paths, source.name)]
    if not found:
        raise UserError(f"corpus.source={config.source}: no source files; check corpus.paths and corpus.licences")
    owners: dict[str, str] = {}
    for file in found:
        if owners.setdefault(file.name, file.source) != file.source:
            raise UserError(f"corpus.sources: {file.name} is in {owners[file.name]} and in {file.source}; mend paths")
    return found


def build_lock(config: CorpusConfig) -> Lock:
    """Hash every source file, in parallel threads."""
    return _lock(config, list_sources(config), {})


def index(config: CorpusConfig, lock_path: Path) -> Lock:
    """Accept the sources as they are now: what `headrace index` does. Files that look unchanged keep their hashes."""
    found = list_sources(config)
    looks = look_at(found)
    known = _unchanged(read(lock_path), config, lock_path, found, looks) if lock_path.exists() else {}
    lock = _lock(config, found, known)
    lock.write(lock_path)
    remember(lock_path, _key(lock, config), looks, [], folders_of(found))
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
    by_name = {file.name: file for file in found}
    command = shlex.join(["headrace", "index", *overrides])
    gone = [file.name for file in lock.files if file.name not in by_name]
    if gone:
        raise UserError(f"{gone[0]}{_others(gone)}: indexed but no longer there; run `{command}` to go on without")
    looks = look_at(found)
    known = _unchanged(lock, config, lock_path, found, looks)
    doubtful = [file for file in lock.files if file.name not in known]
    hashes = _in_threads(content_hash, [by_name[file.name] for file in doubtful])
    changed = [file.name for file, now in zip(doubtful, hashes, strict=True) if now != file.hash]
    if changed:
        raise UserError(
            f"{changed[0]}{_others(changed)} changed since it was indexed; run `{command}` to accept the new text"
        )
    locked = {file.name for file in lock.files}
    new = [name for name in by_name if name not in locked]
    remember(lock_path, _key(lock, config), looks, new, folders_of(found))
    return new


def content_hash(found: Found) -> str:
    """A file's hash as the lock has it: the store's identity where there is one, else the sha256 of its bytes."""
    if found.identity:
        return found.identity
    if not is_remote(found.path):
        return _hash(found.path)
    hasher = hashlib.sha256()
    with open_remote(found.path) as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


def _lock(config: CorpusConfig, found: Sequence[Found], known: Mapping[str, LockedFile]) -> Lock:
    fields = {source.name: source.text_field for source in named_sources(config)}
    fresh = [file for file in found if file.name not in known]
    described = _in_threads(partial(_describe, fields=fields), fresh)
    files = {**known, **{file.name: file for file in described}}
    return Lock.of(files[file.name] for file in found)


def _describe(found: Found, fields: Mapping[str, str]) -> LockedFile:
    groups: tuple[int, ...] = ()
    if found.path.startswith(STREAM):
        from headrace.corpus.hub_stream import describe  # imports the Hub's client

        groups = (0,) * describe(found.path).shards
    elif found.name.endswith(".parquet"):
        from headrace.corpus.readers import row_group_bytes  # imports pyarrow

        groups = row_group_bytes(found, fields[found.source])
    size = os.stat(found.path).st_size if found.size is None else found.size  # noqa: PTH116
    return LockedFile(found.name, found.root, found.source, size, content_hash(found), groups)


def _in_threads(action: Callable[[Found], T], files: Sequence[Found]) -> list[T]:
    """`action` of each file, some files a task: a task of its own for each of a million costs more than hashing it."""
    step = max(1, min(_TASK, len(files) // (4 * _THREADS)))
    parts = [files[begin : begin + step] for begin in range(0, len(files), step)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [each for part in pool.map(lambda part: [action(file) for file in part], parts) for each in part]


def _hash(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - small files by the million
            head = file.read(_SMALL)
        return hash_bytes(head, "sha256") if len(head) < _SMALL else hash_file(Path(path), "sha256")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _unchanged(
    lock: Lock, config: CorpusConfig, lock_path: Path, found: Sequence[Found], looks: Mapping[str, str]
) -> dict[str, LockedFile]:
    """The locked files that look exactly as they did when this machine last hashed them against this very lock."""
    before = recall(lock_path, _key(lock, config)).files
    locked = {file.name: file for file in lock.files}
    return {
        file.name: locked[file.name]
        for file in found
        if file.name in locked and before.get(file.path) == looks[file.path] and not _unknown(file)
    }


def _unknown(file: Found) -> bool:
    """Whether the look tells nothing of the content: a store without identities."""
    return is_remote(file.path) and file.identity is None


def _key(lock: Lock, config: CorpusConfig) -> str:
    """What a look at the sources is good for: this lock, these sources, this interpreter, this working folder."""
    places = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path.cwd())]
    which = [*source_settings(config), *places, lock.hash]
    return hashlib.sha256(json.dumps(which).encode()).hexdigest()


def source_settings(config: CorpusConfig) -> list[object]:
    """The settings that say which files a corpus has; a lock serves every corpus that has these in common."""
    sources = [asdict(source) for source in named_sources(config)]
    return [config.source, sources, config.packages, list(config.licences)]


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
