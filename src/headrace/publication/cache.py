"""The Hub as a cache of stages: finished artifacts in one private data set repository, found again by fingerprint.

    <stage>/<fingerprint>/artifact/...        the artifact with its manifest.json
    <stage>/<fingerprint>/provenance.json     the code, versions and machine that made it

A fingerprint stands for a stage, its settings and all that it was made from, so whoever composes the same run asks for
the same folder. One commit adds a folder whole or not at all. Where two machines made different bytes under one
fingerprint, those that came first stay: others may have gone on from them. What is fetched is only brought here;
whether it is what it claims to be is decided by the manifest in it, and by whoever asked (stages/cache.py).

The repository is private or nothing is pushed: artifacts hold training text.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.constants import REPO_TYPE_DATASET
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from headrace.artifacts.files import hash_file
from headrace.errors import UserError
from headrace.publication.hub import is_same, writing_client

Stored = Literal["pushed", "there", "another"]
_MANIFEST = "artifact/manifest.json"  # says which result a folder holds
_PLAIN = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*/)*[A-Za-z0-9_][\w.+-]*", re.ASCII)
_ATTEMPTS = 5  # commits of others that may come in between; they add other folders
_TIMEOUT = 10.0  # seconds until the Hub counts as out of reach


def store(repo_id: str, entry: str, files: Mapping[str, Path], *, endpoint: str | None = None) -> Stored:
    """Push `files` (path below the folder `entry`, `<stage>/<fingerprint>`: local file) as one commit, then compare.

    Returns `pushed`; `there` where the cache holds the same already; `another` where it holds another result under this
    fingerprint, which stays. Raises what `push` raises, and `UserError` for a repository that is public.
    """
    where = f"publish.cache={repo_id}"
    assert all(_PLAIN.fullmatch(name) for name in files) and _MANIFEST in files
    hashes = {name: hash_file(path, "sha256").removeprefix("sha256:") for name, path in files.items()}
    with writing_client(where, endpoint) as api:
        api.create_repo(repo_id, repo_type=REPO_TYPE_DATASET, private=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            info = api.repo_info(repo_id, repo_type=REPO_TYPE_DATASET)
            assert info.sha is not None
            if not info.private:
                raise UserError(f"{where}: is public, and a cache holds training text; make it private there")
            remote = _listed(api, repo_id, entry, info.sha)
            if _MANIFEST in remote and not is_same(files[_MANIFEST], hashes[_MANIFEST], remote[_MANIFEST]):
                return "another"
            if not (operations := _missing(entry, files, hashes, remote)):
                return "there"
            try:
                made = api.create_commit(
                    repo_id,
                    operations,
                    commit_message=entry,
                    repo_type=REPO_TYPE_DATASET,
                    parent_commit=info.sha,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412:
                    raise
                continue
            if _missing(entry, files, hashes, _listed(api, repo_id, entry, str(made.oid))):
                raise ConnectionError(f"{where}: {entry} differs from what was sent; publish again")
            return "pushed"
    raise ConnectionError(f"{where}: others commit there all the time; publish again")


def fetch(repo_id: str, entry: str, target: Path, *, endpoint: str | None = None) -> Path | None:
    """Bring the folder `entry` to `target`/`entry` and return that; None where the cache has no such folder.

    An earlier download that was cut off is gone on with. Raises `UserError` for a name that is no plain path, and
    whatever the Hub's client raises.
    """
    api = HfApi(endpoint=endpoint)
    try:
        commit = api.repo_info(repo_id, repo_type=REPO_TYPE_DATASET, timeout=_TIMEOUT).sha
    except RepositoryNotFoundError:
        return None
    assert commit is not None
    listed = _listed(api, repo_id, entry, commit)
    for name in listed:
        if not _PLAIN.fullmatch(name):
            raise UserError(f"{entry}: holds a file with the name {name[:80]!r}")
    if not listed:
        return None
    snapshot_download(
        repo_id,
        repo_type=REPO_TYPE_DATASET,
        revision=commit,
        allow_patterns=f"{entry}/*",
        local_dir=target,
        endpoint=endpoint,
    )
    return target / entry


def _missing(
    entry: str, files: Mapping[str, Path], hashes: Mapping[str, str], remote: Mapping[str, RepoFile]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes the remote folder the same as `files`; the provenance that came with the same bytes stays."""
    known = {name for name in remote if _MANIFEST in remote and not name.startswith("artifact/")}
    wanted = [name for name in files.keys() - known if not is_same(files[name], hashes[name], remote.get(name))]
    stray = sorted(remote.keys() - files.keys())
    return [
        *(CommitOperationAdd(f"{entry}/{name}", files[name]) for name in sorted(wanted)),
        *(CommitOperationDelete(f"{entry}/{name}", is_folder=False) for name in stray),
    ]


def _listed(api: HfApi, repo_id: str, entry: str, commit: str) -> dict[str, RepoFile]:
    """The files below `entry` at a commit, by their paths there."""
    entries = api.list_repo_tree(repo_id, entry, repo_type=REPO_TYPE_DATASET, recursive=True, revision=commit)
    try:
        return {found.path.removeprefix(f"{entry}/"): found for found in entries if isinstance(found, RepoFile)}
    except EntryNotFoundError:
        return {}
