"""A Hub dataset through `datasets`' streaming: one shard at a time, at one commit, in the corpus like any source."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig, SourceConfig
from headrace.corpus.build import build_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.hub_stream import describe, read_stream
from headrace.corpus.lock import build_lock
from headrace.corpus.pieces import pieces
from headrace.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = f"datasets://me/words?split=train&config=en&revision={COMMIT}"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real streaming of `datasets` over three local files in the Hub's place."""
    monkeypatch.chdir(tmp_path)
    files = []
    for shard in range(3):
        rows = [{"body": f"shard {shard} row {number} " * 9} for number in range(20)]
        if shard == 1:
            rows[4] = {"body": None}  # type: ignore[dict-item]
        Path(f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / f"{shard}.jsonl"))
    original: Callable[..., Any] = datasets.load_dataset

    def local(path: str, name: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        if (path, name, split, revision, streaming) != ("me/words", "en", "train", COMMIT, True):
            raise ValueError(f"there is no {path} {name} {split} {revision}")
        return original("json", data_files=files, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)


def test_shards_are_read_by_themselves() -> None:
    assert describe(ADDRESS).identity == f"revision:{COMMIT}" and describe(ADDRESS).shards == 3
    rows = list(read_stream(ADDRESS, "body", range(1, 2)))
    assert [label for label, _ in rows] == [f"1-{number}" for number in range(20)]
    assert rows[0][1] == "shard 1 row 0 " * 9 and rows[4][1] is None


def test_it_is_a_source_like_any_other(tmp_path: Path) -> None:
    base = load(["corpus=files", "corpus.paths=[x]", "corpus.contamination_tasks=[]"]).corpus
    config: CorpusConfig = replace(
        base,
        paths=(),
        sources=(SourceConfig("stream", (ADDRESS,), "body"),),
        validation_fraction=0.1,
        heldout_fraction=0.1,
        max_damaged_fraction=0.1,
    )
    lock, out = build_lock(config), tmp_path / "out"
    out.mkdir()
    summary = build_corpus(config, lock, out, print)
    assert summary["documents"] == 59 and summary["damaged"] == {"stream": {"text is null": 1}}
    assert summary["damaged_examples"]["stream"] == [f"{ADDRESS}#1-4: text is null"]
    splits = ("train", "validation", "heldout")
    every = sorted(row for split in splits for row in selected_documents(out, lock, config, pieces(lock), split))
    wanted = [
        f"shard {shard} row {number} " * 9 for shard in range(3) for number in range(20) if (shard, number) != (1, 4)
    ]
    assert [text for _, _, text in every] == wanted


@pytest.mark.parametrize(
    "address", ["datasets://me/words?split=train", "datasets://me/words?split=train&revision=main"]
)
def test_a_branch_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="give datasets://<repository>"):
        describe(address)


def test_a_dataset_that_does_not_open_is_named() -> None:
    with pytest.raises(UserError, match=r"^datasets://me/other.*: cannot be opened: there is no me/other"):
        describe(ADDRESS.replace("words", "other"))
