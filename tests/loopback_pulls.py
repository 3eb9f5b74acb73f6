"""Pull requests of the Hub on 127.0.0.1; they collect commits on a branch refs/pr/<number>."""

import json
from typing import Any

from loopback_repository import HubError, Pull, Repository


class PullAnswers:
    """The answers of the server's handler that concern pull requests."""

    def open_pull(self, repo: str) -> None:
        repository, wanted = self._writable(repo), json.loads(self.body)
        number = len(repository.pulls) + 1
        repository.pulls[number] = Pull(wanted["title"], repository.head)
        repository.branches[f"refs/pr/{number}"] = repository.head
        self._json({"num": number})

    def pulls(self, repo: str) -> None:
        repository, status = self._readable(repo), self.query.get("status", ["all"])[0]
        found = [self._pull(repo, number) for number in repository.pulls]
        author = self.query.get("author", [None])[0]
        found = [pull for pull in found if author in (None, pull["author"]["name"])]
        shown = [
            pull for pull in found if status == "all" or (status == "open") == (pull["status"] in ("open", "draft"))
        ]
        self._json({"discussions": shown, "count": len(shown), "start": 0})

    def pull(self, repo: str, number: str) -> None:
        repository = self._readable(repo)
        if int(number) not in repository.pulls:
            raise HubError(404, "no such discussion")
        found = repository.pulls[int(number)]
        changes = {"base": "refs/heads/main", "mergeCommitId": found.merged}
        conflicts = self._conflicts(repository, int(number))
        self._json(self._pull(repo, int(number)) | {"events": [], "changes": changes, "filesWithConflicts": conflicts})

    def _pull(self, repo: str, number: int) -> dict[str, Any]:
        pull = self.state.repositories[repo].pulls[number]
        kind, _, name = repo.partition("s/") if repo.count("/") == 2 else ("model", "", repo)
        return {
            "num": number,
            "title": pull.title,
            "status": "merged" if pull.merged else "closed" if pull.closed else "draft" if pull.draft else "open",
            "isPullRequest": True,
            "author": {"name": pull.author},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": name, "type": kind},
        }

    def set_status(self, repo: str, number: str) -> None:
        status = json.loads(self.body)["status"]
        pull = self._writable(repo).pulls[int(number)]
        pull.draft, pull.closed = False, status == "closed"
        event = {
            "id": "1",
            "type": "status-change",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "data": {"status": status},
        }
        self._json({"newStatus": event})

    def merge(self, repo: str, number: str) -> None:
        repository = self._writable(repo)
        pull = repository.pulls[int(number)]
        if pull.merged or pull.draft or pull.closed:
            raise HubError(409, "This pull request is merged already, closed, or a draft")
        if conflicts := self._conflicts(repository, int(number)):
            raise HubError(409, f"This pull request has conflicts in {', '.join(conflicts)}")
        base, ours = repository.commits[pull.base], repository.commits[repository.branches[f"refs/pr/{number}"]]
        files = {
            path: blob for path, blob in repository.commits[repository.head].items() if path in ours or path not in base
        }
        files |= {path: blob for path, blob in ours.items() if base.get(path) != blob}
        pull.merged = repository.commit(files, pull.title)
        self._json({})

    @staticmethod
    def _conflicts(repository: Repository, number: int) -> list[str]:
        """Paths that changed on both sides since the pull request began, and not to the same."""
        pull = repository.pulls[number]
        tips = (pull.base, repository.head, repository.branches[f"refs/pr/{number}"])
        base, main, ours = (repository.commits[oid] for oid in tips)
        paths = sorted(base.keys() | main.keys() | ours.keys())
        sides = {path: (base.get(path), main.get(path), ours.get(path)) for path in paths}
        return [path for path, (old, theirs, own) in sides.items() if old != theirs and old != own and theirs != own]
