"""The three files that hold text: whose pieces are read, and that a piece's extract does not depend on the others."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrace.config.schema import CorpusConfig
from headrace.corpus import extract as extract_module
from headrace.corpus.build import build_corpus
from headrace.corpus.extract import FILES, extract, extract_piece, pieces_to_extract, write_extracts
from headrace.corpus.lock import build_lock
from headrace.corpus.pieces import pieces
from headrace.corpus.selection import Selection


def test_extracts_of_pieces_in_any_order_make_the_same_files(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock, out, again = build_lock(mixed), tmp_path / "out", tmp_path / "again"
    out.mkdir()
    again.mkdir()
    build_corpus(mixed, lock, out, print, piece_bytes=20_000)
    selection, cut = Selection(out, lock.hash), pieces(lock, 20_000)
    parts = {
        number: list(extract_piece(selection, lock, mixed, cut[number]))
        for number in reversed(pieces_to_extract(selection))
    }
    write_extracts((row for number in sorted(parts) for row in parts[number]), again)
    for name in FILES:
        assert (again / f"{name}.parquet").read_bytes() == (out / f"{name}.parquet").read_bytes()
        assert pq.read_table(out / f"{name}.parquet").num_rows > 0


def test_what_is_kept_is_not_read_again_unless_it_is_damaged(
    mixed: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock, out, again, kept = build_lock(mixed), tmp_path / "out", tmp_path / "again", tmp_path / "kept"
    for folder in (out, again, kept):
        folder.mkdir()
    build_corpus(mixed, lock, out, print, piece_bytes=20_000)
    selection, cut = Selection(out, lock.hash), pieces(lock, 20_000)
    wanted = pieces_to_extract(selection)
    read: list[int] = []
    original = extract_module.read_chosen
    monkeypatch.setattr(extract_module, "read_chosen", lambda *a: (read.append(a[2].number), original(*a))[1])

    def extract_again() -> list[int]:
        read.clear()
        extract(selection, lock, mixed, cut, again, kept)
        for name in FILES:
            assert (again / f"{name}.parquet").read_bytes() == (out / f"{name}.parquet").read_bytes()
        return list(read)

    assert extract_again() == wanted
    assert extract_again() == [] and not caplog.records
    path = kept / f"{cut[wanted[1]].name}.parquet"
    path.write_bytes(path.read_bytes().replace(b"PAR1", b"PAR2", 1))
    (kept / f"{cut[wanted[2]].name}.parquet").unlink()
    assert extract_again() == wanted[1:3]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: damaged; it is made again"]


def test_row_groups_are_bounded(mixed: CorpusConfig, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    lock, out = build_lock(mixed), tmp_path / "out"
    out.mkdir()
    build_corpus(mixed, lock, out, print)
    before = pq.read_table(out / "sample.parquet")
    monkeypatch.setattr(extract_module, "_ROW_GROUP_BYTES", 5000)
    extract(Selection(out, lock.hash), lock, mixed, pieces(lock), out)
    assert pq.ParquetFile(out / "sample.parquet").num_row_groups > 5
    assert pq.read_table(out / "sample.parquet").equals(before)
