"""What `source=` names: a folder in the Hub's layout, or a repository on the Hub, fetched at one commit and verified.

    source=models/DeepSeek-V3                     a folder
    source=deepseek-ai/DeepSeek-V3-Base           a repository, at the commit that main is at now
    source=deepseek-ai/DeepSeek-V3-Base@<commit>  the same at a commit, tag or branch

A branch moves; so whatever is asked for becomes a commit first, and that commit is what is downloaded, and what the
conversion is known by. Only weights, JSON and what a conversion copies are fetched, into huggingface_hub's own cache;
then every file is hashed and compared with the commit's listing. The token, where one is needed, comes from the
environment.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from headrace.artifacts.files import hash_file
from headrace.conversion.convert_folder import COPIED
from headrace.errors import UserError

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_WANTED = re.compile(rf"[\w-]+\.safetensors|[\w.-]+\.json|{COPIED.pattern}")


@dataclass(frozen=True)
class Source:
    """A folder that can be read now, and what it is known by: JSON-ready, another for other content."""

    folder: Path
    identity: dict[str, Any]


def locate(named: str, endpoint: str | None = None, cache: Path | None = None) -> Source:
    """Find or download what `source=` names. endpoint, cache: the Hub's address and huggingface_hub's folder.

    Raises `UserError` where nothing of the name is there, the Hub refuses, or a downloaded file is not the listed one;
    `ConnectionError` where the Hub fails.
    """
    path = Path(named)
    if path.is_dir():
        return Source(path, _identity(path.resolve()))
    repository = _REPOSITORY.fullmatch(named)
    if repository is None:
        raise UserError(f"source={named}: no such folder, and no repository is named so; give owner/name or a folder")
    try:
        return _downloaded(named, repository[1], repository[2], endpoint, cache)
    except OfflineModeIsEnabled:
        raise UserError(f"source={named}: no such folder, and HF_HUB_OFFLINE is set; unset it to download") from None
    except HfHubHTTPError as error:
        _explain(error, named)
    except httpx2.TransportError as error:
        raise ConnectionError(f"source={named}: cannot reach the Hub ({error}); run it again") from error


def _identity(folder: Path) -> dict[str, Any]:
    """A folder is known by its files' sizes and times: to hash hundreds of GB takes as long as to convert them."""
    files = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "folder": str(folder),
        "files": {name: f"{stat.st_size} bytes, {stat.st_mtime_ns} ns" for name, stat in files.items()},
    }


def _downloaded(named: str, repo_id: str, revision: str | None, endpoint: str | None, cache: Path | None) -> Source:
    api = HfApi(endpoint=endpoint)
    commit = api.repo_info(repo_id, revision=revision).sha
    assert commit is not None
    listed = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, revision=commit)
        if isinstance(entry, RepoFile) and _WANTED.fullmatch(entry.path)
    }
    if not listed:
        raise UserError(f"source={named}: the repository holds no weights at {commit}; name another")
    folder = Path(
        snapshot_download(repo_id, revision=commit, allow_patterns=sorted(listed), endpoint=endpoint, cache_dir=cache)
    )
    for name, entry in listed.items():
        if not _is_same(folder / name, entry):
            raise UserError(f"{folder / name}: differs from {repo_id} at {commit}; remove this file and run it again")
    return Source(folder, {"repository": repo_id, "commit": commit})


def _is_same(path: Path, entry: RepoFile) -> bool:
    """Whether a file has the listed content: its SHA-256, or of a small file git's hash."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return hash_file(path, "sha256") == f"sha256:{entry.lfs.sha256}"
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == entry.blob_id


def _explain(error: HfHubHTTPError, named: str) -> NoReturn:
    status = error.response.status_code
    reason = (error.server_message or "no reason given").strip().replace("\n", " ")
    if status in (401, 403, 404):
        raise UserError(
            f"source={named}: no such folder, and the Hub does not give it ({status}: {reason}); correct the name, or "
            "set HF_TOKEN to a token that may read it"
        ) from None
    raise ConnectionError(f"source={named}: the Hub failed ({status}: {reason}); run it again") from error
