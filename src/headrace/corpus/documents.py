"""The chosen documents of some pieces, read from the sources again: what token shards are made from.

No copy of the training text is kept: at 14.8T tokens it is 55 TB. Every text is compared with its digest, so that a
source which changed after the scan is an error that names it, never other text under the same name. A document's id is
its place among the chosen ones in the lock's order; it does not depend on who reads it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.config.schema import CorpusConfig
from headrace.corpus.listing import named_sources
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import Piece
from headrace.corpus.readers import Damaged, Document
from headrace.corpus.scan import read_piece
from headrace.corpus.selection import Chosen, Selection
from headrace.corpus.split import TRAIN
from headrace.errors import UserError

_HEAD = 8  # bytes of the sha256 that the selection keeps


class Read(NamedTuple):
    """One chosen document: its id, its place among its piece's documents, the root of its file, and the text."""

    id: int
    place: int
    root: str
    document: Document


def selected_documents(
    corpus: Path | Selection,
    lock: Lock,
    config: CorpusConfig,
    pieces: Sequence[Piece],
    split: str = TRAIN,
    skip: int = 0,
    count: int | None = None,
) -> Iterator[tuple[int, str, str]]:
    """(id, source, text) of the documents of `split` in some pieces, in reading order.

    `corpus` is its folder, or its selection: opening one takes a second at 14.8T tokens. `skip` of the documents are
    left out at the beginning, and `count` are enough. Pieces without documents that are asked for are not read. Raises
    `UserError` that names a source which is gone or changed, and for a lock that is not the one the corpus was made
    from.
    """
    selection = Selection(corpus, lock.hash) if isinstance(corpus, Path) else corpus
    for piece, chosen, wanted in _wanted(selection, pieces, split, skip, count):
        for read in read_chosen(lock, config, piece, chosen, wanted.tolist()):
            yield read.id, piece.source, read.document.text


def selected_hash(
    selection: Selection,
    pieces: Sequence[Piece],
    split: str = TRAIN,
    skip: int = 0,
    count: int | None = None,
) -> str:
    """A hash of which documents `selected_documents` gives: of their ids and digests; no text is read."""
    known = hashlib.sha256()
    for _, chosen, wanted in _wanted(selection, pieces, split, skip, count):
        known.update(chosen.ids[wanted].astype("<i8").tobytes())
        known.update(chosen.digests[wanted].astype("<u8").tobytes())
    return f"sha256:{known.hexdigest()}"


def _wanted(
    selection: Selection, pieces: Sequence[Piece], split: str, skip: int, count: int | None
) -> Iterator[tuple[Piece, Chosen, NDArray[np.bool_]]]:
    """Pieces that hold any of the documents that are asked for, with a flag for each document of theirs."""
    holding, left = selection.pieces[f"{split}_documents"], count
    for piece in pieces:
        there = int(holding[piece.number])
        if there <= skip:
            skip -= there
            continue
        if left == 0:
            return
        chosen = selection.of_piece(piece.number)
        places = np.flatnonzero(chosen.of(split))[skip:][:left]
        skip, left = 0, None if left is None else left - len(places)
        wanted = np.zeros(len(chosen.fates), dtype=bool)
        wanted[places] = True
        yield piece, chosen, wanted


def read_chosen(
    lock: Lock, config: CorpusConfig, piece: Piece, chosen: Chosen, wanted: Sequence[bool]
) -> Iterator[Read]:
    """The documents of a piece that are `wanted` (a flag for each), each compared with its digest.

    What comes after the last of them is not read.
    """
    field = next(source.text_field for source in named_sources(config) if source.name == piece.source)
    places = np.flatnonzero(wanted)
    enough = int(places[-1]) + 1 if len(places) else 0
    place = 0
    for found, document in read_piece(lock, piece, field, config.max_document_bytes):
        if isinstance(document, Damaged):
            continue
        if place == len(wanted):
            raise _changed(found.name)
        if wanted[place]:
            data = document.text.encode()
            if hashlib.sha256(data).digest()[:_HEAD] != chosen.digests[place].tobytes():
                raise _changed(document.path)
            yield Read(int(chosen.ids[place]), place, found.root, document)
        place += 1
        if place == enough < len(wanted):
            return
    if place != len(wanted):
        raise _changed(lock.files[piece.last - 1].name)


def _changed(name: str) -> UserError:
    return UserError(f"{name} changed since the corpus was made; run `headrace index`, then the corpus stage again")
