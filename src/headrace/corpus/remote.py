"""Files that lie elsewhere: `hf://` and object stores (`s3://`, `gs://`, `az://` ...), through fsspec.

fsspec comes with huggingface-hub; a store's own package (s3fs, gcsfs, adlfs) is the user's to install. Credentials are
the environment's, as these packages document them. A store that keeps a hash or a version of each file tells it in a
listing: that is the file's identity in the lock, and nothing has to be fetched to check it. Light on imports: fsspec is
imported when an address is met.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from headrace.errors import UserError

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

    Raises `UserError` for a store whose package is not installed or that refuses.
    """
    if entry.startswith(STREAM):
        from headrace.corpus.hub_stream import describe  # imports the Hub's client

        return [Remote(entry, 0, describe(entry).identity)]
    with _explained(entry):
        system, path = _open_store(entry)
        if any(character in path for character in "*?["):
            found = system.glob(path, detail=True)
        else:
            found = system.find(path, detail=True)
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        return [Remote(_address(entry, name), int(info["size"]), identity(info)) for name, info in files.items()]


def look_up(path: str) -> Remote:
    """Size and identity of one file now; raises `UserError` naming it when it is gone."""
    if path.startswith(STREAM):
        return list_remote(path)[0]
    with _explained(path):
        system, inner = _open_store(path)
        info = system.info(inner)
        return Remote(path, int(info["size"]), identity(info))


@contextmanager
def open_remote(path: str) -> Iterator[IO[bytes]]:
    """A seekable file: only the parts that are read are fetched."""
    with _explained(path):
        system, inner = _open_store(path)
        opened = system.open(inner, "rb")
    with opened as file:
        yield file


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


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: needs a package that is not installed: {_first_line(error)}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder in the store") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
