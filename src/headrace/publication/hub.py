"""Push a repository's tree to the Hub: one commit on a known parent, compared afterwards, then tagged.

    create the repository (private unless told otherwise; the visibility of one that exists is never changed)
    read its tags, its head, the tree and the manifest that an earlier push left there
    this fingerprint is there already, whole: nothing to send; its tag stands on something else: refused
    create the branch where a kernel's repository lacks it; a model's is main
    one commit that adds what differs and deletes what the earlier push left and this one lacks
    list the commit's tree and compare every size and hash
    tag the commit with the fingerprint

A fingerprint stands for settings, sources and parents, not for bytes: cards and scores hold wall times. So what is
compared first is the fingerprint; other bytes under one that is there already are not sent.

Someone else's commit in between makes the Hub refuse ours. A push that was cut off anywhere has published nothing or a
whole commit; the next one ends it. The token comes from the environment and goes nowhere else.

A data set of many shards goes into a pull request instead, some files to a commit; a later push goes on in the same
one while main stands where it stood. When all of it is there and the same, it is merged at once: main holds the old
data or the new. One that began on an older main could conflict with it for ever: it is closed, another one opened.

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
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, OfflineModeIsEnabled
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
    changed: bool  # whether this push made a commit; if not, the repository held this fingerprint already


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
    public and `private` is asked for, when it holds another's files, or when the tag stands on another fingerprint's;
    `ConnectionError` when the Hub fails.
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
class _Snapshot:
    """The repository at a commit, and what the manifest of an earlier push says there; where there is none, nothing."""

    commit: str
    files: dict[str, RepoFile]
    fingerprint: str | None
    told: dict[str, str]  # sha256 by name


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
        refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        branches, tags = ({ref.name: ref.target_commit for ref in found} for found in (refs.branches, refs.tags))
        head = self._snapshot(branches.get(self.branch, branches["main"]))
        if MANIFEST not in head.files and (others := sorted(head.files.keys() - _NOT_OURS)):
            self._refuse(f"holds files that Headrace did not put there ({others[0]}); choose a new or empty repository")
        held = self._held(head, tags.get(self.fingerprint))
        if held is not None:
            commit, names = held.commit, tuple(sorted({*held.told, MANIFEST}))
        else:
            if self.branch not in branches:
                self.api.create_branch(self.repo_id, branch=self.branch, repo_type=self.repo_type, exist_ok=True)
            commit, names = self._bring(head, message), tuple(self.hashes)
        if self.fingerprint not in tags:
            self.api.create_tag(self.repo_id, tag=self.fingerprint, revision=commit, repo_type=self.repo_type)
        url = f"{self.api.endpoint}/{REPO_TYPES_URL_PREFIXES.get(self.repo_type, '')}{self.repo_id}"
        changed = held is None and commit != head.commit
        return Publication(self.repo_id, url, commit, self.fingerprint, bool(info.private), names, changed)

    def _snapshot(self, commit: str) -> _Snapshot:
        files = self._tree(commit)
        if MANIFEST not in files:
            return _Snapshot(commit, files, None, {})
        with self._downloaded(MANIFEST, commit) as path:
            try:
                manifest = read_json(path)
                told = {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}
                return _Snapshot(commit, files, str(manifest["fingerprint"]), told)
            except (UserError, LookupError, TypeError, AttributeError):
                self._refuse(f"holds a {MANIFEST} at {commit} that Headrace did not write; choose a new repository")

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(self.repo_id, repo_type=self.repo_type, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    @contextmanager
    def _downloaded(self, name: str, commit: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(
                self.api.hf_hub_download(
                    self.repo_id, name, repo_type=self.repo_type, revision=commit, local_dir=folder
                )
            )

    def _held(self, head: _Snapshot, tagged: str | None) -> _Snapshot | None:
        """The commit that holds this fingerprint whole, in other bytes than ours; where there is none, ours may go out.

        Refused is a tag of this fingerprint on anything else: a commit of ours could never get it.
        """
        there = head if tagged in (None, head.commit) else self._snapshot(str(tagged))
        if there.fingerprint == self.fingerprint:
            if not self._differing(there.files):
                return None
            if not self._damaged(there):
                return there
        if tagged is not None:
            self._refuse(f"has a tag {self.fingerprint} on other files; remove the tag on the Hub and publish again")
        return None

    def _damaged(self, there: _Snapshot) -> str | None:
        """The first file of a commit that is missing or not as the commit's own manifest describes it."""
        return next((name for name, sha256 in there.told.items() if self._remote_sha256(there, name) != sha256), None)

    def _remote_sha256(self, there: _Snapshot, name: str) -> str | None:
        found = there.files.get(name)
        if found is None:
            return None
        if found.lfs is not None:
            return str(found.lfs.sha256)
        if name in self.hashes and self._is_same(name, found):
            return self.hashes[name]
        with self._downloaded(name, there.commit) as path:  # of a file in git the Hub tells git's hash only
            return hash_file(path, "sha256").removeprefix("sha256:")

    def _bring(self, head: _Snapshot, message: str) -> str:
        """The commit that holds our files: the head where it does already, or a new one."""
        wanted = [name for name in self.hashes if not self._is_same(name, head.files.get(name))]
        stale = sorted((head.told.keys() & head.files.keys()) - self.hashes.keys())
        if not wanted and not stale:
            return head.commit
        if self.kind.files_per_commit:
            pull = self._pull_request(message, f"{message} on {head.commit[:12]}")
            commit = self._merge(pull, wanted, stale, message, self.kind.files_per_commit)
        else:
            commit = self._commit(wanted, stale, message, self.branch, parent=head.commit)
        self._compare(commit)
        return commit

    def _is_same(self, name: str, remote: RepoFile | None) -> bool:
        return is_same(self.folder / name, self.hashes[name], remote)

    def _merge(self, pull: Discussion, wanted: list[str], stale: list[str], message: str, most: int) -> str:
        """Bring the files into a pull request, `most` to a commit, and merge it when it holds them all."""
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
        info = self.api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.branch)
        assert info.sha is not None
        return info.sha

    def _pull_request(self, message: str, title: str) -> Discussion:
        """Ours of this title that is not merged, or a new one; on public repositories others may open some too.

        The title names the commit of main where it began. Ours of the same message that began elsewhere are closed.
        """
        me, ours = self.api.whoami()["name"], None
        for found in list(self.api.get_repo_discussions(self.repo_id, author=me, repo_type=self.repo_type)):
            if not found.is_pull_request or found.status not in ("open", "draft"):
                continue
            if found.title == title:
                ours = found
            elif found.title.startswith(f"{message} on "):
                self.api.change_discussion_status(
                    self.repo_id, found.num, new_status="closed", repo_type=self.repo_type
                )
        return ours or self.api.create_pull_request(self.repo_id, title, repo_type=self.repo_type)

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
        if name := self._differing(self._tree(commit)):
            raise ConnectionError(f"{self.repo_id}@{commit}: {name} differs from what was sent; publish again")

    def _differing(self, remote: dict[str, RepoFile]) -> str | None:
        """The first of our files that a tree on the Hub lacks or holds otherwise."""
        return next((name for name in self.hashes if not self._is_same(name, remote.get(name))), None)

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
    if isinstance(error, ValueError) and isinstance(answer, BadRequestError):  # the client's check of README.md
        raise UserError(f"{where}: the Hub does not take the card ({' '.join(str(error).split())})") from None
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
