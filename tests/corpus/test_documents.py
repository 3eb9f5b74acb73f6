"""Documents read again: the ids and texts of the selection, for any pieces, and only what has not changed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrace.config.schema import CorpusConfig
from headrace.corpus import documents
from headrace.corpus.build import build_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.lock import Lock, build_lock
from headrace.corpus.pieces import pieces
from headrace.errors import UserError

PIECE = 20_000


@pytest.fixture
def corpus(mixed: CorpusConfig, tmp_path: Path) -> tuple[CorpusConfig, Lock, Path]:
    lock, out = build_lock(mixed), tmp_path / "corpus"
    out.mkdir()
    build_corpus(mixed, lock, out, print, piece_bytes=PIECE)
    return mixed, lock, out


def test_all_splits_together_are_every_document_once_in_order(corpus: tuple[CorpusConfig, Lock, Path]) -> None:
    config, lock, out = corpus
    cut = pieces(lock, PIECE)
    found = {
        split: list(selected_documents(out, lock, config, cut, split)) for split in ("train", "validation", "heldout")
    }
    for split in ("validation", "heldout"):
        table = pq.read_table(out / f"{split}.parquet")
        assert [(number, text) for number, _, text in found[split]] == list(
            zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
        )
    every = sorted(row for rows in found.values() for row in rows)
    assert [number for number, _, _ in every] == list(range(648))
    texts = [text for _, _, text in every]
    assert len(set(texts)) == 648
    lines = [text for _, source, text in every if source == "lines"]
    assert lines == [f"line {number} " * 30 for number in range(200)]  # the order of the sources


def test_pieces_are_read_by_themselves(corpus: tuple[CorpusConfig, Lock, Path]) -> None:
    config, lock, out = corpus
    cut = pieces(lock, PIECE)
    parts = [list(selected_documents(out, lock, config, [piece])) for piece in cut]
    assert [row for part in parts for row in part] == list(selected_documents(out, lock, config, cut))
    table = pq.read_table(out / "pieces.parquet")
    assert table["train_documents"].to_pylist() == [len(part) for part in parts]
    assert table["train_bytes"].to_pylist() == [sum(len(text.encode()) for _, _, text in part) for part in parts]
    assert table["source"].to_pylist() == [piece.source for piece in cut]


def test_reading_stops_after_the_last_document_that_is_wanted(
    corpus: tuple[CorpusConfig, Lock, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lock, out = corpus
    piece = next(piece for piece in pieces(lock, PIECE) if piece.source == "lines")
    read: list[str] = []
    original = documents.read_piece

    def counting(*arguments):  # type: ignore[no-untyped-def]
        for found, document in original(*arguments):
            read.append(getattr(document, "path", "damaged"))
            yield found, document

    monkeypatch.setattr(documents, "read_piece", counting)
    some = list(selected_documents(out, lock, config, [piece], skip=3, count=4))
    assert len(some) == 4 and read[-1] == f"lines/a.jsonl#{1 + int(some[-1][2].split()[1])}" and len(read) < 20


@pytest.mark.parametrize("change", ["text", "fewer", "more"])
def test_a_source_that_changed_after_the_scan_is_named(corpus: tuple[CorpusConfig, Lock, Path], change: str) -> None:
    config, lock, out = corpus
    lines = Path("lines/a.jsonl").read_bytes().split(b"\n")
    edited = {
        "text": [*lines[:5], lines[5].replace(b"line", b"LINE"), *lines[6:]],
        "fewer": lines[:-1],
        "more": [*lines, lines[0]],
    }
    Path("lines/a.jsonl").write_bytes(b"\n".join(edited[change]))
    with pytest.raises(
        UserError, match=r"^lines/a\.jsonl(#6)? changed since the corpus was made; run `headrace index`"
    ):
        for split in ("train", "validation", "heldout"):
            list(selected_documents(out, lock, config, pieces(lock, PIECE), split))


def test_another_lock_is_refused(corpus: tuple[CorpusConfig, Lock, Path]) -> None:
    config, _, out = corpus
    Path("lines/a.jsonl").write_text('{"text": "other"}\n')
    other = build_lock(config)
    with pytest.raises(UserError, match=r"selection\.json: made from another lock of the sources"):
        next(selected_documents(out, other, config, pieces(other, PIECE)))


def test_a_damaged_selection_is_refused(corpus: tuple[CorpusConfig, Lock, Path]) -> None:
    config, lock, out = corpus
    (out / "selection.fates").write_bytes((out / "selection.fates").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"selection\.fates: \d+ bytes, not those of \d+ documents"):
        next(selected_documents(out, lock, config, pieces(lock, PIECE)))
