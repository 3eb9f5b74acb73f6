from collections import Counter, defaultdict

import numpy as np
import pytest

from headrace.evaluation.ngrams import NAMES, NGramModel, fit, score


class Dictionary:
    """Modified Kneser-Ney as the formula reads, one n-gram at a time in dictionaries."""

    def __init__(self, rows: np.ndarray, order: int, vocabulary: int, discounts: np.ndarray) -> None:
        self.vocabulary, self.discounts = vocabulary, discounts
        self.counts: list[dict[tuple[int, ...], int]] = []
        for length in range(1, order + 1):
            if length == order:
                counts = Counter(gram for row in rows for gram in self.grams(row, length))
            else:
                left = defaultdict(set)
                for row in rows:
                    for gram in self.grams(row, length + 1):
                        left[gram[1:]].add(gram[0])
                counts = Counter({gram: len(neighbours) for gram, neighbours in left.items()})
            self.counts.append(counts)

    @staticmethod
    def grams(row: np.ndarray, length: int) -> list[tuple[int, ...]]:
        tokens = row.tolist()
        return [tuple(tokens[end - length : end]) for end in range(max(length, 2), len(tokens) + 1)]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        below = self.probability(context[1:], token) if context else 1 / self.vocabulary
        counts, discounts = self.counts[len(context)], self.discounts[len(context)]
        followers = [count for gram, count in counts.items() if gram[:-1] == context]
        if not followers:
            return below
        own = counts.get((*context, token), 0)
        kept = own - (discounts[min(own, 3) - 1] if own else 0)
        freed = sum(discounts[min(count, 3) - 1] for count in followers)
        return (kept + freed * below) / sum(followers)


@pytest.fixture(scope="module")
def small_rows() -> np.ndarray:
    generator = np.random.default_rng(2)
    chain = generator.dirichlet(np.full(12, 0.3), size=12)
    rows = np.zeros((60, 16), dtype=np.int32)
    for row in rows:
        for column in range(1, 16):
            row[column] = generator.choice(12, p=chain[row[column - 1]])
    return rows


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_equal_a_dictionary_implementation(small_rows: np.ndarray, order: int) -> None:
    model = NGramModel(small_rows, order, 14)
    reference = Dictionary(small_rows, order, 14, model.discounts)
    unseen = np.random.default_rng(5).integers(0, 14, size=(6, 10))
    for tokens in (small_rows[:4], unseen):
        scores = model.log_probabilities(tokens)
        for row, own in zip(tokens.tolist(), scores, strict=True):
            for target in range(1, len(row)):
                context = tuple(row[max(0, target - order + 1) : target])
                if len(context) < order - 1:
                    assert np.isnan(own[target - 1])
                else:
                    expected = np.log(reference.probability(context, row[target]))
                    assert own[target - 1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_over_the_vocabulary(small_rows: np.ndarray, order: int) -> None:
    model = NGramModel(small_rows, order, 14)
    for context in ([3, 5], [13, 13], [0, 13]):  # seen, never seen, half seen
        tokens = np.array([[*context, token] for token in range(14)])
        assert np.exp(model.log_probabilities(tokens)[:, -1]).sum() == pytest.approx(1, abs=1e-12)


def test_row_starts_use_the_longest_order_that_fits(small_rows: np.ndarray) -> None:
    models = fit(small_rows, 14)
    scores = {order: score(models, order, small_rows[:5]) for order in NAMES}
    assert not np.isnan(scores[3]).any()
    assert np.array_equal(scores[3][:, 0], scores[2][:, 0])
    assert not np.array_equal(scores[3][:, 1:], scores[2][:, 1:])


def test_ngrams_do_not_cross_rows() -> None:
    rows = np.array([[0, 1, 2, 3], [4, 5, 6, 7]] * 12)
    model = NGramModel(rows, 2, 9)
    crossing, inside = np.array([[3, 4]]), np.array([[3, 8]])  # 3 then 4 follow each other only across a row's end
    assert model.log_probabilities(np.array([[2, 3]]))[0, 0] > np.log(0.5)
    unigram_like = model.log_probabilities(np.array([[8, 4]]))[0, 0]  # a context never seen
    assert model.log_probabilities(crossing)[0, 0] == unigram_like
    assert model.log_probabilities(inside)[0, 0] < unigram_like + 1e-9


def test_tuned_discounts_beat_the_closed_form_on_the_rows_kept_back_and_higher_orders_win(
    small_rows: np.ndarray,
) -> None:
    from headrace.evaluation import ngrams

    generator = np.random.default_rng(4)
    chain = generator.dirichlet(np.full(40, 0.05), size=(40, 40))
    rows = np.zeros((400, 30), dtype=np.int64)
    for row in rows:
        for column in range(2, 30):
            row[column] = generator.choice(40, p=chain[row[column - 2], row[column - 1]])
    train, test = rows[:360], rows[360:]
    losses = {order: -score(fit(train, 40), order, test).mean() for order in NAMES}
    assert losses[3] < losses[2] < losses[1] < np.log(40)
    kept_back = train[19::20]
    rest = np.delete(train, np.s_[19::20], axis=0)
    tables = ngrams._count(rest, 3, 40)
    features = ngrams._look_up(tables, ngrams._codes(kept_back, 3, 40).reshape(-1), 40)
    closed = np.stack([ngrams._closed_form(table.counts) for table in tables])
    tuned = NGramModel(train, 3, 40).discounts
    losses_kept = [-np.log(ngrams._interpolate(features, each, 40)).mean() for each in (closed, tuned)]
    assert losses_kept[1] < losses_kept[0]


def test_a_row_seen_again_is_no_new_evidence(small_rows: np.ndarray) -> None:
    once, twice = fit(small_rows, 14), fit(np.concatenate([small_rows, small_rows[:30]]), 14)
    assert twice[1].rows == len(np.unique(small_rows, axis=0))
    for order in NAMES:
        assert np.array_equal(score(once, order, small_rows), score(twice, order, small_rows))


def test_large_vocabularies_keep_their_codes_apart() -> None:
    vocabulary = 129_280
    generator = np.random.default_rng(0)
    rows = generator.integers(vocabulary - 40, vocabulary, size=(50, 20))
    reference = Dictionary(rows, 3, vocabulary, NGramModel(rows, 3, vocabulary).discounts)
    scores = NGramModel(rows, 3, vocabulary).log_probabilities(rows[:1])
    row = rows[0].tolist()
    for target in range(2, 20):
        expected = np.log(reference.probability((row[target - 2], row[target - 1]), row[target]))
        assert scores[0, target - 1] == pytest.approx(expected, abs=1e-10)
