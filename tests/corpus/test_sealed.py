"""Sealed Parquet: plain Parquet to every reader, and no bit of it changes unnoticed."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.corpus.sealed import open_sealed, seal
from headrace.errors import UserError

TABLE = pa.table({"number": list(range(500)), "name": [f"name {number % 7}" for number in range(500)]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    buffer = pa.BufferOutputStream()
    pq.write_table(TABLE.replace_schema_metadata({"who": "me"}), buffer, compression="zstd", row_group_size=100)
    (tmp_path / "a.parquet").write_bytes(seal(buffer.getvalue().to_pybytes()))
    return tmp_path / "a.parquet"


def test_every_reader_of_parquet_reads_it(path: Path) -> None:
    assert open_sealed(path).read().equals(TABLE) and pq.read_table(path).equals(TABLE)
    assert open_sealed(path).metadata.metadata[b"who"] == pq.read_metadata(path).metadata[b"who"] == b"me"


def test_every_flipped_bit_is_found_and_the_file_named(path: Path) -> None:
    """One bit of each byte: of pages, their headers, the seal itself, the footer, its length and the last word."""
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: damaged"):
            open_sealed(path)


@pytest.mark.parametrize("size", [0, 4, 12, 100, -1, -50])
def test_a_file_cut_short_is_found(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.parquet: damaged"):
        open_sealed(path)


def test_a_file_that_was_never_sealed_is_refused(path: Path) -> None:
    pq.write_table(TABLE, path)
    with pytest.raises(UserError, match=r"a\.parquet: damaged"):
        open_sealed(path)
