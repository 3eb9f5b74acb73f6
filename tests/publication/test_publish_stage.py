"""The publish stage: what a dry run lists, code from which nothing is pushed, what is said of the Hub and to others."""

import json
import shutil
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.stages import provenance, publish
from headrace.stages.places import Place, places
from headrace.stages.report import _publication
from headrace.stages.run import Door, Outcome, Run, main
from publication.publication_fixtures import card_facts, local_files, model_folder, token_shards
from saved import put

STAGES = ("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate")
CLEAN, DIRTY = ({"commit": "abc", "dirty": dirty, "diff": None} for dirty in (False, True))
UNKNOWN = CLEAN | {"commit": None}
PUSH = "publish.push=true"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


def parent(run: Run) -> Outcome:
    """What publish reads of the stages before it, in small."""
    if run.place.stage == "convert":
        model_folder(run.output)
        (run.output / "manifest.json").unlink()  # the run writes its own
    elif run.place.stage == "tokenize":
        token_shards(run.output)
    elif run.place.stage == "corpus":
        counted = {run.config.corpus.paths[0]: {"documents": 1, "bytes": 10}}
        (run.output / "corpus.json").write_text(json.dumps({"splits": {"train": {"sources": counted}}}))
    else:
        (run.output / "results.json").write_text("{}")
    return Outcome("made", {})


@pytest.fixture(name="finished", scope="module")
def _finished(tmp_path_factory):
    """A run whose stages up to publish are finished, and its settings."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("some text\n" * 50)
    words = ["experiment=tiny", "tracking=disabled", "corpus=files", f"corpus.paths=[{folder / 'text.txt'}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "code_version", lambda: CLEAN)
        assert {main(Door(stage, parent), [*words, f"paths.results={folder / 'results'}"]) for stage in STAGES} == {0}
    return folder / "results", words


class Publishing:
    """The stage in a results folder of its own."""

    def __init__(self, results: Path, words: list[str]) -> None:
        self.results, self.words = results, [*words, f"paths.results={results}"]

    def place(self, stage: str, *settings: str) -> Place:
        config = load([*self.words, *settings])
        return places(config, known_lock(config).hash)[stage]

    def run(self, *settings: str) -> int:
        return main(publish.DOOR, [*self.words, *settings])

    def told(self, *settings: str) -> dict[str, object]:
        return json.loads((self.place("publish", *settings).artifact / "publication.json").read_text())


@pytest.fixture(name="stage")
def _stage(finished, tmp_path, monkeypatch):
    results, words = finished
    monkeypatch.setattr(provenance, "code_version", lambda: CLEAN)
    monkeypatch.setattr(publish, "card_facts", lambda run: card_facts(fingerprint=run.place.fingerprint))
    return Publishing(Path(shutil.copytree(results, tmp_path / "results", symlinks=True)), words)


def listed(shown: str) -> dict[str, int]:
    lines = [line.split() for line in shown.splitlines() if line.startswith("  ")]
    found = {name: int(size.replace(",", "")) for size, name in lines}
    assert len(found) == len(lines)
    return found


def sizes(files: dict[str, bytes], below: str = "") -> dict[str, int]:
    return {f"{below}{name}": len(data) for name, data in files.items()}


def test_a_dry_run_lists_every_file_that_would_go_out_with_its_size(stage, capfd):
    assert stage.run("publish.kernels=me") == 0
    artifact = stage.place("publish", "publish.kernels=me").artifact
    files = {name: data for name, data in local_files(artifact).items() if name.startswith(("repository/", "kernels/"))}
    shown = listed(capfd.readouterr().err)
    assert shown == sizes(files)
    assert len(shown) > len(stage.told("publish.kernels=me")["files"])
    assert "repository/headrace.json" in files and "kernels/headrace-fp8-gemm/LICENSE" in files


def on_the_hub(hub, name):
    repository = hub.repositories[name]
    files = {path: blob.data for path, blob in repository.commits[repository.head].items()}
    files.pop(".gitattributes")
    return files


@pytest.mark.parametrize("view", ["arrow", "megatron"])
def test_without_a_go_ahead_nothing_is_sent_and_with_it_the_very_files_that_were_listed(view, stage, hub, capfd):
    named = ["repo_id=me/it", "dataset=me/tokens", f"dataset_view={view}", "cache=me/cache", "kernels=me"]
    words = [f"publish.{word}" for word in named]
    assert stage.run(*words) == 0
    shown, told = capfd.readouterr().err, stage.told(*words)
    assert "nothing is sent without publish.push=true" in shown and hub.requests == []
    assert (told["repo_id"], told["commit"], told["dataset"]["commit"]) == ("me/it", None, None)
    artifact = stage.place("publish", *words).artifact
    assert _publication(artifact, load(words)).repository is None, "in the report"
    assert sorted(told["dataset"]["files"]) == sorted(local_files(artifact / "dataset"))
    before = {one: local_files(artifact / one) for one in ("dataset", "repository")}

    assert stage.run(*words, PUSH) == 0
    assert f"; tokens in me/tokens at {stage.told(*words, PUSH)['dataset']['tag']}" in capfd.readouterr().err
    assert _publication(stage.place("publish", *words, PUSH).artifact, load(words)).repository == "me/it"
    sent = sizes(on_the_hub(hub, "me/it"), "repository/") | sizes(on_the_hub(hub, "datasets/me/tokens"), "dataset/")
    sent |= sizes(on_the_hub(hub, "datasets/me/cache"), "cache/")
    assert {name: size for name, size in listed(shown).items() if not name.startswith("kernels/")} == sent
    assert on_the_hub(hub, "datasets/me/tokens") == before["dataset"]
    assert not (stage.place("publish", *words, PUSH).artifact / "dataset").exists(), "as large as the tokens"
    assert {name for name in hub.repositories if name.startswith("kernels/")} == {
        f"kernels/{one['repo_id']}" for one in told["kernels"]
    }


@pytest.mark.parametrize("target", ["dataset=me/tokens", "cache=me/cache", "kernels=me"])
def test_each_goes_out_without_the_others(target, stage, hub):
    assert stage.run(f"publish.{target}", PUSH) == 0
    name = target.partition("=")[2]
    assert hub.repositories and all(name in there for there in hub.repositories)
    assert stage.told(f"publish.{target}", PUSH)["commit"] is None


def test_no_push_of_nothing(stage, capfd):
    assert stage.run(PUSH) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "publish.push=true has nothing to send" in line


def test_a_data_set_is_not_sent_again_where_only_other_things_changed(stage, hub):
    words = ["publish.dataset=me/tokens", PUSH]
    assert stage.run(*words) == 0
    pulls = hub.repositories["datasets/me/tokens"].pulls
    assert main(Door("evaluate", parent), [*stage.words, "evaluate.items=3"]) == 0
    words.append("evaluate.items=3")
    assert stage.run(*words) == 0
    assert not stage.told(*words)["dataset"]["changed"] and len(pulls) == 1
    words.append("publish.dataset_view=megatron")
    assert stage.run(*words) == 0
    assert stage.told(*words)["dataset"]["changed"] and len(pulls) == 2


def test_what_others_read_names_no_folder_of_this_machine_and_no_push(stage, hub, finished, monkeypatch):
    monkeypatch.setattr(publish, "card_facts", lambda run: card_facts(command=publish._shared_command(run)))
    words = ["publish.dataset=me/tokens", "publish.dataset_view=megatron", "publish.repo_id=me/it", PUSH]
    assert stage.run(*words) == 0
    for name in ("me/it", "datasets/me/tokens"):
        files = on_the_hub(hub, name)
        assert [file for file, data in files.items() if str(finished[0].parent).encode() in data] == []
        card = files["README.md"].decode()
        assert "corpus.paths=[text.txt] publish.dataset=me/tokens" in card and "publish.push" not in card
    assert "| text.txt | not declared | 1 | 10 |" in card


def made_by(stage: Publishing, where: str, code: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "now":
        monkeypatch.setattr(provenance, "code_version", lambda: code)
    else:
        path = stage.place(where).folder / "provenance.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": code}))


PUSHES = [(target, where) for target in ("repo_id", "dataset", "cache") for where in ("now", "pretrain")]
PUSHES += [("repo_id", stage) for stage in STAGES if stage != "pretrain"]


@pytest.mark.parametrize(("code", "words"), [(DIRTY, "has uncommitted changes"), (UNKNOWN, "is of an unknown commit")])
@pytest.mark.parametrize(("target", "where"), PUSHES)
def test_no_push_of_what_other_than_committed_code_made_by_default(
    target, where, code, words, stage, hub, monkeypatch, capfd
):
    made_by(stage, where, code, monkeypatch)
    assert stage.run(f"publish.{target}=me/it", PUSH) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("headrace publish: publish.push=true: the code ") and words in line
    assert "publish.allow_dirty=true" in line and (where == "now" or f"/{where}/" in line)
    assert hub.requests == [] and not stage.place("publish", f"publish.{target}=me/it", PUSH).artifact.exists()


def test_the_run_that_weights_went_on_from_counts_too(stage, hub, monkeypatch, capfd):
    before = stage.place("pretrain").folder
    words = ["publish.repo_id=me/it", f"train.from={before.name}@0"]
    made = [main(Door(later, parent), [*stage.words, *words]) for later in ("pretrain", "convert", "evaluate")]
    made_by(stage, "pretrain", DIRTY, monkeypatch)
    capfd.readouterr()
    assert made == [0, 0, 0] and stage.run(*words, PUSH) == 2
    assert f"the code that made {before} has uncommitted changes" in capfd.readouterr().err
    moved = before.rename(before.with_name("moved"))
    assert stage.run(*words, PUSH) == 2 and hub.requests == []
    assert f"the code that made {before} is unknown, since nothing there tells" in capfd.readouterr().err
    moved.rename(before)
    made_by(stage, "pretrain", CLEAN, monkeypatch)
    assert stage.run(*words, PUSH) == 0


@pytest.mark.parametrize("code", [DIRTY, UNKNOWN])
@pytest.mark.parametrize("where", ["now", "pretrain", "corpus"])
def test_other_code_makes_a_local_folder_and_pushes_where_allowed(where, code, stage, hub, monkeypatch):
    made_by(stage, where, code, monkeypatch)
    assert stage.run() == stage.run("publish.repo_id=me/it") == 0 and hub.requests == []
    assert stage.run("publish.repo_id=me/it", PUSH, "publish.allow_dirty=true") == 0
    told = stage.told("publish.repo_id=me/it", PUSH, "publish.allow_dirty=true")
    assert hub.repositories["me/it"].tags == {told["tag"]: told["commit"]}


def test_what_was_fetched_from_a_cache_goes_out_with_the_code_that_made_it(stage, hub, tmp_path, monkeypatch):
    assert stage.run("publish.cache=me/cache", PUSH) == 0
    other = Publishing(tmp_path / "other", [*stage.words[:-1], "launch.fetch=me/cache"])
    monkeypatch.setattr(provenance, "code_version", lambda: UNKNOWN)
    assert {main(Door(name, parent), other.words) for name in STAGES} == {0}
    assert other.run("publish.repo_id=me/it", PUSH) == 2, "the code at work"
    monkeypatch.setattr(provenance, "code_version", lambda: CLEAN)
    assert other.run("publish.repo_id=me/it", PUSH) == 0


def test_clean_code_is_pushed_and_a_fingerprint_that_is_there_is_said_to_be(stage, hub, capfd, monkeypatch):
    assert stage.run("publish.repo_id=me/it", PUSH) == 0
    first, shown = stage.told("publish.repo_id=me/it", PUSH), capfd.readouterr().err
    assert f"at {first['tag']}" in shown and "nothing to do" not in shown
    assert not [line for line in shown.splitlines() if line.strip().endswith("headrace.json")], "no dry run"
    (messages,) = [list(one.messages) for one in hub.repositories.values()]
    shutil.rmtree(stage.place("publish", "publish.repo_id=me/it", PUSH).folder)
    monkeypatch.setattr(
        publish, "card_facts", lambda run: card_facts(fingerprint=run.place.fingerprint, seconds=99.0)
    )  # as another machine would have measured
    assert stage.run("publish.repo_id=me/it", PUSH) == 0
    assert "which holds this fingerprint already: nothing to do" in capfd.readouterr().err
    again = stage.told("publish.repo_id=me/it", PUSH)
    assert again == first | {"changed": False} and hub.repositories["me/it"].messages == messages


def test_kept_checkpoints_are_listed_by_a_dry_run_and_pushed_with_the_model(stage, hub, capfd):
    wanted = ["publish.checkpoints=me/kept"]
    assert stage.run(*wanted) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "publish.checkpoints=me/kept: " in line and "holds none" in line
    trained = stage.place("pretrain")
    for step in (10, 20):
        put(trained.folder / "checkpoints", step)
    files = {name: data for name, data in local_files(trained.folder).items() if name.startswith("checkpoints/")}
    assert stage.run(*wanted) == 0
    shown = {name: size for name, size in listed(capfd.readouterr().err).items() if name.startswith("checkpoints/")}
    assert shown == sizes(files) and hub.requests == []
    assert stage.told(*wanted)["checkpoints"] == {}
    wanted += ["publish.repo_id=me/it", PUSH]
    assert stage.run(*wanted) == 0
    assert "; 2 of 2 checkpoints new in me/kept" in capfd.readouterr().err
    assert stage.told(*wanted)["checkpoints"] == {"step-00000010": "pushed", "step-00000020": "pushed"}
    there = {f"{trained.fingerprint}{name.removeprefix('checkpoints')}": data for name, data in files.items()}
    assert hub.buckets["me/kept"].files == there
