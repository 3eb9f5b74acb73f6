"""The corpus artifact: documents once, whole directories in one split, a sample that is a function of the text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from headrace.artifacts.files import hash_file
from headrace.config.compose import load
from headrace.config.schema import CorpusConfig
from headrace.corpus.build import build_corpus
from headrace.corpus.lock import Lock, build_lock
from headrace.errors import UserError

SPLITS = ("train", "validation", "heldout")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    monkeypatch.chdir(tmp_path)
    for folder in range(30):
        for name in range(4):
            path = tmp_path / f"data/language/{folder}/deeper{name % 2}/{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"folder {folder} file {name}\n" * 20)
    return replace(load(["corpus=files", "corpus.paths=[data]"]).corpus, validation_fraction=0.1, heldout_fraction=0.2)


def build(config: CorpusConfig, out: Path, lock: Lock | None = None) -> dict[str, Any]:
    out.mkdir()
    return build_corpus(config, lock or build_lock(config), out, lambda message: None)


def rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: pq.read_table(out / f"{split}.parquet").to_pylist() for split in SPLITS}


def test_no_directory_is_in_two_splits_and_no_document_is_lost(config: CorpusConfig, tmp_path: Path) -> None:
    summary = build(config, tmp_path / "out")
    where: dict[str, set[str]] = {}
    for split, documents in rows(tmp_path / "out").items():
        assert documents
        assert summary["splits"][split]["documents"] == len(documents)
        assert summary["splits"][split]["bytes"] == sum(len(row["text"]) for row in documents)
        for row in documents:
            assert Path(row["path"]).read_text() == row["text"]
            where.setdefault("/".join(row["path"].split("/")[:3]), set()).add(split)
    assert len(where) == 30 and all(len(splits) == 1 for splits in where.values())
    ids = sorted(row["id"] for documents in rows(tmp_path / "out").values() for row in documents)
    assert ids == list(range(120))
    assert json.loads((tmp_path / "out/corpus.json").read_text()) == summary


def test_the_artifact_is_the_same_byte_for_byte(config: CorpusConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "one")
    build(config, tmp_path / "two")
    for name in (*(f"{split}.parquet" for split in SPLITS), "corpus.json"):
        assert hash_file(tmp_path / "one" / name, "sha256") == hash_file(tmp_path / "two" / name, "sha256")


def test_duplicates_and_documents_out_of_bounds_are_counted(config: CorpusConfig, tmp_path: Path) -> None:
    Path("data/language/3/copy.txt").write_text(Path("data/language/7/deeper0/0.txt").read_text())
    Path("data/language/3/short.txt").write_text("hi")
    Path("data/language/3/empty.txt").write_text("")
    Path("data/language/3/long.txt").write_text("x" * 5001)
    summary = build(replace(config, min_document_bytes=3, max_document_bytes=5000), tmp_path / "out")
    assert summary["documents"] == 120
    assert summary["dropped"] == {
        "exact duplicate": 1,
        "longer than max_document_bytes": 1,
        "shorter than min_document_bytes": 2,
    }


def test_samples_are_nested_and_within_their_limit(config: CorpusConfig, tmp_path: Path) -> None:
    chosen = []
    for limit in (10_000, 20_000):
        summary = build(replace(config, max_bytes=limit), tmp_path / str(limit))
        assert limit - 500 < summary["bytes"] <= limit
        chosen.append({row["path"] for documents in rows(tmp_path / str(limit)).values() for row in documents})
    assert chosen[0] < chosen[1]


def test_jsonl_is_split_by_document(config: CorpusConfig, tmp_path: Path) -> None:
    Path("lines.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(200)))
    build(replace(config, paths=("lines.jsonl",)), tmp_path / "out")
    counts = {split: len(documents) for split, documents in rows(tmp_path / "out").items()}
    assert counts["validation"] in range(18, 23) and counts["heldout"] in range(36, 46)
    assert sum(counts.values()) == 200


def test_a_source_that_is_not_as_locked_is_refused(config: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(config)
    Path("data/language/3/deeper0/0.txt").write_text("edited")
    with pytest.raises(UserError, match=r"data/language/3/deeper0/0\.txt changed since it was indexed"):
        build(config, tmp_path / "out", lock)
    assert not (tmp_path / "out/corpus.json").exists()


def test_text_that_is_not_utf8_is_the_users_to_mend(config: CorpusConfig, tmp_path: Path) -> None:
    Path("data/language/3/latin.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(UserError, match=r"data/language/3/latin\.txt: not UTF-8: byte 0xfc at offset 2"):
        build(config, tmp_path / "out")


def test_an_empty_corpus_and_one_too_small_are_refused(config: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no document is left \(120 shorter than min_document_bytes\)"):
        build(replace(config, min_document_bytes=10_000, max_document_bytes=20_000), tmp_path / "empty")
    Path("alone").mkdir()
    Path("alone/a.txt").write_text("a single document")
    with pytest.raises(UserError, match="corpus: too small"):
        build(replace(config, paths=("alone",)), tmp_path / "small")


def test_the_standard_library_as_a_corpus(tmp_path: Path) -> None:
    config = load(["experiment=tiny"]).corpus
    summary = build(config, tmp_path / "out")
    assert 2_900_000 < summary["bytes"] <= config.max_bytes  # type: ignore[operator]
    documents = rows(tmp_path / "out")
    english = {row["path"] for split in SPLITS for row in documents[split] if row["kind"] == "english"}
    assert english and all(path.startswith("stdlib/pydoc_data/topics.py#") for path in english)
    assert not english & {row["path"] for split in ("train", "validation") for row in documents[split]}
    directories = [
        {"/".join(row["path"].split("/")[:3]) for row in documents[split] if row["path"].count("/") >= 3}
        for split in SPLITS
    ]
    assert not directories[0] & directories[1] and not directories[0] & directories[2]
    total = sum(summary["splits"][split]["bytes"] for split in SPLITS)
    code = summary["splits"]["heldout"]["bytes"] - summary["splits"]["heldout"]["kinds"]["english"]["bytes"]
    assert 0.03 < code / total < 0.08
    assert summary["environment"]["packages"] == {}
