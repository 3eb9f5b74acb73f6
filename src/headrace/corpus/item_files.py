"""Evaluation items in a file: lines of {"id": "task/...", "text": ...}, pinned by their hash.

`headrace items` writes one where the tasks' data can be had (evaluation/item_texts.py); the corpus stage reads it
anywhere, with no network and no harness.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from headrace.artifacts.files import hash_bytes, write_atomic
from headrace.config.schema import ItemsFile
from headrace.corpus.contamination import Item
from headrace.errors import UserError


def write_items(path: Path, items: Iterable[Item]) -> ItemsFile:
    """Write the items in one rename; returns what `corpus.contamination_items` must say to have them sought."""
    lines = (json.dumps({"id": item.id, "text": item.text}, ensure_ascii=False) + "\n" for item in items)
    data = "".join(lines).encode("utf-8", "surrogatepass")
    write_atomic(path, data)
    return ItemsFile(str(path), _sha256(data))


def read_items(file: ItemsFile) -> list[Item]:
    """All items; raises `UserError` for a file that is not there, not the pinned one, or not of items."""
    setting = f"corpus.contamination_items: {file.path}"
    try:
        data = Path(file.path).read_bytes()
    except OSError as error:
        raise UserError(f"{setting}: {error.strerror}; `headrace items` writes such a file") from None
    if _sha256(data) != file.sha256:
        raise UserError(
            f"{setting}: its sha256 is {_sha256(data)}, not the one that is set; set it or take the old file"
        )
    return items_in(data, setting)


def items_in(data: bytes, where: str) -> list[Item]:
    """The items in a file's content; raises `UserError` that begins with `where` for what is no file of items."""
    items = [_item(line, f"{where}: line {number}") for number, line in enumerate(data.splitlines(), 1)]
    if not items:
        raise UserError(f"{where}: it holds no items; `headrace items` writes such a file")
    seen: set[str] = set()
    for number, item in enumerate(items, 1):
        if item.id in seen:
            raise UserError(f"{where}: line {number}: the id {item.id!r} stands there twice")
        seen.add(item.id)
    return items


def _item(line: bytes, where: str) -> Item:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON") from None
    id_, text = (entry.get(key) for key in ("id", "text")) if isinstance(entry, dict) else (None, None)
    if not isinstance(id_, str) or not isinstance(text, str) or "/" not in id_.strip("/"):
        raise UserError(f'{where} is not {{"id": "task/...", "text": "..."}}')
    return Item(id_, text)


def _sha256(data: bytes) -> str:
    return hash_bytes(data, "sha256").removeprefix("sha256:")
