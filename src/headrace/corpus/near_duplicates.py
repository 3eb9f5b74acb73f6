"""Near duplicates by MinHash: texts that share most of their word shingles. Off by default.

A signature has 112 values; the share in which two signatures agree estimates the Jaccard similarity of the two sets of
shingles. Signatures are cut into 14 bands of 8 values, and only documents that agree in a whole band are compared: at a
similarity of 0.72 every other such pair is found, at 0.85 nearly each (1 - (1 - s^8)^14). Of a pair that reaches the
threshold the later document in reading order goes, unless the earlier one went before it.

rensa makes the signatures, while scanning, one piece at a time. They are compared in memory: 448 bytes a document for
the signatures and about 300 for the bands, so that some ten million documents are a laptop's work and a hundred million
a large machine's. Beyond that, deduplicate with datatrove's MinHash stages before indexing (14 x 8 bands as well).
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from headrace.config.schema import NearDuplicatesConfig
from headrace.errors import UserError

BANDS, WIDTH = 14, 8
VALUES = BANDS * WIDTH
SIGNATURE_BYTES = 4 * VALUES
_SEED = 1
_WORD = re.compile(r"\w+")


def open_signer(config: NearDuplicatesConfig) -> Callable[[str], bytes]:
    """A function from text to its signature: 112 little-endian 32-bit values. `UserError` where rensa is missing."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("corpus.near_duplicates needs the package rensa: pip install rensa") from None

    def sign(text: str) -> bytes:
        minhash = RMinHash(num_perm=VALUES, seed=_SEED)
        minhash.update(shingles(text, config.shingle_words))
        return np.asarray(minhash.digest(), dtype="<u4").tobytes()

    return sign


def shingles(text: str, words: int) -> list[str]:
    """Runs of `words` lower-case words; a shorter text is one shingle."""
    found = _WORD.findall(text.lower())
    return [" ".join(found[start : start + words]) for start in range(max(1, len(found) - words + 1))]


def near_duplicates(signatures: Sequence[bytes], threshold: float) -> list[int]:
    """Which documents to drop: indices, ascending, into `signatures`, which are in reading order."""
    matrix = np.frombuffer(b"".join(signatures), dtype="<u4").reshape(len(signatures), VALUES)
    dropped = np.zeros(len(matrix), dtype=bool)
    for later, earlier in _pairs(matrix):
        if dropped[earlier] or dropped[later]:
            continue
        if np.count_nonzero(matrix[earlier] == matrix[later]) >= threshold * VALUES:
            dropped[later] = True
    return [int(index) for index in np.flatnonzero(dropped)]


def _pairs(matrix: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """(later, earlier) pairs of neighbours in a band's bucket and of each with its first, in reading order.

    Only these of a bucket's pairs: a page that is there a million times is a million pairs, not half a billion times a
    thousand.
    """
    found: set[tuple[int, int]] = set()
    for band in range(BANDS):
        keys = np.ascontiguousarray(matrix[:, band * WIDTH : (band + 1) * WIDTH]).view(f"V{4 * WIDTH}").ravel()
        _, codes = np.unique(keys, return_inverse=True)
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1))
        for start, stop in pairwise(starts.tolist()):
            if stop - start > 1:
                members = order[start:stop].tolist()
                found.update((later, members[0]) for later in members[1:])
                found.update((later, earlier) for earlier, later in pairwise(members))
    return sorted(found)
