"""What this machine saw when it last compared a corpus with its lock: size and time of each file, time of each folder.

If nothing looks different, nothing has to be listed, let alone hashed; that is what makes a no-op run cheap. It holds
for one lock, one set of sources and one place (`key`), lies beside the lock, and may be deleted at any time.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.artifacts.files import read_json, write_json
from headrace.errors import UserError


@dataclass(frozen=True)
class Seen:
    """The last look: `files` and `folders` map paths to how they looked, `new` are names that the lock lacks."""

    key: str
    files: Mapping[str, str]
    folders: Mapping[str, str]
    new: Sequence[str]

    def still(self) -> bool:
        """Whether every file and every folder looks as it did."""
        return all(_look(path) == before for looks in (self.files, self.folders) for path, before in looks.items())


def look_at(paths: Iterable[str]) -> dict[str, str]:
    """How files look now. Taken before hashing, so that an edit meanwhile is noticed next time."""
    return {path: _look(path) for path in paths}


def remember(lock_path: Path, key: str, files: Mapping[str, str], new: Sequence[str]) -> None:
    """Write down a comparison that came out well. Folders tell of new files by their times."""
    folders = look_at(sorted({path.rpartition("/")[0] or "." for path in files}))
    write_json(_beside(lock_path), asdict(Seen(key, files, folders, new)))


def recall(lock_path: Path, key: str) -> Seen:
    """The last look under this key; an empty one when there is none (then everything is hashed)."""
    try:
        seen = Seen(**read_json(_beside(lock_path)))
    except (UserError, TypeError):  # none yet, or damaged: it is a cache and is written again
        return Seen("", {}, {}, [])
    return seen if seen.key == key else Seen("", {}, {}, [])


def _beside(lock_path: Path) -> Path:
    return lock_path.with_name(lock_path.name + ".seen")


def _look(path: str) -> str:
    try:
        status = os.stat(path)  # noqa: PTH116 - ten thousands of files each time the Snakefile is parsed
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
