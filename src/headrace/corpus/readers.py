"""A source file in, its documents out, one at a time.

A plain text file is one document; each line of JSONL (plain, `.gz`, `.zst`) and each row of Parquet is one. Text is
strict UTF-8: a byte that is not is the user's to mend, and the error says where it is. Nothing is filtered here.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from headrace.corpus.environment import ENGLISH, english_topics, kind_of
from headrace.corpus.listing import Found
from headrace.errors import UserError

T = TypeVar("T")

_CHUNK = 1 << 20
LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


class NotUtf8(UserError):  # noqa: N818 - it names the condition, as UnicodeDecodeError's reason does
    """A file whose bytes are not UTF-8; the environment corpus leaves such files out."""


@dataclass(frozen=True)
class Document:
    """One text. `path` is the source's name, with `#line`, `#row` or `#topic` where a file holds many documents."""

    path: str
    kind: str
    text: str


def holds_many(name: str) -> bool:
    """Whether a file of this name holds many unrelated documents, so that its split goes by document."""
    return name.endswith((*LINES, ".parquet"))


def read_documents(found: Found, text_field: str) -> Iterator[Document]:
    """The documents of one file, in file order.

    Raises `UserError` naming the file, and the line, row or byte, for text that is not UTF-8, a line that is not a JSON
    object, and a `text_field` that is missing or not a string.
    """
    if found.name.endswith(LINES):
        return _read_lines(found, text_field)
    if found.name.endswith(".parquet"):
        return _read_parquet(found, text_field)
    return _read_text(found)


def decode(data: bytes, name: str) -> str:
    """Strict UTF-8; the `UserError` names the file and the byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise NotUtf8(f"{name}: not UTF-8: {byte}; convert the file or leave it out") from None


def _read_text(found: Found) -> Iterator[Document]:
    text = decode(Path(found.path).read_bytes(), found.name)
    if found.name == ENGLISH and found.root == "stdlib":
        for topic, prose in english_topics(text, found.name):
            yield Document(f"{found.name}#{topic}", "english", prose)
    else:
        yield Document(found.name, kind_of(found.name) or "text", text)


def _read_lines(found: Found, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(found), start=1):
        if line.strip():
            yield Document(f"{found.name}#{number}", "text", _text_of(line, text_field, f"{found.name}:{number}"))


def _text_of(line: bytes, text_field: str, where: str) -> str:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}); mend or remove the line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be a JSON object with the field {text_field!r}")
    if text_field not in value:
        raise UserError(f"{where}: no field {text_field!r} (there are {sorted(value)[:8]}); set corpus.text_field")
    text = value[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is not a string; set corpus.text_field")
    return text


def _lines(found: Found) -> Iterator[bytes]:
    """The lines of a file; damage in the compressed stream becomes one line that names the file."""
    try:
        with Path(found.path).open("rb") as raw:
            if found.name.endswith(".gz"):
                yield from gzip.GzipFile(fileobj=raw)
            elif found.name.endswith(".zst"):
                yield from _split_lines(_decompressed(raw))
            else:
                yield from raw
    except (zstandard.ZstdError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{found.name}: damaged or truncated compressed file ({error}); fetch it again") from None


def _decompressed(raw: IO[bytes]) -> Iterator[bytes]:
    """Every frame of a zstd file. The library's own stream reader takes a truncated frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    while chunk := raw.read(_CHUNK):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("it ends within a frame")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _read_parquet(found: Found, text_field: str) -> Iterator[Document]:
    file = _parquet(partial(pq.ParquetFile, found.path), found.name)
    names = file.schema_arrow.names
    if text_field not in names:
        raise UserError(f"{found.name}: no column {text_field!r} (there are {names[:8]}); set corpus.text_field")
    row = 0
    for group in range(file.num_row_groups):
        column = _parquet(partial(file.read_row_group, group, [text_field]), found.name)[text_field]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            held = f"column {text_field!r} holds {column.type}, not strings"
            raise UserError(f"{found.name}: {held}; set corpus.text_field")
        for text in _parquet(column.to_pylist, found.name):
            if text is None:
                raise UserError(f"{found.name}: row {row} of column {text_field!r} is null; remove the row")
            yield Document(f"{found.name}#{row}", "text", text)
            row += 1


def _parquet(action: Callable[[], T], name: str) -> T:
    try:
        return action()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
