"""The corpus becomes token shards: `<split>-00000-of-00008.bin/.idx`, each made by one unit of work.

What a unit holds follows from the configuration alone: document i of the training split goes to shard i mod
`tokens.shards`, in an order given by a hash of its id; validation and held-out text are one shard each, in corpus
order. So the graph is known before anything is read, and the result is the same for any number of workers. A finished
shard has a record `<shard>.json` with the hashes of what it was made from and of what it holds: a unit whose record
still holds does nothing. Every document ends with the end-of-sequence id; none begins with one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from headrace.artifacts.files import hash_file, read_json, write_json
from headrace.config.schema import TokensConfig
from headrace.errors import UserError
from headrace.tokens.engine import Engine, open_engine
from headrace.tokens.indexed import IndexedWriter
from headrace.tokens.tokenizer import special_id, vocab_size

_BATCH_BYTES = 8_000_000  # text encoded at once: bounds memory, and is enough to keep the engine's threads busy


@dataclass(frozen=True)
class Unit:
    """One output shard: number `index` of the `count` shards of `split`."""

    split: str
    index: int
    count: int

    @property
    def name(self) -> str:
        """The shard's file name without its suffix."""
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}"


def plan(config: TokensConfig) -> list[Unit]:
    """All units of a dataset: `config.shards` of the training split, one of validation, one of held-out text."""
    training = [Unit("train", index, config.shards) for index in range(config.shards)]
    return [*training, Unit("validation", 0, 1), Unit("heldout", 0, 1)]


def make_shard(
    unit: Unit, corpus_folder: Path, tokenizer_folder: Path, config: TokensConfig, out: Path
) -> dict[str, Any]:
    """Make one shard in `out` unless it is there already, made from the same inputs and undamaged; returns its record.

    Raises `UserError` naming shard and document if the engine's ids differ from those of `tokenizers`.
    """
    engine = open_engine(config.engine, tokenizer_folder / "tokenizer.json")
    inputs: dict[str, Any] = {
        "unit": asdict(unit),
        "documents": hash_file(corpus_folder / f"{unit.split}.parquet", "xxh3"),
        "tokenizer": hash_file(tokenizer_folder / "tokenizer.json", "sha256"),
        "eos": special_id(tokenizer_folder, "eos_token"),
        "vocab_size": vocab_size(tokenizer_folder),
        "parity_every": config.parity_every,
        **engine.identity(),
    }
    record_path = out / f"{unit.name}.json"
    if record_path.exists():
        record: dict[str, Any] = read_json(record_path)
        if record.get("inputs") == inputs and all(_holds(out / name, kept) for name, kept in record["files"].items()):
            return record
        record_path.unlink()  # before its files change: a record never stands beside files that it does not describe
    counts = _write(unit, corpus_folder, engine, _Gate(unit, engine, tokenizer_folder, config), inputs["eos"], out)
    files = {name: _describe(out / name) for name in (f"{unit.name}.bin", f"{unit.name}.idx")}
    record = {"inputs": inputs, "files": files, **counts}
    write_json(record_path, record)
    return record


def finish(out: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """Gather the records of all units into `dataset.json`; returns it.

    Raises `UserError` naming the shard that is missing, or was made by another engine or tokenizer than the first.
    """
    records = {unit: read_json(out / f"{unit.name}.json") for unit in units}
    common = ("tokenizer", "eos", "vocab_size", "engine", "version", "unicode")
    made = {key: records[units[0]]["inputs"][key] for key in common}
    dataset: dict[str, Any] = {**made, "splits": {}}
    for unit, record in records.items():
        other = {key: record["inputs"][key] for key in common if record["inputs"][key] != made[key]}
        if other:
            raise UserError(
                f"{out / unit.name}: made with {other}, unlike {units[0].name}; remove it and tokenize again"
            )
        shard = {"name": unit.name, **{key: record[key] for key in ("tokens", "documents", "bytes", "files")}}
        split = dataset["splits"].setdefault(unit.split, {"tokens": 0, "documents": 0, "bytes": 0, "shards": []})
        split["shards"].append(shard)
        for key in ("tokens", "documents", "bytes"):
            split[key] += record[key]
    for stale in out.glob(".*.tmp"):  # left by units that were killed
        stale.unlink()
    write_json(out / "dataset.json", dataset)
    return dataset


class _Gate:
    """Encodes every n-th document of a shard again with `tokenizers` and refuses any difference."""

    def __init__(self, unit: Unit, engine: Engine, tokenizer_folder: Path, config: TokensConfig) -> None:
        self.unit, self.every, self.checked, self._seen = unit, config.parity_every, 0, 0
        reference = engine.name == "tokenizers"  # it would be compared with itself
        self._reference = None if reference else open_engine("tokenizers", tokenizer_folder / "tokenizer.json")

    def check(self, texts: Sequence[str], numbers: Sequence[int], ids: np.ndarray, offsets: np.ndarray) -> None:
        """Compare the ids of a batch with the reference's; `numbers` are the documents' ids, for the message."""
        chosen = [place for place in range(len(texts)) if (self._seen + place) % self.every == 0]
        self._seen += len(texts)
        if self._reference is None or not chosen:
            return
        expected, bounds = self._reference.encode([texts[place] for place in chosen])
        for which, place in enumerate(chosen):
            ours = ids[offsets[place] : offsets[place + 1]]
            if not np.array_equal(ours, expected[bounds[which] : bounds[which + 1]]):
                raise UserError(
                    f"shard {self.unit.name}: document {numbers[place]} has other ids than `tokenizers` gives; "
                    "set tokens.engine=tokenizers"
                )
        self.checked += len(chosen)


def _write(unit: Unit, corpus_folder: Path, engine: Engine, gate: _Gate, eos: int, out: Path) -> dict[str, int]:
    counts = {"tokens": 0, "documents": 0, "bytes": 0}
    with IndexedWriter(out / unit.name) as writer:
        for numbers, texts in _batches(unit, corpus_folder):
            ids, offsets = engine.encode(texts)
            gate.check(texts, numbers, ids, offsets)
            lengths = np.diff(offsets).astype(np.int32) + 1
            writer.add(np.insert(ids, offsets[1:], eos).astype(np.int32), lengths)
            counts["tokens"] += int(lengths.sum())
            counts["documents"] += len(texts)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
    return {**counts, "parity_checked": gate.checked}


def _batches(unit: Unit, corpus_folder: Path) -> Iterator[tuple[list[int], list[str]]]:
    """The unit's documents in their order, about `_BATCH_BYTES` of text at a time."""
    numbers, texts = _documents(unit, corpus_folder)
    order = list(range(len(texts)))
    if unit.split == "train":  # neighbours in the corpus are alike; a row should not hold one folder's files only
        order.sort(key=lambda place: hashlib.blake2b(f"order {numbers[place]}".encode()).digest())
    batch: list[int] = []
    size = 0
    for place in order:
        batch.append(place)
        size += len(texts[place])
        if size >= _BATCH_BYTES:
            yield [numbers[each] for each in batch], [texts[each] for each in batch]
            batch, size = [], 0
    if batch:
        yield [numbers[each] for each in batch], [texts[each] for each in batch]


def _documents(unit: Unit, corpus_folder: Path) -> tuple[list[int], list[str]]:
    """Ids and texts of documents `index`, `index + count`, ... of the split."""
    numbers: list[int] = []
    texts: list[str] = []
    position = 0
    for batch in pq.ParquetFile(corpus_folder / f"{unit.split}.parquet").iter_batches(1024, columns=["id", "text"]):
        mine = batch.take(np.arange((unit.index - position) % unit.count, len(batch), unit.count))
        numbers += mine["id"].to_pylist()
        texts += mine["text"].to_pylist()
        position += len(batch)
    return numbers, texts


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "hash": hash_file(path, "xxh3")}


def _holds(path: Path, described: dict[str, Any]) -> bool:
    return path.is_file() and _describe(path) == described
