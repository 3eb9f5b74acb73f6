"""Locked sources in, the corpus artifact out: `train.parquet`, `validation.parquet`, `heldout.parquet`, `corpus.json`.

Two passes over the sources. The first verifies every file against the lock and keeps of each document its sha256, size
and group: enough to drop exact duplicates, to take a sample and to choose the splits. The second writes the chosen
documents in the lock's order. So the result depends on sources and configuration alone, and memory on the number of
documents.
"""

import hashlib
import itertools
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.artifacts.files import hash_file, write_json
from headrace.config.schema import CorpusConfig
from headrace.corpus.environment import distributions
from headrace.corpus.listing import Found
from headrace.corpus.lock import Lock, list_sources
from headrace.corpus.readers import Document, NotUtf8, holds_many, read_documents
from headrace.corpus.split import HELDOUT, SPLITS, assign
from headrace.errors import UserError

SCHEMA = pa.schema(
    [("id", pa.int64()), ("source", pa.string()), ("path", pa.string()), ("kind", pa.string()), ("text", pa.string())]
)
_ROW_GROUP_BYTES = 16_000_000


@dataclass(frozen=True)
class _Key:
    """What is remembered of a document between the passes."""

    file: int  # index of its file in the lock's order
    place: int  # index of the document in its file
    digest: bytes  # sha256 of its text
    size: int  # UTF-8 bytes
    group: str
    kind: str

    @property
    def held(self) -> bool:
        """Whether it is held out whatever the fractions say: the English book is."""
        return self.kind == "english"


def build_corpus(config: CorpusConfig, lock: Lock, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Read the locked sources and write the corpus into the folder `out`; returns what `corpus.json` holds.

    Raises `UserError` for a source that is not as locked, for a file of the user's that is not UTF-8 (the environment's
    are left out), and for a corpus without documents or too small to be split.
    """
    files = _locked_files(config, lock)
    dropped: Counter[str] = Counter()
    keys = _survey(config, lock, files, dropped, log)
    chosen = _sample(keys, config.max_bytes, dropped)
    if not chosen:
        reasons = ", ".join(f"{count} {rule}" for rule, count in sorted(dropped.items())) or "the sources hold none"
        raise UserError(f"corpus: no document is left ({reasons}); check corpus.paths and the limits in corpus.*")
    splits = _splits(chosen, config)
    counts = _write(config, files, chosen, splits, out)
    total = sum(key.size for key in chosen)
    summary: dict[str, Any] = {
        "lock": lock.hash,
        "files": len(files),
        "documents": len(chosen),
        "bytes": total,
        "splits": counts,
        "dropped": dict(sorted(dropped.items())),
        "environment": _environment(config),
    }
    write_json(out / "corpus.json", summary)
    log(f"corpus: {len(chosen):,} documents, {total / 1e6:,.1f} MB from {len(files):,} files")
    return summary


def _locked_files(config: CorpusConfig, lock: Lock) -> list[Found]:
    present = {file.name: file for file in list_sources(config)}
    missing = [source.name for source in lock.files if source.name not in present]
    if missing:
        raise UserError(f"{missing[0]}: indexed but no longer there; run `headrace index` to go on without")
    return [present[source.name] for source in lock.files]


def _survey(
    config: CorpusConfig, lock: Lock, files: Sequence[Found], dropped: Counter[str], log: Callable[[str], None]
) -> list[_Key]:
    """First pass: verify, filter by length, drop exact duplicates; the keys of what is left, in order."""
    keys: list[_Key] = []
    seen: set[bytes] = set()
    for index, (found, source) in enumerate(zip(files, lock.files, strict=True)):
        if hash_file(Path(found.path), "sha256") != source.sha256:
            raise UserError(f"{found.name} changed since it was indexed; run `headrace index` to accept the new text")
        for place, document in _documents(config, found, dropped):
            key = _key(index, place, document, found)
            rule = _unwanted(key, config, seen)
            if rule:
                dropped[rule] += 1
            else:
                seen.add(key.digest)
                keys.append(key)
        if (index + 1) % 10_000 == 0:
            log(f"corpus: {index + 1:,} of {len(files):,} files read")
    return keys


def _documents(config: CorpusConfig, found: Found, dropped: Counter[str]) -> Iterator[tuple[int, Document]]:
    try:
        yield from enumerate(read_documents(found, config.text_field))
    except NotUtf8:
        if config.source != "environment":
            raise
        dropped["not UTF-8"] += 1


def _key(index: int, place: int, document: Document, found: Found) -> _Key:
    data = document.text.encode()
    digest = hashlib.sha256(data).digest()
    group = digest.hex() if holds_many(found.name) else found.group
    return _Key(index, place, digest, len(data), group, document.kind)


def _unwanted(key: _Key, config: CorpusConfig, seen: set[bytes]) -> str | None:
    if key.size < config.min_document_bytes or key.size == 0:
        return "shorter than min_document_bytes"
    if key.size > config.max_document_bytes:
        return "longer than max_document_bytes"
    return "exact duplicate" if key.digest in seen else None


def _sample(keys: list[_Key], max_bytes: int | None, dropped: Counter[str]) -> list[_Key]:
    """The documents of smallest sha256 that fit `max_bytes` together, in their old order; samples are nested."""
    if max_bytes is None:
        return keys
    ranked = sorted(keys, key=lambda key: key.digest)
    totals = itertools.accumulate(key.size for key in ranked)
    taken = {key.digest for key, total in zip(ranked, totals, strict=True) if total <= max_bytes}
    chosen = [key for key in keys if key.digest in taken]
    if len(chosen) < len(keys):
        dropped["not in the sample of max_bytes"] += len(keys) - len(chosen)
    return chosen


def _splits(chosen: Sequence[_Key], config: CorpusConfig) -> dict[str, str]:
    sizes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for key in chosen:
        if not key.held:
            sizes[key.group] += key.size
            kinds.setdefault(key.group, Counter())[key.kind] += key.size
    strata = {group: max(sorted(counts), key=counts.__getitem__) for group, counts in kinds.items()}
    return assign(sizes, strata, config.validation_fraction, config.heldout_fraction)


def _write(
    config: CorpusConfig, files: Sequence[Found], chosen: Sequence[_Key], splits: dict[str, str], out: Path
) -> dict[str, Any]:
    """Second pass: write the chosen documents; returns counts and bytes by split, kind and source."""
    writers = {split: _Writer(out / f"{split}.parquet") for split in SPLITS}
    number = 0
    for index, group in itertools.groupby(chosen, key=lambda key: key.file):
        wanted = {key.place: key for key in group}
        for place, document in _documents(config, files[index], Counter()):
            key = wanted.get(place)
            if key is None:
                continue
            if hashlib.sha256(document.text.encode()).digest() != key.digest:
                raise UserError(f"{document.path} changed while the corpus was built; run `headrace index`, then again")
            split = HELDOUT if key.held else splits[key.group]
            writers[split].add(number, files[index].root, document, key.size)
            number += 1
    assert number == len(chosen), "every chosen document is read again, unless its file changed in length"
    return {split: writer.close() for split, writer in writers.items()}


class _Writer:
    """One split's Parquet file, written row group by row group, and its counts."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._rows: list[tuple[int, str, str, str, str]] = []
        self._pending = 0
        self._counts: dict[str, dict[str, Counter[str]]] = {"kinds": {}, "sources": {}}

    def add(self, number: int, source: str, document: Document, size: int) -> None:
        self._rows.append((number, source, document.path, document.kind, document.text))
        for table, name in (("kinds", document.kind), ("sources", source)):
            self._counts[table].setdefault(name, Counter()).update(documents=1, bytes=size)
        self._pending += size
        if self._pending >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> dict[str, Any]:
        self._flush()
        self._file.close()
        total: Counter[str] = sum(self._counts["kinds"].values(), Counter(documents=0, bytes=0))
        plain = {table: {name: dict(row) for name, row in rows.items()} for table, rows in self._counts.items()}
        return {"documents": total["documents"], "bytes": total["bytes"], **plain}

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._rows, strict=True), SCHEMA, strict=True)
            ]
            self._file.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
            self._rows, self._pending = [], 0


def _environment(config: CorpusConfig) -> dict[str, Any] | None:
    """Which packages the environment corpus took, with their licences, and which it left out, with the reason."""
    if config.source != "environment":
        return None
    every = distributions(config.licences) if config.packages else []
    return {
        "python": platform.python_version(),
        "packages": {
            each.name: {"version": each.version, "licence": each.licence} for each in every if not each.refused
        },
        "refused": {each.name: each.refused for each in every if each.refused},
    }
