"""The held-out rows that every model is scored on: one convention for the network and for all its baselines.

A document's tokens d_1..d_n are cut into rows of L targets. A row's context starts with one token: the end-of-sentence
token (EOS) for a document's first row, the last token of the row before for the others. That is how training rows
look, so nothing is scored under a condition that was not trained, and no target is scored twice. The EOS that ends a
document is not a target: bits are divided by bytes of text, and EOS is none.

At most `rows` rows are drawn without replacement, with a fixed seed, from all rows of the held-out split, so they come
from many documents and their bits per byte estimates that of the whole split. The seed is not the run's: runs with the
same corpus and tokenizer are scored on the same rows. A very large split is represented by a random pool of documents
that hold sixteen times as many rows as are drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from headrace.artifacts.files import hash_bytes
from headrace.errors import UserError
from headrace.evaluation.text import TextEncoder

Ints = NDArray[np.int64]

_SEED = 20412  # fixed: the draw is part of the convention
_POOL = 16  # rows in the pool per row drawn
_BATCH = 64  # documents encoded at once


@dataclass(frozen=True)
class Document:
    """A held-out document of which at least one row was drawn."""

    id: int
    path: str
    kind: str


@dataclass(frozen=True)
class Heldout:
    """Rows to score. N rows, L targets a row, D documents.

    tokens: int64 [N, L + 1], context token then targets, padded with EOS; lengths: targets per row [N];
    owner: index of each row's document [N]; documents: D of them; sizes: UTF-8 bytes of each row's targets [N].
    """

    tokens: Ints
    lengths: Ints
    owner: Ints
    documents: tuple[Document, ...]
    sizes: Ints

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[N, L]: which targets are scored."""
        inside: NDArray[np.bool_] = np.arange(self.tokens.shape[1] - 1) < self.lengths[:, None]
        return inside

    @property
    def kinds(self) -> list[str]:
        """Kinds of text, sorted."""
        return sorted({document.kind for document in self.documents})

    def of_kind(self, kind: str) -> NDArray[np.bool_]:
        """[D]: which documents are of this kind."""
        return np.array([document.kind == kind for document in self.documents])

    def per_document(self, per_row: NDArray[np.float64] | Ints) -> NDArray[np.float64]:
        """Sums of a per-row quantity [N] over each document's rows [D]."""
        return np.bincount(self.owner, weights=per_row, minlength=len(self.documents)).astype(np.float64)

    def hashes(self, encoder: TextEncoder) -> list[str]:
        """D hashes, one of each document's rows as text: where rows begin is part of it, for it decides the context."""
        rows: list[list[str]] = [[] for _ in self.documents]
        for row, owner in enumerate(self.owner):
            text = encoder.decode_bytes(self.tokens[row, : 1 + self.lengths[row]])
            rows[owner].append(hash_bytes(text, "sha256"))
        return [hash_bytes("".join(own).encode(), "sha256") for own in rows]

    def text(self, encoder: TextEncoder, kind: str | None = None) -> bytes:
        """The scored text of one kind (None: all), rows in document order."""
        rows = [row for row, owner in enumerate(self.owner) if kind in (None, self.documents[owner].kind)]
        return b"".join(encoder.decode_bytes(self.tokens[row, 1 : 1 + self.lengths[row]]) for row in rows)


def read(path: Path, encoder: TextEncoder, sequence_length: int, rows: int) -> Heldout:
    """Draw the rows of `heldout.parquet`. Raises `UserError` where the file is unreadable or holds no text."""
    try:
        table = parquet.read_table(path, columns=["id", "path", "kind", "text"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as held-out documents: {error}") from None
    generator = np.random.Generator(np.random.PCG64(_SEED))
    order = generator.permutation(table.num_rows)
    pool: list[tuple[int, Ints]] = []  # (document's row in the table, context and targets)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH].tolist()
        for index, tokens in zip(chosen, encoder.encode(table["text"].take(chosen).to_pylist()), strict=True):
            pool += [(index, row) for row in _cut(tokens, encoder.eos, sequence_length)]
        if len(pool) >= _POOL * rows:
            break
    if not pool:
        raise UserError(f"{path}: no held-out text; raise corpus.heldout_fraction")
    kept = generator.permutation(len(pool))[:rows].tolist()
    kept.sort(key=lambda number: (pool[number][0], number))  # document order, then order within the document
    drawn = [pool[number] for number in kept]
    numbers = sorted({index for index, _ in drawn})
    position = {index: place for place, index in enumerate(numbers)}
    head = table.select(["id", "path", "kind"]).take(numbers).to_pylist()
    padded = np.full((len(drawn), sequence_length + 1), encoder.eos, dtype=np.int64)
    for place, (_, row) in enumerate(drawn):
        padded[place, : len(row)] = row
    return Heldout(
        tokens=padded,
        lengths=np.array([len(row) - 1 for _, row in drawn], dtype=np.int64),
        owner=np.array([position[index] for index, _ in drawn], dtype=np.int64),
        documents=tuple(Document(int(entry["id"]), entry["path"], entry["kind"]) for entry in head),
        sizes=np.array([encoder.piece_bytes[row[1:]].sum() for _, row in drawn], dtype=np.int64),
    )


def _cut(tokens: Ints, eos: int, length: int) -> list[Ints]:
    """Rows of at most `length` targets, each with the one token before it as context."""
    stream = np.concatenate([[eos], tokens])
    return [stream[start : start + length + 1] for start in range(0, len(tokens), length)]
