"""The data section: facts from hand-made files and from a real dataset, and a page that shows all of them."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from headrace.config.compose import load
from headrace.config.schema import SourceConfig
from headrace.corpus.build import build_corpus
from headrace.corpus.contamination import Item
from headrace.corpus.lock import build_lock
from headrace.corpus.quarantine import QUARANTINE
from headrace.reporting.data import (
    MOST_BARS,
    MOST_ITEMS,
    amounts_figure,
    contaminated,
    data_of,
    lengths_figure,
    read_data,
    section,
)
from headrace.reporting.data_facts import Amount, Data, Drop, FoundItem, Packing, SoughtTask
from headrace.reporting.facts import ReportFacts
from headrace.reporting.page import render
from headrace.stages.token_units import Documents, encoder_of, units_of
from headrace.tokens.indexed import IndexedReader
from headrace.tokens.loader import IGNORED, TokenDataset
from headrace.tokens.shards import finish, make_shard
from headrace.tokens.tokenizer import FIM_HOLE, build_tokenizer
from reporting.invented_data import HOSTILE, environment_data, mixed_data


def words_of(facts: ReportFacts, data: Data) -> str:
    html = render(replace(facts, data=data))
    part = html[html.index('<section id="data"') : html.index('<section id="configuration"')]
    return " ".join(re.sub("<[^>]*>", " ", part).replace("\xa0", " ").split())


def corpus_json() -> dict[str, Any]:
    kinds = {"code": {"documents": 2, "bytes": 50}, "docs": {"documents": 1, "bytes": 70}}
    sources = {"stdlib": {"documents": 1, "bytes": 20}, "packages/numpy": {"documents": 2, "bytes": 100}}
    mixture = {"web": {"documents": 1, "bytes": 20}, "code": {"documents": 2, "bytes": 100}}
    split = {"documents": 3, "bytes": 120, "kinds": kinds, "sources": sources, "mixture": mixture}
    empty = {"documents": 0, "bytes": 0, "kinds": {}, "sources": {}, "mixture": {}}
    packages = {"numpy": {"version": "2.4.6", "licence": "BSD-3-Clause"}}
    return {
        "splits": {"train": split, "validation": empty, "heldout": split},
        "dropped": {"contaminated": 1, "exact duplicate": 4},
        "dropped_by_source": {"web": {"exact duplicate": 1}, "code": {"contaminated": 1, "exact duplicate": 3}},
        "damaged": {"web": {"text is null": 2}},
        "damaged_examples": {"web": ["a.jsonl line 3: text is null"]},
        "quarantined": 2,
        "contamination": {
            "tasks": {"t": {"items": 9, "unchecked": 2}},
            "found": {"t/1": {"documents": 2, "share": 0.5}, "t/2": {"documents": 1, "share": 1.0}},
        },
        "environment": {"python": "3.11.7", "packages": packages, "refused": {"x": "no licence"}},
    }


def dataset_json(*sources: str) -> dict[str, Any]:
    def split(tokens: int, rows: dict[str, int], *shards: dict[str, Any]) -> dict[str, Any]:
        counts = {"fim": 1, "split_tokens": 5, "parity_checked": 2}
        return {"tokens": tokens, "rows": rows, "counts": counts, "lengths": [0, 0, 1, 2], "shards": list(shards)}

    train = [{"source": source, "tokens": 10 + 10 * number} for number, source in enumerate(sources)]
    one = {"source": "", "tokens": 24}
    return {
        "vocab_size": 1024, "engine": "fastokens", "version": "0.3.5", "unicode": "16.0", "fim_rate": 0.1,
        "split_rate": 0.0,
        "splits": {
            "train": split(sum(shard["tokens"] for shard in train), {"8": 5, "16": 2, "64": 1}, *train),
            "validation": split(0, {"8": 0, "16": 0, "64": 0}, {"source": "", "tokens": 0}),
            "heldout": split(24, {"8": 3, "16": 2, "64": 1}, one),
        },
    }  # fmt: skip


def test_one_source_is_told_apart_by_kind() -> None:
    data = data_of(corpus_json(), dataset_json("", ""), ())
    assert [(split.name, split.tokens, split.documents) for split in data.splits] == [
        ("train", 30, 3),
        ("held-out", 24, 3),
    ]
    assert (data.by, data.splits[0].parts) == ("kind", (Amount("docs", 1, 70), Amount("code", 2, 50)))
    assert data.splits[0].packed == (
        Packing(8, 5, 0.25),  # 40 elements, 30 tokens
        Packing(16, 2, pytest.approx(2 / 32)),
        Packing(64, 1, pytest.approx(34 / 64)),
    )
    assert data.splits[1].packed[0].padding == 0
    assert data.splits[0].lengths == (0, 0, 1, 2)
    assert (data.splits[0].rearranged, data.splits[0].split_tokens, data.splits[0].parity_checked) == (1, 5, 2)
    assert data.drops == (Drop("exact duplicate", 4, {}), Drop("contaminated", 1, {}))
    assert (data.tokenizer.engine, data.tokenizer.version, data.tokenizer.unicode) == ("fastokens", "0.3.5", "16.0")
    assert [(s.name, s.licence, s.documents, s.text_bytes) for s in data.sources] == [
        ("numpy 2.4.6", "BSD-3-Clause", 4, 200),
        ("Python standard library 3.11.7", "PSF-2.0", 2, 40),
    ]
    assert data.refused == {"x": "no licence"}


def test_named_sources_have_their_tokens() -> None:
    data = data_of({**corpus_json(), "environment": None}, dataset_json("web", "code", "code"), ())
    assert data.by == "source"
    assert data.splits[0].parts == (Amount("code", 2, 100, 50), Amount("web", 1, 20, 10))
    assert data.splits[1].parts == (Amount("code", 2, 100), Amount("web", 1, 20))  # one shard for all of them
    assert data.drops[0] == Drop("exact duplicate", 4, {"web": 1, "code": 3})
    assert [(each.source, each.rules, each.examples) for each in data.damaged] == [
        ("web", {"text is null": 2}, ("a.jsonl line 3: text is null",))
    ]
    assert data.contamination is not None
    assert data.contamination.found == (FoundItem("t/2", 1, 1.0), FoundItem("t/1", 2, 0.5))
    assert (data.contamination.tasks, data.contamination.dropped) == ((SoughtTask("t", 9, 2),), 1)
    assert ("stdlib", "not stated") in [(source.name, source.licence) for source in data.sources]


def test_a_search_that_was_not_made_is_no_search_without_result(demo_facts: ReportFacts) -> None:
    nothing = {"tasks": {"t": {"items": 9, "unchecked": 2}, "u": {"items": 5, "unchecked": 0}}, "found": {}}
    sought = "searched for 7 items of t (not for 2 that are too short), 5 items of u. No item was found."
    for table, words in ((None, "The text was not searched"), (nothing, sought)):
        data = data_of({**corpus_json(), "contamination": table}, dataset_json(""), ())
        assert words in words_of(demo_facts, data)


def test_the_page_shows_every_figure(demo_facts: ReportFacts) -> None:
    said = words_of(demo_facts, mixed_data())
    for words in (
        "129,280 tokenizers 0.23.2, Unicode 15.1",
        "web 9,212,000 40.2 GB",
        "32,768",
        "0.2 %",
        "asked for 10 %",
        "9 asked for 5 % of those that join punctuation and line ends",
        "the engine is the reference itself",
        "573,347 were duplicates of others, 4.75 %",
        "near duplicate all 512,345",
        "near duplicate code 345",
        "web not valid JSON 7",
        "7 of them lie in corpus/",
        "/artifact/quarantine.jsonl , each with its place and the first 4,096 bytes.",
        "web/&lt;b&gt;.jsonl line 4: not valid JSON &lt;script&gt;fetch(",
        "Found were 30; 37 training documents that contain one were dropped.",
        "humaneval_likelihood/HumanEval/9 ",
        "20 more are in corpus/",
        "Row 7 of train-00000-of-00008 : 249 of 256 tokens, from 2 documents",
        "&lt;｜fim▁begin｜&gt; import js &lt;｜fim▁hole｜&gt; loads(text) &lt;｜fim▁end｜&gt; on value = json.",
        "[1,204 characters]",
        "[padding: 7]",
    ):
        assert words in said, words
    assert "HumanEval/10" not in said


def test_the_demo_has_no_sources_to_tell_apart(demo_facts: ReportFacts) -> None:
    assert demo_facts.data is not None
    said = words_of(demo_facts, demo_facts.data)
    checked = sum(split.parity_checked for split in demo_facts.data.splits)
    assert f"{checked:,} documents encoded again by the reference, tokenizers: no difference" in said
    assert "exact duplicate 412 7.3 %" in said
    assert "No item was found" in said


def test_hostile_words_stay_words(demo_facts: ReportFacts) -> None:
    html = render(replace(demo_facts, data=mixed_data()))
    assert "<script" not in html and not set("\x00\x1b") & set(html)


def test_nothing_left_out_is_said(demo_facts: ReportFacts) -> None:
    said = words_of(demo_facts, replace(mixed_data(), drops=(), damaged=(), rows=(), sources=()))
    for words in ("No document was left out.", "No document was damaged.", "There is no row of training text.",
                  "The sources were not listed."):  # fmt: skip
        assert words in said


def test_many_parts_are_drawn_as_one_and_many_items_are_counted() -> None:
    mixed = mixed_data()
    parts = tuple(Amount(f"source{number}", 1, 10, 100 - number) for number in range(MOST_BARS + 5))
    drawn = amounts_figure(replace(mixed, splits=(replace(mixed.splits[0], parts=parts),)), "there")
    assert drawn is not None and "5 others" in drawn.wide and f"source{MOST_BARS}<" not in drawn.wide
    shown = section(mixed, "a", "b")
    assert (len(shown["listed"]), shown["unlisted"]) == (MOST_ITEMS, 20)


def test_text_without_documents_has_no_histogram() -> None:
    mixed = mixed_data()
    assert lengths_figure(replace(mixed, splits=()), "there") is None
    assert amounts_figure(replace(mixed, splits=()), "there") is None


SOURCES = {"web": "web.jsonl", "notes": "notes"}


@dataclass(frozen=True)
class Made:
    """A dataset of two sources and the texts it was made from."""

    corpus: Path
    tokenizer: Path
    tokens: Path
    texts: list[str]
    item: str


def prose(seed: int, words: int) -> str:
    """Words of which some have several tokens, and no two documents the same."""
    noise = random.Random(seed)
    return " ".join(
        f"{noise.choice(('mill', 'wheel', 'water', 'race', 'Mühle'))}{noise.randrange(60)}" for _ in range(words)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Files have relative names, on which the splits depend, so that the dataset is the same every time."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("data")
        patch.chdir(root)
        yield make(root)


def make(root: Path) -> Made:
    item = " ".join(f"letter{chr(97 + number)}{number}" for number in range(26))
    web = [prose(number, 10 + 7 * number) for number in range(40)]
    web += [
        f"{prose(100, 30)} {item} {prose(101, 9)}",
        f"{prose(102, 40)} {item}",
        web[7],
        f"{HOSTILE} {prose(103, 20)}",
    ]
    notes = [prose(200 + number, 5 + 3 * number) for number in range(30)]
    (root / "notes").mkdir()
    for number, text in enumerate(notes):
        (root / "notes" / f"{number:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in web]
    (root / "web.jsonl").write_text("\n".join([*lines[:5], '{"text": "cut <b>of', *lines[5:]]) + "\n")
    config = load(["experiment=tiny"])
    corpus_config = replace(
        load(["corpus=files", "corpus.paths=[web.jsonl]"]).corpus,
        paths=(),
        sources=tuple(SourceConfig(name, (path,), "text") for name, path in SOURCES.items()),
        max_damaged_fraction=0.1,
        contamination_tasks=("humaneval_likelihood",),
        validation_fraction=0.1,
        heldout_fraction=0.1,
    )  # fmt: skip
    config = replace(config, corpus=corpus_config, tokens=replace(config.tokens, fim_rate=0.4, row_lengths=(64, 256)))
    corpus, tokenizer, tokens = (root / name for name in ("corpus", "tokenizer", "tokens"))
    for folder in (corpus, tokenizer, tokens):
        folder.mkdir()
    lock = build_lock(corpus_config)
    build_corpus(corpus_config, lock, corpus, lambda message: None, items=[Item("humaneval_likelihood/x", item)])
    build_tokenizer(replace(config.tokenizer, vocab_size=400), corpus, tokenizer, lambda message: None)
    units = units_of(corpus, tokenizer, lock, config)
    documents, encoder = Documents(corpus, lock, config), encoder_of(tokenizer, config.tokens)
    for unit in units:
        make_shard(unit, documents.of(unit), encoder, config.tokens, tokens)
    finish(tokens, units)
    return Made(corpus, tokenizer, tokens, [*web, *notes], item)


@pytest.fixture(scope="module")
def data(made: Made) -> Data:
    return read_data(made.corpus, made.tokenizer, made.tokens)


def test_tokens_by_source_are_the_bytes_on_disk(made: Made, data: Data) -> None:
    assert data.by == "source" and {part.name for part in data.splits[0].parts} == {"web", "notes"}
    for part in data.splits[0].parts:
        files = list(made.tokens.glob(f"{part.name}.train-*.bin"))
        assert files and part.tokens == sum(path.stat().st_size for path in files) // 4
    for split, name in zip(data.splits, ("train", "validation", "heldout"), strict=True):
        assert split.tokens == sum(path.stat().st_size for path in made.tokens.glob(f"*{name}-*.bin")) // 4


def test_padding_is_what_the_loader_reads(made: Made, data: Data) -> None:
    split = TokenDataset(made.tokens).split("train")
    assert [packing.row_length for packing in data.splits[0].packed] == [64, 256]
    for packing in data.splits[0].packed:
        rows = np.stack([split.row(number, packing.row_length) for number in range(split.rows(packing.row_length))])
        assert packing.rows == len(rows)
        assert packing.padding == pytest.approx(float((rows == IGNORED).mean()), abs=1e-12)


def test_lengths_are_those_of_the_documents(made: Made, data: Data) -> None:
    lengths = [IndexedReader(path.with_suffix("")).lengths for path in made.tokens.glob("*train-*.bin")]
    found: dict[int, int] = {}
    for length in np.concatenate(lengths).tolist():
        found[length.bit_length() - 1] = found.get(length.bit_length() - 1, 0) + 1
    assert {k: count for k, count in enumerate(data.splits[0].lengths) if count} == found


def test_what_was_left_out_is_what_was_wrong_with_the_text(made: Made, data: Data) -> None:
    drops = {drop.rule: drop for drop in data.drops}
    assert (drops["exact duplicate"].documents, drops["exact duplicate"].by_source) == (1, {"web": 1})
    (damage,) = data.damaged
    assert data.quarantined == 1 == len((made.corpus / QUARANTINE).read_bytes().splitlines())
    assert (damage.source, damage.rules) == ("web", {"not valid JSON": 1})
    assert "web.jsonl:6: not valid JSON" in damage.examples[0]
    kept = [
        row for name in ("validation", "heldout") for row in pq.read_table(made.corpus / f"{name}.parquet").to_pylist()
    ]
    in_training = 2 - sum(made.item in row["text"] for row in kept)
    assert data.contamination is not None and data.contamination.dropped == in_training
    assert data.contamination.found == (FoundItem("humaneval_likelihood/x", 2, 1.0),)


def test_shown_rows_are_pieces_of_the_documents(made: Made, data: Data) -> None:
    pieces = [piece for row in data.rows for document in row.documents for piece in document]
    texts = [piece.text.rstrip("\ufffd") for piece in pieces if piece.kind == "text"]
    assert len(texts) >= 3 and all(any(text in whole for whole in made.texts) for text in texts)
    assert any(piece.kind == "control" and piece.text == FIM_HOLE for piece in pieces)
    assert {row.shard.split(".")[0] for row in data.rows} == {"web", "notes"}
    assert any(row.held > 1 for row in data.rows)


def test_rearranged_documents_are_counted(made: Made, data: Data) -> None:
    vocabulary = json.loads((made.tokenizer / "tokenizer.json").read_text())["added_tokens"]
    hole = next(token["id"] for token in vocabulary if token["content"] == FIM_HOLE)
    stored = np.concatenate([np.fromfile(path, "<i4") for path in made.tokens.glob("*train-*.bin")])
    assert data.splits[0].rearranged == int((stored == hole).sum()) > 0
    assert data.splits[1].rearranged == 0


def test_a_real_dataset_makes_a_page(data: Data, demo_facts: ReportFacts) -> None:
    said = words_of(demo_facts, data)
    assert "humaneval_likelihood/x 2 100 %" in said and "web.jsonl" in said


def test_items_that_were_found_are_counted_by_task() -> None:
    said = "30, their documents dropped; 4 of 164 items too short to be sought"
    assert contaminated(mixed_data(), None) == {"humaneval_likelihood": said}
    assert contaminated(environment_data(), None) == {"humaneval_likelihood": "none"}
    assert contaminated(replace(environment_data(), contamination=None), None) == contaminated(None, None) == {}


def test_text_behind_other_weights_was_not_searched_and_is_not_said_to_be_clean(demo_facts: ReportFacts) -> None:
    begun = replace(demo_facts, weights_from="0f3b6a1c9d2e@1400")
    unknown = "not known: weights come from 0f3b6a1c9d2e@1400; in this run's text: none"
    assert unknown in unescape(render(begun)) and "not known" not in render(demo_facts)
