"""Word n-grams of many texts at once, as 64-bit hashes: how contamination is found at the speed of reading.

A word is a run of letters, digits and non-ASCII characters, in lower case; all else parts words. The hash of a word is
a polynomial of its bytes, the hash of an n-gram a polynomial of its words' hashes, both modulo 2^64. With prefix sums
of b_i B^i the polynomial of any stretch is a difference, divided by B^start; an odd B has an inverse modulo 2^64. So
everything is a few passes of numpy over a batch of texts, and no word is ever a Python object.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
N = 13
"""Words in an n-gram: what GPT-3's and most later reports use."""

_BYTE_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd, else arbitrary
_SEPARATOR = b"\n"
_LETTERS = frozenset([*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0x80, 0x100)])
_DIGITS = frozenset(range(0x30, 0x3A))
_IS_LETTER = bytes(byte in _LETTERS for byte in range(256))
_IS_WORD = bytes(byte in _LETTERS | _DIGITS for byte in range(256))
_WORD = re.compile(r"[0-9A-Za-z\u0080-\u009f\u00a1-\u1fff\u2080-\u2fff\u3040-\U0010ffff]+")  # as `_word_bytes` has it
_TAIL = 4096  # characters that mostly hold more than `N` words


@dataclass(frozen=True)
class Grams:
    """The n-grams of some texts in order: `hashes` [G] and the text [G] that each lies in, its first word `position`.

    `words` [W] and `lettered` [W] are hashes of all words and whether they hold a letter; gram g begins at word
    `starts[g]`. `position` counts words from the beginning of the text.
    """

    hashes: U64
    text: NDArray[np.int64]
    position: NDArray[np.int64]
    starts: NDArray[np.int64]
    words: U64
    lettered: NDArray[np.bool_]


def word_grams(texts: Sequence[str]) -> Grams:
    """All runs of 13 words within one text. It takes some 50 bytes a byte: hand in `text_slices` of long texts."""
    parts = [text.lower().encode() for text in texts]
    joined = _SEPARATOR.join([b"", *parts, b""])
    data, inside = np.frombuffer(joined, dtype=np.uint8), _word_bytes(joined)
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, stops = edges[0::2], edges[1::2]
    words = _mixed(_stretches(data.astype(np.uint64) + np.uint64(1), starts, stops, _BYTE_BASE))
    letters = np.concatenate(([0], np.cumsum(_flags(joined, _IS_LETTER), dtype=np.int32)))
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64) + 1
    owner = np.searchsorted(ends, starts, side="right")
    count = max(0, len(words) - N + 1)
    first = np.flatnonzero(owner[:count] == owner[len(words) - count :]) if count else np.zeros(0, dtype=np.int64)
    hashes = _mixed(_stretches(words, first, first + N, _WORD_BASE))
    before = np.searchsorted(owner, np.arange(len(parts)), side="left")
    text = owner[first]
    return Grams(hashes, text, first - before[text], first, words, letters[stops] > letters[starts])


def text_slices(text: str, most: int) -> Iterator[str]:
    """Parts of `most` characters at most that have, together, the n-grams of the text; some are in two of them.

    No part begins or ends within a word, but for one that fills half a part. They share `N` words (one more than
    n-grams need, for the lower case of a letter can depend on the word before it). An n-gram that is longer than half
    a part may be missed.
    """
    begin = 0
    while len(text) - begin > most:
        end = begin + most
        words = _last_words(text, begin + most // 2, end)
        if words:
            goes_on = words[-1].end() == end and _WORD.match(text, end, end + 1)
            yield text[begin : words[-1].start() if goes_on else end]
            begin = words[max(-1 - N, -len(words))].start()
        else:
            yield text[begin:end]
            filling = _WORD.match(text, end - 1)
            begin = filling.end() if filling else end
    yield text[begin:]


def _last_words(text: str, begin: int, end: int) -> list[re.Match[str]]:
    """The words that begin between two places: more than `N` of the last ones if there are so many, else all."""
    words: list[re.Match[str]] = []
    for start in (max(begin, end - _TAIL), begin):
        words = list(_WORD.finditer(text, start, end))
        if words and words[0].start() == start:
            del words[0]  # it may be the rest of a word
        if len(words) > N:
            break
    return words


def _flags(data: bytes, table: bytes) -> NDArray[np.bool_]:
    return np.frombuffer(data.translate(table), dtype=bool)


def _word_bytes(joined: bytes) -> NDArray[np.bool_]:
    """Which bytes belong to words: not the punctuation and spaces of U+2000..U+206F, U+3000..U+303F and U+00A0."""
    inside = _flags(joined, _IS_WORD)
    if joined.isascii():
        return inside
    inside, data = inside.copy(), np.frombuffer(joined, dtype=np.uint8)
    leads = np.flatnonzero((data == 0xE2) | (data == 0xE3) | (data == 0xC2))
    lead, second = data[leads], data[leads + 1]  # a lead byte is never the last
    for value, seconds, length in ((0xE2, (0x80, 0x81), 3), (0xE3, (0x80, 0x80), 3), (0xC2, (0xA0, 0xA0), 2)):
        places = leads[(lead == value) & ((second == seconds[0]) | (second == seconds[1]))]
        for offset in range(length):
            inside[places + offset] = False
    return inside


def _stretches(values: U64, starts: NDArray[np.int64], stops: NDArray[np.int64], base: int) -> U64:
    """Polynomial of values[start:stop] for each stretch, whatever its place, modulo 2^64."""
    powers, inverses = _powers(base, _capacity(len(values)))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return (sums[stops] - sums[starts]) * inverses[starts]


def _capacity(length: int) -> int:
    return 1 << max(16, length.bit_length())  # powers of two, so that few tables are made


@lru_cache(maxsize=8)
def _powers(base: int, length: int) -> tuple[U64, U64]:
    return _series(base, length), _series(pow(base, -1, 1 << 64), length)


def _series(base: int, length: int) -> U64:
    factors = np.full(length, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _mixed(values: U64) -> U64:
    """Every bit of the result depends on every bit of the value (the finaliser of splitmix64)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
