"""One job of tokenize: some of its shards, in any number of jobs side by side.

Each batch has a lease of its own, each shard is published by a rename and found again by its record, so a killed job
costs at most one shard and the gathering stage makes whatever is missing.

    python -m headrace.stages.tokenize_shards 00002 experiment=tiny
"""

import sys
from collections.abc import Sequence

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import write_atomic
from headrace.config.compose import load
from headrace.config.schema import TokensConfig
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.launch.deadline import Deadline, StopRequested
from headrace.stages.places import Place, places
from headrace.stages.run import explain, fail, held
from headrace.stages.tokenize import shard_folder
from headrace.tokens.shards import Unit, make_shard, plan

STAGE = "tokenize"


def batch_units(batch: str, units: list[Unit], per_job: int) -> list[Unit]:
    """The shards of one batch; `UserError` for a batch that does not exist."""
    count = -(-len(units) // per_job)
    if not batch.isdigit() or int(batch) >= count:
        raise UserError(f"batch {batch!r}: give a number from 0 to {count - 1}")
    return units[int(batch) * per_job : (int(batch) + 1) * per_job]


def main(argv: Sequence[str]) -> int:
    """Make the shards of the batch `argv[0]` under the overrides `argv[1:]`; returns the exit code."""
    try:
        if not argv:
            raise UserError("usage: python -m headrace.stages.tokenize_shards BATCH [key=value ...]")
        config = load(argv[1:])
        found = places(config, known_lock(config).hash)
        units = batch_units(argv[0], plan(config.tokens), config.launch.shards_per_job)
        with Deadline(config.launch.minutes).watching():
            _make(argv[0], found, units, config.tokens)
        return 0
    except (Exception, KeyboardInterrupt, StopRequested) as error:
        code, reason = explain(error)
        return fail(f"{STAGE} {argv[0] if argv else ''}", reason, code)


def _make(batch: str, found: dict[str, Place], units: list[Unit], config: TokensConfig) -> None:
    place = found[STAGE]
    folder = shard_folder(place.folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = found["corpus"].artifact, found["tokenizer"].artifact
    manifests.verify(corpus)
    manifests.verify(tokenizer)
    with held(place, f"batch-{batch}"):
        for unit in units:
            make_shard(unit, corpus, tokenizer, config, folder)
        done = place.folder / "batches" / f"{batch}.done"
        done.parent.mkdir(exist_ok=True)
        write_atomic(done, "".join(f"{unit.name}\n" for unit in units).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
