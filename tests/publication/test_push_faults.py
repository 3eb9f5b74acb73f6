"""Every fault at every request of a push: it ends complete or not at all, and the next one ends it."""

from pathlib import Path

import huggingface_hub
import pytest

from headrace.publication.hub import push
from headrace.publication.repository import build_repository
from loopback_hub import LoopbackHub
from publication.publication_fixtures import (
    FAULTS,
    FINGERPRINT,
    card_facts,
    emptied,
    failing,
    local_files,
    model_folder,
)

_REPO = "me/small"
_MOST = 60  # more requests than a push has
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(name="folders", scope="module")
def _folders(tmp_path_factory):
    """A published tree, and the next one: a shard fewer, other values."""
    folder = tmp_path_factory.mktemp("trees")
    model_folder(folder / "m1", shards=3)
    model_folder(folder / "m2", shards=2, value=2.0)
    build_repository(folder / "t1", folder / "m1", card_facts())
    build_repository(folder / "t2", folder / "m2", card_facts(fingerprint="ba9876543210"))
    return folder / "t1", folder / "t2"


def publish(hub: LoopbackHub, folder: Path):
    return push(folder, _REPO, private=True, message=folder.name, endpoint=hub.url)


def held(hub: LoopbackHub, revision: str) -> dict[str, bytes]:
    repository = hub.repositories[_REPO]
    files = repository.commits[repository.resolve(revision)]
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_first_push(fault, hub, folders):
    expected, met = local_files(folders[0]), 0
    for at in range(1, _MOST):
        emptied(hub)
        error = failing(hub, lambda: publish(hub, folders[0]), fault, at)
        if len(hub.requests) < at:
            assert error is None
            break
        met += 1
        repository = hub.repositories.get(_REPO)
        if repository is not None:
            assert repository.private
            assert held(hub, "main") in ({}, expected)
            assert all(held(hub, tag) == expected for tag in repository.tags)
        if fault == 403:
            assert error is not None, hub.requests[at - 1]
        done = publish(hub, folders[0])
        assert held(hub, "main") == held(hub, FINGERPRINT) == expected
        assert hub.repositories[_REPO].messages == ["initial", "t1"]
        assert hub.repositories[_REPO].tags == {FINGERPRINT: done.commit}
    assert met > 12, "a push asks for more than that"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_push(fault, hub, folders, tmp_path):
    """What is there stays readable, whole, under its tag, whatever happens to what comes after it."""
    first, second = map(local_files, folders)
    for at in range(1, _MOST):
        emptied(hub)
        publish(hub, folders[0])
        failing(hub, lambda: publish(hub, folders[1]), fault, at)
        if len(hub.requests) < at:
            break
        assert held(hub, FINGERPRINT) == first
        assert held(hub, "main") in (first, second)
        done = publish(hub, folders[1])
        assert held(hub, "main") == held(hub, "ba9876543210") == second
        assert hub.repositories[_REPO].messages == ["initial", "t1", "t2"]
        assert hub.repositories[_REPO].head == done.commit
    assert at > 12
    for revision, files in ((FINGERPRINT, first), ("ba9876543210", second)):
        loaded = huggingface_hub.snapshot_download(
            _REPO, revision=revision, endpoint=hub.url, token=hub.read_token, cache_dir=tmp_path / "cache"
        )
        fetched = local_files(Path(loaded))
        fetched.pop(".gitattributes")
        assert fetched == files
