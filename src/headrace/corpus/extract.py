"""The text that others read from the corpus itself: validation, held-out, and the sample for a tokenizer.

Three Parquet files of modest size (the shares are the user's), made from the selection by reading the sources again,
piece by piece, and only pieces that hold such documents. Extracts of pieces are independent of each other: each is
kept as a sealed file, so that whoever goes on after a kill reads no source twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.artifacts.files import write_atomic
from headrace.config.schema import CorpusConfig
from headrace.corpus.documents import read_chosen
from headrace.corpus.listing import kind_in
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import Piece
from headrace.corpus.sealed import find_sealed, open_sealed, seal
from headrace.corpus.selection import Selection
from headrace.corpus.split import HELDOUT, VALIDATION

SCHEMA = pa.schema(
    [("id", pa.int64()), ("source", pa.string()), ("path", pa.string()), ("kind", pa.string()), ("text", pa.string())]
)
_KEPT = pa.schema([("file", pa.string()), *SCHEMA])
SAMPLE = "sample"
FILES = (VALIDATION, HELDOUT, SAMPLE)
_ROW_GROUP_BYTES = 16_000_000


class Row(NamedTuple):
    """A row of `SCHEMA`; `source` is the root of the document's file."""

    id: int
    source: str
    path: str
    kind: str
    text: str


def pieces_to_extract(selection: Selection) -> list[int]:
    """The pieces that hold any text which is extracted, in order."""
    return sorted({*selection.with_text(VALIDATION), *selection.with_text(HELDOUT), *selection.with_sample()})


def extract_piece(selection: Selection, lock: Lock, config: CorpusConfig, piece: Piece) -> Iterator[tuple[str, Row]]:
    """(file, row) of each document of a piece that goes into one of the `FILES`."""
    chosen = selection.of_piece(piece.number)
    validation, heldout = chosen.of(VALIDATION), chosen.of(HELDOUT)
    wanted = (validation | heldout | chosen.sampled).tolist()
    for read in read_chosen(lock, config, piece, chosen, wanted):
        name = VALIDATION if validation[read.place] else HELDOUT if heldout[read.place] else SAMPLE
        document = read.document
        yield name, Row(read.id, read.root, document.path, kind_in(piece.source, document.kind), document.text)


def write_extracts(rows: Iterable[tuple[str, Row]], out: Path) -> None:
    """Write `validation.parquet`, `heldout.parquet` and `sample.parquet` from rows in reading order."""
    writers = {name: _Writer(out / f"{name}.parquet", SCHEMA) for name in FILES}
    for name, row in rows:
        writers[name].add(row)
    for writer in writers.values():
        writer.close()


def extract(
    selection: Selection,
    lock: Lock,
    config: CorpusConfig,
    pieces: Sequence[Piece],
    out: Path,
    kept: Path | None = None,
) -> None:
    """Extract from all pieces in this process; those whose extracts lie in the folder `kept` are not read again."""

    def of(piece: Piece) -> Iterator[tuple[str, Row]]:
        rows = extract_piece(selection, lock, config, piece)
        return _kept(kept / f"{piece.name}.parquet", rows) if kept else rows

    write_extracts((row for number in pieces_to_extract(selection) for row in of(pieces[number])), out)


def _kept(path: Path, rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """The rows by way of the file `path`, which is made where it is missing or damaged."""
    file = find_sealed(path)
    if file is None:
        buffer = pa.BufferOutputStream()
        writer = _Writer(buffer, _KEPT)
        for name, row in rows:
            writer.add((name, *row))
        writer.close()
        write_atomic(path, seal(buffer.getvalue().to_pybytes()))
        file = open_sealed(path)
    for batch in file.iter_batches(1024):
        for name, *values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield name, Row(*values)


class _Writer:
    """One Parquet file, written row group by row group; the last column is the text."""

    def __init__(self, where: Any, schema: Any) -> None:
        self._file, self._schema = pq.ParquetWriter(where, schema, compression="zstd"), schema
        self._rows: list[tuple[Any, ...]] = []
        self._pending = 0

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        self._pending += len(row[-1])
        if self._pending >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._file.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows, self._pending = [], 0
