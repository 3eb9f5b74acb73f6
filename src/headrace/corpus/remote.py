"""Files that lie elsewhere: `hf://` and object stores (`s3://`, `gs://`, `az://` ...), through fsspec.

fsspec comes with huggingface-hub; a store's own package (s3fs, gcsfs, adlfs) is the user's to install. Credentials are
the environment's, as these packages document them. A store that keeps a hash or a version of each file tells it in a
listing: that is the file's identity in the lock, and nothing has to be fetched to check it. A store that fails for a
moment is asked again, a few times. Light on imports: fsspec is imported when an address is met.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

from headrace.artifacts.retry import PAUSES, retried
from headrace.errors import UserError

T = TypeVar("T")

_REFUSED = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
STREAM = "datasets://"
"""Prefix of a Hub dataset that is streamed through `datasets` (see `hub_stream`)."""


@dataclass(frozen=True, slots=True)
class Remote:
    """One file of a listing: its full address, its size in bytes, and its identity where the store has one."""

    path: str
    size: int
    identity: str | None


def is_remote(path: str) -> bool:
    """Whether `path` is an address and not a path of this machine."""
    return "://" in path


def list_remote(entry: str) -> list[Remote]:
    """The files that an address means: a file, a folder (everything below), or a glob.

    Raises `UserError` for a store whose package is not installed, that refuses, or that keeps failing.
    """
    if entry.startswith(STREAM):
        from headrace.corpus.hub_stream import describe  # imports the Hub's client

        return [Remote(entry, 0, describe(entry).identity)]

    def found() -> list[Remote]:
        system, path = _open_store(entry)
        if any(character in path for character in "*?["):
            listed = system.glob(path, detail=True)
        else:
            listed = system.find(path, detail=True)
        files = {name: info for name, info in listed.items() if info["type"] == "file"}
        return [Remote(_address(entry, name), int(info["size"]), identity(info)) for name, info in files.items()]

    return _asked(entry, found)


def look_up(path: str) -> Remote:
    """Size and identity of one file now; raises `UserError` naming it when it is gone."""
    if path.startswith(STREAM):
        return list_remote(path)[0]

    def found() -> Remote:
        system, inner = _open_store(path)
        info = system.info(inner)
        return Remote(path, int(info["size"]), identity(info))

    return _asked(path, found)


@contextmanager
def open_remote(path: str) -> Iterator[IO[bytes]]:
    """A seekable file: only the parts that are read are fetched."""

    def opened() -> Any:
        system, inner = _open_store(path)
        return system.open(inner, "rb")

    with _asked(path, opened) as file:
        yield cast(IO[bytes], _Patient(path, file))


def identity(info: Mapping[str, Any]) -> str | None:
    """What a store says of a file's content: a sha256 (the Hub's large files), a generation, an etag or a git object.

    None where it says nothing; then the file is fetched and hashed.
    """
    large = info.get("lfs")
    sha256 = large.get("sha256") if isinstance(large, Mapping) else getattr(large, "sha256", None)
    if sha256:
        return f"sha256:{sha256}"
    for key, name in (("generation", "generation"), ("ETag", "etag"), ("etag", "etag"), ("blob_id", "git")):
        if info.get(key):
            return f"{name}:{str(info[key]).strip(chr(34)).replace(' ', '')}"
    return None


def _open_store(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, inner = url_to_fs(path)
    return system, str(inner)


def _address(entry: str, name: str) -> str:
    """The full address of a file that the listing of `entry` names without its protocol, in the words of `entry`."""
    protocol, _, rest = entry.partition("://")
    return f"{protocol}://{name if rest.startswith('/') else name.lstrip('/')}"


class _Patient(io.RawIOBase):
    """A store's file: a read that fails is done again."""

    def __init__(self, path: str, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        place = self._file.tell()

        def done() -> bytes:
            self._file.seek(place)
            return bytes(self._file.read(size))

        return _asked(self._path, done)


def _asked(path: str, act: Callable[[], T]) -> T:
    """`act()`, again where the store fails for a moment; raises `UserError` that says what is wrong with `path`."""
    try:
        return retried(act, f"{path}: the store failed", _may_pass)
    except ImportError as error:
        raise UserError(f"{path}: needs a package that is not installed: {_first_line(error)}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder in the store") from None
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        if _may_pass(error):
            text = f"{path}: the store failed {len(PAUSES) + 1} times: {reason}; run it again when it answers"
            raise UserError(text) from None
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _may_pass(error: Exception) -> bool:
    """Whether a store that answers so may answer otherwise soon: not where it refuses or says that we are wrong."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(error, _REFUSED) or (status is not None and 400 <= status < 500 and status not in (408, 429))
    return isinstance(error, OSError) and not refused


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
