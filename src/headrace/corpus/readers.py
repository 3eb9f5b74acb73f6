"""A source file in, its documents out, one at a time.

A plain text file is one document; each line of JSONL (plain, `.gz`, `.zst`) and each row of Parquet is one. Text is
strict UTF-8. A line or row that is not a document (not JSON, no text in it, not UTF-8) comes out as `Damaged`, in its
place, for the caller to count; a file that is broken as a whole is a `UserError` that names it. Nothing is filtered
here; but a plain file that is longer than a document may be is not read, for it would have to be in memory whole.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from headrace.corpus.environment import ENGLISH, english_topics, kind_of
from headrace.corpus.listing import LINES, Found, holds_many
from headrace.corpus.remote import STREAM, is_remote, open_remote
from headrace.errors import UserError

T = TypeVar("T")

_CHUNK = 1 << 20
_ROWS = 1024  # decoded at once
_TOO_LARGE_WINDOW = "too much memory"  # in zstd's message for a window of more than 128 MiB, which it does not allow


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `path` is the source's name, with `#line`, `#row` or `#topic` where a file holds many documents.

    `unread` is the size of a file that is too long to be a document; its text was not read and is empty.
    """

    path: str
    kind: str
    text: str
    unread: int = 0


@dataclass(frozen=True, slots=True)
class Damaged:
    """What should have been a document: `where` (file and line or row), the `rule` it breaks, the details, and what
    there is of it as it is in the file."""

    where: str
    rule: str
    detail: str
    raw: bytes = b""

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}{f' ({self.detail})' if self.detail else ''}"


def read_documents(found: Found, text_field: str, groups: range | None = None) -> Iterator[Document | Damaged]:
    """The documents of one file in file order; of a Parquet file those of the row groups `groups` (None: all).

    Raises `UserError` naming the file if it cannot be read, is a broken archive, or has no column `text_field`.
    """
    if found.name.startswith(STREAM):
        from headrace.corpus.hub_stream import read_stream  # imports `datasets`

        return (_document(text, f"{found.name}#{row}") for row, text in read_stream(found.name, text_field, groups))
    if found.name.endswith(LINES):
        return _read_lines(found, text_field)
    if found.name.endswith(".parquet"):
        return _read_parquet(found, text_field, groups)
    return _read_text(found)


def too_long(found: Found, size: int, max_document_bytes: int) -> Document | None:
    """What stands for a plain file of more bytes than a document may have; None where the file is to be read."""
    many = holds_many(found.name) or _holds_topics(found)
    return None if many or size <= max_document_bytes else Document(found.name, _kind(found), "", size)


def row_group_bytes(found: Found, text_field: str) -> tuple[int, ...]:
    """Bytes of text, uncompressed, in each row group of a Parquet file."""
    with _open_parquet(found, text_field) as file:
        metadata = file.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_field)
        groups = range(metadata.num_row_groups)
        return tuple(metadata.row_group(group).column(column).total_uncompressed_size for group in groups)


def _open(found: Found) -> AbstractContextManager[IO[bytes]]:
    if is_remote(found.path):
        return open_remote(found.path)
    try:
        return Path(found.path).open("rb")
    except OSError as error:
        raise UserError(f"{found.name}: cannot be read: {error.strerror}; see `headrace index`") from None


def _read_text(found: Found) -> Iterator[Document | Damaged]:
    with _open(found) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Damaged(found.name, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start}", data)
        return
    if _holds_topics(found):
        for topic, prose in english_topics(text, found.name):
            yield Document(f"{found.name}#{topic}", "english", prose)
    else:
        yield Document(found.name, _kind(found), text)


def _holds_topics(found: Found) -> bool:
    return found.name == ENGLISH and found.root == "stdlib"


def _kind(found: Found) -> str:
    return kind_of(found.name) or "text"


def _read_lines(found: Found, text_field: str) -> Iterator[Document | Damaged]:
    for number, line in enumerate(_lines(found), start=1):
        if line.strip():
            yield _parse(line, text_field, found.name, number)


def _parse(line: bytes, text_field: str, name: str, number: int) -> Document | Damaged:
    where = f"{name}:{number}"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Damaged(where, "not valid JSON", error.msg, line)
    if not isinstance(value, dict):
        return Damaged(where, "not a JSON object", "", line)
    if text_field not in value:
        return Damaged(where, f"no field {text_field!r}", f"there are {sorted(value)[:8]}", line)
    return _document(value[text_field], f"{name}#{number}", where, line)


def _document(text: Any, path: str, where: str | None = None, raw: bytes = b"") -> Document | Damaged:
    if text is None:
        return Damaged(where or path, "text is null", "", raw)
    if not isinstance(text, str):
        return Damaged(where or path, "text is not a string", type(text).__name__, raw)
    return Document(path, "text", text)


def _lines(found: Found) -> Iterator[bytes]:
    """The lines of a file; damage in the compressed stream becomes one line that names the file."""
    try:
        with _open(found) as raw:
            if found.name.endswith(".gz"):
                yield from _split_lines(_chunks(gzip.GzipFile(fileobj=raw)))
            elif found.name.endswith(".zst"):
                yield from _split_lines(_decompressed(raw))
            else:
                yield from _split_lines(_chunks(raw))
    except (zstandard.ZstdError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        if _TOO_LARGE_WINDOW in str(error):
            raise UserError(
                f"{found.name}: compressed with a window of more than 128 MiB (zstd --long=28 or more), which takes "
                "as much memory to read; compress it again with --long=27 or less"
            ) from None
        raise UserError(f"{found.name}: damaged or truncated compressed file ({error}); fetch it again") from None


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _decompressed(raw: IO[bytes]) -> Iterator[bytes]:
    """Every frame of a zstd file. The library's own stream reader takes a truncated frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    for chunk in _chunks(raw):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends within a frame")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []  # the parts of a line that has no end yet: joined once, however long it is
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        pending.append(first)
        if rest:
            yield b"".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    if any(pending):
        yield b"".join(pending)


def _read_parquet(found: Found, text_field: str, groups: range | None) -> Iterator[Document | Damaged]:
    with _open_parquet(found, text_field) as file:
        for group in range(file.num_row_groups) if groups is None else groups:
            row = sum(file.metadata.row_group(before).num_rows for before in range(group))
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=[text_field], use_threads=False)
            while (batch := _parquet(partial(next, batches, None), found.name)) is not None:
                for text in _texts(batch.column(0)):
                    where = f"{found.name}#{row}"
                    if isinstance(text, bytes):
                        yield Damaged(where, "not UTF-8", "", text)
                    else:
                        yield _document(text, where)
                    row += 1


def _texts(column: Any) -> list[str | bytes | None]:
    """The strings of a column; bytes stand for those that are not UTF-8, which Arrow does not check."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_text_or_bytes(data) for data in column.cast(pa.large_binary()).to_pylist()]


def _text_or_bytes(data: bytes | None) -> str | bytes | None:
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
        return data


@contextmanager
def _open_parquet(found: Found, text_field: str) -> Iterator[Any]:
    """An open Parquet file whose text column is there and holds strings."""
    with _open(found) as raw:
        file = _parquet(partial(pq.ParquetFile, raw), found.name)
        schema = file.schema_arrow
        if text_field not in schema.names:
            there = f"there are {schema.names[:8]}"
            raise UserError(f"{found.name}: no column {text_field!r} ({there}); set corpus.text_field")
        kind = schema.field(text_field).type
        held = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(held) or pa.types.is_large_string(held)):
            raise UserError(f"{found.name}: column {text_field!r} holds {kind}, not strings; set corpus.text_field")
        yield file


def _parquet(action: Callable[[], T], name: str) -> T:
    try:
        return action()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
