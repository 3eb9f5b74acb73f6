"""Locked sources in, the corpus artifact out: which documents there are, and not a copy of their text.

Three steps, which `build_corpus` does in one process and a cluster does in many: scan every piece (`scan`, side by
side), select (`select`, one process that reads no text), and extract the little text that is read by itself
(`extract`). Training text stays where it is; `documents.selected_documents` reads it. The result depends on sources and
configuration alone.
"""

import logging
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import link_or_copy, read_json, write_json
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
from headrace.errors import UserError

SUMMARY = "corpus.json"
_LOG = logging.getLogger(__name__)


def build_corpus(
    config: CorpusConfig,
    lock: Lock,
    out: Path,
    log: Callable[[str], None],
    *,
    items: Sequence[Item] = (),
    scans: Path | None = None,
    kept: Path | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Any]:
    """Read the locked sources and write the corpus into the folder `out`; returns what `corpus.json` holds.

    `items` are those that `corpus.contamination_tasks` and `contamination_items` name. Scans that lie in `scans`
    are used; None scans everything and keeps nothing. In the folder `kept` stay the selection and what was extracted so
    far, which a later call for the same corpus goes on from. Raises `UserError` for a source that is not as locked, for
    too much damage, and for a corpus without documents or too small to be split.
    """
    named = bool(config.contamination_tasks or config.contamination_items)
    assert bool(items) == named, "the stage hands in the items that are named"
    sought = Items(items) if items else None
    folder = scans or out / ".scans"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cut = pieces(lock, piece_bytes)

        def select(into: Path) -> dict[str, Any]:
            paths = list(scan_each(Scanner(config, lock, sought), cut, folder, "corpus"))
            return select_corpus(config, lock, paths, into, sought)

        summary = _kept_selection(kept / "selection", out, select) if kept else select(out)
        extracts = kept and kept / "extracts"
        if extracts:
            extracts.mkdir(exist_ok=True)
        extract(Selection(out, lock.hash), lock, config, cut, out, extracts)
    finally:
        if scans is None:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(out / SUMMARY, summary)
    log(f"corpus: {summary['documents']:,} documents, {summary['bytes'] / 1e6:,.1f} MB from {summary['files']:,} files")
    return summary


def _kept_selection(folder: Path, out: Path, select: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Links in `out` to the selection in `folder`, which is made where it is missing or damaged; its summary."""
    try:
        files = manifests.verify(folder).files
    except UserError as error:
        if folder.exists():
            _LOG.warning("%s; it is made again", str(error).partition(";")[0])
        partial = folder.with_suffix(".partial")
        for left in (folder, partial):
            manifests.discard(left)
        partial.mkdir(parents=True)
        write_json(partial / SUMMARY, select(partial))
        files = manifests.build(partial, kind="selection", producer={}, inputs={}, summary={}, algorithm="xxh3").files
        manifests.commit(partial, folder)
    for name in files:
        if name != SUMMARY:
            link_or_copy(folder / name, out / name)
    facts: dict[str, Any] = read_json(folder / SUMMARY)
    return facts


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
