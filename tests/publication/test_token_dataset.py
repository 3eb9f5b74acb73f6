"""Token shards as a data set repository: the view, the card, one pull request however often the push is cut off."""

import json
from copy import deepcopy
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import DatasetCard, HfApi

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, write_json
from headrace.errors import UserError
from headrace.publication import hub as hub_module
from headrace.publication import token_dataset
from headrace.publication.facts import DataSource
from headrace.publication.gate import inspect_dataset
from headrace.publication.hub import DATASET, push
from headrace.publication.token_dataset import DatasetFacts, build_dataset
from publication.publication_fixtures import FAULTS, FINGERPRINT, SHARDS, emptied, failing, local_files, token_shards

_REPO = "me/tokens"
_REMOTE = f"datasets/{_REPO}"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


@pytest.fixture(name="tokens", scope="module")
def _tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenize")
    token_shards(folder)
    manifests.build(folder, kind="tokenize", producer={}, inputs={}, summary={})
    return folder


def facts(view="arrow", **changes):
    sources = [DataSource("numpy | x", "BSD-3-Clause", 410, 5_123_456), DataSource("stdlib", "PSF-2.0", 9, 90)]
    known = {"repo_id": _REPO, "model": "me/small", "fingerprint": FINGERPRINT, "view": view, "sources": sources}
    known |= {"versions": {"tokenizers": "0.23"}, "code_version": "abc", "command": "snakemake"}
    return DatasetFacts(**({"title": "Small", "license": "other"} | known | changes))


@pytest.fixture(name="trees", scope="module")
def _trees(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    for view in ("arrow", "megatron"):
        build_dataset(folder / view, tokens, facts(view))
    return folder


@pytest.fixture(autouse=True)
def small_commits(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


def publish(hub, tree, most=3):
    kind = hub_module.Kind(DATASET.repo_type, DATASET.inspect, DATASET.prefix, files_per_commit=most)
    message = f"Small: tokens, {read_json(tree / 'headrace.json')['fingerprint']}"
    return push(tree, _REPO, private=True, message=message, endpoint=hub.url, kind=kind)


def held(hub, revision="main"):
    repository = hub.repositories[_REMOTE]
    files = repository.commits[repository.resolve(revision)]
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


def test_the_card_says_where_the_text_is_from_and_loads_as_the_hub_loads_it(trees):
    card = DatasetCard((trees / "arrow" / "README.md").read_text())
    assert (card.data.license, card.data.license_name) == ("other", "see-sources")
    assert card.data.size_categories == ["n<1K"]
    (only,) = card.data.configs
    assert {one["split"]: one["path"] for one in only["data_files"]} == {
        "train": "data/train-*.arrow",
        "heldout": "data/heldout-*.arrow",
    }
    for line in (
        r"| numpy \| x | BSD-3-Clause | 410 | 5,123,456 |",
        "| stdlib | PSF-2.0 | 9 | 90 |",
        "| train | 160 |",
    ):
        assert line in card.text
    assert "the one of `me/small`" in card.text
    assert "configs" not in DatasetCard((trees / "megatron" / "README.md").read_text()).data.to_dict()


@pytest.mark.parametrize(
    ("documents", "size"), [(0, "n<1K"), (1000, "1K<n<10K"), (15_400_000_000, "10B<n<100B"), (10**12, "n>1T")]
)
def test_the_card_says_the_size_in_the_hubs_words(documents, size, tmp_path):
    splits = {"train": {"shards": [{"documents": documents, "tokens": documents}]}}
    write_json(tmp_path / "dataset.json", {"eos": 1, "tokenizer": "sha256:0123", "splits": splits})
    assert DatasetCard(token_dataset._card(tmp_path, facts())).data.size_categories == [size]


def test_the_view_is_whole_and_names_no_place_on_this_machine(trees, tokens):
    loaded = datasets.load_dataset(str(trees / "arrow"), cache_dir=str(trees / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 160, "heldout": 7}
    assert loaded["train"][3]["input_ids"] == [2, 3, 4, 1]
    for name in SHARDS:
        assert (trees / "megatron" / "data" / f"{name}.bin").samefile(tokens / f"{name}.bin")
    for tree in ("arrow", "megatron"):
        for name, data in local_files(trees / tree).items():
            assert name.startswith("data/") or str(trees).encode() not in data, name
        assert (trees / tree / "tokenizer.json").samefile(tokens / "tokenizer.json")
        told = json.loads((trees / tree / "headrace.json").read_text())["files"]
        assert set(told) == set(local_files(trees / tree)) - {"headrace.json"}


@pytest.mark.parametrize("name", ["data/evil.py", "script.py", "data/x/a.arrow", "data/../a.bin", "loading.json"])
def test_what_is_no_data_stays_here(trees, tmp_path, name):
    for source, data in local_files(trees / "arrow").items():
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_bytes(data)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="publish:"):
        inspect_dataset(tmp_path)


@pytest.mark.parametrize("view", ["arrow", "megatron"])
def test_it_goes_through_one_pull_request_and_is_merged_and_tagged(view, hub, trees, tmp_path):
    tree = trees / view
    done = publish(hub, tree)
    repository = hub.repositories[_REMOTE]
    assert repository.private and done.changed
    assert held(hub) == held(hub, FINGERPRINT) == local_files(tree)
    (pull,) = repository.pulls.values()
    assert pull.merged == repository.head == done.commit
    *sent, merged = repository.messages[1:]
    assert sent == [f"Small: tokens, {FINGERPRINT}"] * -(-len(local_files(tree)) // 3) and merged == pull.title
    again = publish(hub, tree)
    assert not again.changed and len(repository.pulls) == 1
    loaded = huggingface_hub.snapshot_download(
        _REPO, repo_type="dataset", revision=FINGERPRINT, endpoint=hub.url, token=hub.token, cache_dir=tmp_path
    )
    fetched = local_files(Path(loaded))
    fetched.pop(".gitattributes")
    assert fetched == local_files(tree)


@pytest.mark.parametrize("fault", FAULTS)
def test_cut_off_at_any_request_it_goes_on_in_the_same_pull_request(fault, hub, trees):
    tree = trees / "arrow"
    expected = local_files(tree)
    for at in range(1, 100):
        emptied(hub)
        error = failing(hub, lambda: publish(hub, tree), fault, at)
        if len(hub.requests) < at:
            assert error is None
            break
        assert error is not None or fault != 403, hub.requests[at - 1]
        assert _REMOTE not in hub.repositories or held(hub) in ({}, expected)
        publish(hub, tree)
        assert held(hub) == held(hub, FINGERPRINT) == expected
        assert len(hub.repositories[_REMOTE].pulls) == 1
    assert at > 20, "a push asks for more than that"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_data_set_leaves_the_first_one_whole(fault, hub, trees, tokens, tmp_path):
    """Other shards under another fingerprint: main and both tags hold whole data, whatever was cut off."""
    build_dataset(tmp_path / "next", tokens, facts("arrow", fingerprint="ba9876543210"))
    first, second = (local_files(tree) for tree in (trees / "megatron", tmp_path / "next"))
    publish(hub, trees / "megatron")
    kept = deepcopy(hub.repositories), dict(hub.objects)
    for at in range(1, 100):
        hub.repositories, hub.objects = deepcopy(kept[0]), dict(kept[1])
        failing(hub, lambda: publish(hub, tmp_path / "next", most=20), fault, at)
        if len(hub.requests) < at:
            break
        assert held(hub, FINGERPRINT) == first and held(hub) in (first, second)
        publish(hub, tmp_path / "next", most=20)
        assert held(hub, FINGERPRINT) == first and held(hub) == held(hub, "ba9876543210") == second
    assert at > 20, "a push asks for more than that"


def test_another_persons_pull_request_of_the_same_title_is_not_gone_on_with(hub, trees, monkeypatch):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(_REPO, repo_type="dataset", private=True)
    base = hub.repositories[_REMOTE].head
    api.create_pull_request(_REPO, f"Small: tokens, {FINGERPRINT} on {base[:12]}", repo_type="dataset")
    hub.repositories[_REMOTE].pulls[1].author = "somebody"
    publish(hub, trees / "arrow")
    assert hub.repositories[_REMOTE].pulls[1].merged is None
    assert hub.repositories[_REMOTE].pulls[2].merged is not None


@pytest.mark.parametrize(("method", "pattern"), [("GET", "/tree/refs%2Fpr%2F2"), ("POST", "/merge")])
def test_a_pull_request_that_began_before_another_data_set_came_blocks_nothing(
    method, pattern, hub, trees, tokens, tmp_path
):
    """Both changed the card and the manifest, so git cannot merge what was cut off, empty or full, any more."""
    build_dataset(tmp_path / "next", tokens, facts("arrow", fingerprint="ba9876543210"))
    publish(hub, trees / "megatron")
    repository = hub.repositories[_REMOTE]
    hub.fail(method, pattern, 403)
    with pytest.raises(UserError, match="403"):
        publish(hub, tmp_path / "next")
    build_dataset(tmp_path / "third", tokens, facts("megatron", fingerprint="cdefcdefcdef"))
    publish(hub, tmp_path / "third")
    assert not repository.pulls[2].closed, "of another data set"
    publish(hub, tmp_path / "next")
    assert held(hub) == held(hub, "ba9876543210") == local_files(tmp_path / "next")
    assert [pull.closed for pull in repository.pulls.values()] == [False, True, False, False]
