"""Buckets of the Hub on 127.0.0.1: folders that anybody with the right may change, whose bytes travel by Xet.

huggingface_hub hands them to hf_xet, which asks here for a token and for the address of a store. The store is a folder
(`local://`), which hf_xet itself reads and writes: chunks, hashes and downloads are real; what hf_xet says to a store
of the Hub over the network is not here.
"""

import json
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hf_xet import XetFileInfo, XetObjectNotFoundError, XetSession

from loopback_repository import HubError

_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Bucket:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # Xet's
    batches: list[list[str]] = field(default_factory=list)  # what each changed: +path or -path

    def entry(self, path: str) -> dict[str, Any]:
        known = {"size": len(self.files[path]), "xetHash": self.hashes[path]}
        return {"type": "file", "path": path, "mtime": _DATE, "uploadedAt": _DATE, **known}


session = cache(XetSession)


def stored(store: Path, xet_hash: str) -> bytes | None:
    """The content of a file that was uploaded; None where there is none of this hash."""
    expires = int(time.time()) + 3600
    group = session().new_download_stream_group(
        endpoint=f"local://{store}", token="xet", token_expiry_unix_secs=expires
    )
    try:
        return b"".join(group.download_stream(XetFileInfo(xet_hash)))
    except XetObjectNotFoundError:
        return None


class BucketAnswers:
    """The answers of the server's handler that concern buckets."""

    def _bucket(self, name: str, write: bool = False) -> Bucket:
        found = self.state.buckets.get(name)
        if found is None or (found.private and self.role == "none"):
            raise HubError(404 if self.role != "none" else 401, "Bucket not found", "RepoNotFound")
        if write and self.role != "write":
            raise HubError(403, "this token may not write here")
        return found

    def create_bucket(self, bucket: str) -> None:
        if self.role != "write":
            raise HubError(401 if self.role == "none" else 403, "this token may not create buckets")
        url = {"url": f"{self.state.url}/buckets/{bucket}"}
        if bucket in self.state.buckets:
            raise HubError(409, "You already created this bucket", **url)
        self.state.buckets[bucket] = Bucket(json.loads(self.body).get("visibility") == "private")
        self._json(url)

    def bucket_info(self, bucket: str) -> None:
        found = self._bucket(bucket)
        counted = {"size": sum(map(len, found.files.values())), "totalFiles": len(found.files)}
        self._json({"id": bucket, "private": found.private, "createdAt": _DATE, **counted})

    def bucket_tree(self, bucket: str, prefix: str) -> None:
        """Recursive only: what is asked for here and by `hf buckets sync`."""
        found = self._bucket(bucket)
        self._json([found.entry(path) for path in sorted(found.files) if path.startswith(prefix)])

    def bucket_paths(self, bucket: str) -> None:
        found = self._bucket(bucket)
        self._json([found.entry(path) for path in json.loads(self.body)["paths"] if path in found.files])

    def bucket_batch(self, bucket: str) -> None:
        found, failed = self._bucket(bucket, write=True), []
        operations = [json.loads(line) for line in self.body.splitlines() if line]
        for one in operations:
            path, xet_hash = one["path"], one.get("xetHash")
            if one["type"] == "deleteFile":
                if found.files.pop(path, None) is None:
                    failed.append({"path": path, "error": "no such file"})
            elif (data := stored(self.state.store, xet_hash)) is not None:
                found.files[path], found.hashes[path] = data, xet_hash
            else:
                failed.append({"path": path, "error": f"{xet_hash} was never uploaded"})
        found.batches.append([("-" if one["type"] == "deleteFile" else "+") + one["path"] for one in operations])
        counted = {"processed": len(operations), "succeeded": len(operations) - len(failed)}
        self._json({"success": not failed, "failed": failed, **counted}, 422 if len(failed) == len(operations) else 200)

    def xet_token(self, bucket: str, right: str) -> None:
        self._bucket(bucket, write=right == "write")
        expires = int(time.time()) + 3600
        self._json({"accessToken": "xet", "exp": expires, "casUrl": f"local://{self.state.store}"})

    def bucket_resolve(self, bucket: str, path: str) -> None:
        found = self._bucket(bucket)
        if path not in found.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        route = f"{self.state.url}/api/buckets/{bucket}/xet-read-token"
        headers = {"X-Xet-Hash": found.hashes[path], "X-Xet-Refresh-Route": route}
        headers["X-Linked-Size"] = str(len(found.files[path]))
        self._send(b"", 200, headers)


_BUCKET = r"(?P<bucket>[\w.-]+/[\w.-]+)"
_API = f"/api/buckets/{_BUCKET}"
ROUTES = [
    ("POST", _API, BucketAnswers.create_bucket),
    ("GET", _API, BucketAnswers.bucket_info),
    ("GET", _API + "/tree(?:/(?P<prefix>.+))?", BucketAnswers.bucket_tree),
    ("POST", _API + "/paths-info", BucketAnswers.bucket_paths),
    ("POST", _API + "/batch", BucketAnswers.bucket_batch),
    ("GET", _API + "/xet-(?P<right>read|write)-token", BucketAnswers.xet_token),
    ("HEAD", f"/buckets/{_BUCKET}/resolve/(?P<path>.+)", BucketAnswers.bucket_resolve),
]
