"""The last look: any file that changed, vanished or came makes it stale, and it holds for its own key only."""

import os
from pathlib import Path

import pytest

from headrace.corpus.listing import Found
from headrace.corpus.seen import folders_of, look_at, recall, remember


@pytest.fixture
def lock_path(tmp_path: Path) -> Path:
    for name in ("a/one.txt", "a/two.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    path = tmp_path / "lock.json"
    remember(
        path, "key", look_at(Found(name, str(tmp_path / name), "a") for name in ("a/one.txt", "a/two.txt")), ["new"]
    )
    return path


def test_what_was_seen_still_holds(lock_path: Path) -> None:
    seen = recall(lock_path, "key")
    assert seen.still() and seen.new == ["new"] and len(seen.files) == 2


@pytest.mark.parametrize("change", ["edit", "touch", "remove", "add"])
def test_every_change_is_seen(lock_path: Path, change: str) -> None:
    one = lock_path.parent / "a/one.txt"
    if change == "edit":
        one.write_text("longer text")
    elif change == "touch":
        os.utime(one, (1, 1))
    elif change == "remove":
        one.unlink()
    else:
        (one.parent / "three.txt").write_text("text")
        os.utime(one.parent, (2, 2))  # whatever the file system's clock resolves
    assert not recall(lock_path, "key").still()


def test_folders_up_to_the_root_are_looked_at(tmp_path: Path) -> None:
    web, names = tmp_path / "web", ("web/2024/10/a.txt", "web/b.txt", "alone.txt")
    files = [Found(name, f"{tmp_path}/{name}", "web" if "/" in name else ".") for name in names]
    assert folders_of(files) == {f"{web}/2024/10", f"{web}/2024", str(web), str(tmp_path)}
    assert folders_of([Found("a/b.txt", "a/b.txt", "."), Found("s3://x/y", "s3://x/y", "s3://x")]) == {"a", "."}


def test_another_key_and_a_damaged_file_know_nothing(lock_path: Path) -> None:
    assert recall(lock_path, "other").files == {}
    lock_path.with_name("lock.json.seen").write_text("{")
    assert recall(lock_path, "key").files == {}


def test_remote_files_look_as_their_listing_says_and_must_be_listed_again(tmp_path: Path) -> None:
    address = "memory://bucket/a.jsonl"
    looks = look_at([Found(address, address, "memory://bucket", size=5, identity="etag:1")])
    assert looks == {address: "5 etag:1"}
    remember(tmp_path / "lock", "key", looks, [])
    seen = recall(tmp_path / "lock", "key")
    assert seen.files == looks and seen.folders == {} and not seen.still()
