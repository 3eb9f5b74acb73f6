"""What the Hub on 127.0.0.1 keeps in memory: repositories and what is in them, and which requests are to fail."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

CUT, LOST, HALF = "cut", "lost", "half"


class HubError(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the file: the hash of its content, or of the pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        return entry | ({"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}} if self.lfs else {})


@dataclass
class Pull:
    """A pull request: where it began, and the commit that merged it."""

    title: str
    base: str
    merged: str | None = None
    author: str = "me"
    draft: bool = True  # as those that are opened through the API; not to be merged
    closed: bool = False


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})
    pulls: dict[int, Pull] = field(default_factory=dict)  # their commits lie on the branch refs/pr/<number>

    @property
    def head(self) -> str:
        return self.branches["main"]

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main") -> str:
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{self.branches[branch]}\n{message}\n{listing}".encode()).hexdigest()
        self.branches[branch], self.commits[oid] = oid, files
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str:
        oid = (self.tags | self.branches).get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Fault:
    method: str
    pattern: str
    outcome: int | str  # a status, or CUT, LOST or HALF
    countdown: int
