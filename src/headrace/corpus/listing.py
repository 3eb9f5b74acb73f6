"""Which files a corpus has: a logical name, the real path, and the root below which directories are split.

Names of the environment corpus start at a logical root (`stdlib`, `packages/<distribution>`), so that the same packages
in another place have the same names. Names of the user's files are the words of `corpus.paths` and what lies below.
Light on imports: the Snakefile lists and checks sources each time it is parsed.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import UserError

GLOB_CHARACTERS = "*?["
HERE = "."


@dataclass(frozen=True)
class Found:
    """One source file: `name` is logical and begins with `root`; `path` is where it lies on this machine."""

    name: str
    path: str
    root: str

    @property
    def group(self) -> str:
        """What is never divided between splits: the second-level directory below `root`, or a file right in `root`."""
        below = self.name if self.root == HERE else self.name.removeprefix(self.root + "/")
        directories = below.split("/")[:-1]
        return "/".join([self.root, *directories[:2]]) if directories else self.name


def list_user_files(paths: Sequence[str]) -> list[Found]:
    """The files that `corpus.paths` means (files, folders, globs), sorted by name; hidden ones in folders are left out.

    Raises `UserError` for an entry that matches nothing and for a name that is not UTF-8.
    """
    found: dict[str, Found] = {}
    for entry in paths:
        matches = [entry] if Path(entry).exists() or not any(c in entry for c in GLOB_CHARACTERS) else _expand(entry)
        root = _fixed_part(entry)
        files = [file for match in matches for file in _files_below(match)]
        if not files:
            raise UserError(f"corpus.paths: {entry!r} matches no file; give files, folders or globs that exist")
        for file in files:
            if not file.isprintable():
                raise UserError(f"corpus.paths: {file!r} is not a printable UTF-8 name; rename the file")
            found.setdefault(
                file, Found(file, file, root if root == HERE or file.startswith(root + "/") else str(Path(file).parent))
            )
    return [found[name] for name in sorted(found)]


def _expand(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too, which Path.glob refuses


def _fixed_part(entry: str) -> str:
    """The folder of `entry` before its first wildcard: the root of what it matches."""
    parts: list[str] = []
    for part in Path(entry).parts:
        if any(character in part for character in GLOB_CHARACTERS) and not Path(entry).exists():
            break
        parts.append(part)
    return str(Path(*parts)) if parts else HERE


def _files_below(path: str) -> list[str]:
    if Path(path).is_file():
        return [str(Path(path))]
    return [
        str(Path(folder, name))
        for folder, folders, names in os.walk(path)
        if _skip_hidden(folders)
        for name in sorted(names)
        if not name.startswith(".") and Path(folder, name).is_file()
    ]


def _skip_hidden(folders: list[str]) -> bool:
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    return True
