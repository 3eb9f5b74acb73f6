"""Word n-grams by numpy: the n-grams that a regular expression finds, wherever a text stands."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.corpus.word_hashes import N, text_slices, word_grams

TEXT = st.text(st.sampled_from("abCDé0 1.,\n漢\u2019\u3000\u00a0-"), max_size=120)
WORDS = re.compile(r"[^\W_]+")


def plain_grams(text: str) -> list[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return [tuple(words[start : start + N]) for start in range(len(words) - N + 1)]


@given(st.lists(TEXT, max_size=6))
def test_they_are_those_of_a_regular_expression(texts: list[str]) -> None:
    grams = word_grams(texts)
    expected = [
        (number, position, gram) for number, text in enumerate(texts) for position, gram in enumerate(plain_grams(text))
    ]
    assert grams.text.tolist() == [number for number, _, _ in expected]
    assert grams.position.tolist() == [position for _, position, _ in expected]
    by_hash: dict[int, tuple[str, ...]] = {}
    by_gram: dict[tuple[str, ...], int] = {}
    for value, (_, _, gram) in zip(grams.hashes.tolist(), expected, strict=True):
        assert by_hash.setdefault(value, gram) == gram and by_gram.setdefault(gram, value) == value


def test_a_text_has_the_same_hashes_in_any_company() -> None:
    text = " ".join(f"word{number}" for number in range(40))
    alone = word_grams([text]).hashes
    among = word_grams(["x y z", "", text, "!" * 100_000, text.upper() + "."])
    for number in (2, 4):
        assert np.array_equal(among.hashes[among.text == number], alone)


def test_words_that_differ_in_order_or_borders_have_other_hashes() -> None:
    words = [f"w{number}" for number in range(N)]
    swapped = [words[1], words[0], *words[2:]]
    shifted = ["w0w", "1", *words[2:]]
    values = [word_grams([" ".join(each)]).hashes.tolist() for each in (words, swapped, shifted)]
    assert all(len(value) == 1 for value in values) and len({value[0] for value in values}) == 3


def test_a_million_grams_do_not_collide() -> None:
    generator = np.random.default_rng(0)
    text = " ".join(generator.integers(0, 10**9, 1_000_000).astype(str).tolist())
    hashes = word_grams([text]).hashes
    assert len(np.unique(hashes)) == len(hashes) == 1_000_000 - N + 1
    assert abs(float((hashes >> np.uint64(63)).mean()) - 0.5) < 0.003  # six deviations


SHORT_WORDS = st.sampled_from(["a", "B2", "Caf", "d\u00e9", "\u6f22", "\u039f\u03a3"])
GAPS = st.sampled_from([" ", "\n", "\u2019", "\u3000", "\u00a0", ".'"])


@given(st.lists(st.tuples(SHORT_WORDS, GAPS), min_size=150, max_size=300), st.integers(130, 200))
def test_slices_have_the_grams_of_the_whole(pairs: list[tuple[str, str]], most: int) -> None:
    text = "".join(word + gap for word, gap in pairs)
    slices = list(text_slices(text, most))
    assert len(slices) > 1 and all(len(each) <= most for each in slices)
    assert all(each in text for each in slices)
    whole, parts = word_grams([text]).hashes, word_grams(slices).hashes
    assert set(whole.tolist()) <= set(parts.tolist())


def test_a_word_longer_than_a_slice_hides_nothing_beside_it_and_its_pieces_are_no_words() -> None:
    words = [f"w{number}" for number in range(N)]
    for length in (90, 100, 150, 1000, 1001):
        text = " ".join([*words, "x" * length, *words, "y" * length, " " * length, *words])
        hashes = [word_grams([part]).hashes.tolist() for part in text_slices(text, 200)]
        (known,) = word_grams([" ".join(words)]).hashes.tolist()
        assert sum(known in each for each in hashes) >= 3
    tail = "x" * 10_000 + " ".join(["z", *words[1:]])
    (false,) = word_grams([" ".join(["xz", *words[1:]])]).hashes.tolist()
    assert all(false not in word_grams([part]).hashes.tolist() for part in text_slices(tail, 200))
