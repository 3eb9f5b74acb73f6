"""A Hub on 127.0.0.1: the API that huggingface_hub 2.4 really uses for repositories, with its state in memory.

    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)          # in this process
        subprocess.run(..., env=os.environ | hub.environment())  # in another one

Repositories of models and (named kernels/owner/name here) of kernels, commits with a parent check, LFS uploads whose
hash is checked, branches, tags, trees, downloads with ranges; tokens that may write, only read, or are unknown; private
repositories that do not exist for strangers. `hub.fail("POST", "/commit/", 500)` makes the next such request fail
(`at=3`: the third). `hub.requests` lists what was asked.
Not here: pull requests, Xet (clients need HF_HUB_DISABLE_XET=1), git.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_REPO = r"(?P<repo>(?:kernels/)?[\w.-]+/[\w.-]+)"
_LFS_FROM = 1 << 20  # bytes; smaller files are kept in git unless they look binary


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
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})

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
class _Fault:
    method: str
    pattern: str
    status: int
    countdown: int


class LoopbackHub:
    """The server and its state; see the module's docstring."""

    def __init__(self) -> None:
        self.token, self.read_token = "hf_loopback_write", "hf_loopback_read"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # large files come from another host, as on the Hub

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self) -> dict[str, str]:
        """Variables for a subprocess that uses this Hub with the writing token."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fail(self, method: str, pattern: str, status: int, at: int = 1) -> None:
        """Answer `status` to the `at`-th request from now whose method matches and whose path contains `pattern`."""
        self._faults.append(_Fault(method, pattern, status, at))

    def fault(self, method: str, path: str) -> None:
        for fault in list(self._faults):
            if fault.method == method and fault.pattern in path:
                fault.countdown -= 1
                if fault.countdown == 0:
                    self._faults.remove(fault)
                    raise HubError(fault.status, "injected fault")

    def role(self, authorization: str | None) -> str:
        """`write`, `read` or `none`; an unknown token is refused."""
        if authorization is None:
            return "none"
        roles = {f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read"}
        if authorization not in roles:
            raise HubError(401, "Invalid credentials in Authorization header")
        return roles[authorization]

    def repository(self, name: str, role: str) -> Repository:
        if name not in self.repositories or (self.repositories[name].private and role == "none"):
            raise HubError(404 if role != "none" else 401, "Repository not found", "RepoNotFound")
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    state: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.state.lock:
                self.state.requests.append(f"{self.command} {path}")
                self.state.fault(self.command, path)
                for method, pattern, action in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method.split():
                        self.role = self.state.role(self.headers.get("Authorization"))
                        groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        return action(self, **groups)
                raise HubError(404, f"no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._json({"error": error.message, **error.body}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _readable(self, repo: str) -> Repository:
        return self.state.repository(repo, self.role)

    def _writable(self, repo: str) -> Repository:
        repository = self.state.repository(repo, self.role)
        if self.role != "write":
            raise HubError(403, "this token may not write here")
        return repository

    def whoami(self) -> None:
        if self.role == "none":
            raise HubError(401, "Invalid username or password.")
        self._json({"type": "user", "name": "me", "auth": {"accessToken": {"role": self.role}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind = {"model": "", "kernel": "kernels/"}[wanted.get("type") or "model"]
        repo = f"{kind}{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.role != "write":
            raise HubError(401 if self.role == "none" else 403, "this token may not create repositories")
        url = {"url": f"{self.state.url}/{repo}"}
        if repo in self.state.repositories:
            raise HubError(409, "You already created this repo", **url)
        self.state.repositories[repo] = Repository(private=wanted.get("visibility") == "private")
        self.state.repositories[repo].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial")
        self._json(url)

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.S)
        data = yaml.safe_load(front[1]) if front else {}
        errors = [{"message": f'"{key}" is missing'} for key in ("license",) if key not in (data or {})]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            binary = file["size"] >= _LFS_FROM or b"\0" in base64.b64decode(file["sample"])
            old = present.get(file["path"])
            oid = None if old is None else (old.sha256 if old.lfs else old.oid)
            mode = "lfs" if binary or file["path"].endswith(".safetensors") else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._writable(repo)
        answers = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.state.objects:
                answer["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content does not have the announced sha256")
        self.state.objects[oid] = self.body
        self._send(b"", 200, {})

    def commit(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[repository.resolve(revision)])
        for item in (line["value"] | {"key": line["key"]} for line in lines[1:]):
            if item["key"] == "file":
                files[item["path"]] = Blob(base64.b64decode(item["content"]), False)
            elif item["key"] == "lfsFile":
                if item["oid"] not in self.state.objects:
                    raise HubError(400, f"LFS object {item['oid']} was never uploaded")
                files[item["path"]] = Blob(self.state.objects[item["oid"]], True)
            elif files.pop(item["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = repository.commit(files, header["summary"], revision)
        self._json({"commitUrl": f"{self.state.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def tag(self, repo: str, revision: str) -> None:
        repository, name = self._writable(repo), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise HubError(409, f"Tag {name} already exists")
        repository.tags[name] = repository.resolve(revision)
        self._json({})

    def branch(self, repo: str, name: str) -> None:
        repository = self._writable(repo)
        if name in repository.branches:
            raise HubError(409, f"Reference refs/heads/{name} already exists")
        repository.branches[name] = repository.resolve(json.loads(self.body).get("startingPoint", "main"))
        self._json({})

    def refs(self, repo: str) -> None:
        repository = self._readable(repo)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in repository.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repository.tags.items()]
        self._json({"branches": branches, "converts": [], "tags": tags})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        repository = self._readable(repo)
        oid = repository.resolve(revision)
        prefix = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in repository.commits[oid].items() if path.startswith(prefix)}
        if folder and not below:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {path[: path.index("/", len(prefix))] for path in below if "/" in path[len(prefix) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        files = [blob.entry(path) for path, blob in below.items() if recursive or "/" not in path[len(prefix) :]]
        self._json(entries + files)

    def info(self, repo: str, revision: str) -> None:
        repository = self._readable(repo)
        oid = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        name = repo.removeprefix("kernels/")
        self._json({"id": name, "modelId": name, "sha": oid, "private": repository.private, "siblings": siblings})

    def settings(self, repo: str) -> None:
        self._writable(repo).private = json.loads(self.body)["visibility"] == "private"
        self._json({})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self._readable(repo)
        oid = repository.resolve(revision)
        blob = repository.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid}
        if blob is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(b"Entry not found", 404, headers | code)
        elif blob.lfs:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            self._send(b"", 302, headers | linked | {"Location": f"{self.state.storage}/lfs/{blob.sha256}"})
        else:
            self._content(blob.data, headers | {"ETag": f'"{blob.oid}"'})

    def lfs_get(self, oid: str) -> None:
        self._content(self.state.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(data, 200, headers | {"Accept-Ranges": "bytes"})
            return
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        part = data[first : last + 1]
        self._send(part, 206, headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})


_API = f"/api/(?:models/)?{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _API + "/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_get),
    ("POST", _API + "/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", _API + "/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("POST", _API + "/branch/(?P<name>[^/]+)", _Handler.branch),
    ("GET", _API + "/refs", _Handler.refs),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", _API + "(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("PUT", _API + "/settings", _Handler.settings),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
