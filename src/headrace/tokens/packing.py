"""Packing: documents are laid down so that a shard can be cut into training rows without cutting documents.

Text that is cut anywhere loses context: with rows of 4,096 tokens a fifth of all web documents would be cut although
they fit into a row (Ding et al. 2024, arXiv 2404.10830). Here each document that fits into a row is whole. Documents
are placed by decreasing length, each into the row that it fills best ("best fit decreasing"); a list of rows by the
room that is left in them, and one bit per such number, find that row in one step, for all documents of one length at
once.

A row is a contiguous piece of the shard, so that an index of 8 bytes per row is all a reader needs. A document of n >
L tokens therefore comes last in its row: its first n mod L tokens are placed like a short document, at most one such
head in a row, and the rest follows as whole rows. Where the head leaves room, the row takes more of the document
instead of padding, and the document's last row is short by as much. So two rules hold for every row:

- only documents longer than a row are cut;
- a row that ends within a document is full; a row that is short ends with the end of a document.

Order comes first: within a window of documents, which bounds memory, they are shuffled before they are placed, and a
row keeps its documents in shuffled order; otherwise neighbours in the corpus would be neighbours in a row, and long
documents would always come first.

A shard may have rows of several lengths, for the phases of context extension. The first length decides what lies
together in a row, the longer ones which of these rows lie side by side; then the one stream is cut for each length
under the same two rules.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.tokens.order import Ints, scattered

WINDOW = 1 << 25
"""Tokens of a window, about: 34,000 web documents of 1,000 tokens, and 128 MiB."""


@dataclass(frozen=True)
class Block:
    """A window's documents as they are stored; `tokens` holds them until the next block is asked for.

    `starts` has int64 [R + 1] per row length: where rows begin and end.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    starts: tuple[Ints, ...]


class Packer:
    """Documents in, blocks of whole rows out; how many documents come at once changes nothing.

    `row_lengths`: the first is what documents are packed for, rows of the others are cut from that order. `label`:
    what the shuffle depends on, beside the number of the window.
    """

    def __init__(self, row_lengths: Sequence[int], label: str, window: int = WINDOW) -> None:
        assert row_lengths and window > 0
        self._row_lengths, self._label, self._window = row_lengths, label, window
        self._documents: list[NDArray[np.int32]] = []
        self._tokens, self._number = 0, 0
        self._stored = np.empty(
            0, dtype=np.int32
        )  # of one block after the other: fresh memory costs as much as copying

    def add(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> Iterator[Block]:
        """Take documents: `tokens` int32 [sum of lengths], `lengths` int32 [D]; gives the windows that they fill."""
        assert len(tokens) == int(lengths.sum()), "every token belongs to a document"
        ends = np.cumsum(lengths, dtype=np.int64)
        for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
            self._documents.append(tokens[start:end])
            self._tokens += end - start
            if self._tokens >= self._window:
                yield self._block()

    def rest(self) -> Iterator[Block]:
        """The last window, if anything is left."""
        if self._documents:
            yield self._block()

    def _block(self) -> Block:
        shuffled = scattered(f"headrace window {self._label} {self._number}", len(self._documents))
        documents = [self._documents[place] for place in shuffled]
        self._documents, self._tokens, self._number = [], 0, self._number + 1
        lengths = np.array([len(document) for document in documents], dtype=np.int32)
        order = pack(lengths, self._row_lengths)
        lengths = lengths[order]
        starts = tuple(cut(lengths, row_length) for row_length in self._row_lengths)
        count = int(lengths.sum(dtype=np.int64))
        if len(self._stored) < count:
            self._stored = np.empty(count, dtype=np.int32)
        stored = np.concatenate([documents[place] for place in order], out=self._stored[:count])
        return Block(stored, lengths, starts)


def pack(lengths: NDArray[np.int32], row_lengths: Sequence[int]) -> Ints:
    """The order in which documents of these lengths [D], all positive, fill rows best: int64 [D].

    Documents are placed for rows of the first length. What lies in one such row, with the whole rows of its long
    document behind it, is then placed like one document for each longer length, so that its rows fill too.
    """
    documents, totals = np.arange(len(lengths)), lengths.astype(np.int64)
    assert not len(totals) or int(totals.min()) > 0, "an empty document has no place"
    counts = np.ones(len(totals), dtype=np.int64)  # documents of each group; at first each is one of its own
    longest = 0
    for row_length in row_lengths:
        if row_length <= longest or not len(totals):
            continue
        longest = row_length
        group_of = _best_fit(totals, row_length)
        order = np.lexsort((np.arange(len(totals)), totals > row_length, group_of))
        borders = np.flatnonzero(np.diff(group_of[order], prepend=-1))
        documents = documents[_ranges((np.cumsum(counts) - counts)[order], counts[order])]
        totals, counts = np.add.reduceat(totals[order], borders), np.add.reduceat(counts[order], borders)
    return documents


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """start, start + 1, ... of each range, one range after the other."""
    within: Ints = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return within + np.repeat(starts, counts)


def cut(lengths: NDArray[np.int32], row_length: int) -> Ints:
    """Where rows begin, and the last ends, if documents of these lengths [D] stay in their order: int64 [R + 1].

    A row ends before the first document that would fit into a row but does not fit into the rest of this one; no cut
    under the two rules above makes fewer rows of this order.
    """
    ends: list[int] = np.cumsum(lengths, dtype=np.int64).tolist()
    total = ends[-1] if ends else 0
    starts, at, document = [0], 0, 0
    while at + row_length < total:
        limit = at + row_length
        document = bisect.bisect_right(ends, limit, lo=document)  # the first that does not end within the row
        last = ends[document - 1] if document else 0
        whole = last > at and int(lengths[document]) <= row_length
        at = last if whole else limit
        starts.append(at)
    return np.array([*starts, total] if total else starts, dtype=np.int64)


class _Rows:
    """Rows by the room that is left in them: a list per number of tokens, and a bit for each list that has one."""

    def __init__(self, row_length: int) -> None:
        self.mask = 0
        self._by_room: list[list[int]] = [[] for _ in range(row_length + 1)]

    def put(self, room: int, rows: Sequence[int]) -> None:
        if rows and room:
            self._by_room[room] += rows
            self.mask |= 1 << room

    def take(self, room: int, count: int) -> list[int]:
        """Up to `count` rows with this room, the latest."""
        there = self._by_room[room]
        taken = there[-count:]
        del there[-count:]
        if not there:
            self.mask ^= 1 << room
        return taken


def _best_fit(lengths: Ints, row_length: int) -> Ints:
    """The group of each document: what shares a row, with at most one long document, whose head alone is placed."""
    long = lengths > row_length
    sizes = np.where(long, lengths % row_length, lengths)
    # By decreasing size, heads before whole documents of that size, and those alike in any order but their own: the few
    # short ones that fill rows to the end would all be the first of their length, and come first in their rows.
    order = np.lexsort((scattered("headrace alike", len(lengths)), ~long, -sizes))
    keys = (sizes * 2 + long)[order]
    borders = np.append(np.flatnonzero(np.diff(keys, prepend=-1)), len(keys)).tolist()
    free, headed = _Rows(row_length), _Rows(row_length)  # without a head, and with one
    groups: list[int] = []  # in `order`
    opened = 0
    for begin, end in itertools.pairwise(borders):
        size, head = divmod(int(keys[begin]), 2)
        if size == 0:  # long ones that are whole rows
            groups += range(opened, opened + end - begin)
            opened += end - begin
            continue
        left = end - begin
        while left:
            fitting = (free.mask if head else free.mask | headed.mask) >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else row_length
            each = 1 if head else room // size  # a row that was best stays best while another fits
            count = -(-left // each)
            if not fitting:
                target, rows = headed if head else free, list(range(opened, opened + count))
                opened += count
            elif not head and headed.mask >> room & 1:
                target, rows = headed, headed.take(room, count)
            else:
                target, rows = headed if head else free, free.take(room, count)
            placed = min(left, len(rows) * each)
            groups += rows[:placed] if each == 1 else [row for row in rows for _ in range(each)][:placed]
            full, rest = divmod(placed, each)
            target.put(room - each * size, rows[:full])
            target.put(room - rest * size, rows[full:])
            left -= placed
    found = np.empty(len(lengths), dtype=np.int64)
    found[order] = groups
    return found
