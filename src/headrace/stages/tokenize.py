"""tokenize: gather the token shards into a dataset, making those that no batch job has made.

Jobs hash every byte that they write, and whoever reads a shard verifies it. The gather believes their records and reads
no shard again: of 59 TB that would take longer than a job may. Only where the stage had finished once and its result
was taken away, as one does with a damaged one, is every shard verified, and the damaged ones are made again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.artifacts.files import link_or_copy
from headrace.artifacts.manifest import FileEntry
from headrace.stages.attempts import Ledger
from headrace.stages.batches import Job
from headrace.stages.run import Door, Outcome, Run, main
from headrace.stages.token_units import planned, shard_folder
from headrace.stages.tokenize_shards import make_shards
from headrace.tokens.plan import Unit
from headrace.tokens.shards import DATASET, finish, record_of, recorded_files

TOKENIZER = "tokenizer.json"


def body(run: Run) -> Outcome:
    """Finished shards are taken over; the others are made here."""
    inputs = {parent: run.input(parent) for parent in ("corpus", "tokenizer")}
    units = planned(run.folder, inputs["corpus"], inputs["tokenizer"], run.lock, run.config)
    job = Job("tokenize", run.config, run.lock, run.place, inputs, run.log)
    for line in make_shards(job, units, quick=not Ledger(run.folder).has_finished()):
        run.log.info("%s", line)
    shards = shard_folder(run.folder)
    dataset = finish(shards, units)
    known = gather(shards, units, run.output)
    link_or_copy(inputs["tokenizer"] / TOKENIZER, run.output / TOKENIZER)  # `dataset.json` has its sha256
    train = dataset["splits"]["train"]
    summary = {"tokens": train["tokens"], "shards": len(train["shards"])}
    return Outcome(f"{train['tokens']:,} training tokens in {len(train['shards'])} shards", summary, known)


def gather(shards: Path, units: Sequence[Unit], output: Path) -> dict[str, FileEntry]:
    """Link what the records name, and nothing else that lies beside it; returns the files that are hashed already."""
    known = {}
    for unit in units:
        for name, entry in recorded_files(shards, unit).items():
            link_or_copy(shards / name, output / name)
            if (output / name).samefile(shards / name):  # a copy is neither fsynced nor known to be right
                known[name] = entry
        record = record_of(shards, unit)
        link_or_copy(record, output / record.name)
    link_or_copy(shards / DATASET, output / DATASET)
    return known


def finished_shards(run_folder: Path) -> int:
    """How far an interrupted stage has got."""
    return len(list(shard_folder(run_folder).glob("*.json")))


DOOR = Door("tokenize", body, progress=finished_shards)

if __name__ == "__main__":
    sys.exit(main(DOOR))
