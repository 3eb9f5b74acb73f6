"""Files of evaluation items: what is written is read, and nothing else is taken for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.artifacts.files import hash_bytes
from headrace.config.schema import ItemsFile
from headrace.corpus.contamination import Item
from headrace.corpus.item_files import read_items, write_items
from headrace.errors import UserError

ITEMS = [Item("quiz/1", "a question\u2028 of two \n lines"), Item("quiz/a/2", "\ud800 no text"), Item("sums/0", "")]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = write_items(tmp_path / "items.jsonl", ITEMS)
    assert read_items(file) == ITEMS
    assert write_items(tmp_path / "again.jsonl", ITEMS).sha256 == file.sha256


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    file = write_items(tmp_path / "items.jsonl", ITEMS)
    changed = write_items(tmp_path / "items.jsonl", ITEMS[:2])
    with pytest.raises(UserError, match=f"its sha256 is {changed.sha256}, not the one that is set"):
        read_items(file)
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        read_items(replace(file, path=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it holds no items"),
        (b'{"id": "quiz/1", "text": "a"}\n{"id": ', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\xff", "line 1 is not JSON"),
        (b'["quiz/1", "a"]', "line 1 is not"),
        (b'{"id": 3, "text": "a"}', "line 1 is not"),
        (b'{"id": "quiz", "text": "a"}', "line 1 is not"),
        (b'{"id": "quiz/1"}', "line 1 is not"),
        (
            b'{"id": "quiz/1", "text": "a"}\n{"id": "quiz/1", "text": "b"}\n',
            "line 2: the id 'quiz/1' stands there twice",
        ),
    ],
)
def test_what_is_no_file_of_items_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    pin = hash_bytes(content, "sha256").removeprefix("sha256:")
    with pytest.raises(UserError, match=said):
        read_items(ItemsFile(str(path), pin))
