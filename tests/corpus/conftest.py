"""A corpus of all formats at once, small, with every kind of damage."""

import gzip
from dataclasses import replace
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig, SourceConfig


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """Three sources: Parquet of several row groups, JSONL in three wrappings, plain files in folders."""
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()
    pages = [
        f"page {number} of the web: " + " ".join(f"w{(number * i) % 1013}" for i in range(60)) for number in range(400)
    ]
    pq.write_table(pa.table({"url": ["x"] * 300, "content": pages[:300]}), "web/a.parquet", row_group_size=40)
    pq.write_table(pa.table({"content": [*pages[290:], None]}), "web/b.parquet", row_group_size=1000)
    Path("lines").mkdir()
    good = [orjson.dumps({"text": f"line {number} " * 30}) for number in range(200)]
    Path("lines/a.jsonl").write_bytes(b"\n".join([*good[:60], b'{"text": "cut', b"", good[60]]))
    Path("lines/b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*good[50:120], b'{"body": "x"}'])))
    parts = [b"\n".join(part) + b"\n" for part in (good[120:150], [b"[]", b'{"text": 7}', *good[150:]])]
    Path("lines/c.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    for folder in range(12):
        Path(f"notes/{folder}").mkdir(parents=True)
        for number in range(4):
            Path(f"notes/{folder}/{number}.txt").write_text(f"note {number} in {folder}. " * 25)
    Path("notes/3/latin.txt").write_bytes(b"gr\xfcn")
    base = load(["corpus=files", "corpus.paths=[x]", "corpus.contamination_tasks=[]"]).corpus
    return replace(
        base,
        paths=(),
        sources=(
            SourceConfig("web", ("web",), "content"),
            SourceConfig("lines", ("lines",), "text"),
            SourceConfig("notes", ("notes",), "text"),
        ),
        validation_fraction=0.1,
        heldout_fraction=0.1,
        max_damaged_fraction=0.1,
    )
