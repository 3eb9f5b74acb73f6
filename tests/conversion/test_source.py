"""A source is a folder, or a repository at one commit of which every file is verified; against the loopback Hub."""

import json

import pytest

from conversion_models import LIKE_V3, checkpoint_of, reference_model, tiny_model, tokenizer_folder
from headrace.conversion.check import verify_export
from headrace.conversion.convert_folder import convert_folder
from headrace.conversion.export import export
from headrace.conversion.source import locate
from headrace.errors import UserError
from loopback_hub import LoopbackHub
from loopback_repository import Blob, Repository

REPO = "someone/small"
COPIED = ("chat_template.jinja", "LICENSE", "LICENSE-MODEL", "LICENSE.txt", "NOTICE")


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny_model(**LIKE_V3)
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    tokenizer = tokenizer_folder(folder / "tokenizer")
    export(folder / "model.safetensors", config, tokenizer, folder / "hub", "fp8", 400_000)
    return folder / "hub"


@pytest.fixture(name="hub")
def _hub(model, monkeypatch):
    """A repository with the model and, as releases have them, code and a readme."""
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_TOKEN", server.read_token)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        repository = server.repositories[REPO] = Repository(private=True)
        files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in model.iterdir()}
        files |= {name: Blob(b"raise SystemExit('run')", False) for name in ("modeling_deepseek.py", "README.md")}
        files |= {name: Blob(name.encode(), False) for name in COPIED}
        server.objects |= {blob.sha256: blob.data for blob in files.values() if blob.lfs}
        repository.commit(files, "release")
        repository.tags["v1"] = repository.head
        yield server


def test_a_repository_is_fetched_at_one_commit_and_converted(hub, model, tmp_path):
    head = hub.repositories[REPO].head
    source = locate(f"{REPO}@v1", hub.url, tmp_path / "cache")
    assert source.identity == {"repository": REPO, "commit": head}
    assert {path.name: path.read_bytes() for path in source.folder.iterdir()} == {
        **{path.name: path.read_bytes() for path in model.iterdir()},
        **{name: name.encode() for name in COPIED},
    }
    assert not any("modeling" in line or "README" in line for line in hub.requests)
    config, _ = convert_folder(source.folder, tmp_path / "out", "bf16", 400_000)
    verify_export(tmp_path / "out", source.folder, config)
    assert all((tmp_path / "out" / name).read_text() == name for name in COPIED)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_branch_that_moves_is_another_source(hub, tmp_path):
    repository = hub.repositories[REPO]
    before = locate(REPO, hub.url, tmp_path / "cache")
    content = json.loads(repository.commits[repository.head]["config.json"].data)
    changed = Blob(json.dumps({**content, "routed_scaling_factor": 1.5}).encode(), False)
    repository.commit({**repository.commits[repository.head], "config.json": changed}, "another")
    after = locate(REPO, hub.url, tmp_path / "cache")
    assert before.identity["commit"] != after.identity["commit"] == repository.head
    assert locate(f"{REPO}@{before.identity['commit']}", hub.url, tmp_path / "cache") == before


def test_a_file_that_is_not_the_listed_one_is_named(hub, tmp_path):
    source = locate(REPO, hub.url, tmp_path / "cache")
    for name in ("model-00002-of-000007.safetensors", "config.json"):
        file = next(path for path in source.folder.iterdir() if path.name[:11] == name[:11]).resolve()
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name[:11]}.* differs from {REPO} at "):
            locate(REPO, hub.url, tmp_path / "cache")
        file.write_bytes(whole)
    assert locate(REPO, hub.url, tmp_path / "cache") == source


def test_what_the_hub_does_not_give_is_said(hub, tmp_path, monkeypatch):
    for named, message in (
        ("someone/else", "the Hub does not give it"),
        (f"{REPO}@v9", "the Hub does not give it"),
        ("no folder here", "no such folder, and no repository is named so"),
        ("/no/such/folder", "no such folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            locate(named, hub.url, tmp_path / "cache")
        assert str(caught.value).startswith(f"source={named}: ") and "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="401"):
        locate(REPO, hub.url, tmp_path / "cache")


def test_a_repository_without_weights_is_said_to_have_none(hub, tmp_path):
    hub.repositories["someone/empty"] = Repository(private=False)
    hub.repositories["someone/empty"].commit({"README.md": Blob(b"#", False)}, "initial")
    with pytest.raises(UserError, match="holds no weights"):
        locate("someone/empty", hub.url, tmp_path / "cache")


def test_a_folder_is_known_by_its_files(model, tmp_path):
    first = locate(str(model))
    assert first.folder == model and first == locate(f"{model}/")
    (tmp_path / "config.json").write_text("{}")
    before = locate(str(tmp_path)).identity
    (tmp_path / "config.json").write_text("{ }")
    assert locate(str(tmp_path)).identity != before
