"""The Hub as a cache of stages: whole folders by fingerprint, found again; stages that are fetched in place of run."""

import json
import shutil
from functools import cached_property
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from headrace.artifacts import manifest as manifests
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.publication.cache import fetch, store
from headrace.stages import corpus_scans
from headrace.stages.cache import files_of, take
from headrace.stages.places import Place, places
from headrace.stages.run import Door, Outcome, Run, main
from loopback_hub import CUT, HALF, LOST
from publication.publication_fixtures import local_files

_REPO = "me/cache"
_REMOTE = f"datasets/{_REPO}"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("some text\n" * 50)
    return ["experiment=tiny", "tracking=disabled", "corpus=files", f"corpus.paths=[{text}]"]


class Machine:
    """A results folder of its own, as on another machine, and stages that say whether they were run."""

    def __init__(self, words: list[str], results: Path) -> None:
        self.words, self.results, self.ran = [*words, f"paths.results={results}"], results, []

    def run(self, stage: str, content: str = "result") -> int:
        def body(run: Run) -> Outcome:
            self.ran.append(stage)
            for parent in run.parents:
                run.input(parent)
            (run.output / "part").mkdir()
            (run.output / "part" / "result.txt").write_text(content)
            (run.output / "weights.safetensors").write_bytes(bytes(range(256)) * 64)
            return Outcome("made", {"files": 2})

        return main(Door(stage, body), self.words)

    @cached_property
    def places(self) -> dict[str, Place]:
        config = load(self.words)
        return places(config, known_lock(config).hash)

    def place(self, stage: str) -> Place:
        return self.places[stage]

    def push(self, stage: str) -> str:
        place = self.place(stage)
        files = files_of(place, manifests.verify(place.artifact))
        return store(_REPO, f"{stage}/{place.fingerprint}", files)


@pytest.fixture(scope="module")
def first(words, tmp_path_factory):
    """Has made two stages; tests only read what it holds."""
    machine = Machine(words, tmp_path_factory.mktemp("first"))
    assert machine.run("corpus") == machine.run("tokenizer") == 0
    return machine


@pytest.fixture
def second(words, tmp_path):
    return Machine([*words, f"launch.fetch={_REPO}"], tmp_path / "second")


def remote(hub, prefix):
    repository = hub.repositories[_REMOTE]
    files = repository.commits[repository.head]
    return {path.removeprefix(prefix): blob.data for path, blob in files.items() if path.startswith(prefix)}


def change(hub, path, data):
    """A commit of somebody who may write there; None deletes."""
    operation = CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data)
    HfApi(endpoint=hub.url, token=hub.token).create_commit(
        _REPO, [operation], commit_message="other", repo_type="dataset"
    )


def test_an_artifact_is_one_commit_in_a_private_repository_and_pushed_once(hub, first):
    assert first.push("corpus") == "pushed"
    repository, place = hub.repositories[_REMOTE], first.place("corpus")
    entry = f"corpus/{place.fingerprint}"
    assert repository.private and repository.messages == ["initial", entry]
    expected = {f"artifact/{name}": data for name, data in local_files(place.artifact).items()}
    expected["provenance.json"] = (place.folder / "provenance.json").read_bytes()
    assert remote(hub, f"{entry}/") == expected
    assert first.push("corpus") == "there"
    assert first.push("tokenizer") == "pushed"
    assert len(repository.messages) == 3


def test_a_stage_that_is_there_is_fetched_and_not_run(hub, first, second, capsys):
    assert first.push("corpus") == first.push("tokenizer") == "pushed"
    capsys.readouterr()
    assert second.run("corpus") == second.run("tokenizer") == 0
    assert second.ran == []
    for stage in ("corpus", "tokenizer"):
        here, there = second.place(stage), first.place(stage)
        assert here.fingerprint == there.fingerprint
        assert local_files(here.artifact) == local_files(there.artifact)
        assert here.done.read_text() == manifests.verify(here.artifact).hash + "\n"
        made, told = (json.loads((place.folder / "provenance.json").read_text()) for place in (there, here))
        assert told == {**made, "fetched": _REPO}
        assert not (here.folder / "fetched.partial").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "fetched from" in line]
    assert [line.split()[0] for line in said] == ["corpus", "tokenizer"]
    asked = len(hub.requests)
    assert second.run("corpus") == 0  # a finished stage asks nobody
    assert len(hub.requests) == asked
    assert second.push("corpus") == "there"  # and what was fetched is not sent back


def test_jobs_of_a_stage_that_is_there_have_nothing_to_do(hub, first, second, capsys):
    assert first.push("corpus") == "pushed"
    capsys.readouterr()
    place = second.place("corpus")
    for _ in range(2):
        assert corpus_scans.BATCHES.main(["00000", *second.words]) == 0
    assert capsys.readouterr().err.count("fetched from") == 1
    assert local_files(place.artifact) == local_files(first.place("corpus").artifact)
    assert next(place.folder.glob("corpus_scans.*.batches/00000.done")).read_text() == "the stage's artifact is there\n"
    assert not corpus_scans.scan_folder(place.folder).exists()
    assert corpus_scans.BATCHES.main(["../../../out", *second.words]) == 2
    assert not list(second.results.rglob("out*"))
    assert second.run("corpus") == 0
    assert second.ran == []
    assert place.done.exists()


def test_jobs_of_a_stage_that_is_not_there_work(hub, second, capsys):
    assert corpus_scans.BATCHES.main(["00000", *second.words]) == 0
    place = second.place("corpus")
    assert list(corpus_scans.scan_folder(place.folder).glob("*.parquet"))
    assert not place.artifact.exists()
    assert capsys.readouterr().err.count("so it runs") == 1


def test_what_is_not_there_is_run(hub, second, capsys):
    assert second.run("corpus") == 0
    assert second.ran == ["corpus"]
    assert capsys.readouterr().err.count("so it runs") == 1


def test_without_a_network_the_stage_runs_and_says_so_once(hub, first, second, monkeypatch, capsys):
    assert first.push("corpus") == "pushed"
    capsys.readouterr()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert second.run("corpus") == 0
    assert second.ran == ["corpus"]
    assert capsys.readouterr().err.count("so it runs") == 1


def flipped(data: bytes) -> bytes:
    return data[:9] + bytes([data[9] ^ 1]) + data[10:]


def forged(data: bytes) -> bytes:
    """A manifest whose text was edited, as by someone who does not know how it is hashed."""
    return data.replace(b'"files"', b'"filez"', 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("artifact/part/result.txt", lambda data: data.replace(b"result", b"resulT")),
        ("artifact/part/result.txt", lambda data: data + b"more"),
        ("artifact/part/result.txt", lambda data: None),
        ("artifact/weights.safetensors", flipped),
        ("artifact/weights.safetensors", lambda data: data[:-1]),
        ("artifact/manifest.json", forged),
        ("artifact/manifest.json", lambda data: None),
        ("artifact/extra.py", lambda data: b"print()"),
        ("artifact/.hidden", lambda data: b"x"),
        ("provenance.json", lambda data: None),
        ("provenance.json", lambda data: data[: len(data) // 2]),
        ("provenance.json", lambda data: b"[]"),
    ],
)
def test_damage_there_is_never_taken_and_the_next_push_mends_it_or_leaves_it(name, damage, hub, first, second, capsys):
    first.push("corpus")
    entry = f"corpus/{first.place('corpus').fingerprint}"
    whole = remote(hub, f"{entry}/")
    change(hub, f"{entry}/{name}", damage(whole.get(name, b"")))
    capsys.readouterr()
    assert second.run("corpus", content="own") == 0
    assert second.ran == ["corpus"]
    assert (second.place("corpus").artifact / "part" / "result.txt").read_text() == "own"
    assert not (second.place("corpus").folder / "fetched.partial").exists()
    assert capsys.readouterr().err.count("so it runs") == 1
    told = first.push("corpus")
    if name.endswith("manifest.json") and damage(whole[name]) is not None:
        assert told == "another"  # what cannot be read may be of a later version
    elif name == "provenance.json" and damage(whole[name]) is not None:
        assert told == "there"
    else:
        assert told == "pushed" and remote(hub, f"{entry}/") == whole


def test_an_artifact_of_another_stage_or_version_is_not_taken(hub, first, second):
    """Both are whole; only their producer says whose they are."""
    place = first.place("tokenizer")
    files = files_of(place, manifests.verify(place.artifact))
    assert store(_REPO, f"corpus/{first.place('corpus').fingerprint}", files) == "pushed"
    assert second.run("corpus") == 0
    assert second.ran == ["corpus"]


def test_an_artifact_made_from_another_parent_than_the_one_here_is_not_taken(hub, first, second, capsys):
    assert first.push("tokenizer") == "pushed"
    assert second.run("corpus", content="bytes that differ under the same fingerprint") == 0
    assert second.run("tokenizer") == 0
    assert second.ran == ["corpus", "tokenizer"]
    assert "another corpus" in capsys.readouterr().err


def test_the_result_that_came_first_stays(hub, first, second):
    assert second.run("corpus", content="other") == 0
    assert first.push("corpus") == "pushed"
    assert second.push("corpus") == "another"
    place = first.place("corpus")
    assert remote(hub, f"corpus/{place.fingerprint}/artifact/") == local_files(place.artifact)


def test_the_commit_of_another_in_between_is_waited_for(hub, first, monkeypatch):
    first.push("tokenizer")
    real = HfApi.create_commit

    def late(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", real)
        change(hub, "note.txt", b"mine")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    assert first.push("corpus") == "pushed"
    assert remote(hub, "note.txt") == {"": b"mine"}


def test_a_public_repository_is_refused(hub, first):
    HfApi(endpoint=hub.url, token=hub.token).create_repo(_REPO, private=False, repo_type="dataset")
    with pytest.raises(UserError, match=r"^publish\.cache=me/cache: is public[^\n]*$"):
        first.push("corpus")
    assert hub.repositories[_REMOTE].messages == ["initial"]


@pytest.mark.parametrize("fault", [401, 403, 412, 429, 500, CUT, LOST])
def test_a_push_that_fails_at_any_request_leaves_all_or_nothing_and_the_next_ends_it(fault, hub, first):
    entry, folder = f"corpus/{first.place('corpus').fingerprint}/", first.place("corpus").artifact
    whole = {f"artifact/{name}": data for name, data in local_files(folder).items()}
    for at in range(1, 100):
        hub.repositories.clear()
        hub.objects.clear()
        hub.requests.clear()
        hub.fail("*", "", fault, at=at)
        try:
            first.push("corpus")
        except (UserError, ConnectionError) as error:
            assert len(str(error).splitlines()) == 1
        if len(hub.requests) < at:
            hub.unfail()
            break
        there = remote(hub, entry) if _REMOTE in hub.repositories else {}
        assert not there or {name: there.get(name) for name in whole} == whole
        assert first.push("corpus") in ("pushed", "there")
        assert {name: data for name, data in remote(hub, entry).items() if name in whole} == whole
        assert hub.repositories[_REMOTE].messages == ["initial", entry.rstrip("/")]
    assert at > 6, "a push asks for more than that"


@pytest.mark.parametrize("fault", [401, 403, 429, 500, CUT, LOST, HALF])
def test_a_fetch_that_fails_at_any_request_takes_all_or_nothing(fault, hub, first, second):
    first.push("corpus")
    whole, place = local_files(first.place("corpus").artifact), second.place("corpus")
    for at in range(1, 100):
        shutil.rmtree(second.results, ignore_errors=True)
        place.folder.mkdir(parents=True)
        hub.requests.clear()
        hub.fail("*", "", fault, at=at)
        taken, line = take(_REPO, place, {})
        met = len(hub.requests) >= at
        hub.unfail()
        assert place.artifact.exists() == taken
        assert not taken or local_files(place.artifact) == whole
        assert len(line.splitlines()) == 1 and ("so it runs" in line) != taken
        if not met:
            break
    assert taken and at > 6


def test_a_name_that_is_no_plain_path_is_refused_before_anything_is_fetched(hub, first, tmp_path):
    first.push("corpus")
    repository, entry = hub.repositories[_REMOTE], f"corpus/{first.place('corpus').fingerprint}"
    files = repository.commits[repository.head]
    files[f"{entry}/artifact/../../../../escaped"] = next(iter(files.values()))
    with pytest.raises(UserError, match="name"):
        fetch(_REPO, entry, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "escaped").exists()
