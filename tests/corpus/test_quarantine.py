"""The quarantine: every damaged document as it is in its file, in reading order, within its bounds."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.config.schema import CorpusConfig
from headrace.corpus import quarantine
from headrace.corpus.build import build_corpus
from headrace.corpus.lock import build_lock


def quarantined(config: CorpusConfig, out: Path) -> tuple[int, list[dict[str, Any]]]:
    """What corpus.json counts, and the lines; `raw` decoded."""
    out.mkdir()
    summary = build_corpus(config, build_lock(config), out, print, piece_bytes=20_000)
    entries = [json.loads(line) for line in (out / quarantine.QUARANTINE).read_text(encoding="ascii").splitlines()]
    return summary["quarantined"], [entry | {"raw": base64.b64decode(entry["raw"])} for entry in entries]


def test_damaged_documents_of_all_formats_are_kept_as_they_are(mixed: CorpusConfig, tmp_path: Path) -> None:
    count, entries = quarantined(mixed, tmp_path / "out")
    assert [tuple(entry.values()) for entry in entries] == [
        ("web", "web/b.parquet#110", "text is null", "", 0, b""),
        ("lines", "lines/a.jsonl:61", "not valid JSON", "unexpected end of data", 13, b'{"text": "cut'),
        ("lines", "lines/b.jsonl.gz:71", "no field 'text'", "there are ['body']", 13, b'{"body": "x"}'),
        ("lines", "lines/c.jsonl.zst:31", "not a JSON object", "", 2, b"[]"),
        ("lines", "lines/c.jsonl.zst:32", "text is not a string", "int", 11, b'{"text": 7}'),
        ("notes", "notes/3/latin.txt", "not UTF-8", "byte 0xfc at offset 2", 4, b"gr\xfcn"),
    ]
    assert count == len(entries)


def test_no_damage_leaves_an_empty_quarantine(mixed: CorpusConfig, tmp_path: Path) -> None:
    Path("notes/3/latin.txt").unlink()
    assert quarantined(replace(mixed, sources=mixed.sources[2:]), tmp_path / "out") == (0, [])


def test_of_a_long_document_the_beginning_is_kept(mixed: CorpusConfig, tmp_path: Path) -> None:
    raw = b"\xff" + b"x" * 9_999
    Path("notes/3/latin.txt").write_bytes(raw)
    _, entries = quarantined(replace(mixed, sources=mixed.sources[2:]), tmp_path / "out")
    assert [(entry["bytes"], entry["raw"]) for entry in entries] == [(10_000, raw[: quarantine.DOCUMENT_BYTES])]


def test_what_does_not_fit_is_counted_as_damaged_and_not_kept(
    mixed: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, all_ = quarantined(mixed, tmp_path / "all")
    sizes = [len(line) + 1 for line in (tmp_path / "all" / quarantine.QUARANTINE).read_bytes().splitlines()]
    monkeypatch.setattr(quarantine, "FILE_BYTES", sum(sizes[:3]))
    assert quarantined(mixed, tmp_path / "three") == (3, all_[:3])
    monkeypatch.setattr(quarantine, "FILE_BYTES", sum(sizes[:3]) - 1)
    assert quarantined(mixed, tmp_path / "two") == (2, all_[:2])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quarantine, "PIECE_BYTES", max(sizes))  # one file, a piece, has two
    count, entries = quarantined(mixed, tmp_path / "piece")
    assert count == 5 and entries == [*all_[:4], all_[5]]
    summary = json.loads((tmp_path / "piece/corpus.json").read_text())
    assert summary["damaged"] == json.loads((tmp_path / "all/corpus.json").read_text())["damaged"]
