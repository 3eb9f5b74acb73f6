"""What scans and selection add up to: documents and bytes by split, kind, root and source, and a row a piece."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from headrace.corpus.contamination import Findings
from headrace.corpus.listing import ENVIRONMENT
from headrace.corpus.scan import read_summary
from headrace.corpus.scan_columns import Coded, read_columns
from headrace.corpus.selection import DIGESTS, FIRST_RULE, PIECE_SCHEMA
from headrace.corpus.split import SPLITS
from headrace.errors import UserError

_EXAMPLES = 5


@dataclass
class Survey:
    """What the scans say of themselves, before a row of theirs is read."""

    sources: list[str] = field(default_factory=list)  # of each piece
    rows: list[int] = field(default_factory=list)  # of each piece
    damaged: dict[str, Counter[str]] = field(default_factory=dict)  # by source and rule
    examples: dict[str, list[str]] = field(default_factory=dict)  # by source
    with_damage: list[Path] = field(default_factory=list)  # scans
    findings: Findings = field(default_factory=Findings)

    def refuse_damage(self, limit: float) -> None:
        """Raise `UserError` that names the first damaged documents of a source where more than `limit` are damaged."""
        rows: Counter[str] = Counter()
        for source, count in zip(self.sources, self.rows, strict=True):
            rows[source] += count
        for source, counts in self.damaged.items():
            damaged = counts.total()
            if source != ENVIRONMENT and damaged > limit * (rows[source] + damaged):
                examples = "; ".join(self.examples[source])
                share = f"{damaged:,} of {rows[source] + damaged:,}"
                wrong = not rows[source] and any(rule.startswith("no field") for rule in counts)
                advice = "none can be read, check corpus.text_field" if wrong else "mend them or raise it"
                raise UserError(
                    f"{examples}: {share} documents of the source {source} are damaged, more than "
                    f"corpus.max_damaged_fraction={limit}; {advice}"
                )


def survey(scans: Sequence[Path]) -> Survey:
    """Read the summaries of all scans; they are in reading order."""
    found = Survey()
    for scan in scans:
        summary = read_summary(scan)
        found.sources.append(summary.source)
        found.rows.append(summary.rows)
        if summary.damaged:
            found.with_damage.append(scan)
            found.damaged.setdefault(summary.source, Counter()).update(summary.damaged)
            examples = found.examples.setdefault(summary.source, [])
            examples += summary.examples[: _EXAMPLES - len(examples)]
        for item, (documents, share) in summary.items.items():
            found.findings.add(item, documents, share)
    return found


class Tally:
    """Counts over all documents; `pieces` becomes `pieces.parquet`."""

    def __init__(self) -> None:
        self._splits = {split: {"kinds": _Table(), "sources": _Table(), "mixture": _Table()} for split in SPLITS}
        self._dropped: dict[str, Counter[str]] = {}
        self._rows: list[dict[str, Any]] = []

    def pieces(self) -> Any:
        """The table of `selection.PIECE_SCHEMA`."""
        return pa.Table.from_pylist(self._rows, schema=PIECE_SCHEMA)

    def splits(self) -> dict[str, Any]:
        """By split: documents and bytes, also by kind, by root (`sources`: what a licence goes with) and by source."""
        found: dict[str, Any] = {}
        for split, tables in self._splits.items():
            rows = {f"{split}_{unit}": 0 for unit in ("documents", "bytes")}
            for piece in self._rows:
                rows = {name: total + piece[name] for name, total in rows.items()}
            totals = {"documents": rows[f"{split}_documents"], "bytes": rows[f"{split}_bytes"]}
            found[split] = {**totals, **{name: table.plain() for name, table in tables.items()}}
        return found

    def dropped(self) -> dict[str, dict[str, int]]:
        """Documents dropped, by source and rule."""
        return {source: dict(sorted(counts.items())) for source, counts in self._dropped.items()}

    def add(self, scan: Path, source: str, fates: NDArray[np.uint8], rules: Sequence[str]) -> NDArray[np.uint64]:
        """Count a piece with its documents' fates; returns the first 8 bytes of their digests."""
        columns = read_columns(scan)
        before = self._rows[-1] if self._rows else None
        row: dict[str, Any] = {"piece": len(self._rows), "source": source, "rows": len(columns)}
        row["first_row"] = before["first_row"] + before["rows"] if before else 0
        row["first_id"] = before["first_id"] + sum(before[f"{split}_documents"] for split in SPLITS) if before else 0
        for code, split in enumerate(SPLITS):
            chosen = fates == code
            sizes = columns.bytes[chosen]
            row[f"{split}_documents"], row[f"{split}_bytes"] = len(sizes), int(sizes.sum())
            tables = self._splits[split]
            tables["kinds"].add(columns.kind, chosen, sizes)
            tables["sources"].add(columns.root, chosen, sizes)
            if len(sizes):
                tables["mixture"].add_one(source, len(sizes), int(sizes.sum()))
        counts = np.bincount(fates, minlength=FIRST_RULE)[FIRST_RULE:]
        self._dropped.setdefault(source, Counter()).update(
            {rules[rule]: int(counts[rule]) for rule in np.flatnonzero(counts).tolist()}
        )
        self._rows.append(row)
        return columns.digests[:, 0].byteswap()


class _Table:
    """Documents and bytes by name."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, coded: Coded, chosen: NDArray[np.bool_], sizes: NDArray[np.int64]) -> None:
        codes = coded.codes[chosen]
        documents = np.bincount(codes, minlength=len(coded.names))
        totals = np.zeros(len(coded.names), dtype=np.int64)
        np.add.at(totals, codes, sizes)
        for code in np.flatnonzero(documents).tolist():
            self.add_one(coded.names[code], int(documents[code]), int(totals[code]))

    def add_one(self, name: str, documents: int, size: int) -> None:
        self._counts.setdefault(name, Counter()).update(documents=documents, bytes=size)

    def plain(self) -> dict[str, dict[str, int]]:
        return {name: dict(counts) for name, counts in sorted(self._counts.items())}


def tally(found: Survey, scans: Sequence[Path], fates: NDArray[np.uint8], rules: Sequence[str], out: Path) -> Tally:
    """Count everything, and write the digests of all documents."""
    counts, begin = Tally(), 0
    with (out / DIGESTS).open("wb") as file:
        for scan, source, rows in zip(scans, found.sources, found.rows, strict=True):
            file.write(counts.add(scan, source, np.asarray(fates[begin : begin + rows]), rules).tobytes())
            begin += rows
    return counts
