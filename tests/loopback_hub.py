"""A Hub on 127.0.0.1: the API that huggingface_hub 2.4 really uses for repositories, with its state in memory.

    with LoopbackHub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)          # in this process
        subprocess.run(..., env=os.environ | hub.environment())  # in another one

Repositories of models and (named kernels/owner/name and datasets/owner/name here) of kernels and data sets, commits
with a parent check, LFS uploads whose hash is checked, branches, tags, trees, downloads with ranges; tokens that may
write, only read, or are unknown; private repositories that do not exist for strangers;
pull requests that collect commits on a reference of their own and are merged onto whatever main has become.
buckets, whose bytes go by Xet into a folder (loopback_buckets.py).
`hub.fail("POST", "/commit/", 500)` makes the next such request fail
(`at=3`: the third; `"*"`: of any method). In place of a status: CUT closes the connection before anything is done, LOST
after it is done and before it is answered, HALF in the middle of the answer. `hub.requests` lists what was asked.
Not here: comments, Xet in repositories (clients need HF_HUB_DISABLE_XET=1), git.
"""

import base64
import hashlib
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from loopback_buckets import ROUTES, Bucket, BucketAnswers
from loopback_pulls import PullAnswers
from loopback_repository import CUT, HALF, LOST, Blob, Fault, HubError, Repository

_REPO = r"(?P<repo>(?:kernels/|datasets/)?[\w.-]+/[\w.-]+)"
_LFS_FROM = 1 << 20  # bytes; smaller files are kept in git unless they look binary


class LoopbackHub:
    """The server and its state; see the module's docstring."""

    def __init__(self) -> None:
        self.token, self.read_token = "hf_loopback_write", "hf_loopback_read"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.buckets: dict[str, Bucket] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # large files come from another host, as on the Hub

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self.store = self._folder.name
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def environment(self) -> dict[str, str]:
        """Variables for a subprocess that uses this Hub with the writing token."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fail(self, method: str, pattern: str, outcome: int | str, at: int = 1) -> None:
        """Let the `at`-th request from now of this method whose path contains `pattern` end with `outcome`."""
        self._faults.append(Fault(method, pattern, outcome, at))

    def unfail(self) -> None:
        """Forget faults that no request has met."""
        self._faults.clear()

    def fault(self, method: str, path: str) -> int | str | None:
        """How this request is to end, where a fault was set for it."""
        for fault in list(self._faults):
            if fault.method in ("*", method) and fault.pattern in path:
                fault.countdown -= 1
                if fault.countdown == 0:
                    self._faults.remove(fault)
                    return fault.outcome
        return None

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


class _Handler(BucketAnswers, PullAnswers, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    state: LoopbackHub
    fault: int | str | None = None

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.state.lock:
                self.state.requests.append(f"{self.command} {path}")
                self.fault = self.state.fault(self.command, path)
                if self.fault == CUT:
                    self._hang_up()
                    return
                if isinstance(self.fault, int):
                    raise HubError(self.fault, "injected fault")
                for method, pattern, action in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method.split():
                        self.role = self.state.role(self.headers.get("Authorization"))
                        groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        action(self, **groups)
                        return
                raise HubError(404, f"no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._json({"error": error.message, **error.body}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        if self.fault == LOST:
            self._hang_up()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault == HALF else data)
        if self.fault == HALF:
            self._hang_up()

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
        kind = {"model": "", "kernel": "kernels/", "dataset": "datasets/"}[wanted.get("type") or "model"]
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
        heads = {name: oid for name, oid in repository.branches.items() if not name.startswith("refs/pr/")}
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in heads.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repository.tags.items()]
        pulls = [
            {"name": n, "ref": n, "targetCommit": repository.branches[n]} for n in repository.branches.keys() - heads
        ]
        listed = {"pullRequests": pulls} if "include_prs" in self.query else {}
        self._json({"branches": branches, "converts": [], "tags": tags, **listed})

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
        name = repo.removeprefix("kernels/").removeprefix("datasets/")
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
    *ROUTES,
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
    ("POST", _API + "/discussions", _Handler.open_pull),
    ("GET", _API + "/discussions", _Handler.pulls),
    ("GET", _API + r"/discussions/(?P<number>\d+)", _Handler.pull),
    ("POST", _API + r"/discussions/(?P<number>\d+)/merge", _Handler.merge),
    ("POST", _API + r"/discussions/(?P<number>\d+)/status", _Handler.set_status),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", _API + "(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("PUT", _API + "/settings", _Handler.settings),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
