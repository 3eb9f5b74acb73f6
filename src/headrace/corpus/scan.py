"""Read one piece of the corpus and write down what `select` must know of each document: never the text itself.

A scan is a small Parquet file, one row a document in reading order: digest, bytes, group, kind, root, and the rule that
drops it already here (length, quality, a repetition within the piece), if any. It is a function of piece and settings,
so scans are made in any order, by any number of workers; one that is there with the same inputs is not made again. It
is published in one rename: a killed scan leaves nothing but perhaps a temporary file, which `select` sweeps away. It is
sealed (`sealed`): one that is damaged is found, named and made again.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.artifacts.files import write_atomic
from headrace.config.schema import CorpusConfig
from headrace.corpus.contamination import Items
from headrace.corpus.listing import Found, group_in, holds_many, kind_in, named_sources
from headrace.corpus.lock import Lock, LockedFile, content_hash
from headrace.corpus.near_duplicates import SIGNATURE_BYTES, open_signer
from headrace.corpus.pieces import Piece
from headrace.corpus.quality import open_filters
from headrace.corpus.quarantine import Quarantine
from headrace.corpus.readers import Damaged, Document, read_documents, too_long
from headrace.corpus.remote import is_remote, look_up
from headrace.corpus.sealed import find_sealed, open_sealed, seal
from headrace.errors import UserError
from headrace.tracking.progress import by_rule, progress_on

T = TypeVar("T")

VERSION = 4  # raised when a scan's meaning changes
DIGEST_BYTES = 16
SCHEMA = pa.schema(
    [
        ("digest", pa.binary(DIGEST_BYTES)),  # the first bytes of the text's sha256
        ("bytes", pa.int64()),  # of UTF-8
        ("group", pa.dictionary(pa.int32(), pa.string())),  # null: the document is a group of its own
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("root", pa.dictionary(pa.int32(), pa.string())),
        ("rule", pa.dictionary(pa.int32(), pa.string())),  # what drops it; null: nothing so far
        ("contaminated", pa.bool_()),  # contains an evaluation item
        ("signature", pa.binary(SIGNATURE_BYTES)),  # MinHash; null where near duplicates are not sought
    ]
)
_AT_ONCE = 8  # files of a store that are asked for at a time
_EXAMPLES = 5
_HOPELESS = 10_000  # so many such documents and not one good one before them: not damage but a wrong setting
_WRONG_SETTING = ("no field", "not valid JSON", "not a JSON object", "text is not a string")
_ROWS = 1 << 17  # rows kept as Python objects at once
_SEARCHED_BYTES = 4_000_000


@dataclass
class Summary:
    """What a scan says beside its rows and quarantine: how many rows; damaged documents by rule, with examples; items
    found: (documents, share)."""

    source: str
    inputs: str
    rows: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    items: dict[str, tuple[int, float]] = field(default_factory=dict)


class Scanner:
    """Scans pieces; opened once per worker, because filters, signer and items take a moment to open."""

    def __init__(self, config: CorpusConfig, lock: Lock, items: Items | None = None) -> None:
        self._config, self._lock, self._items = config, lock, items
        self._fields = {source.name: source.text_field for source in named_sources(config)}
        self._dropped_by = open_filters(config.quality_filters) if config.quality_filters else None
        self._sign = open_signer(config.near_duplicates) if config.near_duplicates else None
        self._read, self._bytes, self._began = 0, 0, time.monotonic()
        self._left_out, self._with_items = Counter[str](), 0

    def scan(self, piece: Piece, folder: Path) -> Path:
        """Write the scan of a piece into `folder` unless it is there; returns its path.

        Raises `UserError` that names the file for a source that is not as locked or cannot be read, and for a piece
        that begins with thousands of documents without the text field.
        """
        path, inputs = folder / f"{piece.name}.parquet", self.inputs(piece)
        if (there := find_sealed(path)) and _summary(there).inputs == inputs:
            return path
        for _ in _of_each(self._lock.files[piece.first : piece.last], lambda file: verify(file, piece)):
            pass
        summary, aside = Summary(piece.source, inputs), Quarantine()
        buffer = pa.BufferOutputStream()
        writer = pq.ParquetWriter(buffer, SCHEMA, compression="zstd", use_dictionary=["group", "kind", "root", "rule"])
        for rows in self._batches(piece, summary, aside):
            summary.rows += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        said = {"headrace": json.dumps(asdict(summary), sort_keys=True)}
        writer.add_key_value_metadata({**said, **aside.metadata()})
        writer.close()
        write_atomic(path, seal(buffer.getvalue().to_pybytes()))
        return path

    def said(self) -> str:
        """What this scanner has read and left out so far, for people; scans that were there already do not count."""
        speed = self._bytes / 1e6 / max(1e-9, time.monotonic() - self._began)
        items = [f"{self._with_items:,} with evaluation items"] if self._with_items else []
        rules = [f"left out: {by_rule(self._left_out)}"] if self._left_out else []
        return ", ".join([f"{self._read:,} documents read at {speed:,.1f} MB/s", *items, *rules])

    def inputs(self, piece: Piece) -> str:
        """A hash of all that the scan of a piece depends on."""
        config, items = self._config, self._items.hash if self._items else None
        near = config.near_duplicates.shingle_words if config.near_duplicates else None
        settings = [config.min_document_bytes, config.max_document_bytes, list(config.quality_filters), near, items]
        files = [list(file) for file in self._lock.files[piece.first : piece.last]]
        known = [VERSION, settings, self._fields[piece.source], files, piece.begin, piece.end]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _batches(self, piece: Piece, summary: Summary, aside: Quarantine) -> Iterator[list[dict[str, Any]]]:
        """Rows, many at a time; fills in `summary` and `aside`."""
        seen: set[bytes] = set()
        rows: list[dict[str, Any]] = []
        texts: list[str] = []
        size = 0
        for found, document in self._documents(piece, summary, aside):
            row = self._row(found, document, seen)
            rows.append(row)
            texts.append("" if row["rule"] else document.text)
            size += row["bytes"]
            if len(rows) >= _ROWS or size >= _SEARCHED_BYTES:
                yield self._searched(rows, texts, summary)
                rows, texts, size = [], [], 0
        yield self._searched(rows, texts, summary)

    def _documents(self, piece: Piece, summary: Summary, aside: Quarantine) -> Iterator[tuple[Found, Document]]:
        """Good documents; damaged ones are counted and set aside."""
        good, damaged = 0, Counter[str]()
        field_, most = self._fields[piece.source], self._config.max_document_bytes
        for found, document in read_piece(self._lock, piece, field_, most):
            if isinstance(document, Document):
                good += 1
                yield found, document
                continue
            damaged[document.rule] += 1
            self._left_out[document.rule] += 1
            aside.add(piece.source, document)
            if len(summary.examples) < _EXAMPLES:
                summary.examples.append(str(document))
            if not good:
                self._refuse_hopeless(document, damaged)
        summary.damaged = dict(sorted(damaged.items()))

    def _refuse_hopeless(self, last: Damaged, damaged: Counter[str]) -> None:
        """Stop early where a setting is wrong; how much damage there may be is decided when everything is scanned."""
        count = sum(documents for rule, documents in damaged.items() if rule.startswith(_WRONG_SETTING))
        if count >= _HOPELESS and self._config.max_damaged_fraction < 1:
            raise UserError(
                f"{last}: none of the first {damaged.total():,} documents can be read; check corpus.text_field"
            )

    def _row(self, found: Found, document: Document, seen: set[bytes]) -> dict[str, Any]:
        data = document.text.encode()
        size = document.unread or len(data)
        digest = hashlib.sha256(data).digest()[:DIGEST_BYTES]
        rule = self._rule(document, size) or ("exact duplicate" if digest in seen else None)
        self._read, self._bytes = self._read + 1, self._bytes + len(data)
        if rule is None:
            seen.add(digest)
        else:
            self._left_out[rule] += 1
        return {
            "digest": digest,
            "bytes": size,
            "group": None if holds_many(found.name) else group_in(found.source, found.group),
            "kind": kind_in(found.source, document.kind),
            "root": found.root,
            "rule": rule,
            "contaminated": False,
            "signature": self._sign(document.text) if self._sign and rule is None else None,
        }

    def _rule(self, document: Document, size: int) -> str | None:
        if size < self._config.min_document_bytes or size == 0:
            return "shorter than min_document_bytes"
        if size > self._config.max_document_bytes:
            return "longer than max_document_bytes"
        name = self._dropped_by(document.text) if self._dropped_by else None
        return name and f"quality: {name}"

    def _searched(self, rows: list[dict[str, Any]], texts: Sequence[str], summary: Summary) -> list[dict[str, Any]]:
        """The rows, those that contain evaluation items marked."""
        for match in self._items.search(texts) if self._items else ():
            self._with_items += not rows[match.document]["contaminated"]
            rows[match.document]["contaminated"] = True
            documents, share = summary.items.get(match.item, (0, 0.0))
            summary.items[match.item] = (documents + 1, max(share, match.share))
        return rows


def read_piece(
    lock: Lock, piece: Piece, text_field: str, max_document_bytes: int
) -> Iterator[tuple[Found, Document | Damaged]]:
    """What a piece holds, in reading order, with the file that holds it; a plain file that is too long is not read."""
    files = lock.files[piece.first : piece.last]

    def read(file: LockedFile) -> Iterable[Document | Damaged]:
        unread = too_long(file.found, file.size, max_document_bytes)
        documents = [unread] if unread else read_documents(file.found, text_field, piece.groups)
        return documents if len(files) == 1 else list(documents)  # one of several is a small plain file

    for file, documents in zip(files, _of_each(files, read), strict=True):
        for document in documents:
            yield file.found, document


def _of_each(files: Sequence[LockedFile], act: Callable[[LockedFile], T]) -> Iterator[T]:
    """`act` of each file of a piece, in order; of a store's several by threads, since each takes round trips."""
    if len(files) == 1 or not is_remote(files[0].found.path):
        yield from map(act, files)
        return
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        yield from threads.map(act, files)


def verify(file: LockedFile, piece: Piece) -> None:
    """Compare a file with the lock; raises `UserError` that names it.

    A local file's bytes are hashed by the piece that holds its beginning; the other pieces of a large Parquet file
    compare its size. A store's file is compared by the identity that the store gives.
    """
    found = file.found
    if is_remote(found.path):
        now = look_up(found.path)
        same = now.size == file.size and (now.identity or _fetched_hash(found, file, piece)) == file.hash
    elif not Path(found.path).is_file():
        raise UserError(f"{file.name}: indexed but no longer there; run `headrace index` to go on without")
    elif piece.begin:
        same = Path(found.path).stat().st_size == file.size
    else:
        same = content_hash(found) == file.hash
    if not same:
        raise UserError(f"{file.name} changed since it was indexed; run `headrace index` to accept the new text")


def _fetched_hash(found: Found, file: LockedFile, piece: Piece) -> str:
    return file.hash if piece.begin else content_hash(found)


def read_summary(path: Path) -> Summary:
    """What a scan says beside its rows; raises `UserError` for a damaged scan."""
    return _summary(open_sealed(path))


def _summary(scan: pq.ParquetFile) -> Summary:
    return Summary(**json.loads(scan.metadata.metadata[b"headrace"]))


def scan_each(scanner: Scanner, pieces: Sequence[Piece], folder: Path, name: str) -> Iterator[Path]:
    """The scans of some pieces in their order; progress is shown under `name`, where there is more than one."""
    display = progress_on(name=name, unit="pieces")
    try:
        for done, piece in enumerate(pieces, 1):
            yield scanner.scan(piece, folder)
            if len(pieces) > 1:
                display.show(done, len(pieces), scanner.said())
    finally:
        display.close()
