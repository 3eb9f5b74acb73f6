"""Push and load through huggingface_hub itself, against a real HTTP server on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from headrace.errors import UserError
from headrace.publication.hub import push
from headrace.publication.repository import build_repository
from publication.publication_fixtures import FINGERPRINT, card_facts, local_files, model_folder

_REPO = "me/small"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


def tree(folder, fingerprint=FINGERPRINT, **model):
    build_repository(
        folder, model_folder(folder.with_name(folder.name + "-model"), **model), card_facts(fingerprint=fingerprint)
    )
    return folder


def publish(hub, folder, private=True):
    return push(folder, _REPO, private=private, message="Publish", endpoint=hub.url)


def remote_files(hub, revision):
    repository = hub.repositories[_REPO]
    return {path: blob.data for path, blob in repository.commits[repository.resolve(revision)].items()}


def asked(hub, part):
    return [request for request in hub.requests if part in request]


def test_one_commit_private_tagged_and_equal(hub, tmp_path):
    folder = tree(tmp_path / "a")
    done = publish(hub, folder)
    repository = hub.repositories[_REPO]
    assert repository.private and done.private and done.changed
    assert repository.messages == ["initial", "Publish"] and done.commit == repository.head
    assert repository.tags == {FINGERPRINT: done.commit} and done.tag == FINGERPRINT
    files = remote_files(hub, FINGERPRINT)
    files.pop(".gitattributes")
    assert files == local_files(folder) and sorted(files) == sorted(done.files)
    assert done.url == f"{hub.url}/me/small"

    loaded = huggingface_hub.snapshot_download(
        _REPO, revision=FINGERPRINT, endpoint=hub.url, token=hub.read_token, cache_dir=tmp_path / "cache"
    )
    fetched = local_files(Path(loaded))
    fetched.pop(".gitattributes")
    assert fetched == local_files(folder)
    card = ModelCard(fetched["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 1.91


def test_a_second_push_does_nothing(hub, tmp_path):
    folder = tree(tmp_path / "a")
    first = publish(hub, folder)
    hub.requests.clear()
    second = publish(hub, folder)
    assert second.commit == first.commit and not second.changed
    assert hub.repositories[_REPO].messages == ["initial", "Publish"]
    assert not asked(hub, "/commit/") and not asked(hub, "PUT /lfs") and not asked(hub, "POST /api/models/me/small/tag")


def test_new_content_is_a_new_commit_and_stale_shards_go(hub, tmp_path):
    first = publish(hub, tree(tmp_path / "a", shards=3))
    folder = tree(tmp_path / "b", fingerprint="ba9876543210", shards=2, value=2.0)
    second = publish(hub, folder)
    assert second.changed and second.commit != first.commit
    files = remote_files(hub, "main")
    files.pop(".gitattributes")
    assert files == local_files(folder)
    assert hub.repositories[_REPO].tags == {FINGERPRINT: first.commit, "ba9876543210": second.commit}


def test_files_that_did_not_change_are_not_sent_again(hub, tmp_path):
    publish(hub, tree(tmp_path / "a"))
    hub.requests.clear()
    publish(hub, tree(tmp_path / "b", fingerprint="ba9876543210"))
    assert not asked(hub, "PUT /lfs") and len(asked(hub, "/commit/")) == 1


def test_a_commit_of_someone_else_in_between_is_not_overwritten(hub, tmp_path, monkeypatch):
    folder = tree(tmp_path / "a")
    other = HfApi(endpoint=hub.url, token=hub.token)
    real = HfApi.create_commit

    def late(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", real)
        note = CommitOperationAdd("README.md", b"---\nlicense: mit\n---\nmine\n")
        other.create_commit(_REPO, [note], commit_message="Other")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(UserError, match="changed meanwhile"):
        publish(hub, folder)
    assert hub.repositories[_REPO].messages == ["initial", "Other"] and not hub.repositories[_REPO].tags
    assert publish(hub, folder).changed


def test_without_a_token_nothing_is_asked(hub, tmp_path, monkeypatch):
    folder = tree(tmp_path / "a")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"^publish\.repo_id=me/small: no Hub token; set HF_TOKEN[^\n]*$"):
        publish(hub, folder)
    assert hub.requests == []


def test_bad_and_weak_tokens_are_one_line_and_tried_once(hub, tmp_path, monkeypatch):
    folder = tree(tmp_path / "a")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(UserError, match=r"^[^\n]*401[^\n]*HF_TOKEN[^\n]*$"):
        publish(hub, folder)
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    hub.requests.clear()
    with pytest.raises(UserError, match=r"^[^\n]*403[^\n]*write access$"):
        publish(hub, folder)
    assert len(asked(hub, "POST /api/repos/create")) == 1 and hub.repositories == {}


@pytest.mark.parametrize("request_", ["/preupload/", "/commit/", "/tag/"])
def test_403_is_not_retried_anywhere(hub, tmp_path, request_):
    folder = tree(tmp_path / "a")
    hub.fail("POST", request_, 403)
    with pytest.raises(UserError, match="403"):
        publish(hub, folder)
    assert len(asked(hub, request_)) == 1
    assert publish(hub, folder).tag == FINGERPRINT


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("POST", "/repos/create"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
        ("GET", "/refs"),
        ("GET", "/api/models/me/small"),
    ],
)
def test_after_a_failure_of_the_hub_the_next_push_ends_it(hub, tmp_path, method, request_):
    folder = tree(tmp_path / "a")
    hub.fail(method, request_, 500)
    with pytest.raises(ConnectionError, match="500"):
        publish(hub, folder)
    repository = hub.repositories.get(_REPO)
    assert repository is None or len(repository.messages) in (1, 2)
    done = publish(hub, folder)
    assert hub.repositories[_REPO].messages == ["initial", "Publish"]
    assert hub.repositories[_REPO].tags == {FINGERPRINT: done.commit}


def test_a_failed_upload_is_tried_again_by_the_client(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("PUT", "/lfs/", 500)
    done = publish(hub, tree(tmp_path / "a"))
    assert done.changed and len(asked(hub, "PUT /lfs")) == 3


def test_what_arrived_differently_is_not_tagged(hub, tmp_path, monkeypatch):
    folder = tree(tmp_path / "a")
    real = HfApi.create_commit

    def damaging(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        files = hub.repositories[_REPO].commits[done.oid]
        files["config.json"] = type(files["config.json"])(files["config.json"].data.replace(b"64", b"65"), False)
        return done

    monkeypatch.setattr(HfApi, "create_commit", damaging)
    with pytest.raises(ConnectionError, match=r"config\.json differs"):
        publish(hub, folder)
    assert hub.repositories[_REPO].tags == {}


def test_a_public_repository_is_refused_when_private_is_asked_for_and_stays_as_it_is(hub, tmp_path):
    folder = tree(tmp_path / "a")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(_REPO, private=False)
    with pytest.raises(UserError, match="is public"):
        publish(hub, folder)
    assert not publish(hub, folder, private=False).private
    api.update_repo_settings(_REPO, private=True)
    assert publish(hub, folder, private=False).private and hub.repositories[_REPO].private


def test_another_persons_repository_is_left_alone(hub, tmp_path):
    folder = tree(tmp_path / "a")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(_REPO, private=True)
    api.create_commit(_REPO, [CommitOperationAdd("pytorch_model.bin", b"theirs")], commit_message="Theirs")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        publish(hub, folder)
    assert hub.repositories[_REPO].messages == ["initial", "Theirs"]


def test_a_tree_that_was_changed_after_it_was_built_is_refused(hub, tmp_path):
    folder = tree(tmp_path / "a")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"hidden_size": 65}')
    with pytest.raises(UserError, match=r"config\.json: publish: is not as headrace\.json describes it"):
        publish(hub, folder)
    assert hub.requests == []


def test_an_unreachable_hub_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(
        ConnectionError, match=r"^publish\.repo_id=me/small: cannot reach http://127\.0\.0\.1:9 [^\n]*$"
    ):
        push(tree(tmp_path / "a"), _REPO, private=True, message="Publish", endpoint="http://127.0.0.1:9")


_LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
source = {"revision": sys.argv[2]}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **source).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **source)
tokens = torch.tensor([tokenizer("abba cab")["input_ids"]])
with torch.no_grad():
    save_file({"tokens": tokens, "logits": model(tokens).logits}, sys.argv[3])
"""


def test_transformers_loads_it_from_the_tag_with_equal_logits(hub, tmp_path):
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1, **sizes, **heads, **experts)
    model = DeepseekV3ForCausalLM(config).eval()
    source = tmp_path / "model"
    model.save_pretrained(source, max_shard_size="50KB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    (source / "generation_config.json").unlink()  # transformers writes a private key, which the gate refuses
    folder = tmp_path / "repository"
    build_repository(folder, source, card_facts())
    publish(hub, folder)

    out = tmp_path / "logits.safetensors"
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.read_token}
    environment |= {"TRANSFORMERS_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _LOAD, _REPO, FINGERPRINT, str(out)], env=environment, check=True)
    loaded = load_file(out)
    with torch.no_grad():
        assert torch.equal(loaded["logits"], model(loaded["tokens"]).logits)
    assert asked(hub, f"/resolve/{FINGERPRINT}/config.json") or asked(hub, f"/revision/{FINGERPRINT}")
