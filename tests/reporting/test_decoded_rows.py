"""Rows as text: documents end where they end, control tokens are told apart from text that spells them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.artifacts.files import write_json
from headrace.reporting.data_facts import ExampleRow, Piece
from headrace.reporting.decoded_rows import example_rows, shortened
from headrace.reporting.facts import ReportFacts
from headrace.reporting.page import render
from headrace.tokens.engine import open_engine
from headrace.tokens.plan import Unit
from headrace.tokens.shards import Encoded, finish, write_shard
from headrace.tokens.tokenizer import CONTROL, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, train
from reporting.invented_data import HOSTILE, environment_data

ID = {token: number for number, token in enumerate(CONTROL)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No merges: a token is a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(train(iter(()), 262).to_str())
    return folder


class Shards:
    """Writes shards of documents given as texts and control tokens."""

    def __init__(self, tokenizer: Path, out: Path) -> None:
        self.encode = open_engine("tokenizers", tokenizer / "tokenizer.json").encode
        self.out = out
        self.units: list[Unit] = []
        self.length = 32

    def ids(self, *pieces: str) -> list[int]:
        """Control tokens are given as elements of their own."""
        return [id_ for piece in pieces for id_ in ([ID[piece]] if piece in ID else self.encode([piece])[0].tolist())]

    def add(self, documents: Sequence[Sequence[str]], source: str = "") -> None:
        encoded = [self.ids(*pieces, EOS) for pieces in documents]
        unit = Unit("train", 0, 1, source)
        lengths = np.array([len(ids) for ids in encoded], np.int32)
        facts = write_shard(self.out / unit.name, iter([Encoded(np.concatenate(encoded).astype(np.int32), lengths, 1)]),
                            [self.length])  # fmt: skip
        inputs = {"eos": ID[EOS], "vocab_size": 262, "row_lengths": [self.length]}
        write_json(self.out / f"{unit.name}.json", {"inputs": inputs, "counts": {}, **facts})
        self.units.append(unit)

    def rows(self, tokenizer: Path) -> tuple[ExampleRow, ...]:
        finish(self.out, self.units)
        return example_rows(tokenizer, self.out)


@pytest.fixture
def shards(tokenizer: Path, tmp_path: Path) -> Shards:
    return Shards(tokenizer, tmp_path)


def kinds(row: ExampleRow) -> list[list[tuple[str, str]]]:
    return [[(piece.kind, piece.text) for piece in document] for document in row.documents]


def test_text_that_spells_a_control_token_stays_text(shards: Shards, tokenizer: Path) -> None:
    quoted = f"x{EOS}"
    shards.length = 64
    shards.add([[quoted]])
    (row,) = shards.rows(tokenizer)
    assert kinds(row)[0] == [("text", quoted), ("control", EOS)]
    assert row.held == 1 and row.tokens == len(quoted.encode()) + 1


def test_boundaries_and_padding_are_shown(shards: Shards, tokenizer: Path) -> None:
    shards.add([["one"], ["two two"], ["three"]])
    (row,) = shards.rows(tokenizer)
    documents = kinds(row)
    assert sorted(documents[:3]) == [[("text", t), ("control", EOS)] for t in ("one", "three", "two two")]
    assert documents[3] == [("note", "padding: 14")]  # 32 - 4 - 8 - 6
    assert (row.held, row.tokens, row.length, row.shard, row.row) == (3, 18, 32, "train-00000-of-00001", 0)


def test_a_document_over_several_rows_says_so(shards: Shards, tokenizer: Path) -> None:
    shards.add([["0123456789" * 7]])  # 71 tokens: rows of 32, 32 and 7
    (row,) = shards.rows(tokenizer)
    (document,) = kinds(row)
    assert document == [("text", ("0123456789" * 4)[:32]), ("note", "goes on in the next row")]


def test_a_rearranged_document_is_looked_for(shards: Shards, tokenizer: Path) -> None:
    plain = [[f"document {number:03} without any gap"] for number in range(99)]  # 31 bytes and EOS: a row each
    shards.add([*plain, [FIM_BEGIN, "<script>", FIM_HOLE, "</script>", FIM_END, "alert(1)"]])
    rows = shards.rows(tokenizer)
    assert len(rows) == 2 and rows[0].row == 0
    assert kinds(rows[1])[0] == [
        ("control", FIM_BEGIN),
        ("text", "<script>"),
        ("control", FIM_HOLE),
        ("text", "</script>"),
        ("control", FIM_END),
        ("text", "alert(1)"),
        ("control", EOS),
    ]


def test_most_of_a_rearranged_document_is_shown(shards: Shards, tokenizer: Path) -> None:
    shards.add([[FIM_BEGIN, "p" * 40, FIM_HOLE, "suffix", FIM_END, "middle"]])  # 56 tokens: rows of 32 and 24
    first, second = shards.rows(tokenizer)
    assert kinds(first) == [[("control", FIM_BEGIN), ("text", "p" * 31), ("note", "goes on in the next row")]]
    assert kinds(second) == [
        [
            ("note", "begins in an earlier row"),
            ("text", "p" * 9),
            ("control", FIM_HOLE),
            ("text", "suffix"),
            ("control", FIM_END),
            ("text", "middle"),
            ("control", EOS),
        ],
        [("note", "padding: 8")],
    ]


def test_each_source_has_a_row(shards: Shards, tokenizer: Path) -> None:
    for source in ("web", "code", "proofs", "poems"):
        shards.add([[f"from {source} alone, word for word"[:31].ljust(31, ".")]], source)
    assert [row.shard.split(".")[0] for row in shards.rows(tokenizer)] == ["web", "code", "proofs"]


def test_a_character_cut_in_two_is_marked_and_nothing_is_lost(shards: Shards, tokenizer: Path) -> None:
    shards.add([["x" + "水" * 20]])  # 61 bytes: the first row ends after the first byte of a character
    (row,) = shards.rows(tokenizer)
    assert kinds(row)[0][0] == ("text", "x" + "水" * 10 + "\ufffd")


def test_many_documents_are_counted(shards: Shards, tokenizer: Path) -> None:
    shards.add([["a"]] * 16)
    (row,) = shards.rows(tokenizer)
    assert row.held == 16 and len(row.documents) == 7
    assert kinds(row)[6] == [("note", "10 more")]


def test_a_long_text_loses_its_middle() -> None:
    text = "".join(map(str, range(1000)))
    head, note, tail = shortened(text)
    assert text.startswith(head.text) and text.endswith(tail.text)
    assert note.text == f"{len(text) - len(head.text) - len(tail.text):,} characters"
    assert list(shortened(text[:500])) == [Piece("text", text[:500])]


def test_hostile_text_is_shown_and_does_nothing(shards: Shards, tokenizer: Path, demo_facts: ReportFacts) -> None:
    shards.length = 256
    shards.add([[HOSTILE], [FIM_BEGIN, "\x1b]0;owned\x07", FIM_HOLE, "<b>\u202e", FIM_END, "\x9b"]])
    html = render(replace(demo_facts, data=replace(environment_data(), rows=shards.rows(tokenizer))))
    assert "<script" not in html and "<b>" not in html
    part = html[html.index('<section id="data"') : html.index('<section id="configuration"')]
    assert "&lt;script&gt;fetch(" in part and "&lt;b&gt;\u27e8U+202E\u27e9" in part
    assert "\u241b]0;owned\u2407" in part and "\u27e8U+009B\u27e9" in part
    assert not set("\x00\x07\x1b\x9b\u202e") & set(html)
    for token in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS):
        assert f'<bdi class="control">{token.replace("<", "&lt;").replace(">", "&gt;")}</bdi>' in part
