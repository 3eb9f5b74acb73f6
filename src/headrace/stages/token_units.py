"""What the units of tokenize are made from: the plan of a corpus and tokenizer, and the documents of each unit.

The rooms `corpus` and `tokens` know nothing of each other; here they meet.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from headrace.artifacts.files import hash_file, read_json
from headrace.config.schema import Config, TokensConfig
from headrace.config.shards import training_shards
from headrace.corpus.documents import selected_documents, selected_hash
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import Piece, pieces
from headrace.corpus.selection import Selection
from headrace.tokens.encode import Encoder, Settings
from headrace.tokens.plan import FIXED, TRAIN, Text, Unit, plan, read_plan, write_plan
from headrace.tokens.shards import Source


def plan_path(run_folder: Path) -> Path:
    """Where the plan lies."""
    return run_folder / "plan.json"


def shard_folder(run_folder: Path) -> Path:
    """Where shards lie until the dataset is whole."""
    return run_folder / "shards"


def planned(run_folder: Path, corpus: Path, tokenizer: Path, lock: Lock, config: Config) -> list[Unit]:
    """All units; the plan is made where it is missing. It is a function of what names the run directory."""
    path = plan_path(run_folder)
    if not path.exists():
        write_plan(path, units_of(corpus, tokenizer, lock, config))
    return read_plan(path)


def units_of(corpus: Path, tokenizer: Path, lock: Lock, config: Config) -> list[Unit]:
    """The plan of a corpus artifact and a tokenizer artifact."""
    found, cut = Selection(corpus, lock.hash).pieces, pieces(lock)
    text = Text(found["source"].tolist(), found[f"{TRAIN}_documents"], found[f"{TRAIN}_bytes"])
    splits = read_json(corpus / "corpus.json")["splits"]
    fixed = {split: (splits[split]["documents"], splits[split]["bytes"]) for split in FIXED}
    bytes_per_token = read_json(tokenizer / "tokenizer_report.json")["bytes_per_token"]

    def files(first: int, last: int) -> str:
        locked = lock.files[cut[first].first : cut[last].last]
        return f"sha256:{hashlib.sha256(repr([(f.name, f.size, f.hash) for f in locked]).encode()).hexdigest()}"

    named = bool(config.corpus.sources)
    return plan(text, fixed, training_shards(config.tokens), bytes_per_token, files, named)


def encoder_of(tokenizer: Path, config: TokensConfig) -> Encoder:
    """The encoder of a tokenizer artifact, for all units of a process."""
    return Encoder(tokenizer, Settings(config.engine, config.parity_every, config.fim_rate, config.split_rate))


class Documents:
    """Finds the documents of units in a corpus artifact."""

    def __init__(self, corpus: Path, lock: Lock, config: Config) -> None:
        self._corpus, self._lock, self._config = corpus, lock, config.corpus
        self._pieces: list[Piece] = pieces(lock)
        self._selection = Selection(corpus, lock.hash)  # once for all units: there may be 6,894

    def of(self, unit: Unit) -> Source:
        """The documents of one unit."""
        if unit.split != TRAIN:
            path = self._corpus / f"{unit.split}.parquet"
            return Source(hash_file(path, "xxh3"), lambda: _extracted(path))
        mine = self._pieces[unit.first_piece : unit.last_piece + 1]
        known = selected_hash(self._selection, mine, TRAIN, unit.skip, unit.documents)

        def read() -> Iterator[tuple[int, str]]:
            chosen = selected_documents(
                self._selection, self._lock, self._config, mine, TRAIN, unit.skip, unit.documents
            )
            for number, _, text in chosen:
                yield number, text

        return Source(known, read)


def _extracted(path: Path) -> Iterator[tuple[int, str]]:
    for batch in pq.ParquetFile(path).iter_batches(1024, columns=["id", "text"]):
        yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
