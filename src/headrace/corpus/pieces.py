"""The unit of reading is a piece: so large that starting on it costs little, so small that losing it does too.

A piece is a run of row groups of one Parquet file, one JSONL file, one shard of a streamed Hub dataset, or a run of
small plain files, up to about 32 MB in the lock's order. It never crosses from one source to the next. Which pieces
there are is a function of the lock alone: every worker knows them without looking at a file, and no result depends on
how many workers there are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.corpus.listing import holds_many
from headrace.corpus.lock import Lock, LockedFile
from headrace.corpus.remote import STREAM

PIECE_BYTES = 32_000_000


class Piece(NamedTuple):
    """Files `first` up to `last` (not included) of the lock; of a Parquet file, row groups `begin` up to `end`."""

    number: int  # its place among all pieces, which is the reading order
    first: int
    last: int
    begin: int  # 0 and 0 where the piece is whole files
    end: int
    source: str

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.number:07d}"

    @property
    def groups(self) -> range | None:
        """Its row groups; None for whole files."""
        return range(self.begin, self.end) if self.end else None


def pieces(lock: Lock, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """All pieces in reading order."""
    cuts = _cuts(lock.files, piece_bytes)
    return [Piece(number, *cut, lock.files[cut[0]].source) for number, cut in enumerate(cuts)]


def count(lock: Lock, piece_bytes: int = PIECE_BYTES) -> int:
    """How many pieces there are: without making them, since there are millions and the Snakefile asks."""
    return sum(1 for _ in _cuts(lock.files, piece_bytes))


def _cuts(files: Sequence[LockedFile], piece_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, last, begin, end) of each piece."""
    index = 0
    while index < len(files):
        file = files[index]
        if file.row_groups:
            most = 0 if file.name.startswith(STREAM) else piece_bytes
            for begin, end in _runs(file.row_groups, most):
                yield index, index + 1, begin, end
            index += 1
        elif holds_many(file.name):
            yield index, index + 1, 0, 0
            index += 1
        else:
            last = _end_of_run(files, index, piece_bytes)
            yield index, last, 0, 0
            index = last


def _end_of_run(files: Sequence[LockedFile], index: int, piece_bytes: int) -> int:
    """One after the last plain file that still belongs to a piece that begins at `index`."""
    total, last = files[index].size, index + 1
    while last < len(files) and files[last].source == files[index].source and not holds_many(files[last].name):
        total += files[last].size
        if total > piece_bytes:
            break
        last += 1
    return last


def _runs(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of at most `most` bytes, or of one where a single one is larger."""
    begin, total = 0, 0
    for index, size in enumerate(sizes):
        if index > begin and (total + size > most or most == 0):
            yield begin, index
            begin, total = index, 0
        total += size
    yield begin, len(sizes)
