"""Evaluation items that stand in training text: an item seen in training measures memory, not ability.

Every item's word 13-grams are hashed; a document is looked up gram by gram. One common phrase proves nothing: an item
counts as contained in a document when at least half of its n-grams are there, or two that do not overlap. N-grams of
low entropy (runs of numbers, a word repeated) are no evidence and are left out. Training documents that contain an item
are dropped; items never are: `corpus.json` says which were found in how many documents, the report how many of a task.

An item of under 13 words, or of low entropy throughout, has no n-grams and cannot be sought; `corpus.json` counts such
items. Text without spaces between words (Chinese, Japanese) has long "words", and only exact sentences are found.

Memory is that of a slice, not that of a document: long texts are searched in parts that overlap (`text_slices`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.corpus.word_hashes import Grams, N, text_slices, word_grams

LEAST_SHARE = 0.5
"""An item is in a document that has this share of its n-grams."""

LEAST_WORDS = 6
"""An n-gram with fewer different words that hold a letter is of low entropy."""

_BATCH_BYTES = 1 << 16  # the arrays of a batch stay in a core's cache
_LEAST_FILTER_BITS, _MOST_FILTER_BITS = 22, 27  # sixteen slots for an n-gram, as long as that is 128 MB at most


@dataclass(frozen=True)
class Item:
    """One evaluation item: an id `task/...`, and the text that must not have been trained on.

    Hand in what is particular to the item (question, solution), without the template that all items share.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Match:
    """Document `document` (its index in what was searched) contains item `item`: `grams` of its n-grams are in it."""

    document: int
    item: str
    grams: int
    share: float


class Items:
    """All n-grams of the items, ready to be looked up."""

    def __init__(self, items: Sequence[Item]) -> None:
        ids = [item.id for item in items]
        assert len(set(ids)) == len(ids), "items have ids of their own"
        self.ids = ids
        lines = sorted(f"{item.id}\0{item.text}" for item in items)
        self.hash = hashlib.sha256("\0".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
        hashes, item, position = _grams_of(items)
        order = np.lexsort((position, item, hashes))
        self._hashes, self._item, self._position = hashes[order], item[order], position[order]
        self._slots = 1 << min(_MOST_FILTER_BITS, max(_LEAST_FILTER_BITS, (16 * len(hashes)).bit_length()))
        self._filter = np.zeros(self._slots, dtype=bool)
        self._filter[self._slot_of(self._hashes)] = True
        pairs = np.unique(np.stack([self._item.astype(np.uint64), self._hashes]), axis=1)
        self.grams = np.bincount(pairs[0].astype(np.int64), minlength=len(items))
        """[items]: different n-grams of each; 0 for an item that cannot be checked."""

    def by_task(self) -> dict[str, dict[str, int]]:
        """By task: how many items there are, and how many of them have no n-grams and so cannot be sought."""
        counts: dict[str, dict[str, int]] = {}
        for id_, grams in zip(self.ids, self.grams.tolist(), strict=True):
            task = counts.setdefault(id_.partition("/")[0], {"items": 0, "unchecked": 0})
            task["items"] += 1
            task["unchecked"] += grams == 0
        return dict(sorted(counts.items()))

    def search(self, texts: Sequence[str]) -> list[Match]:
        """Which of the texts contain which items, ordered by text and item."""
        hits: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for documents, parts in _batches(texts):
            for part, entry in self._entries(parts):
                hits[documents[part], int(self._item[entry])].add(entry)
        found = (self._judge(document, item, sorted(entries)) for (document, item), entries in sorted(hits.items()))
        return [match for match in found if match]

    def _entries(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """(index of a text, an item's n-gram that is in it), again and again where it is there several times."""
        grams = word_grams(texts)
        maybe = np.flatnonzero(self._filter[self._slot_of(grams.hashes)])
        left = np.searchsorted(self._hashes, grams.hashes[maybe], side="left")
        right = np.searchsorted(self._hashes, grams.hashes[maybe], side="right")
        there = left < right
        for gram, low, high in zip(maybe[there], left[there], right[there], strict=True):
            for entry in range(low, high):
                yield int(grams.text[gram]), entry

    def _slot_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (hashes & np.uint64(self._slots - 1)).astype(np.int64)

    def _judge(self, document: int, item: int, entries: list[int]) -> Match | None:
        """What it means that these n-grams of an item are in a document; None: nothing."""
        different = len(np.unique(self._hashes[entries]))
        share = different / int(self.grams[item])
        if share < LEAST_SHARE and not _disjoint(sorted(self._position[entries].tolist())):
            return None
        return Match(document, self.ids[item], different, share)


class Findings:
    """What is known of each item after some searches: documents that contain it, and the largest share in one."""

    def __init__(self) -> None:
        self._documents: defaultdict[str, int] = defaultdict(int)
        self._share: defaultdict[str, float] = defaultdict(float)

    def add(self, item: str, documents: int, share: float) -> None:
        """Count `documents` more documents with this item."""
        self._documents[item] += documents
        self._share[item] = max(self._share[item], share)

    def table(self) -> dict[str, Any]:
        """By item: in how many documents it is, and the largest share of its n-grams that one of them has."""
        return {
            item: {"documents": self._documents[item], "share": round(self._share[item], 4)}
            for item in sorted(self._documents)
        }


def _grams_of(items: Sequence[Item]) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]:
    """Hash, item's index and position of all telling n-grams; memory beside them is that of a batch of items."""
    hashes, owners, positions = [], [], []
    for numbers, texts in _batches([item.text for item in items], whole=True):
        grams = word_grams(texts)
        good = _telling(grams)
        hashes.append(grams.hashes[good])
        owners.append(np.array(numbers, dtype=np.int32)[grams.text[good]])
        positions.append(grams.position[good].astype(np.int32))
    empty = np.zeros(0, dtype=np.int32)
    return (
        np.concatenate([empty.astype(np.uint64), *hashes]),
        np.concatenate([empty, *owners]),
        np.concatenate([empty, *positions]),
    )


def _telling(grams: Grams) -> NDArray[np.bool_]:
    """[G]: whether a gram has enough different words with letters."""
    windows = grams.starts[:, None] + np.arange(N)
    words = np.where(grams.lettered[windows], grams.words[windows], np.uint64(0))
    words.sort(axis=1)
    different = (words[:, 0] != 0) + np.count_nonzero(words[:, 1:] != words[:, :-1], axis=1)
    return np.asarray(different >= LEAST_WORDS)


def _disjoint(positions: Sequence[int]) -> bool:
    """Whether two of an item's hits share no word."""
    return positions[-1] - positions[0] >= N


def _batches(texts: Sequence[str], whole: bool = False) -> Iterator[tuple[list[int], list[str]]]:
    """(which text each is of, texts or parts of long ones), of `_BATCH_BYTES` to twice as much together.

    `whole`: no text is cut, for who needs the places of words in it.
    """
    documents, parts, size = list[int](), list[str](), 0
    for document, text in enumerate(texts):
        for part in [text] if whole else text_slices(text, _BATCH_BYTES):
            documents.append(document)
            parts.append(part)
            size += len(part)
            if size >= _BATCH_BYTES:
                yield documents, parts
                documents, parts, size = [], [], 0
    if parts:
        yield documents, parts
