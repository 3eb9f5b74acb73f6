"""A scan's columns come back as they were written, over row groups with dictionaries of their own."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.corpus.scan import SCHEMA
from headrace.corpus.scan_columns import read_columns, read_signatures
from headrace.corpus.sealed import seal


def write_scan(path: Path, table: pa.Table, rows: int) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=rows)
    path.write_bytes(seal(buffer.getvalue().to_pybytes()))


def test_columns_come_back(tmp_path: Path) -> None:
    names = ["b", None, "a", "b", "c", None, "a"]
    rows = [
        {
            "digest": hashlib.sha256(bytes([place])).digest()[:16],
            "bytes": 10**10 + place,
            "group": name,
            "kind": "text",
            "root": "r",
            "rule": "x" if place == 4 else None,
            "contaminated": place % 2 == 0,
            "signature": bytes(448) if place == 3 else None,
        }
        for place, name in enumerate(names)
    ]
    write_scan(tmp_path / "a.parquet", pa.Table.from_pylist(rows, schema=SCHEMA), 2)
    columns = read_columns(tmp_path / "a.parquet")
    halves = [[int.from_bytes(row["digest"][:8], "big"), int.from_bytes(row["digest"][8:], "big")] for row in rows]  # type: ignore[index]
    assert columns.digests.tolist() == halves
    assert columns.bytes.tolist() == [row["bytes"] for row in rows]
    assert [None if code < 0 else columns.group.names[code] for code in columns.group.codes.tolist()] == names
    assert [code >= 0 for code in columns.rule.codes.tolist()] == [row["rule"] is not None for row in rows]
    assert columns.contaminated.tolist() == [row["contaminated"] for row in rows]
    assert [signature is None for signature in read_signatures(tmp_path / "a.parquet")] == [n != 3 for n in range(7)]


def test_a_scan_of_nothing_has_no_rows(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.parquet", SCHEMA.empty_table(), 2)
    columns = read_columns(tmp_path / "a.parquet")
    assert len(columns) == 0 and columns.digests.shape == (0, 2) and columns.kind.names == []
