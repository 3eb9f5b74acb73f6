"""The corpus stage: however often it is stopped, it goes on as long as it gets further."""

from pathlib import Path

import pytest

from headrace.corpus.pieces import Piece
from headrace.corpus.scan import Scanner
from headrace.launch.deadline import StopRequested
from headrace.stages.corpus import DOOR
from headrace.stages.run import main

FILES = 5


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


def test_a_stage_that_gets_no_further_is_stuck(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Scanner, piece: Piece, folder: Path) -> Path:
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(Scanner, "scan", stop)
    assert [main(DOOR, words) for _ in range(4)] == [75, 75, 75, 1]
