"""A token shard: Megatron's indexed dataset, version 1 (MMIDIDX), and beside it where training rows begin.

`.bin` is the documents' int32 tokens one after the other, little-endian, nothing else, so that the same bytes serve
other readers too. `.idx`, little-endian: 9 bytes magic, u64 version, u8 dtype code (4: int32), u64 sequences S, u64
entries of the document index (S + 1), int32[S] lengths in tokens, int64[S] byte offsets into `.bin`, int64[S + 1]
document index 0..S. Each document is one sequence.

`.L4096.pack`, ours, one for each row length L, little-endian: 8 bytes magic, u32 L, u32 flags (0), u64 rows R, then
u64[R + 1], the tokens of `.bin` at which rows begin, and the end of the last. Row i is at most L tokens; what it lacks
is padded when it is read. Files appear under their names only when they are whole.
"""

import io
import os
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from headrace.artifacts.files import sync_folder
from headrace.errors import UserError
from headrace.tokens.verified import map_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
INT32_CODE = 4
PACK_MAGIC = b"DPACK\x00\x00\x01"
_HEADER = struct.Struct("<9sQBQQ")
PACK_HEADER = struct.Struct("<8sIIQ")


def pack_path(prefix: Path, row_length: int) -> Path:
    """The `.pack` of a shard for rows of this length."""
    return prefix.with_name(f"{prefix.name}.L{row_length}.pack")


def shard_paths(prefix: Path, row_lengths: Sequence[int] = ()) -> list[Path]:
    """All files of a shard."""
    plain = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    return [*plain, *(pack_path(prefix, row_length) for row_length in row_lengths)]


class _Hashed(io.BufferedWriter):
    """A file that hashes what it is given to write."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hasher = xxhash.xxh3_128()

    def write(self, data: Any, /) -> int:
        """Write and hash bytes, or what has bytes."""
        self._hasher.update(data)
        return super().write(data)

    def hash(self) -> str:
        """As `artifacts.files` has it of the whole file."""
        return f"xxh3:{self._hasher.hexdigest()}"


class IndexedWriter:
    """Writes the files of a shard; use as a context manager, which publishes them on success only.

    `hashes`: by name, of what was written, so that what is read back can be compared with it.
    """

    def __init__(self, prefix: Path, row_lengths: Sequence[int] = ()) -> None:
        self._paths, self._row_lengths = shard_paths(prefix, row_lengths), row_lengths
        self._temporary = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in self._paths]
        self._lengths: list[NDArray[np.int32]] = []
        self._starts: list[list[NDArray[np.int64]]] = [[] for _ in row_lengths]
        self._tokens = 0
        self.hashes: dict[str, str] = {}

    def __enter__(self) -> "IndexedWriter":
        self._bin = _Hashed(self._temporary[0])
        return self

    def add(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], starts: Sequence[NDArray[np.int64]] = ()
    ) -> None:
        """Append documents: `tokens` int32 [sum of lengths], end-of-sequence tokens included; `lengths` int32 [D].

        `starts`: for each row length int64 [R + 1], where rows begin and the last ends, counted from these tokens on.
        """
        assert len(tokens) == int(lengths.sum()), "every token belongs to a document"
        assert len(starts) == len(self._starts), "rows of every length"
        self._bin.write(np.ascontiguousarray(tokens, dtype="<i4").data)
        self._lengths.append(lengths.astype("<i4"))
        for kept, more in zip(self._starts, starts, strict=True):
            assert more[0] == 0 and more[-1] == len(tokens), "every token belongs to a row"
            kept.append(more[:-1] + self._tokens)
        self._tokens += len(tokens)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._bin:
            if kind is None:
                _sync(self._bin)
        if kind is not None:
            self._temporary[0].unlink()
            return
        files = [self._bin]
        with _Hashed(self._temporary[1]) as file:
            _write_index(file, np.concatenate([np.empty(0, "<i4"), *self._lengths]))
            _sync(file)
            files.append(file)
        for path, row_length, parts in zip(self._temporary[2:], self._row_lengths, self._starts, strict=True):
            with _Hashed(path) as file:
                _write_pack(file, row_length, np.concatenate([*parts, [self._tokens]]))
                _sync(file)
                files.append(file)
        self.hashes = {path.name: file.hash() for path, file in zip(self._paths, files, strict=True)}
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
        data = map_file(path)
    except OSError:
        raise _damaged(path, "missing") from None
    if len(data) != 4 * count:
        raise _damaged(path, f"{len(data)} bytes instead of {4 * count}: truncated or damaged")
    return data.view("<i4")


def read_pack(path: Path, row_length: int, tokens: int) -> NDArray[np.int64]:
    """Where rows begin and the last ends, int64 [R + 1], all checked; `tokens` are those of the `.bin`.

    Raises `UserError` that names the file where it is missing, damaged, or of other rows.
    """
    try:
        data = path.read_bytes()
    except OSError:
        raise _damaged(path, "missing") from None
    starts = pack_starts(path, np.frombuffer(data, np.uint8), row_length, tokens)
    sizes = np.diff(starts)
    if starts[0] or (sizes < 1).any() or (sizes > row_length).any():
        raise _damaged(path, f"its rows are not the tokens in order, 1 to {row_length} each: damaged")
    return starts


def pack_starts(path: Path, data: NDArray[np.uint8], row_length: int, tokens: int) -> NDArray[np.int64]:
    """The int64 [R + 1] view of a `.pack`'s bytes, its header and its end checked, not every row."""
    if len(data) < PACK_HEADER.size or bytes(data[:8]) != PACK_MAGIC:
        raise _damaged(path, "not an index of rows (DPACK, version 1)")
    _, length, flags, rows = PACK_HEADER.unpack_from(data.data)
    if length != row_length or flags:
        raise _damaged(path, f"rows of {length} tokens with flags {flags} instead of {row_length} with 0")
    if len(data) != PACK_HEADER.size + 8 * (rows + 1):
        raise _damaged(path, f"{len(data)} bytes do not hold the {rows} rows that it announces: truncated or damaged")
    starts = data[PACK_HEADER.size :].view("<i8")
    if starts[-1] != tokens:
        raise _damaged(path, f"its rows end at token {starts[-1]} instead of {tokens}: damaged")
    return starts


def _write_index(file: IO[bytes], lengths: NDArray[np.int32]) -> None:
    count = len(lengths)
    offsets = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    file.write(_HEADER.pack(MAGIC, VERSION, INT32_CODE, count, count + 1))
    file.write(lengths.tobytes())
    file.write((offsets * 4).tobytes())
    file.write(np.arange(count + 1, dtype="<i8").tobytes())


def _write_pack(file: IO[bytes], row_length: int, starts: NDArray[np.int64]) -> None:
    file.write(PACK_HEADER.pack(PACK_MAGIC, row_length, 0, len(starts) - 1))
    file.write(starts.astype("<i8").tobytes())


def _read_index(path: Path) -> NDArray[np.int32]:
    """The lengths in an `.idx`, all of whose parts are checked against each other."""
    try:
        data = path.read_bytes()
    except OSError:
        raise _damaged(path, "missing") from None
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise _damaged(path, "not a Megatron index (MMIDIDX)")
    _, version, code, sequences, documents = _HEADER.unpack_from(data)
    if version != VERSION or code != INT32_CODE:
        raise _damaged(path, f"version {version} with dtype code {code} instead of {VERSION} with {INT32_CODE} (int32)")
    if documents != sequences + 1 or len(data) != _HEADER.size + 20 * sequences + 8:
        raise _damaged(
            path, f"{len(data)} bytes do not hold the {sequences} sequences that it announces: truncated or damaged"
        )
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size)
    offsets = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    numbers = np.frombuffer(data, "<i8", documents, _HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * 4
    consistent = np.array_equal(offsets, np.concatenate([[0], ends[:-1]])[:sequences])
    if not consistent or (sequences and lengths.min() < 1) or not np.array_equal(numbers, np.arange(documents)):
        raise _damaged(path, "lengths, offsets and document index contradict each other: damaged")
    return lengths


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; run the tokenize stage again")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
