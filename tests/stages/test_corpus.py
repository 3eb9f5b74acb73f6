"""The corpus stage: however often it is stopped, it goes on as long as it gets further."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig
from headrace.corpus import build, extract
from headrace.corpus.contamination import Item
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import Piece
from headrace.corpus.scan import Scanner
from headrace.corpus.selection import Selection
from headrace.corpus.sources import checked_lock
from headrace.launch.deadline import StopRequested
from headrace.stages import corpus_scans
from headrace.stages.attempts import LIMIT
from headrace.stages.corpus import DOOR, KEPT
from headrace.stages.lease import Lease
from headrace.stages.places import Place, places
from headrace.stages.run import main

FILES = 5


def place_of(words: list[str]) -> Place:
    config = load(words)
    return places(config, checked_lock(config, words)[0].hash)["corpus"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text").mkdir()
    for number in range(FILES):  # a piece each
        lines = "".join(f'{{"text": "line {line} of file {number}"}}\n' for line in range(50))
        (tmp_path / "text" / f"{number}.jsonl").write_text(lines)
    settings = ["experiment=tiny", "tracking=disabled", "corpus=files", "corpus.contamination_tasks=[]"]
    return [*settings, f"corpus.paths=[{tmp_path}/text]", f"paths.results={tmp_path}/results"]


def test_a_stage_that_gets_one_piece_further_each_time_is_not_stuck(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scanner.scan

    def scan_and_stop(self: Scanner, piece: Piece, folder: Path) -> Path:
        there = (folder / f"{piece.name}.parquet").exists()
        path = original(self, piece, folder)
        if not there:
            raise StopRequested("SIGTERM")
        return path

    monkeypatch.setattr(Scanner, "scan", scan_and_stop)
    assert [main(DOOR, words) for _ in range(FILES + 1)] == [75] * FILES + [0]


def test_a_stage_that_is_stopped_again_and_again_behind_its_scans_goes_on(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped as soon as the selection is there, and in each piece that text is extracted from."""
    selected: list[int] = []
    original, stops = build.select_corpus, list(range(FILES))
    monkeypatch.setattr(build, "select_corpus", lambda *a: (selected.append(1), original(*a))[1])
    read = extract.extract_piece

    def read_and_stop(selection: Selection, lock: Lock, config: CorpusConfig, piece: Piece) -> Iterator[Any]:
        if piece.number in stops[:1]:
            stops.pop(0)
            raise StopRequested("SIGTERM")
        yield from read(selection, lock, config, piece)

    monkeypatch.setattr(extract, "extract_piece", read_and_stop)
    assert FILES > LIMIT and [main(DOOR, words) for _ in range(FILES + 1)] == [75] * FILES + [0]
    assert selected == [1]
    place = place_of(words)
    made = {path.name: path.read_bytes() for path in place.artifact.iterdir()}
    monkeypatch.undo()
    other = [*words[:-1], f"paths.results={tmp_path}/undisturbed"]
    assert main(DOOR, other) == 0
    assert made == {path.name: path.read_bytes() for path in place_of(other).artifact.iterdir()}


def test_a_damaged_selection_is_named_and_made_again(words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(DOOR, words) == 0
    place = place_of(words)
    made = {path.name: path.read_bytes() for path in place.artifact.iterdir()}
    fates = place.folder / KEPT / "selection" / "selection.fates"
    data = fates.read_bytes()
    fates.write_bytes(bytes([data[0] ^ 1]) + data[1:])  # the artifact's, too: one file with two names
    shutil.rmtree(place.artifact)
    assert main(DOOR, words) == 0
    assert made == {path.name: path.read_bytes() for path in place.artifact.iterdir()}
    assert "selection.fates: damaged" in caplog.text and "it is made again" in caplog.text


def test_a_stage_that_gets_no_further_is_stuck(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Scanner, piece: Piece, folder: Path) -> Path:
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(Scanner, "scan", stop)
    assert [main(DOOR, words) for _ in range(4)] == [75, 75, 75, 1]


def test_jobs_side_by_side_make_the_evaluation_items_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puzzles take seconds to make: the others wait for who makes them, and read what it has written."""
    words = [*words, "corpus.contamination_tasks=[reasoning_gym]"]
    config = load(words)
    place = places(config, checked_lock(config, words)[0].hash)["corpus"]
    place.folder.mkdir(parents=True)
    made: list[object] = []
    items = [Item("reasoning_gym/1", "as many words as it takes"), Item("reasoning_gym/2", "\u2028 \ud800")]
    monkeypatch.setattr(corpus_scans, "task_items", lambda corpus: (made.append(corpus), items)[1])
    lease = Lease(place.folder, "items")
    assert lease.try_acquire() is None  # another job is at it
    found: list[list[Item]] = []
    jobs = [
        threading.Thread(target=lambda: found.append(corpus_scans.sought_items(config.corpus, place)), daemon=True)
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    jobs[0].join(1.0)
    assert not found and not made
    lease.release()  # it was killed: nothing is there
    for job in jobs:
        job.join(60)
    assert found == [items] * 3 and made == [config.corpus]
    assert corpus_scans.sought_items(config.corpus, place) == items and len(made) == 1


def test_without_items_none_are_made(words: list[str]) -> None:
    assert main(DOOR, words) == 0
    config = load(words)
    place = places(config, checked_lock(config, words)[0].hash)["corpus"]
    assert place.artifact.exists() and not (place.folder / corpus_scans.ITEMS).exists()
