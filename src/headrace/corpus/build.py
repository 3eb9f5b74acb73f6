"""Locked sources in, the corpus artifact out: which documents there are, and not a copy of their text.

Three steps, which `build_corpus` does in one process and a cluster does in many: scan every piece (`scan`, side by
side), select (`select`, one process that reads no text), and extract the little text that is read by itself
(`extract`). Training text stays where it is; `documents.selected_documents` reads it. The result depends on sources and
configuration alone.
"""

import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.artifacts.files import write_json
from headrace.config.schema import CorpusConfig
from headrace.corpus.contamination import Item, Items
from headrace.corpus.digest_ranges import RANGE_DOCUMENTS
from headrace.corpus.environment import distributions
from headrace.corpus.extract import extract
from headrace.corpus.listing import ENVIRONMENT
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import PIECE_BYTES, pieces
from headrace.corpus.quarantine import QUARANTINE, write_quarantine
from headrace.corpus.scan import Scanner, scan_each
from headrace.corpus.select import run_selecting
from headrace.corpus.selection import Selection, write_selection
from headrace.corpus.tally import Survey, survey, tally


def build_corpus(
    config: CorpusConfig,
    lock: Lock,
    out: Path,
    log: Callable[[str], None],
    *,
    items: Sequence[Item] = (),
    scans: Path | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Any]:
    """Read the locked sources and write the corpus into the folder `out`; returns what `corpus.json` holds.

    `items` are those that `corpus.contamination_tasks` and `contamination_items` name. Scans that lie in `scans`
    are used; None scans everything and keeps nothing. Raises `UserError` for a source that is not as locked, for too
    much damage, and for a corpus without documents or too small to be split.
    """
    named = bool(config.contamination_tasks or config.contamination_items)
    assert bool(items) == named, "the stage hands in the items that are named"
    sought = Items(items) if items else None
    folder = scans or out / ".scans"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cut = pieces(lock, piece_bytes)
        scanner = Scanner(config, lock, sought)
        paths = list(scan_each(scanner, cut, folder, "corpus"))
        summary = select_corpus(config, lock, paths, out, sought)
        extract(Selection(out, lock.hash), lock, config, cut, out)
    finally:
        if scans is None:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(out / "corpus.json", summary)
    log(f"corpus: {summary['documents']:,} documents, {summary['bytes'] / 1e6:,.1f} MB from {summary['files']:,} files")
    return summary


def select_corpus(
    config: CorpusConfig,
    lock: Lock,
    scans: Sequence[Path],
    out: Path,
    sought: Items | None = None,
    range_documents: int = RANGE_DOCUMENTS,
) -> dict[str, Any]:
    """Write the selection into `out` from the scans of all pieces, in order; returns what `corpus.json` holds."""
    for stale in {temporary for scan in scans[:1] for temporary in scan.parent.glob(".*.tmp")}:
        stale.unlink()  # left by scans that were killed
    found = survey(scans)
    found.refuse_damage(config.max_damaged_fraction)
    selecting = run_selecting(config, scans, sum(found.rows), out, range_documents)
    rules = selecting.rules.names
    counts = tally(found, scans, selecting.fates, rules, out)
    write_selection(out, lock.hash, rules, sum(found.rows), selecting.sample, counts.pieces())
    quarantined = write_quarantine(out / QUARANTINE, found.with_damage)
    splits = counts.splits()
    return {
        "lock": lock.hash,
        "files": len(lock.files),
        "pieces": len(scans),
        "documents": sum(split["documents"] for split in splits.values()),
        "bytes": sum(split["bytes"] for split in splits.values()),
        "splits": splits,
        "dropped": _dropped(selecting.dropped(), found),
        "dropped_by_source": counts.dropped(),
        "damaged": {source: dict(sorted(rules.items())) for source, rules in found.damaged.items()},
        "damaged_examples": found.examples,
        "quarantined": quarantined,
        "contamination": {"tasks": sought.by_task(), "found": found.findings.table()} if sought else None,
        "environment": _environment(config),
    }


def left_out(facts: Mapping[str, Any]) -> Counter[str]:
    """Documents that are not in the corpus which `corpus.json` tells of, by rule: dropped ones and damaged ones."""
    counts = Counter(facts["dropped"])  # which has the environment's damaged ones
    for source, rules in facts["damaged"].items():
        counts.update(rules if source != ENVIRONMENT else {})
    return counts


def _dropped(by_rule: dict[str, int], found: Survey) -> dict[str, int]:
    """Documents by the rule that dropped them; files of the environment that are not UTF-8 are among them."""
    return dict(sorted({**by_rule, **found.damaged.get(ENVIRONMENT, {})}.items()))


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
