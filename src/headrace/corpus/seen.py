"""What this machine saw when it last compared a corpus with its lock: size and time of each file, time of each folder.

If nothing looks different, nothing has to be listed, let alone hashed; that is what makes a no-op run cheap. It holds
for one lock, one set of sources and one place (`key`), lies beside the lock, and may be deleted at any time. A remote
file looks as its store's listing says; to look again is to list again.

Folders tell of new files and folders by their times: those that hold a source file, and those above them up to its
root. A file that comes into a folder which had none, beside folders that had, is not noticed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from headrace.artifacts.files import read_bytes, write_atomic
from headrace.corpus.listing import HERE, Found, below
from headrace.corpus.remote import is_remote
from headrace.errors import UserError


@dataclass(frozen=True)
class Seen:
    """The last look: `files` and `folders` map paths to how they looked, `new` are names that the lock lacks."""

    key: str
    files: Mapping[str, str]
    folders: Mapping[str, str]
    new: Sequence[str]

    def still(self) -> bool:
        """Whether every file and every folder looks as it did; False where that cannot be told without a listing."""
        return all(_look(path) == before for looks in (self.files, self.folders) for path, before in looks.items())


def look_at(files: Iterable[Found]) -> dict[str, str]:
    """How files look now, by path. Taken before hashing, so that an edit meanwhile is noticed next time."""
    return {
        file.path: f"{file.size} {file.identity or 'unknown'}" if is_remote(file.path) else _look(file.path)
        for file in files
    }


def folders_of(files: Iterable[Found]) -> set[str]:
    """The folders of this machine that hold the files, and those above them up to the files' roots."""
    depths = {
        (file.path.rpartition("/")[0] or HERE, below(file.name, file.root).count("/"))
        for file in files
        if not is_remote(file.path)
    }
    return {str(each) for folder, depth in depths for each in (Path(folder), *Path(folder).parents[:depth])}


def remember(
    lock_path: Path, key: str, files: Mapping[str, str], new: Sequence[str], above: Iterable[str] = ()
) -> None:
    """Write down a comparison that came out well; `above` are folders to be looked at beside those of the files."""
    local = {path.rpartition("/")[0] or HERE for path in files if not is_remote(path)}
    folders = {folder: _look(folder) for folder in sorted({*local, *above})}
    write_atomic(_beside(lock_path), orjson.dumps(asdict(Seen(key, files, folders, new)), option=orjson.OPT_INDENT_2))


def recall(lock_path: Path, key: str) -> Seen:
    """The last look under this key; an empty one when there is none (then everything is hashed)."""
    try:
        seen = Seen(**orjson.loads(read_bytes(_beside(lock_path))))
    except (UserError, TypeError, ValueError):  # none yet, or damaged: it is a cache and is written again
        return Seen("", {}, {}, [])
    return seen if seen.key == key else Seen("", {}, {}, [])


def _beside(lock_path: Path) -> Path:
    return lock_path.with_name(lock_path.name + ".seen")


def _look(path: str) -> str:
    if is_remote(path):
        return "remote"
    try:
        status = os.stat(path)  # noqa: PTH116 - ten thousands of files each time the Snakefile is parsed
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
