"""The stand-in Hub is as strict as the tests that rely on it need it to be."""

import hashlib
import json

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from loopback_hub import CUT, HALF, LOST, LoopbackHub


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def client(hub):
    with httpx2.Client(base_url=hub.url, headers={"Authorization": f"Bearer {hub.token}"}) as made:
        made.post("/api/repos/create", json={"name": "a", "organization": "me", "visibility": "private"})
        yield made


def put_object(client, data):
    oid = hashlib.sha256(data).hexdigest()
    assert client.put(f"/lfs/{oid}", content=data).status_code == 200
    return oid


def commit(client, *lines, parent=None):
    header = {"key": "header", "value": {"summary": "s"} | ({"parentCommit": parent} if parent else {})}
    body = "".join(json.dumps(line) + "\n" for line in [header, *lines])
    return client.post("/api/models/me/a/commit/main", content=body.encode())


def test_uploads_are_checked_and_needed(client):
    oid = hashlib.sha256(b"announced").hexdigest()
    assert client.put(f"/lfs/{oid}", content=b"something else").status_code == 400
    line = {"key": "lfsFile", "value": {"path": "a.safetensors", "oid": oid, "size": 9}}
    assert commit(client, line).status_code == 400
    put_object(client, b"announced")
    assert commit(client, line).status_code == 200


def test_ranges_and_linked_hashes(client, hub):
    oid = put_object(client, bytes(range(100)))
    commit(client, {"key": "lfsFile", "value": {"path": "a.safetensors", "oid": oid, "size": 100}})
    head = client.head("/me/a/resolve/main/a.safetensors")
    assert head.status_code == 302 and head.headers["X-Linked-Etag"] == f'"{oid}"'
    assert head.headers["X-Linked-Size"] == "100"
    assert head.headers["X-Repo-Commit"] == hub.repositories["me/a"].head
    part = httpx2.get(head.headers["Location"], headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == bytes(range(10, 20))
    assert part.headers["Content-Range"] == "bytes 10-19/100"


def test_a_stale_parent_is_refused(client, hub):
    first = hub.repositories["me/a"].head
    line = {"key": "file", "value": {"path": "b.txt", "content": "YQ=="}}
    assert commit(client, line, parent=first).status_code == 200
    assert commit(client, line, parent=first).status_code == 412


def test_private_repositories_do_not_exist_for_strangers(client, hub):
    assert client.get("/api/models/me/a").status_code == 200
    assert httpx2.get(f"{hub.url}/api/models/me/a").status_code == 401
    assert httpx2.get(f"{hub.url}/me/a/resolve/main/.gitattributes").status_code == 401


def test_faults_hit_the_request_they_were_set_for(client, hub):
    hub.fail("GET", "/api/whoami-v2", 503, at=2)
    assert [client.get("/api/whoami-v2").status_code for _ in range(3)] == [200, 503, 200]


def test_a_pull_request_collects_commits_and_is_merged_onto_what_main_became(client, hub):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("me/d", repo_type="dataset", private=True)
    kind = {"repo_type": "dataset"}
    opened = api.create_pull_request("me/d", "Shards", **kind)
    assert (opened.num, opened.status, opened.git_reference) == (1, "draft", "refs/pr/1")
    for name in ("a.txt", "b.txt"):
        add = [CommitOperationAdd(name, name.encode())]
        api.create_commit("me/d", add, commit_message=name, revision="refs/pr/1", **kind)
    api.create_commit("me/d", [CommitOperationAdd("c.txt", b"main")], commit_message="c", **kind)
    repository = hub.repositories["datasets/me/d"]
    assert set(repository.commits[repository.head]) == {".gitattributes", "c.txt"}
    assert [one.title for one in api.get_repo_discussions("me/d", discussion_status="open", **kind)] == ["Shards"]
    refs = api.list_repo_refs("me/d", include_pull_requests=True, **kind)
    assert [branch.name for branch in refs.branches] == ["main"]
    assert [pull.target_commit for pull in refs.pull_requests] == [repository.branches["refs/pr/1"]]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request("me/d", 1, **kind)
    assert api.change_discussion_status("me/d", 1, new_status="open", **kind).new_status == "open"
    api.merge_pull_request("me/d", 1, **kind)
    assert set(repository.commits[repository.head]) == {".gitattributes", "a.txt", "b.txt", "c.txt"}
    details = api.get_discussion_details("me/d", 1, **kind)
    assert (details.status, details.merge_commit_oid) == ("merged", repository.head)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request("me/d", 1, **kind)


def test_connections_are_cut_before_after_and_in_the_middle(client, hub):
    hub.fail("GET", "/api/models/me/a", CUT)
    with pytest.raises(httpx2.TransportError):
        client.get("/api/models/me/a")
    hub.fail("POST", "/api/repos/create", LOST)
    with pytest.raises(httpx2.TransportError):
        client.post("/api/repos/create", json={"name": "b", "organization": "me"})
    assert "me/b" in hub.repositories
    oid = put_object(client, bytes(range(100)))
    hub.fail("*", "/lfs/", HALF)
    with pytest.raises(httpx2.TransportError):
        client.get(f"/lfs/{oid}")
    assert client.get(f"/lfs/{oid}").content == bytes(range(100))
