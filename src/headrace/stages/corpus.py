"""corpus: locked sources to training, validation and held-out documents."""

import sys

from headrace.corpus.build import build_corpus
from headrace.stages.run import Door, Outcome, Run, main


def body(run: Run) -> Outcome:
    """Read, deduplicate, sample and split the sources that the lock names."""
    facts = build_corpus(run.config.corpus, run.lock, run.output, run.log.info)
    summary = {"documents": facts["documents"], "bytes": facts["bytes"]}
    return Outcome(f"{facts['documents']:,} documents, {facts['bytes'] / 1e6:,.1f} MB of text", summary)


DOOR = Door("corpus", body)

if __name__ == "__main__":
    sys.exit(main(DOOR))
