"""corpus: locked sources to training, validation and held-out documents."""

import sys
from pathlib import Path

from headrace.corpus.build import build_corpus, left_out
from headrace.corpus.quarantine import QUARANTINE
from headrace.stages.corpus_scans import scan_folder, sought_items
from headrace.stages.run import Door, Outcome, Run, main, say
from headrace.tracking.progress import by_rule

KEPT = "kept"
"""What a later attempt goes on from, in the run folder."""


def body(run: Run) -> Outcome:
    """Read, deduplicate, sample and split the sources that the lock names."""
    config, scans = run.config.corpus, scan_folder(run.folder)
    items = sought_items(config, run.place)
    kept = run.folder / KEPT
    facts = build_corpus(config, run.lock, run.output, run.log.info, items=items, scans=scans, kept=kept)
    summary = {"documents": facts["documents"], "bytes": facts["bytes"]}
    for rule, count in facts["dropped"].items():
        run.log.info("dropped: %d %s", count, rule)
    for source, rules in facts["damaged"].items():
        run.log.info("damaged in %s: %s; see %s", source, rules, QUARANTINE)
    if rules := left_out(facts):
        say(run.place, f"left out: {by_rule(rules)}")
    dropped = sum(facts["dropped"].values())
    line = f"{facts['documents']:,} documents, {facts['bytes'] / 1e6:,.1f} MB of text, {dropped:,} dropped"
    return Outcome(line, summary)


def finished_parts(run_folder: Path) -> int:
    """How far an interrupted stage has got: scans, the selection, extracts."""
    selection = (run_folder / KEPT / "selection").exists()
    return selection + sum(
        len(list(folder.glob("*.parquet"))) for folder in (scan_folder(run_folder), run_folder / KEPT / "extracts")
    )


DOOR = Door("corpus", body, progress=finished_parts)

if __name__ == "__main__":
    sys.exit(main(DOOR))
