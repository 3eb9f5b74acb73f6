"""What became of each document: the result of `select`, mapped and not read, however large.

`selection.fates` has one byte a document in reading order (0 train, 1 validation, 2 held-out, from 3 on a rule of
`selection.json`), `selection.digests` the first 8 bytes of each document's sha256, `selection.sample` the places of the
training documents that a tokenizer is learnt from, `pieces.parquet` a row a piece. At 14.8T tokens (15.4 billion
documents) that is 15 GB, 123 GB and 60 MB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrace.artifacts.files import read_json, write_json
from headrace.corpus.split import SPLITS
from headrace.errors import UserError

FATES, DIGESTS, SAMPLE, PIECES, HEAD = (
    "selection.fates",
    "selection.digests",
    "selection.sample",
    "pieces.parquet",
    "selection.json",
)
PENDING = 255
FIRST_RULE = len(SPLITS)
PIECE_SCHEMA = pa.schema(
    [
        ("piece", pa.int64()),
        ("source", pa.string()),
        ("first_row", pa.int64()),  # of its first document among all documents
        ("rows", pa.int64()),  # documents in it, dropped ones too
        ("first_id", pa.int64()),  # of its first chosen document
        *((f"{split}_{unit}", pa.int64()) for split in SPLITS for unit in ("documents", "bytes")),
    ]
)


@dataclass(frozen=True)
class Chosen:
    """The documents [n] of one piece in reading order, dropped ones too."""

    fates: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    ids: NDArray[np.int64]  # -1 where dropped
    sampled: NDArray[np.bool_]  # in the sample for the tokenizer

    def of(self, split: str) -> NDArray[np.bool_]:
        """[n]: which are in `split`."""
        return np.equal(self.fates, SPLITS.index(split))


class Selection:
    """The selection in a corpus folder. Raises `UserError` where it is not there or of another lock."""

    def __init__(self, folder: Path, lock_hash: str) -> None:
        head = read_json(folder / HEAD)
        if head["lock"] != lock_hash:
            raise UserError(f"{folder / HEAD}: made from another lock of the sources; run the corpus stage again")
        self.rules: list[str] = head["rules"]
        self.rows: int = head["rows"]
        self.pieces: dict[str, NDArray[Any]] = {
            name: column.to_numpy() for name, column in zip(PIECE_SCHEMA.names, _columns(folder), strict=True)
        }
        self._fates = _mapped(folder / FATES, np.dtype(np.uint8), self.rows)
        self._digests = _mapped(folder / DIGESTS, np.dtype("<u8"), self.rows)
        self._sample = np.fromfile(folder / SAMPLE, dtype="<u8")

    def of_piece(self, piece: int) -> Chosen:
        """What became of a piece's documents."""
        first, rows = int(self.pieces["first_row"][piece]), int(self.pieces["rows"][piece])
        fates = np.asarray(self._fates[first : first + rows])
        kept = fates < FIRST_RULE
        ids = np.where(kept, int(self.pieces["first_id"][piece]) + np.cumsum(kept) - 1, -1)
        sampled = np.zeros(rows, dtype=bool)
        # Of its own kind: for signed numbers NumPy would convert the whole sample, at every piece.
        begin, end = np.searchsorted(self._sample, np.array([first, first + rows], np.uint64))
        sampled[(self._sample[begin:end] - np.uint64(first)).astype(np.int64)] = True
        return Chosen(fates, np.asarray(self._digests[first : first + rows]), ids, sampled)

    def with_text(self, split: str) -> list[int]:
        """The pieces that hold documents of `split`, in order."""
        return [int(piece) for piece in np.flatnonzero(self.pieces[f"{split}_documents"])]

    def with_sample(self) -> list[int]:
        """The pieces that hold documents of the sample, in order."""
        places = np.searchsorted(self.pieces["first_row"], self._sample.astype(np.int64), side="right") - 1
        return [int(piece) for piece in np.unique(places)]


def write_selection(
    folder: Path, lock_hash: str, rules: Sequence[str], rows: int, sample: NDArray[np.uint64], pieces: Any
) -> None:
    """Write all but fates and digests, which are written as they come about."""
    with (folder / SAMPLE).open("wb") as file:
        file.write(np.sort(sample).astype("<u8").tobytes())
    pq.write_table(pieces, folder / PIECES, compression="zstd")
    write_json(folder / HEAD, {"lock": lock_hash, "rules": list(rules), "rows": rows})


def _columns(folder: Path) -> list[Any]:
    table = pq.read_table(folder / PIECES)
    return [table[name] for name in PIECE_SCHEMA.names]


def _mapped(path: Path, kind: np.dtype[Any], rows: int) -> NDArray[Any]:
    if path.stat().st_size != rows * kind.itemsize:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, not those of {rows} documents; run the corpus stage again"
        )
    return np.memmap(path, dtype=kind, mode="r")
