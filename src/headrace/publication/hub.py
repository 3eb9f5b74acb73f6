"""Push a repository's tree to the Hub: one commit on a known parent, compared afterwards, then tagged.

    create the repository (private unless told otherwise; the visibility of one that exists is never changed)
    create the branch where a kernel's repository lacks it; a model's is main
    read its head, its tree and the manifest that an earlier push left there; the same hashes: nothing to commit
    one commit that adds what differs and deletes what the earlier push left and this one lacks
    list the commit's tree and compare every size and hash
    tag the commit with the fingerprint

Someone else's commit in between makes the Hub refuse ours. A push that was cut off anywhere has published nothing or a
whole commit; the next one ends it. The token comes from the environment and goes nowhere else.

A data set of many shards goes into a pull request instead, some files to a commit; a later push goes on in the same
one. When all of it is there and the same, it is merged at once: main holds the old data or the new.

Models, kernels and data sets are repositories of different types; `Kind` holds the difference.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi, get_token
from huggingface_hub.constants import REPO_TYPE_DATASET, REPO_TYPE_KERNEL, REPO_TYPE_MODEL, REPO_TYPES_URL_PREFIXES
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from headrace.artifacts.files import hash_file, read_json
from headrace.errors import UserError
from headrace.publication import gate, kernels
from headrace.publication.repository import MANIFEST

_NOT_OURS = {".gitattributes", "README.md", "LICENSE"}  # what a repository that was just made by hand may hold


@dataclass(frozen=True)
class Kind:
    """A type of repository: what the Hub calls it, what may go into it, how messages name it."""

    repo_type: str
    inspect: Callable[[Path], list[str]]
    prefix: str
    files_per_commit: int | None = None  # into a pull request; null: all in one commit to the branch


MODEL = Kind(REPO_TYPE_MODEL, gate.inspect, "publish.repo_id=")
KERNEL = Kind(REPO_TYPE_KERNEL, kernels.inspect, "publish.kernels: ")
DATASET = Kind(REPO_TYPE_DATASET, gate.inspect_dataset, "publish.dataset=", files_per_commit=50)


@dataclass(frozen=True)
class Publication:
    """What is on the Hub now."""

    repo_id: str
    url: str
    commit: str
    tag: str
    private: bool
    files: tuple[str, ...]
    changed: bool  # whether this push made a commit


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    message: str,
    endpoint: str | None = None,
    kind: Kind = MODEL,
    branch: str = "main",
) -> Publication:
    """Publish the tree `folder` as `repo_id`: one commit on `branch`, tagged with the tree's fingerprint.

    The tree is made by `build_repository` (MODEL) or `build_kernel_repositories` (KERNEL). The token is HF_TOKEN, or
    what `hf auth login` stored. `endpoint` is the Hub's address (default: HF_ENDPOINT).
    Raises `UserError` without a token, when the Hub refuses (401, 403, a commit in between), when the repository is
    public and `private` is asked for, or when it holds another's files; `ConnectionError` when the Hub fails.
    """
    names = kind.inspect(folder)
    fingerprint, hashes = _read_verified(folder, names)
    where = f"{kind.prefix}{repo_id}"
    with writing_client(where, endpoint) as api:
        return _Push(api, folder, hashes, repo_id, kind, branch, fingerprint, where).run(private, message)


@contextmanager
def writing_client(where: str, endpoint: str | None = None) -> Iterator[HfApi]:
    """The Hub's client with the environment's token; what goes wrong within becomes an error that begins with `where`.

    Raises what `push` raises.
    """
    token = get_token()
    if token is None:
        raise UserError(f"{where}: no Hub token; set HF_TOKEN to one that may write there")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        yield api
    except OfflineModeIsEnabled:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it to publish") from None
    except (UserError, ConnectionError):
        raise
    except Exception as error:
        _explain(error, where, api.endpoint)


def is_same(path: Path, sha256: str, remote: RepoFile | None) -> bool:
    """Whether the Hub holds the local file `path`, whose SHA-256 is given in hexadecimal digits."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256)
    return bool(remote.blob_id == _git_hash(path.read_bytes()))


@dataclass(frozen=True)
class _Push:
    api: HfApi
    folder: Path
    hashes: dict[str, str]  # sha256 of every file
    repo_id: str
    kind: Kind
    branch: str
    fingerprint: str
    where: str  # how messages begin

    @property
    def repo_type(self) -> str:
        return self.kind.repo_type

    def run(self, private: bool, message: str) -> Publication:
        self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=True, exist_ok=True)
        info = self.api.repo_info(self.repo_id, repo_type=self.repo_type)
        if private and not info.private:
            self._refuse("is public, and publish.private is true; make it private there, or set publish.private=false")
        head = self._head()
        remote = self._tree(head)
        wanted = [name for name in self.hashes if not self._is_same(name, remote.get(name))]
        stale = sorted((self._earlier(head, remote) & remote.keys()) - self.hashes.keys())
        changed = bool(wanted or stale)
        if not changed:
            commit = head
        elif self.kind.files_per_commit:
            commit = self._merge(wanted, stale, message, self.kind.files_per_commit)
        else:
            commit = self._commit(wanted, stale, message, self.branch, parent=head)
        self._compare(commit)
        self._tag(commit)
        url = f"{self.api.endpoint}/{REPO_TYPES_URL_PREFIXES.get(self.repo_type, '')}{self.repo_id}"
        files = tuple(self.hashes)
        return Publication(self.repo_id, url, commit, self.fingerprint, bool(info.private), files, changed)

    def _head(self) -> str:
        """The branch's newest commit; a branch that is not there begins where main is."""
        if self.branch != "main":
            self.api.create_branch(self.repo_id, branch=self.branch, repo_type=self.repo_type, exist_ok=True)
        info = self.api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.branch)
        assert info.sha is not None
        return info.sha

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(self.repo_id, repo_type=self.repo_type, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _earlier(self, revision: str, remote: dict[str, RepoFile]) -> set[str]:
        """The files that an earlier push put into the repository; a repository with another's files is left alone."""
        if MANIFEST in remote:
            with tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(
                    self.repo_id, MANIFEST, repo_type=self.repo_type, revision=revision, local_dir=folder
                )
                return set(read_json(Path(path))["files"])
        if others := sorted(remote.keys() - _NOT_OURS):
            self._refuse(f"holds files that Headrace did not put there ({others[0]}); choose a new or empty repository")
        return set()

    def _is_same(self, name: str, remote: RepoFile | None) -> bool:
        return is_same(self.folder / name, self.hashes[name], remote)

    def _merge(self, wanted: list[str], stale: list[str], message: str, most: int) -> str:
        """Bring the files into a pull request, `most` to a commit, and merge it when it holds them all."""
        pull = self._pull_request(message)
        reference = f"refs/pr/{pull.num}"
        there = self._tree(reference)
        missing = [name for name in wanted if not self._is_same(name, there.get(name))]
        for first in range(0, len(missing), most):
            self._commit(missing[first : first + most], [], message, reference)
        if gone := [name for name in stale if name in there]:
            self._commit([], gone, message, reference)
        self._compare(reference)
        if pull.status == "draft":
            self.api.change_discussion_status(self.repo_id, pull.num, new_status="open", repo_type=self.repo_type)
        self.api.merge_pull_request(self.repo_id, pull.num, repo_type=self.repo_type)
        return self._head()

    def _pull_request(self, title: str) -> Discussion:
        """Ours of this title that is not merged, or a new one; on public repositories others may open some too."""
        me = self.api.whoami()["name"]
        for found in self.api.get_repo_discussions(self.repo_id, author=me, repo_type=self.repo_type):
            if found.is_pull_request and found.title == title and found.status in ("open", "draft"):
                return found
        return self.api.create_pull_request(self.repo_id, title, repo_type=self.repo_type)

    def _commit(
        self, wanted: list[str], stale: list[str], message: str, revision: str, parent: str | None = None
    ) -> str:
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        operations += [CommitOperationAdd(name, self.folder / name) for name in wanted]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        done = self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            repo_type=self.repo_type,
            revision=revision,
            parent_commit=parent,
        )
        return str(done.oid)

    def _compare(self, commit: str) -> None:
        if name := self._differing(commit):
            raise ConnectionError(f"{self.repo_id}@{commit}: {name} differs from what was sent; publish again")

    def _differing(self, commit: str) -> str | None:
        """The first of our files that a commit lacks or holds otherwise."""
        remote = self._tree(commit)
        return next((name for name in self.hashes if not self._is_same(name, remote.get(name))), None)

    def _tag(self, commit: str) -> None:
        """Tag the commit; a tag on an earlier one with the same files, to which others have added theirs, stays."""
        refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        if self.fingerprint not in tags:
            self.api.create_tag(self.repo_id, tag=self.fingerprint, revision=commit, repo_type=self.repo_type)
        elif tags[self.fingerprint] != commit and self._differing(tags[self.fingerprint]):
            self._refuse(f"has a tag {self.fingerprint} on other files; remove the tag on the Hub and publish again")

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(f"{self.where}: the repository {reason}")


def _read_verified(folder: Path, names: list[str]) -> tuple[str, dict[str, str]]:
    """Fingerprint and sha256 by name, after every file was compared with the tree's own manifest."""
    manifest = read_json(folder / MANIFEST)
    hashes = {name: hash_file(folder / name, "sha256").removeprefix("sha256:") for name in names}
    told = {name: entry["sha256"] for name, entry in manifest["files"].items()} | {MANIFEST: hashes[MANIFEST]}
    if differing := sorted(name for name in hashes.keys() | told.keys() if hashes.get(name) != told.get(name)):
        raise UserError(f"{folder / differing[0]}: publish: is not as {MANIFEST} describes it; run publish again")
    return str(manifest["fingerprint"]), hashes


def _explain(error: BaseException, where: str, endpoint: str) -> NoReturn:
    """Raise what the user can act upon; uploads wrap the Hub's answer in other exceptions."""
    causes = list(_causes(error))
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        if lost := next((cause for cause in causes if isinstance(cause, httpx2.TransportError)), None):
            raise ConnectionError(f"{where}: cannot reach {endpoint} ({lost}); publish again") from error
        raise error
    status = answer.response.status_code
    reason = (answer.server_message or "no reason given").strip().replace("\n", " ")
    if status == 401:
        raise UserError(
            f"{where}: the Hub does not accept this token (401: {reason}); set HF_TOKEN to a valid one"
        ) from None
    if status in (403, 404):
        raise UserError(
            f"{where}: this token may not write there ({status}: {reason}); use one with write access"
        ) from None
    if status == 412:
        raise UserError(
            f"{where}: the repository changed meanwhile; look at the new commit and publish again"
        ) from None
    raise ConnectionError(
        f"{where}: the Hub failed ({status}: {reason}); publish again, nothing is half done"
    ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
