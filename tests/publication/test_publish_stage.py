"""The publish stage: what a dry run lists, what may be pushed from uncommitted code, what is said of the Hub."""

import json
import shutil
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.stages import provenance, publish
from headrace.stages.places import Place, places
from headrace.stages.run import Door, Outcome, Run, main
from publication.publication_fixtures import card_facts, local_files, model_folder
from saved import put

STAGES = ("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate")
CLEAN, DIRTY = ({"commit": "abc", "dirty": dirty, "diff": None} for dirty in (False, True))
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


def parent(run: Run) -> Outcome:
    """What publish reads of the stages before it, in small."""
    if run.place.stage == "convert":
        model_folder(run.output)
        (run.output / "manifest.json").unlink()  # the run writes its own
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


def test_a_dry_run_lists_every_file_that_would_go_out_with_its_size(stage, capfd):
    assert stage.run("publish.kernels=me") == 0
    shown = [line.split() for line in capfd.readouterr().err.splitlines() if line.startswith("  ")]
    artifact = stage.place("publish", "publish.kernels=me").artifact
    files = {name: data for name, data in local_files(artifact).items() if name.startswith(("repository/", "kernels/"))}
    assert {name: int(size.replace(",", "")) for size, name in shown} == {n: len(data) for n, data in files.items()}
    assert len(shown) == len(files) > len(stage.told("publish.kernels=me")["files"])
    assert "repository/headrace.json" in files and "kernels/headrace-fp8-gemm/LICENSE" in files


def dirty(stage: Publishing, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "now":
        monkeypatch.setattr(provenance, "code_version", lambda: DIRTY)
    else:
        path = stage.place("pretrain").folder / "provenance.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"code": DIRTY}))


@pytest.mark.parametrize("where", ["now", "in training"])
@pytest.mark.parametrize("push", ["repo_id", "dataset", "cache"])
def test_no_push_from_uncommitted_code_by_default(push, where, stage, hub, monkeypatch, capfd):
    dirty(stage, where, monkeypatch)
    assert stage.run(f"publish.{push}=me/it") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"headrace publish: publish.{push}=me/it: ") and "publish.allow_dirty=true" in line
    assert hub.requests == [] and not stage.place("publish", f"publish.{push}=me/it").artifact.exists()


@pytest.mark.parametrize("where", ["now", "in training"])
def test_uncommitted_code_makes_a_local_folder_and_pushes_where_allowed(where, stage, hub, monkeypatch):
    dirty(stage, where, monkeypatch)
    assert stage.run() == 0 and hub.requests == []
    assert stage.run("publish.repo_id=me/it", "publish.allow_dirty=true") == 0
    told = stage.told("publish.repo_id=me/it", "publish.allow_dirty=true")
    assert hub.repositories["me/it"].tags == {told["tag"]: told["commit"]}


def test_clean_code_is_pushed_and_a_fingerprint_that_is_there_is_said_to_be(stage, hub, capfd, monkeypatch):
    assert stage.run("publish.repo_id=me/it") == 0
    first, shown = stage.told("publish.repo_id=me/it"), capfd.readouterr().err
    assert f"at {first['tag']}" in shown and "nothing to do" not in shown
    assert not [line for line in shown.splitlines() if line.strip().endswith("headrace.json")], "no dry run"
    (messages,) = [list(one.messages) for one in hub.repositories.values()]
    shutil.rmtree(stage.place("publish", "publish.repo_id=me/it").folder)
    monkeypatch.setattr(
        publish, "card_facts", lambda run: card_facts(fingerprint=run.place.fingerprint, seconds=99.0)
    )  # as another machine would have measured
    assert stage.run("publish.repo_id=me/it") == 0
    assert "which holds this fingerprint already: nothing to do" in capfd.readouterr().err
    again = stage.told("publish.repo_id=me/it")
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
    shown = [line.split() for line in capfd.readouterr().err.splitlines() if line.startswith("  ")]
    listed = {name: int(size.replace(",", "")) for size, name in shown if name.startswith("checkpoints/")}
    assert listed == {name: len(data) for name, data in files.items()} and hub.requests == []
    assert stage.told(*wanted)["checkpoints"] == {}
    wanted.append("publish.repo_id=me/it")
    assert stage.run(*wanted) == 0
    assert "; 2 of 2 checkpoints new in me/kept" in capfd.readouterr().err
    assert stage.told(*wanted)["checkpoints"] == {"step-00000010": "pushed", "step-00000020": "pushed"}
    there = {f"{trained.fingerprint}{name.removeprefix('checkpoints')}": data for name, data in files.items()}
    assert hub.buckets["me/kept"].files == there
