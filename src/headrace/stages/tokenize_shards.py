"""One job of tokenize: some of its shards, in any number of jobs side by side.

Each batch has a lease, a ledger and a log of its own, each shard is published by a rename and found again by its
record: a killed job costs at most one shard, and the gathering stage makes whatever is missing.

    python -m headrace.stages.tokenize_shards 00002 experiment=tiny
"""

import sys
import traceback
from collections.abc import Sequence

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import write_atomic
from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.launch.deadline import Deadline, StopRequested
from headrace.stages.attempts import Ledger
from headrace.stages.places import Place, places
from headrace.stages.run import close_log, explain, fail, held, open_log
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
    name = f"{STAGE} {argv[0] if argv else ''}".strip()
    try:
        if not argv:
            raise UserError("usage: python -m headrace.stages.tokenize_shards BATCH [key=value ...]")
        config = load(argv[1:])
        found = places(config, known_lock(config).hash)
        units = batch_units(argv[0], plan(config.tokens), config.tokens.shards_per_job)
        with Deadline(config.launch.minutes).watching():
            return _attempt(argv[0], found, units, config)
    except (Exception, KeyboardInterrupt, StopRequested) as error:
        code, reason = explain(error)
        return fail(name, reason, code)


def _attempt(batch: str, found: dict[str, Place], units: list[Unit], config: Config) -> int:
    place = found[STAGE]
    shards, batches = shard_folder(place.folder), place.folder / "batches"
    for folder in (shards, batches):
        folder.mkdir(parents=True, exist_ok=True)
    with held(place, f"batch-{batch}"):
        ledger, log = Ledger(batches, batch), open_log(batches / f"{batch}.log", config.tracking.log_level)
        stuck = ledger.start(sum((shards / f"{unit.name}.json").exists() for unit in units))
        if stuck:
            return fail(f"{STAGE} {batch}", stuck, 1)
        code, reason = 1, "failed"
        try:
            corpus, tokenizer = found["corpus"].artifact, found["tokenizer"].artifact
            manifests.verify(corpus)
            manifests.verify(tokenizer)
            for unit in units:
                made = make_shard(unit, corpus, tokenizer, config.tokens, shards)
                log.info("%s: %s tokens", unit.name, made["tokens"])
            write_atomic(batches / f"{batch}.done", "".join(f"{unit.name}\n" for unit in units).encode())
            code, reason = 0, f"{len(units)} shards"
        except BaseException as error:
            code, reason = explain(error)
            log.error("%s", "".join(traceback.format_exception(error)))
            raise
        finally:
            ledger.end(code, reason)
            close_log(log)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
