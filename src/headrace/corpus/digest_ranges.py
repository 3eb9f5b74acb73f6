"""Documents ordered by digest, more than fit into memory: one file for each range of digests.

Digests are uniform, so ranges of equal width hold nearly equally many documents; all repetitions of a text fall into
one range. What must be known of a document to deduplicate, sample and split is 39 bytes. Memory is bounded by one range
and the buffer that fills them, both `range_documents` records: about 150 bytes each while they are sorted.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype(
    [
        ("high", "<u8"),  # the digest's first 8 bytes as a big-endian number
        ("low", "<u8"),  # the next 8
        ("ordinal", "<u8"),  # row among all scans: the reading order
        ("bytes", "<u8"),
        ("group", "<i4"),  # code of its directory; -1: the document is a group of its own
        ("kind", "<u2"),
        ("contaminated", "?"),
    ]
)
RANGE_DOCUMENTS = 1 << 22
_MOST_BITS = 12  # as many files as may be appended to in turn
Records = NDArray[Any]


class DigestRanges:
    """Files of records under `folder`, for about `documents` documents, `range_documents` of them in each at most."""

    def __init__(self, folder: Path, documents: int, range_documents: int = RANGE_DOCUMENTS) -> None:
        self._folder, self._buffer, self._buffered, self._most = folder, list[Records](), 0, range_documents
        wanted = 1.25 * documents / range_documents  # a quarter for chance
        self._bits = min(_MOST_BITS, max(0, math.ceil(math.log2(wanted)))) if wanted > 1 else 0

    def add(self, records: Records) -> NDArray[np.uint64]:
        """Put records in, in reading order; returns ordinals of repetitions that were noticed and left out."""
        self._buffer.append(records)
        self._buffered += len(records)
        return self.flush() if self._buffered >= self._most else np.zeros(0, dtype=np.uint64)

    def flush(self) -> NDArray[np.uint64]:
        """Write what is buffered. A text that is there a million times would overfill its range, so it goes already."""
        if not self._buffer:
            return np.zeros(0, dtype=np.uint64)
        records, repeated = first_of_each(np.concatenate(self._buffer))
        self._buffer, self._buffered = [], 0
        numbers = self._range_of(records)
        bounds = np.searchsorted(numbers, np.arange((1 << self._bits) + 1))
        for number in np.unique(numbers).tolist():
            with self._path(number).open("ab") as file:
                file.write(records[bounds[number] : bounds[number + 1]].tobytes())
        return repeated

    def __iter__(self) -> Iterator[tuple[int, Records]]:
        """(number, records) of each range, ranges in the order of digests."""
        for number in range(1 << self._bits):
            if self._path(number).exists():
                yield number, np.fromfile(self._path(number), dtype=RECORD)

    def mapped(self) -> Iterator[Records]:
        """The ranges as files mapped into memory, for readers that stop early."""
        for number in range(1 << self._bits):
            if self._path(number).exists() and self._path(number).stat().st_size:
                yield np.memmap(self._path(number), dtype=RECORD, mode="r")

    def replace(self, number: int, records: Records) -> None:
        """Put other records in the place of a range's."""
        with self._path(number).open("wb") as file:
            file.write(records.tobytes())

    def _range_of(self, records: Records) -> NDArray[np.int64]:
        shifted = records["high"] >> np.uint64(64 - self._bits) if self._bits else records["high"] * np.uint64(0)
        return shifted.astype(np.int64)

    def _path(self, number: int) -> Path:
        return self._folder / f"range-{number:04d}"


def first_of_each(records: Records) -> tuple[Records, NDArray[np.uint64]]:
    """Sorted by digest, the first of each in reading order; and the ordinals of the others."""
    ordered = records[np.lexsort((records["ordinal"], records["low"], records["high"]))]
    again = np.zeros(len(ordered), dtype=bool)
    again[1:] = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    return ordered[~again], ordered["ordinal"][again]
