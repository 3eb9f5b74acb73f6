"""Checkpoints in a bucket: whole or not there, whatever was cut off; what comes back is what went out, and loads."""

import json
import shutil

import pytest
from huggingface_hub import HfApi

from headrace.checkpoint.reader import open_checkpoint
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.publication.checkpoints import kept_checkpoints, push_checkpoints
from headrace.publication.gate import inspect_checkpoint
from headrace.stages import convert, pretrain
from headrace.stages.places import places
from headrace.stages.run import main
from loopback_buckets import Bucket
from publication.publication_fixtures import FAULTS, FINGERPRINT, emptied, failing, local_files
from saved import put, simple, value_of
from small_corpus import tokenized

_BUCKET = "me/kept"
_MOST = 40  # more requests than a push has


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")


@pytest.fixture(name="kept", scope="module")
def _kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        put(folder, step)
    return folder


def publish(hub, folder, private=True):
    return push_checkpoints(_BUCKET, FINGERPRINT, kept_checkpoints(folder), private=private, endpoint=hub.url)


def expected(folder):
    return {f"{FINGERPRINT}/{name}": data for name, data in local_files(folder).items()}


def held(hub):
    return hub.buckets[_BUCKET].files


def whole(hub, files):
    """Every checkpoint of the bucket that has a manifest is as it was here."""
    there = held(hub) if _BUCKET in hub.buckets else {}
    for name in (name for name in there if name.endswith("/manifest.json")):
        step = name.removesuffix("manifest.json")
        ours, theirs = ({key: found[key] for key in found if key.startswith(step)} for found in (files, there))
        if ours != theirs:
            return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_is_cut_off_is_ended_by_the_next(fault, hub, kept):
    files = expected(kept)
    for at in range(1, _MOST):
        emptied(hub)
        error = failing(hub, lambda: publish(hub, kept), fault, at)
        if len(hub.requests) < at:
            assert error is None
            break
        assert error is not None or fault != 403, hub.requests[at - 1]
        assert whole(hub, files)
        publish(hub, kept)
        assert held(hub) == files and hub.buckets[_BUCKET].private
    assert at > 2 + 2 * 7


def test_what_is_there_is_not_sent_again_and_the_manifest_comes_last(hub, kept):
    assert publish(hub, kept) == {"step-00000010": "pushed", "step-00000020": "pushed"}
    sent = list(hub.buckets[_BUCKET].batches)
    assert [len(batch) for batch in sent] == [6, 1, 6, 1]
    assert sent[1] == [f"+{FINGERPRINT}/step-00000010/manifest.json"]
    hub.requests.clear()
    assert publish(hub, kept) == {"step-00000010": "there", "step-00000020": "there"}
    assert hub.buckets[_BUCKET].batches == sent
    assert not [asked for asked in hub.requests if "token" in asked or "batch" in asked]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_changed_in_the_bucket_is_no_checkpoint_until_it_is_right_again(fault, hub, tmp_path):
    put(tmp_path, 20)
    files, entry = expected(tmp_path), f"{FINGERPRINT}/step-00000020"
    for at in range(1, _MOST):
        emptied(hub)
        publish(hub, tmp_path)
        bucket = hub.buckets[_BUCKET]
        bucket.files[f"{entry}/state.json"], bucket.hashes[f"{entry}/state.json"] = b"{}", "0" * 64
        bucket.files[f"{entry}/model-00002.safetensors"] = b"stray"
        bucket.hashes[f"{entry}/model-00002.safetensors"] = "1" * 64
        bucket.batches.clear()
        failing(hub, lambda: publish(hub, tmp_path), fault, at)
        if len(hub.requests) < at:
            break
        assert whole(hub, files) or not bucket.batches
        publish(hub, tmp_path)
        assert held(hub) == files
    assert bucket.batches == [
        [f"-{entry}/manifest.json"],
        [f"+{entry}/state.json", f"-{entry}/model-00002.safetensors"],
        [f"+{entry}/manifest.json"],
    ]


def test_another_machines_checkpoint_stays(hub, kept, tmp_path):
    publish(hub, kept)
    there = dict(held(hub))
    put(tmp_path, 20, 7.0)
    assert publish(hub, tmp_path) == {"step-00000020": "another"}
    assert held(hub) == there


def test_what_arrived_otherwise_is_said_and_gets_no_manifest(hub, kept, monkeypatch):
    send = HfApi.batch_bucket_files

    def damaging(api, bucket, **operations):
        send(api, bucket, **operations)
        hub.buckets[bucket].hashes[f"{FINGERPRINT}/step-00000010/slices.json"] = "0" * 64

    monkeypatch.setattr(HfApi, "batch_bucket_files", damaging)
    with pytest.raises(ConnectionError, match=r"step-00000010/slices\.json is not as it was sent"):
        publish(hub, kept)
    assert not [name for name in held(hub) if name.endswith("manifest.json")]


def test_a_public_bucket_is_refused_unless_it_is_meant(hub, kept):
    hub.buckets[_BUCKET] = Bucket(private=False)
    with pytest.raises(UserError, match=r"is public, and publish\.private is true"):
        publish(hub, kept)
    assert held(hub) == {}
    publish(hub, kept, private=False)
    assert held(hub) == expected(kept)


def test_a_token_that_may_only_read_is_told(hub, kept, monkeypatch):
    hub.buckets[_BUCKET] = Bucket(private=True)
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    with pytest.raises(UserError, match=rf"publish.checkpoints={_BUCKET}: .*403"):
        publish(hub, kept)
    assert held(hub) == {}


def named(name, text="x"):
    def change(folder):
        (folder / name).write_text(text)

    return change


def state(**changes):
    def change(folder):
        path = folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (named("optimizer.pt"), "code and formats that can run code"),
        (named("notes.txt"), "not on the list"),
        (named("sub-00000.safetensors"), "not on the list"),
        (state(code="hf_" + "aB3" * 12), "looks like a Hugging Face token"),
        (state(code="q7Zr2LmX9vKp4TnB8sWd3FhJ6cYg1RaE5uQo"), "random-looking"),
        (state(auto_map={}), "auto_map"),
    ],
)
def test_what_has_no_place_in_a_checkpoint_stays_here(change, reason, tmp_path):
    folder = put(tmp_path, 10)
    change(folder)
    with pytest.raises(UserError, match=reason):
        inspect_checkpoint(folder)


def test_a_damaged_checkpoint_is_named_before_anything_is_asked_of_the_hub(hub, kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    path = folder / "step-00000010" / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model-00001\.safetensors: damaged"):
        publish(hub, folder)
    assert hub.requests == []


def test_a_download_has_equal_bytes_and_loads(hub, kept, tmp_path):
    publish(hub, kept)
    api = HfApi(endpoint=hub.url, token=hub.read_token)
    api.sync_bucket(f"hf://buckets/{_BUCKET}/{FINGERPRINT}", str(tmp_path / "back"), quiet=True)
    assert local_files(tmp_path / "back") == local_files(kept)
    found = open_checkpoint(tmp_path / "back" / "step-00000020")
    assert found.kinds == sorted(simple(0)) and value_of(found) == 20


def test_checkpoints_of_a_run_pass_the_gate_and_are_converted_where_they_were_not_made(hub, tmp_path):
    """Real state: the numbers of random generators look like keys."""
    settings = [
        "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
        "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "evaluate.tasks=[]", "recipe.tokens=2560",
        "recipe.extensions=[]", "recipe.sequence_length=16", "recipe.batch_sequences=8", "recipe.batch_ramp=null",
        "checkpoint.interval=10", "checkpoint.keep=9", "train.validate_every=20", "launch.threads=1",
        "launch.device=cpu",
    ]  # fmt: skip
    words = tokenized(tmp_path, settings)
    assert main(pretrain.DOOR, words) == 0
    config = load(words)
    run = places(config, known_lock(config).hash)["pretrain"].folder
    publish(hub, run / "checkpoints")
    there = local_files(run / "checkpoints")
    assert {name.split("/")[0] for name in there} == {"step-00000010", "step-00000020"}
    shutil.rmtree(run / "checkpoints")
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.sync_bucket(f"hf://buckets/{_BUCKET}/{FINGERPRINT}", str(run / "checkpoints"), quiet=True)
    assert local_files(run / "checkpoints") == there
    assert main(convert.DOOR, [*words, "convert.step=10"]) == 0
