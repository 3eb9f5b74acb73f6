"""A Hub dataset read through `datasets`, for those whose files are not Parquet or JSONL: an adapter, not a main road.

The address is `datasets://<repository>?split=train&revision=<commit>`, with `&config=<name>` where the dataset has
several. The commit is part of it, because a branch moves; it is also the identity in the lock. One shard of the
dataset's is one piece of work. (Plain files of a dataset are better read as `hf://datasets/<repository>/...`.)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from headrace.corpus.remote import STREAM
from headrace.errors import UserError


@dataclass(frozen=True)
class Described:
    """What the lock holds of a streamed dataset."""

    identity: str
    shards: int


@dataclass(frozen=True)
class _Address:
    repository: str
    split: str
    revision: str
    config: str | None


def describe(entry: str) -> Described:
    """Commit and number of shards; raises `UserError` for an address that lacks split or commit, or does not open."""
    address = _parse(entry)
    return Described(f"revision:{address.revision}", int(_open(entry, address).num_shards))


def read_stream(entry: str, text_field: str, shards: range | None) -> Iterator[tuple[str, Any]]:
    """(label, value of the text field) of each row; None where a row lacks the field."""
    dataset = _open(entry, _parse(entry))
    for shard in range(dataset.num_shards) if shards is None else shards:
        part = dataset.shard(num_shards=dataset.num_shards, index=shard)
        for number, row in enumerate(part):
            yield f"{shard}-{number}", row.get(text_field)


def _parse(entry: str) -> _Address:
    repository, _, query = entry.removeprefix(STREAM).partition("?")
    words = dict(parse_qsl(query))
    revision = words.get("revision", "")
    if not repository or "split" not in words or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"{entry}: give {STREAM}<repository>?split=<name>&revision=<40 hex digits of a commit>")
    return _Address(repository, words["split"], revision, words.get("config"))


def _open(entry: str, address: _Address) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{entry}: needs the package datasets: pip install datasets") from None
    try:
        return load_dataset(
            address.repository, address.config, split=address.split, revision=address.revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{entry}: cannot be opened: {first}") from None
