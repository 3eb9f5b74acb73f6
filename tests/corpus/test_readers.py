"""Readers: the same documents whatever the format, and errors that say where."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from headrace.corpus.listing import Found
from headrace.corpus.readers import Damaged, Document, read_documents, row_group_bytes
from headrace.errors import UserError

TEXTS = ["plain", "zwei\nZeilen\r\n", "\u2028 separator, NUL \x00, BOM \ufeff", "雪と氷 🏔", ""]


def found(path: Path) -> Found:
    return Found(path.name, str(path), ".")


def texts(path: Path, field: str = "text") -> list[str]:
    documents = list(read_documents(found(path), field))
    assert all(isinstance(document, Document) for document in documents)
    return [document.text for document in documents if isinstance(document, Document)]


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
        (b'{"text": "cut', r"a.jsonl:2: not valid JSON (unexpected end of data)"),
        (b'{"body": "x"}', r"a.jsonl:2: no field 'text' (there are ['body'])"),
        (b'{"text": 3}', r"a.jsonl:2: text is not a string (int)"),
        (b'{"text": null}', r"a.jsonl:2: text is null"),
        (b'["text"]', r"a.jsonl:2: not a JSON object"),
        (b'{"text": "\xff"}', r"a.jsonl:2: not valid JSON (str is not valid UTF-8: surrogates not allowed)"),
        (b'{"text": "\\ud800"}', r"a.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_comes_out_in_its_place_and_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "better"}\n')
    first, bad, last = read_documents(found(tmp_path / "a.jsonl"), "text")
    assert isinstance(bad, Damaged) and str(bad).startswith(message)
    assert [document.text for document in (first, last) if isinstance(document, Document)] == ["good", "better"]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    (bad,) = read_documents(found(tmp_path / "latin.txt"), "text")
    assert str(bad) == "latin.txt: not UTF-8 (byte 0xfc at offset 2)"


def test_bad_rows_of_parquet_are_named(tmp_path: Path) -> None:
    data = pa.array([b"good", b"gr\xfcn", None, b"", b"last"], pa.binary())
    column = pa.StringArray.from_buffers(5, data.buffers()[1], data.buffers()[2], data.buffers()[0])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=3)
    texts, bad = [], []
    for document in read_documents(found(tmp_path / "a.parquet"), "text"):
        (bad if isinstance(document, Damaged) else texts).append(document)
    assert [str(each) for each in bad] == ["a.parquet#1: not UTF-8", "a.parquet#2: text is null"]
    assert [(each.path, each.text) for each in texts] == [  # type: ignore[union-attr]
        ("a.parquet#0", "good"),
        ("a.parquet#3", ""),
        ("a.parquet#4", "last"),
    ]


def test_row_groups_are_read_by_themselves_and_weighed(tmp_path: Path) -> None:
    texts = [f"text {number} " * number for number in range(1, 8)]
    table = pa.table({"url": ["x" * 1000] * 7, "text": texts, "language": pa.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, use_dictionary=False, write_statistics=False)
    file = found(tmp_path / "a.parquet")
    got = list(read_documents(file, "text", range(1, 3)))
    assert [each.text for each in got] == texts[3:]  # type: ignore[union-attr]
    assert [each.path for each in got] == [f"a.parquet#{row}" for row in range(3, 7)]  # type: ignore[union-attr]
    sizes = row_group_bytes(file, "text")
    expected = [sum(4 + len(text) for text in texts[begin : begin + 3]) for begin in (0, 3, 6)]  # a length and a text
    assert all(want <= size <= want + 100 for want, size in zip(expected, sizes, strict=True))
    assert [each.text for each in read_documents(file, "language")] == texts  # type: ignore[union-attr]


def test_lines_of_any_length_over_any_number_of_chunks(tmp_path: Path) -> None:
    values = ["x" * size for size in (0, 1, 3_000_000, 5, (1 << 20) - 13, 7)]
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": value} for value in values])[:-1])  # no newline at the end
    assert texts(tmp_path / "a.jsonl") == values


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


def test_a_zstd_window_that_is_too_large_is_told_as_such(tmp_path: Path) -> None:
    for exponent, expected in ((17, None), (18, r"a\.jsonl\.zst: compressed with a window of more than 128 MiB")):
        data = lines([{"text": "x"}])
        block = (len(data) << 3 | 1).to_bytes(3, "little") + data  # the last one, uncompressed
        frame = b"\x28\xb5\x2f\xfd" + bytes([0, exponent << 3]) + block  # a window of 2^(10 + exponent)
        (tmp_path / "a.jsonl.zst").write_bytes(frame)
        if expected is None:
            assert texts(tmp_path / "a.jsonl.zst") == ["x"]
        else:
            with pytest.raises(UserError, match=expected):
                texts(tmp_path / "a.jsonl.zst")


def test_a_parquet_column_must_be_there_and_hold_strings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "number": [1]}), tmp_path / "a.parquet")
    for field, message in (("text", "no column 'text'"), ("number", "holds int64")):
        with pytest.raises(UserError, match=rf"a\.parquet: .*{message}"):
            texts(tmp_path / "a.parquet", field)
