"""Parquet files that tell when any bit of theirs is damaged.

Parquet's own checksums cover pages alone, neither their headers nor the footer. So the xxh3-128 of all other bytes
stands between the last page and the footer. Parquet's readers never look there: pages are found by offsets from the
file's beginning, the footer from its end.
"""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from headrace.errors import UserError

_LOG = logging.getLogger(__name__)
_SEAL = 16  # bytes
_END = 8  # bytes behind the footer: its length, and "PAR1"


def seal(data: bytes) -> bytes:
    """The Parquet file `data` with its hash in it."""
    at = _footer(data)
    return data[:at] + xxhash.xxh3_128_digest(data) + data[at:]


def open_sealed(path: Path) -> pq.ParquetFile:
    """The file, read and verified whole; raises `UserError` that names one which is damaged or was never sealed."""
    data = memoryview(path.read_bytes())
    at = _footer(data)
    begin = max(0, at - _SEAL)
    hasher = xxhash.xxh3_128(data[:begin])
    hasher.update(data[at:])
    if data[begin:at] != hasher.digest():
        raise UserError(f"{path}: damaged (its hash is not that of its content); run it again: it is made anew")
    return pq.ParquetFile(pa.BufferReader(data))


def find_sealed(path: Path) -> pq.ParquetFile | None:
    """The same where it is there and whole; a damaged file is named, for it is to be made again."""
    try:
        return open_sealed(path)
    except FileNotFoundError:
        return None
    except UserError:
        _LOG.warning("%s: damaged; it is made again", path)
        return None


def _footer(data: bytes | memoryview) -> int:
    """Where the footer begins; 0 where there is none."""
    return max(0, len(data) - _END - int.from_bytes(data[-_END : 4 - _END], "little"))
