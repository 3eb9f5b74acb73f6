"""The gather: it reads no shard again and takes only what records name; a damaged shard is named and made anew."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest

from headrace.artifacts import manifest as manifests
from headrace.artifacts.manifest import FileEntry
from headrace.config.compose import load
from headrace.corpus.selection import Selection
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.stages import corpus, tokenize, tokenize_plan, tokenize_shards, tokenizer
from headrace.stages.batches import Job
from headrace.stages.lease import Lease
from headrace.stages.places import Place, places
from headrace.stages.run import main, open_log
from headrace.stages.token_units import planned, shard_folder
from headrace.tokens import shards as shards_module
from headrace.tokens.loader import TokenDataset
from headrace.training.rows import training_batches
from small_corpus import write_texts

SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16",
    "recipe.batch_sequences=8", "recipe.batch_ramp=null", f"recipe.tokens={128 * 30}", "recipe.extensions=[]",
    "launch.shards_per_job=4",
)  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_texts(tmp_path)
    return prepared(tmp_path)


def prepared(folder: Path) -> list[str]:
    """A corpus and a tokenizer that are finished, and a plan."""
    source = f"corpus.sources=[{{name: web, paths: [{folder}/texts], text_field: text}}]"
    words = [*SMALL, source, "recipe.mixture=[{since: 0, weights: {web: 1}}]", f"paths.results={folder}/results"]
    assert [main(stage.DOOR, words) for stage in (corpus, tokenizer)] == [0, 0]
    assert tokenize_plan.BATCHES.main(["00000", *words]) == 0
    return words


def place_of(words: list[str]) -> Place:
    config = load(words)
    return places(config, known_lock(config).hash)["tokenize"]


def make_all(words: list[str]) -> None:
    assert [tokenize_shards.BATCHES.main([batch, *words]) for batch in ("00000", "00001")] == [0, 0]


def test_the_gather_reads_no_shard_and_takes_what_records_name(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_all(words)
    place, hashed = place_of(words), []
    shards = shard_folder(place.folder)
    recorded = sorted(path.name for path in shards.iterdir())
    for stray in (".web.train-00000-of-00003.bin.0123abcd.tmp", "train-00000-of-00009.bin"):
        (shards / stray).write_bytes(b"of another process")
    hash_file = manifests.hash_file
    monkeypatch.setattr(manifests, "hash_file", lambda path, *how: (hashed.append(path.name), hash_file(path, *how))[1])
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "describe", None)
        assert main(tokenize.DOOR, words) == 0
    manifest = manifests.read(place.artifact)
    assert sorted(manifest.files) == sorted([*recorded, "dataset.json", "tokenizer.json"])
    described = json.loads((place.artifact / "dataset.json").read_text())
    assert described["tokenizer"] == hash_file(place.artifact / "tokenizer.json", "sha256")
    assert [name for name in hashed if name in recorded and not name.endswith(".json")] == []
    for name, entry in manifest.files.items():
        path = place.artifact / name
        assert entry == FileEntry(path.stat().st_size, hash_file(path, "xxh3"))
    manifests.verify(place.artifact)


def test_the_selection_is_opened_once_for_all_units(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    init = Selection.__init__
    monkeypatch.setattr(Selection, "__init__", lambda self, *given: (opened.append(given), init(self, *given))[1])
    assert main(tokenize.DOOR, words) == 0  # it makes all shards
    assert len(opened) == 1
    assert len(list(shard_folder(place_of(words).folder).glob("web.train-*.bin"))) == 3


def test_a_damaged_shard_is_named_and_made_anew_once_the_result_is_taken_away(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(words)
    place = place_of(words)
    path = next(shard_folder(place.folder).glob("web.train-00001-*.bin"))
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert main(tokenize.DOOR, words) == 0
    with pytest.raises(UserError, match=rf"{path.name}: damaged"):
        TokenDataset(place.artifact).verify()
    assert main(tokenize.DOOR, words) == 2
    assert f"{path.name}: damaged" in capsys.readouterr().err
    shutil.rmtree(place.artifact)
    place.done.unlink()
    assert main(tokenize.DOOR, words) == 0
    manifests.verify(place.artifact)
    assert (place.artifact / path.name).read_bytes() == whole


def test_a_shard_that_another_process_is_making_is_waited_for(words: list[str]) -> None:
    config = load(words)
    lock = known_lock(config)
    found = places(config, lock.hash)
    place, inputs = found["tokenize"], {name: found[name].artifact for name in ("corpus", "tokenizer")}
    (unit, *_) = planned(place.folder, inputs["corpus"], inputs["tokenizer"], lock, config)
    job = Job("tokenize", config, lock, place, inputs, open_log(place.folder / "log.txt", "info"))
    lease = Lease(place.folder, f"shard-{unit.name}")
    assert lease.try_acquire() is None
    lines: list[str] = []
    making = threading.Thread(target=lambda: lines.extend(tokenize_shards.make_shards(job, [unit])), daemon=True)
    making.start()
    making.join(1.5)
    assert making.is_alive() and not list(shard_folder(place.folder).iterdir())
    lease.release()
    making.join(60)
    assert len(lines) == 1 and not list(place.folder.glob("shard-*.json"))


def test_a_job_tells_its_speed_and_what_the_corpus_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path)
    (tmp_path / "texts" / "again.txt").write_text((tmp_path / "texts" / "3.txt").read_text())
    words = prepared(tmp_path)
    assert "  left out: 1 exact duplicate" in capsys.readouterr().err
    make_all(words)
    told = (
        r"tokenize_shards 00000: tokens ([\d,]+) of \1 \(100 %\), \d+ documents, [\d,]+ tokens/s, the corpus left out: "
    )
    assert re.search(told + "1 exact duplicate", capsys.readouterr().err)
    assert main(tokenize.DOOR, words) == 0  # makes none, so there is no speed
    found = r"tokenize: tokens ([\d,]+) of \1 \(100 %\), 20 documents, the corpus left out: 1 exact duplicate"
    assert re.search(found, capsys.readouterr().err)


def test_a_mixture_of_one_named_source(words: list[str]) -> None:
    assert main(tokenize.DOOR, words) == 0
    place, config = place_of(words), load(words)
    description = json.loads((place.artifact / "dataset.json").read_text())
    assert {shard["source"] for shard in description["splits"]["train"]["shards"]} == {"web"}
    batch = training_batches(TokenDataset(place.artifact), config, config.recipe.sequence_length, 1).batch(0, 4)
    assert batch.shape == (4, config.recipe.sequence_length + 1)
