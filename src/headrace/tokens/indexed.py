"""Megatron's indexed dataset, version 1 (MMIDIDX): a `.bin` of int32 tokens, an `.idx` that says where documents lie.

`.bin` is the documents' tokens one after the other, little-endian, nothing else, so that the same bytes serve other
readers too. `.idx`, little-endian: 9 bytes magic, u64 version, u8 dtype code (4: int32), u64 sequences S, u64 entries
of the document index (S + 1), int32[S] lengths in tokens, int64[S] byte offsets into `.bin`, int64[S + 1] document
index 0..S. Each document is one sequence. Files appear under their names only when they are whole.
"""

import os
import struct
import uuid
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import sync_folder
from headrace.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
INT32_CODE = 4
_HEADER = struct.Struct("<9sQBQQ")


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; use as a context manager, which publishes both on success only."""

    def __init__(self, prefix: Path) -> None:
        self._paths = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
        self._temporary = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in self._paths]
        self._lengths: list[NDArray[np.int32]] = []

    def __enter__(self) -> "IndexedWriter":
        self._bin: IO[bytes] = self._temporary[0].open("wb")
        return self

    def add(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """Append documents: `tokens` int32 [sum of lengths], end-of-sequence tokens included; `lengths` int32 [D]."""
        assert len(tokens) == int(lengths.sum()), "every token belongs to a document"
        self._bin.write(np.ascontiguousarray(tokens, dtype="<i4").data)
        self._lengths.append(lengths.astype("<i4"))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._bin:
            if kind is None:
                _sync(self._bin)
        if kind is not None:
            self._temporary[0].unlink()
            return
        with self._temporary[1].open("wb") as file:
            _write_index(file, np.concatenate([np.empty(0, "<i4"), *self._lengths]))
            _sync(file)
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)
        sync_folder(self._paths[0].parent)


class IndexedReader:
    """Reads `<prefix>.bin` and `<prefix>.idx` through mmap.

    `tokens` int32 [T], `lengths` int32 [documents], `starts` int64 [documents + 1] in tokens. Raises `UserError` that
    names the file when one is missing, truncated, damaged or of another version, dtype or kind.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
        self.lengths = _read_index(index)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.tokens = map_tokens(data, int(self.starts[-1]))

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> NDArray[np.int32]:
        """The tokens of one document, int32, its end-of-sequence token included; a view of the file."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]


def map_tokens(path: Path, count: int) -> NDArray[np.int32]:
    """A `.bin` as a read-only int32 [count] view; `UserError` naming the file unless it holds `count` tokens."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: missing; run the tokenize stage again") from None
    if size != 4 * count:
        raise UserError(
            f"{path}: {size} bytes instead of {4 * count}: truncated or damaged; run the tokenize stage again"
        )
    return np.memmap(path, dtype="<i4", mode="r") if count else np.empty(0, dtype=np.int32)


def _write_index(file: IO[bytes], lengths: NDArray[np.int32]) -> None:
    count = len(lengths)
    offsets = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    file.write(_HEADER.pack(MAGIC, VERSION, INT32_CODE, count, count + 1))
    file.write(lengths.tobytes())
    file.write((offsets * 4).tobytes())
    file.write(np.arange(count + 1, dtype="<i8").tobytes())


def _read_index(path: Path) -> NDArray[np.int32]:
    """The lengths in an `.idx`, all of whose parts are checked against each other."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: {what}; run the tokenize stage again")

    try:
        data = path.read_bytes()
    except OSError:
        raise damaged("missing") from None
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise damaged("not a Megatron index (MMIDIDX)")
    _, version, code, sequences, documents = _HEADER.unpack_from(data)
    if version != VERSION or code != INT32_CODE:
        raise damaged(f"version {version} with dtype code {code} instead of {VERSION} with {INT32_CODE} (int32)")
    if documents != sequences + 1 or len(data) != _HEADER.size + 20 * sequences + 8:
        raise damaged(
            f"{len(data)} bytes do not hold the {sequences} sequences that it announces: truncated or damaged"
        )
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    numbers = np.frombuffer(data, "<i8", documents, _HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    consistent = np.array_equal(offsets, np.concatenate([[0], ends[:-1]])[:sequences])
    if not consistent or (sequences and lengths.min() < 1) or not np.array_equal(numbers, np.arange(documents)):
        raise damaged("lengths, offsets and document index contradict each other: damaged")
    return lengths


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
