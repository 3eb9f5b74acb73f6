"""Counts: what the documents themselves add up to."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrace.config.schema import CorpusConfig
from headrace.corpus.build import build_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.lock import build_lock
from headrace.corpus.pieces import pieces
from headrace.corpus.tally import Survey
from headrace.errors import UserError

SPLITS = ("train", "validation", "heldout")


def test_counts_are_those_of_the_documents(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock, out = build_lock(mixed), tmp_path / "out"
    out.mkdir()
    summary = build_corpus(mixed, lock, out, print, piece_bytes=20_000)
    for split in SPLITS:
        documents, sizes = Counter[str](), Counter[str]()
        for _, source, text in selected_documents(out, lock, mixed, pieces(lock, 20_000), split):
            documents[source] += 1
            sizes[source] += len(text.encode())
        found = summary["splits"][split]
        assert found["mixture"] == {
            name: {"documents": documents[name], "bytes": sizes[name]} for name in sorted(documents)
        }
        assert found["documents"] == documents.total() and found["bytes"] == sizes.total()
        assert found["kinds"] == found["mixture"]  # a named source is a kind of its own
        assert found["sources"] == found["mixture"]  # each source has one root, of its own name
        table = pq.read_table(out / "pieces.parquet")
        assert sum(table[f"{split}_bytes"].to_pylist()) == sizes.total()
    assert summary["documents"] + sum(summary["dropped"].values()) == sum(table["rows"].to_pylist())


def test_damage_of_one_source_is_not_hidden_by_a_large_other() -> None:
    survey = Survey(
        ["big", "small"], [10**9, 99], {"small": Counter({"not UTF-8": 1})}, {"small": ["a.txt: not UTF-8"]}
    )
    survey.refuse_damage(0.01)
    with pytest.raises(UserError, match=r"^a\.txt: not UTF-8: 1 of 100 documents of the source small are damaged"):
        survey.refuse_damage(0.009)
