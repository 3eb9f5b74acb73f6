"""Readers: the same documents whatever the format, and errors that say where."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from headrace.corpus.listing import Found
from headrace.corpus.readers import read_documents
from headrace.errors import UserError

TEXTS = ["plain", "zwei\nZeilen\r\n", "\u2028 separator, NUL \x00, BOM \ufeff", "雪と氷 🏔", ""]


def found(path: Path) -> Found:
    return Found(path.name, str(path), ".")


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(found(path), field)]


def lines(values: list[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_every_format_yields_the_same_documents(tmp_path: Path) -> None:
    data = lines([{"text": text, "url": "x"} for text in TEXTS])
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    half = len(lines([{"text": text, "url": "x"} for text in TEXTS[:2]])) + 5
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))  # two frames, cut within a line
    pq.write_table(pa.table({"text": TEXTS, "url": ["x"] * 5}), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert texts(tmp_path / name) == TEXTS, name
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        assert texts(tmp_path / f"{number}.txt") == [text]


def test_paths_tell_line_and_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": "three"}\n')
    assert [document.path for document in read_documents(found(tmp_path / "a.jsonl"), "text")] == [
        "a.jsonl#1",
        "a.jsonl#3",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl:2: not valid JSON"),
        (b'{"body": "x"}', r"a\.jsonl:2: no field 'text' \(there are \['body'\]\)"),
        (b'{"text": 3}', r"a\.jsonl:2: field 'text' is not a string"),
        (b'["text"]', r"a\.jsonl:2: a line must be a JSON object"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "a.jsonl")


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8: byte 0xfc at offset 2"):
        texts(tmp_path / "latin.txt")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    data = lines([{"text": "x" * 5000 + str(i)} for i in range(50)])
    for name, packed in (
        ("a.jsonl.gz", gzip.compress(data)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(data)),
    ):
        (tmp_path / name).write_bytes(b"\x00\x01\x02" + packed[3:])
        with pytest.raises(UserError, match=f"{name}: damaged"):
            texts(tmp_path / name)
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(UserError, match=f"{name}: damaged or truncated"):
            texts(tmp_path / name)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        texts(tmp_path / "a.parquet")


def test_a_parquet_column_must_be_there_and_hold_strings(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"body": ["x"], "number": [1], "gap": pa.array([None], pa.string())}), tmp_path / "a.parquet"
    )
    for field, message in (("text", "no column 'text'"), ("number", "holds int64"), ("gap", "row 0 .* is null")):
        with pytest.raises(UserError, match=rf"a\.parquet: .*{message}"):
            texts(tmp_path / "a.parquet", field)
