"""Near duplicates: by signatures the later of two similar texts goes, by real MinHash where rensa is installed."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.config.schema import CorpusConfig, NearDuplicatesConfig
from headrace.corpus.build import build_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.lock import build_lock
from headrace.corpus.near_duplicates import VALUES, near_duplicates, open_signer, shingles
from headrace.corpus.pieces import pieces
from headrace.errors import UserError

CONFIG = NearDuplicatesConfig(0.72, 5)
needs_rensa = pytest.mark.skipif(importlib.util.find_spec("rensa") is None, reason="rensa is not installed")


def signature(generator: np.random.Generator, like: bytes | None = None, same: int = 0) -> bytes:
    values = generator.integers(0, 2**32, VALUES, dtype=np.uint32)
    if like is not None:
        values[:same] = np.frombuffer(like, dtype="<u4")[:same]
    return values.tobytes()


def test_the_later_of_a_similar_pair_goes_in_reading_order() -> None:
    generator = np.random.default_rng(0)
    first = signature(generator)
    near, far = signature(generator, first, 90), signature(generator, first, 70)
    other = signature(generator)
    signatures = [other, first, far, near, signature(generator, other, VALUES)]
    assert near_duplicates(signatures, 0.72) == [3, 4]  # 90 of 112 is 0.80, 70 is 0.63
    assert near_duplicates(signatures, 0.6) == [2, 3, 4]
    assert near_duplicates([first], 0.72) == []


def test_what_resembles_only_a_dropped_text_stays() -> None:
    generator = np.random.default_rng(1)
    first = signature(generator)
    second = np.frombuffer(signature(generator, first, 84), dtype="<u4").copy()
    third = generator.integers(0, 2**32, VALUES, dtype=np.uint32)
    third[28:] = second[28:]  # shares 84 values with the second, 56 with the first
    assert near_duplicates([first, second.tobytes(), third.tobytes()], 0.72) == [1]


def test_shingles_are_runs_of_words() -> None:
    assert shingles("One, two THREE four", 3) == ["one two three", "two three four"]
    assert shingles("one", 3) == ["one"]


def test_without_rensa_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(UserError, match=r"^corpus\.near_duplicates needs the package rensa: pip install rensa$"):
        open_signer(CONFIG)


@needs_rensa
def test_signatures_estimate_the_similarity_of_texts() -> None:
    generator = random.Random(0)
    sign = open_signer(CONFIG)
    words = [str(generator.randrange(10**6)) for _ in range(2000)]
    for edits in (10, 60, 200):
        edited = list(words)
        for place in generator.sample(range(2000), edits):
            edited[place] = "edited" + str(place)
        one, two = (set(shingles(" ".join(each), 5)) for each in (words, edited))
        exact = len(one & two) / len(one | two)
        a, b = (np.frombuffer(sign(" ".join(each)), dtype="<u4") for each in (words, edited))
        assert abs(np.mean(a == b) - exact) < 4 * (exact * (1 - exact) / VALUES) ** 0.5
    assert sign("the same text") == open_signer(CONFIG)("the same text")


@needs_rensa
def test_a_corpus_drops_them_when_asked(mixed: CorpusConfig, tmp_path: Path) -> None:
    generator = random.Random(1)
    text = " ".join(str(generator.randrange(10**6)) for _ in range(500))
    Path("notes/9/original.txt").write_text(text)
    Path("notes/a").mkdir()
    Path("notes/a/copy.txt").write_text(text + " and a few words more")
    one = replace(mixed, sources=(mixed.sources[0], mixed.sources[2]), near_duplicates=CONFIG)
    (tmp_path / "out").mkdir()
    lock = build_lock(one)
    summary = build_corpus(one, lock, tmp_path / "out", print)
    splits = ("train", "validation", "heldout")
    kept = {row[2] for split in splits for row in selected_documents(tmp_path / "out", lock, one, pieces(lock), split)}
    assert text in kept and not any(other.startswith(text) and other != text for other in kept)
    assert summary["dropped"]["near duplicate"] + len(kept) == 400 + 50
