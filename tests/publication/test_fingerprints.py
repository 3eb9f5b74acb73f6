"""A push looks at fingerprint and tag first: what is there already is not sent, no commit stays without its tag."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from headrace.errors import UserError
from headrace.publication import hub as hub_module
from headrace.publication.hub import DATASET, MODEL, Publication, push
from headrace.publication.repository import build_repository
from loopback_hub import LoopbackHub
from publication.publication_fixtures import FINGERPRINT, card_facts, local_files, model_folder

_REPO, NEXT = "me/small", "ba9876543210"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


@pytest.fixture(name="trees", scope="module")
def _trees(tmp_path_factory):
    """`first`, `later`: the same fingerprint, but other wall times and weights; `other`: another fingerprint."""
    folder = tmp_path_factory.mktemp("trees")
    made = {"first": (1.0, {}), "later": (2.0, {"seconds": 99.0}), "other": (3.0, {"fingerprint": NEXT})}
    for name, (value, changes) in made.items():
        model_folder(folder / f"{name}-model", value=value)
        build_repository(folder / name, folder / f"{name}-model", card_facts(**changes))
    return folder


@pytest.fixture(params=["model", "dataset"])
def kind(request):
    """A data set goes through a pull request; what may be in it does not matter here."""
    if request.param == "model":
        return MODEL
    return hub_module.Kind(DATASET.repo_type, MODEL.inspect, DATASET.prefix, files_per_commit=3)


def publish(hub: LoopbackHub, tree: Path, kind: hub_module.Kind = MODEL) -> Publication:
    return push(tree, _REPO, private=True, message="Publish", endpoint=hub.url, kind=kind)


def repository(hub: LoopbackHub):
    (only,) = hub.repositories.values()
    return only


def state(hub: LoopbackHub):
    there = repository(hub)
    return dict(there.branches), dict(there.tags), list(there.messages), len(there.pulls)


def held(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    there = repository(hub)
    files = {path: blob.data for path, blob in there.commits[there.resolve(revision)].items()}
    files.pop(".gitattributes")
    return files


def edit(hub: LoopbackHub, *operations: CommitOperationAdd | CommitOperationDelete) -> str:
    """A commit of somebody on main."""
    return HfApi(endpoint=hub.url, token=hub.token).create_commit(_REPO, list(operations), commit_message="Edit").oid


def test_the_same_fingerprint_in_other_bytes_sends_nothing(hub, trees, kind):
    first = publish(hub, trees / "first", kind)
    before = state(hub)
    hub.requests.clear()
    again = publish(hub, trees / "later", kind)
    assert state(hub) == before
    assert (again.commit, again.tag, again.changed) == (first.commit, FINGERPRINT, False)
    assert sorted(again.files) == sorted(first.files)
    assert not [one for one in hub.requests if re.search("PUT|/commit/|/tag/|/preupload/|POST .*/discussions", one)]


def test_an_interrupted_push_is_ended_in_either_bytes(hub, trees, kind):
    for rerun in ("first", "later"):
        hub.repositories.clear()
        hub.fail("POST", "/tag/", 500)
        with pytest.raises(ConnectionError, match="500"):
            publish(hub, trees / "first", kind)
        branches, tags, messages, pulls = state(hub)
        assert tags == {}
        done = publish(hub, trees / rerun, kind)
        assert state(hub) == (branches, {FINGERPRINT: repository(hub).head}, messages, pulls)
        assert (done.commit, done.changed) == (repository(hub).head, False)
        assert held(hub, FINGERPRINT) == local_files(trees / "first")


def test_a_tag_on_another_fingerprints_commit_is_refused_before_anything_is_written(hub, trees, kind):
    publish(hub, trees / "other", kind)
    there = repository(hub)
    there.tags[FINGERPRINT] = there.head
    before = state(hub)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^[^\n]*has a tag {FINGERPRINT} on other files; remove the tag[^\n]*$"):
            publish(hub, trees / "first", kind)
        assert state(hub) == before


def test_a_tag_on_a_commit_without_a_manifest_is_refused_before_anything_is_written(hub, trees, kind):
    publish(hub, trees / "other", kind)
    there = repository(hub)
    there.tags[FINGERPRINT] = next(oid for oid, files in there.commits.items() if "headrace.json" not in files)
    before = state(hub)
    with pytest.raises(UserError, match=f"has a tag {FINGERPRINT} on other files"):
        publish(hub, trees / "first", kind)
    assert state(hub) == before


@pytest.mark.parametrize("damage", ["edited", "gone", "weights"])
def test_a_tag_on_files_that_are_not_as_their_manifest_says_is_refused(hub, trees, damage):
    publish(hub, trees / "first")
    shard = "model-00001-of-000002.safetensors"
    made = {
        "edited": CommitOperationAdd("README.md", b"---\nlicense: mit\n---\nmine\n"),
        "gone": CommitOperationDelete("config.json"),
        "weights": CommitOperationAdd(shard, (trees / "other" / shard).read_bytes()),
    }
    repository(hub).tags[FINGERPRINT] = edit(hub, made[damage])
    before = state(hub)
    with pytest.raises(UserError, match=f"has a tag {FINGERPRINT} on other files"):
        publish(hub, trees / "later")
    assert state(hub) == before


def test_an_untagged_commit_that_is_damaged_is_replaced(hub, trees):
    publish(hub, trees / "first")
    repository(hub).tags.clear()
    edit(hub, CommitOperationAdd("README.md", b"---\nlicense: mit\n---\nmine\n"))
    done = publish(hub, trees / "later")
    assert done.changed and repository(hub).tags == {FINGERPRINT: done.commit}
    assert held(hub) == local_files(trees / "later")


def test_after_another_fingerprint_the_same_bytes_come_back_and_other_bytes_stay_away(hub, trees):
    first = publish(hub, trees / "first")
    publish(hub, trees / "other")
    before = state(hub)
    kept = publish(hub, trees / "later")
    assert state(hub) == before and (kept.commit, kept.changed) == (first.commit, False)
    back = publish(hub, trees / "first")
    assert back.changed and held(hub) == held(hub, FINGERPRINT) == local_files(trees / "first")
    assert repository(hub).tags[FINGERPRINT] == first.commit


@pytest.mark.parametrize(
    "content", [b"[1]", b"{}", b'{"fingerprint": "a", "files": {"a": {}}}', b"\xff", b'{"files": 1}']
)
def test_somebody_elses_manifest_is_refused(hub, trees, content):
    HfApi(endpoint=hub.url, token=hub.token).create_repo(_REPO, private=True)
    edit(hub, CommitOperationAdd("headrace.json", content))
    before = state(hub)
    with pytest.raises(UserError, match=r"^[^\n]*headrace\.json at \w+ that Headrace did not write[^\n]*$"):
        publish(hub, trees / "first")
    assert state(hub) == before


def test_the_trees_differ_where_no_fingerprint_looks(trees):
    """Or the tests above would prove nothing."""
    first, later = (local_files(trees / name) for name in ("first", "later"))
    assert {name for name in first if first[name] != later[name]} >= {"README.md", "headrace.json"}
    told = [json.loads((trees / name / "headrace.json").read_text())["fingerprint"] for name in ("first", "later")]
    assert told == [FINGERPRINT, FINGERPRINT]
