"""Unigram, bigram and trigram models: interpolated modified Kneser-Ney over token ids, on exactly the rows the model
saw.

A small network that does not beat counting has learnt little, so the counts get every advantage. Smoothing is Chen and
Goodman's modified Kneser-Ney (1998, section 4.1.6; Kneser and Ney 1995): an n-gram seen c times keeps c - D(c), with
three discounts D(1), D(2), D(3+), and what is taken away goes to the next lower order, whose counts are numbers of
distinct left neighbours instead of occurrences; below the unigram lies the uniform distribution over the vocabulary.

    p(w | h) = (c(h w) - D(c(h w))) / c(h) + (D1 n1(h) + D2 n2(h) + D3 n3(h)) / c(h) * p(w | shorter h)

Discounts are tuned on training text: with the counts of 19 of 20 rows, a coordinate search minimises the loss on the
twentieth, starting from Chen and Goodman's closed form; with fewer than 20 rows the closed form stays. The final
counts are those of all rows.

Rows are independent: no n-gram crosses from one to the next, as in training. A target with one token of context (the
first of a row) is scored by the bigram model, also under the trigram's name. All of it is sorted int64 codes and
binary search: ten million tokens take seconds; the rows must fit in memory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.integer]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}

_HELD_IN = 20  # one training row in so many is kept back for tuning
_TUNING_TOKENS = 60_000
_STEPS = (0.2, 0.1, 0.05, 0.02)  # of the coordinate search
_LEAST = 0.02  # a discount of 0 would give unseen n-grams no probability


@dataclass(frozen=True)
class _Table:
    """Counts of one order; `keys` are sorted codes of n-grams, context in the high digits; `contexts` are sorted."""

    keys: Ints
    counts: Ints
    contexts: Ints
    totals: Ints  # per context
    kinds: Ints  # per context, [., 3]: continuations counted once, twice, three times or more


@dataclass(frozen=True)
class _Features:
    """What the interpolation needs to know at one order about each of N targets."""

    counts: Ints  # [N], of the n-gram
    totals: Ints  # [N], of its context
    kinds: Ints  # [N, 3]


class NGramModel:
    """A model of one order, 1 to 3.

    rows: integer [R, L + 1], each training row once; vocab_size: V, above all ids.
    `discounts` [order, 3]: D(1), D(2), D(3+) of each order, lowest first; `rows` and `targets`: what was counted.
    """

    def __init__(self, rows: Rows, order: int, vocab_size: int) -> None:
        assert order in NAMES and vocab_size**order < 2**63 and len(rows) > 0 and rows.shape[1] > order
        assert int(rows.min()) >= 0 and int(rows.max()) < vocab_size
        self.order, self.vocab_size = order, vocab_size
        self.rows, self.targets = len(rows), len(rows) * (rows.shape[1] - 1)
        self._tables = _count(rows, order, vocab_size)
        held_in = np.arange(len(rows)) % _HELD_IN == _HELD_IN - 1
        self.discounts = np.stack([_closed_form(table.counts) for table in self._tables])
        if held_in.any():
            self.discounts = _tune(self.discounts, _count(rows[~held_in], order, vocab_size), rows[held_in], vocab_size)

    def log_probabilities(self, tokens: Rows) -> Floats:
        """tokens [B, T + 1] -> natural log-probabilities [B, T] of tokens[:, 1:] given the tokens before in the row.

        NaN where fewer than order - 1 tokens come before; `score` fills those from the lower order.
        """
        scores = np.full((len(tokens), tokens.shape[1] - 1), np.nan)
        codes = _codes(tokens, self.order, self.vocab_size)
        features = _look_up(self._tables, codes.reshape(-1), self.vocab_size)
        values = np.log(_interpolate(features, self.discounts, self.vocab_size))
        scores[:, scores.shape[1] - codes.shape[1] :] = values.reshape(codes.shape)
        return scores


def fit(rows: Rows, vocab_size: int) -> dict[int, NGramModel]:
    """Models of all three orders. A row that occurs again (a later epoch) is counted once: repeats are no evidence."""
    plain = np.ascontiguousarray(rows)
    packed = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1]))).reshape(-1)
    first = np.sort(np.unique(packed, return_index=True)[1])
    distinct = plain if len(first) == len(plain) else plain[first]
    return {order: NGramModel(distinct, order, vocab_size) for order in NAMES}


def score(models: dict[int, NGramModel], order: int, tokens: Rows) -> Floats:
    """Log-probabilities [B, T] under one order; where a row's start gives too little context, under the one below."""
    scores = models[order].log_probabilities(tokens)
    short = np.isnan(scores)
    return np.where(short, score(models, order - 1, tokens), scores) if short.any() else scores


def _codes(rows: Rows, order: int, vocab_size: int) -> Ints:
    """Each target's n-gram as one number in base V, its last token the lowest digit; a column per target with one."""
    first = max(order - 1, 1)  # column of the first target with order - 1 tokens before it; column 0 is context only
    width = max(rows.shape[1] - first, 0)
    codes = np.zeros((len(rows), width), dtype=np.int64)
    for back in range(order - 1, -1, -1):
        codes = codes * vocab_size + rows[:, first - back : first - back + width]
    return codes


def _count(rows: Rows, order: int, vocab_size: int) -> list[_Table]:
    """Tables of orders 1 to `order`: occurrences at the highest, distinct left neighbours below."""
    tables = []
    for lower in range(1, order):
        longer, _ = _runs(np.sort(_codes(rows, lower + 1, vocab_size), axis=None))
        tables.append(_table(longer % vocab_size**lower, vocab_size))
    return [*tables, _table(_codes(rows, order, vocab_size).reshape(-1), vocab_size)]


def _table(codes: Ints, vocab_size: int) -> _Table:
    keys, starts = _runs(np.sort(codes))
    counts = np.diff(starts, append=len(codes))
    contexts, starts = _runs(keys // vocab_size)
    seen = np.stack([counts == 1, counts == 2, counts >= 3], axis=1).astype(np.int64)
    return _Table(keys, counts, contexts, np.add.reduceat(counts, starts), np.add.reduceat(seen, starts, axis=0))


def _runs(ordered: Ints) -> tuple[Ints, Ints]:
    """Distinct values of a sorted array and where each begins; np.unique hashes, which is ten times slower here."""
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    return ordered[starts], starts


def _look_up(tables: list[_Table], codes: Ints, vocab_size: int) -> list[_Features]:
    features = []
    for order, table in enumerate(tables, start=1):
        own = codes % vocab_size**order
        gram, known = _find(table.keys, own)
        context, seen = _find(table.contexts, own // vocab_size)
        features.append(
            _Features(
                counts=np.where(known, table.counts[gram], 0),
                totals=np.where(seen, table.totals[context], 0),
                kinds=np.where(seen[:, None], table.kinds[context], 0),
            )
        )
    return features


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Positions of `wanted` in the sorted `keys`, and whether they are there."""
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return position, keys[position] == wanted


def _interpolate(features: list[_Features], discounts: Floats, vocab_size: int) -> Floats:
    """Probability of each target [N]; an unseen context passes all of it to the lower order."""
    probability = np.full(len(features[0].counts), 1 / vocab_size)
    for own, discount in zip(features, discounts, strict=True):
        kept = own.counts - np.concatenate([[0.0], discount])[np.minimum(own.counts, 3)]
        mixed = (kept + (own.kinds @ discount) * probability) / np.maximum(own.totals, 1)
        probability = np.where(own.totals > 0, mixed, probability)
    return probability


def _closed_form(counts: Ints) -> Floats:
    """D(1), D(2), D(3+) from the numbers of n-grams counted once to four times (Chen and Goodman 1998, eq. 26)."""
    n1, n2, n3, n4 = (max(int((counts == times).sum()), 1) for times in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    estimate = np.array([1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    clipped: Floats = np.clip(estimate, _LEAST, [1.0, 2.0, 3.0])
    return clipped


def _tune(start: Floats, tables: list[_Table], held_in: Rows, vocab_size: int) -> Floats:
    """Coordinate search over the discounts [order, 3] for the least loss on the rows kept back."""
    codes = _codes(held_in, len(tables), vocab_size).reshape(-1)[:_TUNING_TOKENS]
    features = _look_up(tables, codes, vocab_size)

    def loss(candidate: Floats) -> float:
        return -float(np.log(_interpolate(features, candidate, vocab_size)).mean())

    best, least = start, loss(start)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for place in np.ndindex(best.shape):
                for change in (step, -step):
                    candidate = best.copy()
                    candidate[place] = np.clip(candidate[place] + change, _LEAST, place[1] + 1)
                    value = loss(candidate)
                    if value < least - 1e-7:
                        best, least, improved = candidate, value, True
    return best
