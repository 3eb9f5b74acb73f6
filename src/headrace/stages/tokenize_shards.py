"""One job of tokenize: some of its shards, as the plan has them. See `batches`.

python -m headrace.stages.tokenize_shards 00002 experiment=tiny
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from headrace.artifacts.files import read_json
from headrace.config.schema import Config
from headrace.corpus.build import left_out
from headrace.corpus.lock import Lock
from headrace.stages.batch_names import per_job
from headrace.stages.batches import Batches, Job, run
from headrace.stages.places import Place, places
from headrace.stages.run import held
from headrace.stages.token_units import Documents, encoder_of, planned, shard_folder
from headrace.tokens.plan import Unit
from headrace.tokens.shards import make_shard, record_of
from headrace.tracking.progress import Display, by_rule, progress_on


def _units(config: Config, lock: Lock, place: Place) -> Sequence[Unit]:
    found = places(config, lock.hash)
    return planned(place.folder, found["corpus"].artifact, found["tokenizer"].artifact, lock, config)


def make_shards(job: Job, units: Sequence[Unit], quick: bool = False) -> Iterator[str]:
    """Make these units, telling of it on the terminal; finished ones are verified, or `quick` only found, and left.

    A unit has a lease: a job that outlived the killed Snakemake it belonged to is followed, not disturbed.
    """
    out = shard_folder(job.place.folder)
    out.mkdir(exist_ok=True)
    documents = Documents(job.inputs["corpus"], job.lock, job.config)
    encoder = encoder_of(job.inputs["tokenizer"], job.config.tokens)
    rules = by_rule(left_out(read_json(job.inputs["corpus"] / "corpus.json")))
    expected = sum(unit.expected_tokens for unit in units)
    told = _Told(
        progress_on(name=job.name, unit="tokens"), expected, f", the corpus left out: {rules}" if rules else ""
    )
    for unit in units:
        there = record_of(out, unit).exists()
        free = quick and there  # nothing will be written, and there may be thousands
        tell = told.found if there else told.add
        with nullcontext() if free else held(job.place, f"shard-{unit.name}"):
            record = make_shard(unit, documents.of(unit), encoder, job.config.tokens, out, tell, quick)
        yield f"{unit.name}: {record['documents']} documents, {record['tokens']} tokens, {record['counts']}"
    told.end()


class _Told:
    """Adds up what was done and shows it."""

    def __init__(self, display: Display, expected_tokens: int, rules: str) -> None:
        self._display, self._expected, self._began, self._rules = display, expected_tokens, time.monotonic(), rules
        self._documents = self._tokens = self._found = 0

    def add(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._show(max(self._expected, self._tokens + 1))  # an estimate never says that it is the end

    def found(self, documents: int, tokens: int) -> None:
        """A shard is there already: no part of this job's speed, nor of the time left."""
        self._documents += documents
        self._tokens += tokens
        self._found += tokens

    def end(self) -> None:
        self._show(self._tokens)
        self._display.close()

    def _show(self, total: int) -> None:
        made = self._tokens - self._found
        speed = f", {made / max(1e-9, time.monotonic() - self._began):,.0f} tokens/s" if made else ""
        self._display.show(self._tokens, total, f"{self._documents:,} documents{speed}{self._rules}")


BATCHES = Batches(
    stage="tokenize",
    program="tokenize_shards",
    per_job=lambda config: per_job("tokenize_shards", config.launch),
    units=_units,
    finished=lambda place, unit: record_of(shard_folder(place.folder), unit).exists(),
    make=make_shards,
    unit_name=lambda unit: unit.name,
)

if __name__ == "__main__":
    run(BATCHES)
