"""The corpus becomes token shards: `<split>-00000-of-00008.bin/.idx/.L4096.pack`, each made by one unit of work.

Which documents a unit holds the plan says (see `plan`); what they become, the encoder (see `encode`). Within a shard
documents are shuffled and packed into rows a window at a time (see `packing`), so memory does not grow with the shard.
A finished shard has a record `<shard>.json` with the hashes of what it was made from and of what it holds: a unit whose
record still holds does nothing. Every document ends with the end-of-sequence id; none begins with one.

A record: `inputs`; `files` by name, each with its size and hashes (see `verified`); `tokens`, `documents`,
`bytes` of text; `counts` of documents compared with the reference, documents rearranged, tokens split; `rows` by row
length; `lengths`, where number k counts documents of 2^k to 2^(k+1) - 1 tokens. `dataset.json` has all of it but inputs
and files, by split and shard, and the hash of each record.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import hash_bytes, parse_json, read_bytes, read_json, write_json
from headrace.artifacts.manifest import FileEntry
from headrace.config.schema import TokensConfig
from headrace.errors import UserError
from headrace.tokens.encode import Encoder, ShardEncoder
from headrace.tokens.indexed import IndexedWriter, shard_paths
from headrace.tokens.packing import Block, Packer
from headrace.tokens.plan import TRAIN, Unit
from headrace.tokens.verified import describe

DATASET = "dataset.json"
_BATCH_BYTES = 8_000_000  # text encoded at once: bounds memory, and is enough to keep the engine's threads busy
_LENGTHS = 31  # an int32 length has so many powers of two
_OWN = ("unit", "documents", "parity_every")  # inputs of a shard; the others are those of all shards
_SUMS = ("tokens", "documents", "bytes")
_NOTHING = dict.fromkeys(_SUMS, 0)


@dataclass(frozen=True)
class Source:
    """The documents of a unit: `hash` of what they are, `read` gives their ids and texts, in order, whenever called."""

    hash: str
    read: Callable[[], Iterable[tuple[int, str]]]


@dataclass(frozen=True)
class Encoded:
    """Some documents as they are stored: `tokens` int32 [sum of lengths] with every EOS, `lengths` int32 [D], and the
    bytes of their text."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    bytes: int


def make_shard(
    unit: Unit,
    source: Source,
    encoder: Encoder,
    config: TokensConfig,
    out: Path,
    tell: Callable[[int, int], None] = lambda documents, tokens: None,
    quick: bool = False,
) -> dict[str, Any]:
    """Make one shard in `out` unless it is there already, made from the same inputs and undamaged; returns its record.

    With `quick` a shard that is there is not read, only its record and the sizes of its files. `tell` hears, batch by
    batch, how many documents and tokens were added. Raises `UserError` naming shard and document if the engine's ids
    differ from those of `tokenizers`, and for a source that is not what the corpus was made from.
    """
    inputs: dict[str, Any] = {
        "unit": asdict(unit),
        "documents": source.hash,
        "parity_every": config.parity_every,
        "row_lengths": list(config.row_lengths),
        **encoder.identity(),
    }
    record_path = record_of(out, unit)
    if record_path.exists():
        record: dict[str, Any] = read_json(record_path)
        kept = record["files"].items()
        if record.get("inputs") == inputs and all(_holds(out / name, entry, quick) for name, entry in kept):
            tell(record["documents"], record["tokens"])
            return record
        record_path.unlink()  # before its files change: a record never stands beside files that it does not describe
    _sweep(out, unit.name)
    shard = encoder.shard(unit.name, training=unit.split == TRAIN, documents=unit.documents)
    facts = write_shard(out / unit.name, _encoded(source.read(), shard, tell), config.row_lengths)
    assert facts["documents"] == unit.documents, "the plan counts what the corpus holds"
    record = {"inputs": inputs, "counts": shard.counts, **facts}
    write_json(record_path, record)
    return record


def record_of(out: Path, unit: Unit) -> Path:
    """Where the record of a unit's shard lies."""
    return out / f"{unit.name}.json"


def recorded_files(out: Path, unit: Unit) -> dict[str, FileEntry]:
    """The files of a finished shard by name, as its record has them; whoever wrote it has hashed and fsynced them."""
    files = read_json(record_of(out, unit))["files"]
    return {name: FileEntry(kept["size"], kept["hash"]) for name, kept in files.items()}


def write_shard(prefix: Path, documents: Iterable[Encoded], row_lengths: Sequence[int]) -> dict[str, Any]:
    """Pack documents into the files of one shard; what its record says of them, inputs apart.

    Raises `OSError` that names the file which reads back otherwise than it was written.
    """
    facts: dict[str, Any] = dict(_NOTHING)
    rows, lengths = [0] * len(row_lengths), np.zeros(_LENGTHS, dtype=np.int64)
    packer = Packer(row_lengths, prefix.name)
    with IndexedWriter(prefix, row_lengths) as writer:

        def store(blocks: Iterator[Block]) -> None:
            for block in blocks:
                writer.add(block.tokens, block.lengths, block.starts)
                for place, starts in enumerate(block.starts):
                    rows[place] += len(starts) - 1

        for batch in documents:
            store(packer.add(batch.tokens, batch.lengths))
            facts["tokens"] += len(batch.tokens)
            facts["documents"] += len(batch.lengths)
            facts["bytes"] += batch.bytes
            lengths += np.bincount(np.frexp(batch.lengths)[1] - 1, minlength=_LENGTHS)
        store(packer.rest())
    return {
        **facts,
        "files": {path.name: _read_back(path, writer.hashes[path.name]) for path in shard_paths(prefix, row_lengths)},
        "rows": dict(zip(map(str, row_lengths), rows, strict=True)),
        "lengths": np.trim_zeros(lengths, "b").tolist(),
    }


def finish(out: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """Gather the records of all units into `dataset.json`; returns it.

    Raises `UserError` naming the shard that is missing, or was made by another engine or tokenizer than the first.
    """
    dataset: dict[str, Any] = {}
    for unit in units:
        path = record_of(out, unit)
        data = read_bytes(path)
        record = parse_json(data, path)
        made = {key: value for key, value in record["inputs"].items() if key not in _OWN}
        if not dataset:
            dataset = {**made, "splits": {}}
        if other := {key: value for key, value in made.items() if value != dataset.get(key)}:
            raise UserError(
                f"{out / unit.name}: made with {other}, unlike {units[0].name}; remove it and tokenize again"
            )
        facts = {key: record[key] for key in (*_SUMS, "rows")}
        nothing = {**_NOTHING, "rows": {}, "counts": {}, "lengths": [], "shards": []}
        _add(dataset["splits"].setdefault(unit.split, nothing), record)
        kept = {"size": len(data), "hash": hash_bytes(data, "xxh3")}
        dataset["splits"][unit.split]["shards"].append(
            {"name": unit.name, "source": unit.source, **facts, "record": kept}
        )
    _sweep(out, DATASET)
    write_json(out / DATASET, dataset)
    return dataset


def _add(split: dict[str, Any], record: dict[str, Any]) -> None:
    """Add what the record of a shard counts to its split's counts."""
    for key in _SUMS:
        split[key] += record[key]
    for table in ("rows", "counts"):
        for key, count in record[table].items():
            split[table][key] = split[table].get(key, 0) + count
    split["lengths"] = [a + b for a, b in zip_longest(split["lengths"], record["lengths"], fillvalue=0)]


def _encoded(
    documents: Iterable[tuple[int, str]], shard: ShardEncoder, tell: Callable[[int, int], None]
) -> Iterator[Encoded]:
    """Documents as they are stored, in their order, about `_BATCH_BYTES` of text at a time."""
    for numbers, texts in _batches(documents):
        tokens, offsets = shard.encode(texts, numbers)
        yield Encoded(tokens, np.diff(offsets).astype(np.int32), sum(len(text.encode()) for text in texts))
        tell(len(texts), len(tokens))


def _batches(documents: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    for number, text in documents:
        numbers.append(number)
        texts.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield numbers, texts
            numbers, texts, size = [], [], 0
    if texts:
        yield numbers, texts


def _read_back(path: Path, written: str) -> dict[str, Any]:
    described = describe(path)
    if described["hash"] != written:
        raise OSError(f"{path}: reads back otherwise than it was written; check disk and memory, then tokenize again")
    return described


def _holds(path: Path, described: dict[str, Any], quick: bool) -> bool:
    if not path.is_file() or path.stat().st_size != described["size"]:
        return False
    return "hash" in described if quick else describe(path) == described


def _sweep(out: Path, name: str) -> None:
    """Remove what a killed process was writing: a shard's part can be gigabytes. Others' files are at work still."""
    for stale in out.glob(f".{glob.escape(name)}.*.tmp"):
        stale.unlink()
