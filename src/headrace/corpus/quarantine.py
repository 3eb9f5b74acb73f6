"""Damaged documents set aside: `quarantine.jsonl` of the corpus artifact, where they can be looked at and mended.

A line a document, in reading order: `source`; `where` (file:line or file#row); the `rule` that it breaks and `detail`;
its `bytes`, and as `raw` the first `DOCUMENT_BYTES` of them in base64, for they may be anything. A null has none.

How much is kept is bounded for a document, a piece and the whole, never for a worker: the file depends on sources and
settings alone. What is beyond the bounds is counted as damaged like everything else, and only that.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from headrace.corpus.readers import Damaged
from headrace.corpus.sealed import open_sealed

QUARANTINE = "quarantine.jsonl"
DOCUMENT_BYTES = 4096
PIECE_BYTES = 1 << 20
"""Of the lines of one piece, which lie in its scan's metadata until the corpus is put together."""
FILE_BYTES = 64 << 20
KEY = "quarantine"


class Quarantine:
    """The damaged documents of a piece; what comes after the first that does not fit is left out."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._left = PIECE_BYTES

    def add(self, source: str, damaged: Damaged) -> None:
        """Set a document aside if there is room."""
        if self._left >= 0:
            line = _line(source, damaged)
            self._left -= len(line)
            self._lines += [line] if self._left >= 0 else []

    def metadata(self) -> dict[str, bytes]:
        """What the scan of the piece keeps beside its summary."""
        return {KEY: b"".join(self._lines)} if self._lines else {}


def write_quarantine(path: Path, scans: Iterable[Path]) -> int:
    """Write what these scans have set aside, in their order, as far as it fits; returns the number of documents."""
    documents, left = 0, FILE_BYTES
    with path.open("wb") as file:
        for scan in scans:
            for line in open_sealed(scan).metadata.metadata.get(KEY.encode(), b"").splitlines(keepends=True):
                left -= len(line)
                if left < 0:
                    return documents
                file.write(line)
                documents += 1
    return documents


def _line(source: str, damaged: Damaged) -> bytes:
    entry = {
        "source": source,
        "where": damaged.where,
        "rule": damaged.rule,
        "detail": damaged.detail[:DOCUMENT_BYTES],
        "bytes": len(damaged.raw),
        "raw": base64.b64encode(damaged.raw[:DOCUMENT_BYTES]).decode(),
    }
    return json.dumps(entry).encode() + b"\n"
