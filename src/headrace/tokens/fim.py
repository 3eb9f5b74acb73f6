"""What training does to documents at random: fill in the middle, and the split of combined tokens.

Fill in the middle (FIM): a model that only ever reads from left to right never learns to fill a gap. So some documents
are cut at two characters and laid out as prefix, suffix, middle (PSM, report section 4.1: a tenth of them, whole
documents, before packing), each piece encoded by itself, since the gap of a user's file ends anywhere in a token too:

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <end of sequence>

Split of combined tokens: V3's vocabulary has tokens such as ".\\n", punctuation with the line ends after it. A prompt
that ends before its line end would then show the model a token that training never had there, so that some of these
tokens are written as two (report section 4.1; how many is not published).

A document's chances are a pure function of (seed, document id): no generator runs along the corpus, whose state a
restart would lose, and what shares a batch or a shard with the document changes nothing.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Flat = tuple[Ids, NDArray[np.int64]]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LEAST_CHARACTERS = 3  # one for each piece


def chances(seed: int, purpose: str, documents: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), float64 [N]: draw `numbers[i]` of document `documents[i]`, both int64 [N].

    SplitMix64 with its counter given: any draw of any document is computed by itself. `purpose` tells streams apart.
    """
    key = np.frombuffer(hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest(), "<u8")[0]
    state = _mix(_mix(documents.astype(np.uint64) + _GOLDEN) ^ key)
    mixed = _mix(state + (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Fim:
    """The share of documents that is rearranged, and the ids that stand before prefix, suffix and middle."""

    rate: float
    begin: int
    hole: int
    end: int

    def pieces(self, texts: Sequence[str], documents: NDArray[np.int64], seed: int) -> tuple[list[str], Ids, Ids]:
        """What to encode: piece texts in the order in which they are stored, and for each piece two arrays int32 [P]:

        the control id before it (-1: none) and the number of its document in `texts`.
        """
        drawn = chances(seed, "fim", np.repeat(documents, 3), np.tile(np.arange(3), len(texts))).reshape(-1, 3)
        out: list[str] = []
        leads: list[int] = []
        owners: list[int] = []
        for owner, (text, (chance, first, second)) in enumerate(zip(texts, drawn.tolist(), strict=True)):
            if chance < self.rate and len(text) >= _LEAST_CHARACTERS:
                one, two = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
                out += (text[:one], text[two:], text[one:two])
                leads += (self.begin, self.hole, self.end)
                owners += (owner, owner, owner)
            else:
                out.append(text)
                leads.append(-1)
                owners.append(owner)
        return out, np.array(leads, np.int32), np.array(owners, np.int32)


class CombinedTokens:
    """The tokens of a vocabulary that join punctuation and the line ends after it, and how each is written as two.

    `texts` are the texts of all ids, `encode` is the engine: each part becomes what it is where a text ends with it.
    """

    def __init__(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Flat]) -> None:
        found = [(id_, cut) for id_, text in enumerate(texts) if (cut := _cut(text))]
        ids, offsets = encode([part for id_, cut in found for part in (texts[id_][:cut], texts[id_][cut:])])
        self.ids = np.array([id_ for id_, _ in found], np.int32)
        self._place = np.full(len(texts), -1, np.int32)  # of an id in `ids`
        self._place[self.ids] = np.arange(len(found))
        self._parts, self._starts = ids, offsets[::2]

    def parts(self, id_: int) -> Ids:
        """The ids that a combined token is written as, int32, two or more."""
        place = self._place[id_]
        return self._parts[self._starts[place] : self._starts[place + 1]]

    def split(
        self, ids: Ids, offsets: NDArray[np.int64], documents: NDArray[np.int64], rate: float, seed: int
    ) -> tuple[Ids, NDArray[np.int64], int]:
        """Write a share `rate` of the combined tokens as two: (ids int32 [T'], offsets int64 [N + 1], how many).

        `ids` int32 [T] and `offsets` int64 [N + 1] are documents, or their pieces one after the other; `documents`
        int64 [N] the id of the document that each belongs to.
        """
        places = self._place[ids]
        where = np.flatnonzero(places >= 0)
        owner = documents[np.searchsorted(offsets, where, side="right") - 1]
        chosen = where[chances(seed, "split", owner, _running_numbers(owner)) < rate]
        lengths = np.ones(len(ids), np.int64)
        lengths[chosen] = np.diff(self._starts)[places[chosen]]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        out = np.repeat(ids, lengths)
        for position in chosen.tolist():
            out[starts[position] : starts[position + 1]] = self.parts(ids[position])
        return out, starts[offsets], len(chosen)


def _cut(text: str) -> int:
    """Where a combined token's line ends begin; 0 if `text` is not at most a space, punctuation, and line ends."""
    head = text.rstrip("\r\n")
    marks = head.removeprefix(" ")
    return len(head) if len(head) < len(text) and marks and all(map(_is_mark, marks)) else 0


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character != "\ufffd"  # stands for a part of a character


def _running_numbers(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, ... within each run of equal values."""
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    return np.arange(len(owner)) - np.repeat(begins, np.diff(begins, append=len(owner)))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `value`, uint64 [N]."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
