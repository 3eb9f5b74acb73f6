"""The tree holds the model, its card and its own list of hashes, or is not there."""

import hashlib
import json

import pytest

from headrace.errors import UserError
from headrace.publication.repository import build_repository
from publication.publication_fixtures import card_facts, model_folder


def test_the_tree_is_complete_linked_and_lists_itself(tmp_path):
    model, target = model_folder(tmp_path / "model"), tmp_path / "out" / "repository"
    (tmp_path / "results.json").write_text('{"bits_per_byte": 1.91}')
    (tmp_path / "terms").write_text("Terms.\n")
    names = build_repository(
        target, model, card_facts(), results=tmp_path / "results.json", license_file=tmp_path / "terms"
    )
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert names == found
    assert {"README.md", "LICENSE", "evaluation.json", ".eval_results/openai-openai-humaneval.yaml"} <= set(found)
    assert "manifest.json" not in found
    shard = "model-00001-of-000002.safetensors"
    assert (model / shard).samefile(target / shard)
    told = json.loads((target / "headrace.json").read_text())
    assert told["fingerprint"] == "0123456789ab" and sorted(told["files"]) == sorted(set(found) - {"headrace.json"})
    for name, entry in told["files"].items():
        data = (target / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_the_gate_refuses_leaves_nothing(tmp_path):
    model = model_folder(tmp_path / "model")
    (model / "modeling.py").write_text("print()")
    with pytest.raises(UserError, match=r"modeling\.py"):
        build_repository(tmp_path / "repository", model, card_facts())
    assert not (tmp_path / "repository").exists() and (model / "config.json").exists()


def test_a_tree_is_never_overwritten(tmp_path):
    model = model_folder(tmp_path / "model")
    build_repository(tmp_path / "repository", model, card_facts())
    with pytest.raises(UserError, match="already exists"):
        build_repository(tmp_path / "repository", model, card_facts())
    assert (tmp_path / "repository" / "README.md").exists()


def test_a_link_in_the_model_is_not_followed(tmp_path):
    model = model_folder(tmp_path / "model")
    (model / "special_tokens_map.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="ordinary file"):
        build_repository(tmp_path / "repository", model, card_facts())
