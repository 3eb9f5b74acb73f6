"""Which files a corpus has: a logical name, the real path, and the root below which directories are split.

Names of the environment corpus start at a logical root (`stdlib`, `packages/<distribution>`), so that the same packages
in another place have the same names. Names of the user's files are the words of the configuration and what lies below.
Folders are listed by several threads, a level of the tree at a time: on a network disk listing is waiting.
Light on imports: the Snakefile lists and checks sources each time it is parsed.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from headrace.config.schema import CorpusConfig, SourceConfig
from headrace.corpus.remote import STREAM, is_remote, list_remote
from headrace.errors import UserError

GLOB_CHARACTERS = "*?["
HERE = "."
ENVIRONMENT, FILES = "environment", "files"
LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
_THREADS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """One source file: `name` is logical and begins with `root`; `path` is where it lies; `source` names its source.

    A remote file also has what its listing told: `size` in bytes and `identity` (`remote.identity`), which is None
    where the store keeps no hash or version of its files.
    """

    name: str
    path: str
    root: str
    source: str = FILES
    size: int | None = None
    identity: str | None = None

    @property
    def group(self) -> str:
        """What is never divided between splits: the second-level directory below `root`, or a file right in `root`."""
        directories = below(self.name, self.root).split("/")[:-1]
        return "/".join([self.root, *directories[:2]]) if directories else self.name


def holds_many(name: str) -> bool:
    """Whether a file of this name holds many unrelated documents, so that its split goes by document."""
    return name.endswith((*LINES, ".parquet")) or name.startswith(STREAM)


def below(name: str, root: str) -> str:
    """A file's name without its root."""
    return name if root == HERE else name.removeprefix(root + "/")


def named_sources(config: CorpusConfig) -> tuple[SourceConfig, ...]:
    """The corpus' sources in their order: `environment` alone, `files` alone for `corpus.paths`, or the list."""
    if config.source == "environment":
        return (SourceConfig(ENVIRONMENT, (), config.text_field),)
    return config.sources or (SourceConfig(FILES, config.paths, config.text_field),)


def kind_in(source: str, kind: str) -> str:
    """What a document counts as: its kind of text, or its source where sources are named."""
    return kind if source in (ENVIRONMENT, FILES) else source


def group_in(source: str, group: str) -> str:
    """The name of a group; folders that several named sources share are a group in each."""
    return group if source in (ENVIRONMENT, FILES) else f"{source}:{group}"


def list_user_files(paths: Sequence[str], source: str = FILES) -> list[Found]:
    """The files that `paths` means (files, folders, globs), sorted by root and name; hidden ones are left out.

    Raises `UserError` for an entry that matches nothing and for a name that is not UTF-8.
    """
    found: dict[str, Found] = {}
    for entry in paths:
        files = _list_remote(entry, source) if is_remote(entry) else _list_local(entry, source)
        if not files:
            raise UserError(f"corpus.paths: {entry!r} matches no file; give files, folders or globs that exist")
        for file in files:
            if not file.name.isprintable():
                raise UserError(f"corpus.paths: {file.name!r} is not a printable UTF-8 name; rename the file")
            found.setdefault(file.name, file)
    return sorted(found.values(), key=lambda file: (file.root, file.name))


def _list_local(entry: str, source: str) -> list[Found]:
    matches = [entry] if Path(entry).exists() or not _has_wildcard(entry) else _expand(entry)
    root = _fixed_part(entry)
    inside = "" if root == HERE else root + "/"
    return [
        Found(file, file, root if file.startswith(inside) else str(Path(file).parent), source)
        for file in _files_below(matches)
    ]


def _list_remote(entry: str, source: str) -> list[Found]:
    listed = list_remote(entry)
    parts = entry.split("/")
    fixed = next((number for number, part in enumerate(parts) if _has_wildcard(part)), len(parts))
    root = "/".join(parts[:fixed]).rstrip("/")
    return [
        Found(each.path, each.path, _root_of(each.path, root), source, each.size, each.identity)
        for each in listed
        if not any(part.startswith(".") for part in each.path.split("/"))
    ]


def _root_of(path: str, root: str) -> str:
    return root if path.startswith(root + "/") else path.rpartition("/")[0]


def _has_wildcard(text: str) -> bool:
    return any(character in text for character in GLOB_CHARACTERS)


def _expand(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too, which Path.glob refuses


def _fixed_part(entry: str) -> str:
    """The folder of `entry` before its first wildcard: the root of what it matches."""
    parts: list[str] = []
    for part in Path(entry).parts:
        if _has_wildcard(part) and not Path(entry).exists():
            break
        parts.append(part)
    return str(Path(*parts)) if parts else HERE


def _files_below(matches: Iterable[str]) -> list[str]:
    """Files among `matches` and, level by level, in the folders among them."""
    files: list[str] = []
    level: list[str] = []
    for match in matches:
        if os.path.isdir(match):  # noqa: PTH112 - a glob may match millions
            level.append(str(Path(match)))
        elif os.path.isfile(match):  # noqa: PTH113
            files.append(str(Path(match)))
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            listings = list(pool.map(_entries, level))
            files += [file for inside, _ in listings for file in inside]
            level = [folder for _, folders in listings for folder in folders]
    return files


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """(files, folders) right in a folder, without hidden ones; links to folders are not followed."""
    prefix = "" if folder == HERE else folder.rstrip("/") + "/"
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(prefix + entry.name)
            elif entry.is_file():
                files.append(prefix + entry.name)
    return files, folders
