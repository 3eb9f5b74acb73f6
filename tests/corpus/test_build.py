"""The corpus artifact: documents once, whole directories in one split, a sample that is a function of the text."""

import gzip
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.artifacts.files import hash_file
from headrace.config.compose import load
from headrace.config.schema import CorpusConfig, SourceConfig
from headrace.corpus.build import build_corpus, left_out
from headrace.corpus.contamination import Item
from headrace.corpus.documents import read_chosen, selected_documents
from headrace.corpus.lock import Lock, build_lock
from headrace.corpus.pieces import pieces
from headrace.corpus.selection import Selection
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
    return replace(
        load(["corpus=files", "corpus.paths=[data]", "corpus.contamination_tasks=[]"]).corpus,
        validation_fraction=0.1,
        heldout_fraction=0.2,
    )


def build(config: CorpusConfig, out: Path, lock: Lock | None = None) -> dict[str, Any]:
    out.mkdir()
    return build_corpus(config, lock or build_lock(config), out, lambda message: None)


def rows(config: CorpusConfig, out: Path) -> dict[str, list[dict[str, Any]]]:
    """By split: every document, training text read from the sources again."""
    lock = build_lock(config)
    selection = Selection(out, lock.hash)
    training = []
    for piece in pieces(lock):
        chosen = selection.of_piece(piece.number)
        for read in read_chosen(lock, config, piece, chosen, chosen.of("train").tolist()):
            training.append({"id": read.id, "source": read.root, **asdict(read.document)})
    files = {split: pq.read_table(out / f"{split}.parquet").to_pylist() for split in SPLITS[1:]}
    return {"train": training, **files}


def test_no_directory_is_in_two_splits_and_no_document_is_lost(config: CorpusConfig, tmp_path: Path) -> None:
    summary = build(config, tmp_path / "out")
    where: dict[str, set[str]] = {}
    for split, documents in rows(config, tmp_path / "out").items():
        assert documents
        assert summary["splits"][split]["documents"] == len(documents)
        assert summary["splits"][split]["bytes"] == sum(len(row["text"]) for row in documents)
        for row in documents:
            assert Path(row["path"]).read_text() == row["text"]
            where.setdefault("/".join(row["path"].split("/")[:3]), set()).add(split)
    assert len(where) == 30 and all(len(splits) == 1 for splits in where.values())
    ids = sorted(row["id"] for documents in rows(config, tmp_path / "out").values() for row in documents)
    assert ids == list(range(120))
    assert json.loads((tmp_path / "out/corpus.json").read_text()) == summary


def test_the_artifact_is_the_same_byte_for_byte(config: CorpusConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "one")
    build(config, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        "corpus.json",
        "heldout.parquet",
        "pieces.parquet",
        "quarantine.jsonl",
        "sample.parquet",
        "selection.digests",
        "selection.fates",
        "selection.json",
        "selection.sample",
        "validation.parquet",
    ]
    for name in names:
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
        small = replace(config, max_bytes=limit)
        summary = build(small, tmp_path / str(limit))
        assert limit - 500 < summary["bytes"] <= limit
        assert summary["dropped"]["not in the sample of max_bytes"] == 120 - summary["documents"]
        found = rows(small, tmp_path / str(limit))
        chosen.append({row["path"] for documents in found.values() for row in documents})
    assert chosen[0] < chosen[1]


def test_jsonl_is_split_by_document(config: CorpusConfig, tmp_path: Path) -> None:
    Path("lines.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(200)))
    config = replace(config, paths=("lines.jsonl",))
    build(config, tmp_path / "out")
    counts = {split: len(documents) for split, documents in rows(config, tmp_path / "out").items()}
    assert counts["validation"] in range(18, 23) and counts["heldout"] in range(36, 46)
    assert sum(counts.values()) == 200


def test_a_source_that_is_not_as_locked_is_refused(config: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(config)
    Path("data/language/3/deeper0/0.txt").write_text("edited")
    with pytest.raises(UserError, match=r"data/language/3/deeper0/0\.txt changed since it was indexed"):
        build(config, tmp_path / "out", lock)
    assert not (tmp_path / "out/corpus.json").exists()


def test_damage_is_counted_up_to_the_share_that_is_allowed(config: CorpusConfig, tmp_path: Path) -> None:
    Path("data/language/3/latin.txt").write_bytes(b"gr\xfcn")
    message = (
        r"^data/language/3/latin\.txt: not UTF-8 \(byte 0xfc at offset 2\): 1 of 121 documents of the source files are "
        r"damaged, more than corpus\.max_damaged_fraction=0\.001"
    )
    with pytest.raises(UserError, match=message):
        build(config, tmp_path / "out")
    summary = build(replace(config, max_damaged_fraction=0.01), tmp_path / "more")
    assert summary["documents"] == 120 and summary["dropped"] == {}
    assert summary["damaged"] == {"files": {"not UTF-8": 1}} and left_out(summary) == {"not UTF-8": 1}
    assert summary["damaged_examples"] == {"files": ["data/language/3/latin.txt: not UTF-8 (byte 0xfc at offset 2)"]}


def test_the_sample_for_a_tokenizer_is_training_text_within_its_limit(config: CorpusConfig, tmp_path: Path) -> None:
    build(replace(config, sample_bytes=5000), tmp_path / "out")
    build(replace(config, sample_bytes=9000), tmp_path / "more")
    samples = [pq.read_table(tmp_path / name / "sample.parquet").to_pylist() for name in ("out", "more")]
    training = {row["text"]: row["id"] for row in rows(config, tmp_path / "out")["train"]}
    assert all(training[row["text"]] == row["id"] for sample in samples for row in sample)
    sizes = [sum(len(row["text"]) for row in sample) for sample in samples]
    assert 4600 < sizes[0] <= 5000 and 8600 < sizes[1] <= 9000  # a document has at most 400 bytes
    taken, more = ({row["text"] for row in sample} for sample in samples)
    assert taken < more
    digest = {text: hashlib.sha256(text.encode()).digest() for text in training}
    assert max(digest[text] for text in more) < min(digest[text] for text in training if text not in more)
    assert [row["id"] for row in samples[1]] == sorted(row["id"] for row in samples[1])


def test_three_kinds_of_sources_at_once(config: CorpusConfig, tmp_path: Path) -> None:
    texts = [f"web page {number} " * 10 for number in range(300)]
    pq.write_table(pa.table({"content": texts[:200]}), "web.parquet", row_group_size=50)
    both = [*texts[150:], "book " * 50]
    Path("books.jsonl.gz").write_bytes(gzip.compress(b"".join(orjson.dumps({"text": text}) + b"\n" for text in both)))
    named = replace(
        config,
        paths=(),
        sources=(
            SourceConfig("web", ("web.parquet",), "content"),
            SourceConfig("notes", ("data",), "text"),
            SourceConfig("books", ("books.*.gz",), "text"),
        ),
    )
    summary = build(named, tmp_path / "out")
    assert summary["dropped_by_source"] == {"web": {}, "notes": {}, "books": {"exact duplicate": 50}}
    mixture = dict.fromkeys(("web", "notes", "books"), 0)
    for split in SPLITS:
        for name, counts in summary["splits"][split]["mixture"].items():
            mixture[name] += counts["documents"]
    assert mixture == {"web": 200, "notes": 120, "books": 101}
    lock = build_lock(named)
    got = list(selected_documents(tmp_path / "out", lock, named, pieces(lock)))
    assert [source for _, source, _ in got] == sorted(
        (source for _, source, _ in got), key=["web", "notes", "books"].index
    )
    assert [number for number, _, _ in got] == sorted({number for number, _, _ in got})
    assert len(got) == summary["splits"]["train"]["documents"]
    by_source = {name: {text for _, source, text in got if source == name} for name in mixture}
    for split in ("validation", "heldout"):  # each source is divided by itself
        assert set(summary["splits"][split]["mixture"]) == set(mixture)
        assert {row["kind"] for row in rows(named, tmp_path / "out")[split]} == set(mixture)
    assert by_source["web"] <= set(texts[:200]) and by_source["books"] <= set(texts[200:]) | {"book " * 50}


def test_sources_that_share_folders_are_divided_each_by_itself_whatever_their_names(
    config: CorpusConfig, tmp_path: Path
) -> None:
    """`english` is also the kind of text that the environment corpus holds out."""
    for number in range(60):
        folder = Path(f"tree/a/{number}")
        folder.mkdir(parents=True)
        (folder / "code.py").write_text(f"value = {number}\n" * 30)
        (folder / "prose.md").write_text(f"words of page {number}\n" * 30)
    sources = (
        SourceConfig("code", ("tree/**/*.py",), "text"),
        SourceConfig("english", ("tree/**/*.md",), "text", validation_fraction=0.0, heldout_fraction=0.0),
    )
    splits = build(replace(config, paths=(), sources=sources), tmp_path / "out")["splits"]
    assert splits["train"]["mixture"]["english"]["documents"] == 60
    assert [set(splits[name]["mixture"]) for name in ("validation", "heldout")] == [{"code"}, {"code"}]


def test_training_text_with_evaluation_items_is_dropped_and_told(config: CorpusConfig, tmp_path: Path) -> None:
    question = "which of the seven rivers that cross the old town was the last one to be covered by a road in winter"
    clean = {row["path"]: split for split, found in _built(config, tmp_path / "clean").items() for row in found}
    target = next(path for path, split in clean.items() if split == "train")
    held = next(path for path, split in clean.items() if split == "heldout")
    for path in (target, held):
        Path(path).write_text(Path(path).read_text() + f"Q: {question.upper()}?")
    named = replace(config, contamination_tasks=("quiz",))
    (tmp_path / "out").mkdir()
    other = question.replace("rivers", "lakes").replace("winter", "spring")
    items = [Item("quiz/1", question), Item("quiz/2", other), Item("quiz/3", "too short a question")]
    summary = build_corpus(named, build_lock(named), tmp_path / "out", lambda message: None, items=items)
    assert summary["dropped"] == {"contaminated": 1}
    assert summary["contamination"] == {
        "tasks": {"quiz": {"items": 3, "unchecked": 1}},
        "found": {"quiz/1": {"documents": 2, "share": 1.0}},  # 3 of 9 n-grams of the second are too few
    }
    found = rows(named, tmp_path / "out")
    assert target not in {row["path"] for row in found["train"]} and held in {row["path"] for row in found["heldout"]}


def _built(config: CorpusConfig, out: Path) -> dict[str, list[dict[str, Any]]]:
    build(config, out)
    return rows(config, out)


def test_an_empty_corpus_and_one_too_small_are_refused(config: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no document is left \(120 shorter than min_document_bytes\)"):
        build(replace(config, min_document_bytes=10_000, max_document_bytes=20_000), tmp_path / "empty")
    Path("alone").mkdir()
    Path("alone/a.txt").write_text("a single document")
    with pytest.raises(UserError, match="corpus: too small"):
        build(replace(config, paths=("alone",)), tmp_path / "small")


def test_the_standard_library_as_a_corpus(tmp_path: Path) -> None:
    config = load(["experiment=tiny", "corpus.contamination_tasks=[]"]).corpus
    summary = build(config, tmp_path / "out")
    assert 2_900_000 < summary["bytes"] <= config.max_bytes  # type: ignore[operator]
    documents = rows(config, tmp_path / "out")
    assert summary["dropped"]["not UTF-8"] > 0 and left_out(summary) == summary["dropped"]
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
