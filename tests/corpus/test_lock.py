"""The lock: same files give the same hash, an edit is refused by name, and a check does not hash what it has seen."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig, SourceConfig
from headrace.corpus import lock as lock_module
from headrace.corpus.lock import Lock, LockedFile, build_lock, check, ensure, index, read
from headrace.corpus.pieces import pieces
from headrace.corpus.sources import lock_path
from headrace.errors import UserError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one.txt", "a/two.txt", "b/three.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(f"this is {name}")
    return replace(load(["corpus=files", "corpus.paths=[data]", "corpus.contamination_tasks=[]"]).corpus)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are hashed from here on."""
    paths: list[str] = []
    original: Callable[[str], str] = lock_module._hash
    monkeypatch.setattr(lock_module, "_hash", lambda path: (paths.append(path), original(path))[1])
    return paths


def test_the_hash_covers_names_and_content_but_not_times_or_places(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_lock(config)
    assert [source.name for source in first.files] == ["data/a/one.txt", "data/a/two.txt", "data/b/three.txt"]
    assert first.files[0].size == len("this is a/one.txt")
    os.utime("data/a/one.txt", (1, 1))
    assert build_lock(config).hash == first.hash
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["cp", "-r", "data", "elsewhere/data"], check=True)
    monkeypatch.chdir(elsewhere)
    assert build_lock(config).hash == first.hash
    Path("data/a/one.txt").rename("data/a/uno.txt")
    assert build_lock(config).hash != first.hash


def test_a_check_hashes_only_what_looks_different(config: CorpusConfig, hashed: list[str]) -> None:
    path = Path("lock.json")
    index(config, path)
    assert len(hashed) == 3
    hashed.clear()
    _, new = ensure(config, path)
    assert hashed == [] and new == []
    os.utime("data/b/three.txt", (1, 1))
    ensure(config, path)
    assert hashed == ["data/b/three.txt"]  # touched, not changed
    ensure(config, path)
    assert hashed == ["data/b/three.txt"]


def test_an_edit_of_the_same_size_is_refused_with_the_command_that_accepts_it(config: CorpusConfig) -> None:
    path = Path("lock.json")
    before = index(config, path)
    Path("data/a/one.txt").write_text("THIS is a/one.txt")
    with pytest.raises(
        UserError, match=r"^data/a/one\.txt changed .* `headrace index corpus=files` to accept"
    ) as refusal:
        ensure(config, path, ["corpus=files"])
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError):  # a refusal is not remembered as seen
        ensure(config, path)
    accepted = index(config, path)
    assert accepted.hash != before.hash
    assert ensure(config, path) == (accepted, [])


def test_a_missing_file_is_refused_and_a_new_one_is_a_notice(config: CorpusConfig) -> None:
    path = Path("lock.json")
    lock = index(config, path)
    Path("data/b/four.txt").write_text("new")
    assert check(lock, config, path) == ["data/b/four.txt"]
    assert check(lock, config, path) == ["data/b/four.txt"]  # the quick way says so too
    Path("data/a/two.txt").unlink()
    with pytest.raises(UserError, match=r"data/a/two\.txt: indexed but no longer there"):
        check(lock, config, path)


def test_a_lock_from_elsewhere_is_hashed_once(config: CorpusConfig, hashed: list[str]) -> None:
    path = Path("lock.json")
    index(config, path)
    path.with_name("lock.json.seen").unlink()
    hashed.clear()
    ensure(config, path)
    assert len(hashed) == 3
    path.with_name("lock.json.seen").write_text("{damaged")
    ensure(config, path)
    assert len(hashed) == 6


def test_a_damaged_lock_is_refused_by_name(config: CorpusConfig) -> None:
    path = Path("lock.json")
    index(config, path)
    assert read(path).hash == build_lock(config).hash
    path.write_text(path.read_text().replace(" 17 ", " 18 ", 1))
    with pytest.raises(UserError, match=r"lock\.json: the lock was edited or damaged"):
        read(path)
    path.write_text("headrace lock 1 0\n")
    with pytest.raises(UserError, match=r"lock\.json: 'headrace lock 1' is not 'headrace lock 2'"):
        read(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"lock\.json: not a lock"):
        read(path)


def test_sources_that_match_nothing_are_refused(config: CorpusConfig) -> None:
    with pytest.raises(UserError, match=r"corpus\.paths: 'nothing/\*' matches no file"):
        build_lock(replace(config, paths=("data", "nothing/*")))
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"corpus\.paths: 'empty' matches no file"):
        build_lock(replace(config, paths=("empty",)))


def test_globs_and_files_and_hidden_names(config: CorpusConfig) -> None:
    Path("data/.hidden").write_text("secret")
    both = replace(config, paths=("data/*/t*.txt", "data/a/one.txt"))
    assert [source.name for source in build_lock(both).files] == [
        "data/a/two.txt",
        "data/b/three.txt",
        "data/a/one.txt",  # its root is data/a, which is read after data
    ]
    assert [s.name for s in build_lock(config).files] == ["data/a/one.txt", "data/a/two.txt", "data/b/three.txt"]


def test_a_parquet_file_is_locked_with_its_row_groups(config: CorpusConfig) -> None:
    pq.write_table(pa.table({"text": [f"text {n} " * 50 for n in range(100)]}), "data/a/t.parquet", row_group_size=30)
    lock = build_lock(config)
    (file,) = [file for file in lock.files if file.name.endswith(".parquet")]
    assert len(file.row_groups) == 4 and all(size > 0 for size in file.row_groups)
    lock.write(Path("lock"))
    assert read(Path("lock")).files == lock.files
    with pytest.raises(UserError, match=r"data/a/t\.parquet: no column 'body'"):
        build_lock(replace(config, text_field="body"))


def test_sources_are_in_the_order_that_was_given_and_a_file_is_in_one(config: CorpusConfig) -> None:
    two = (SourceConfig("second", ("data/b",), "text"), SourceConfig("first", ("data/a",), "text"))
    lock = build_lock(replace(config, paths=(), sources=two))
    assert [(file.source, file.root, file.name) for file in lock.files] == [
        ("second", "data/b", "data/b/three.txt"),
        ("first", "data/a", "data/a/one.txt"),
        ("first", "data/a", "data/a/two.txt"),
    ]
    assert b"= second data/b\n" in lock.body and b" three.txt\n" in lock.body  # a person can read it
    both = (two[0], SourceConfig("all", ("data",), "text"))
    with pytest.raises(UserError, match=r"corpus\.sources: data/b/three\.txt is in second and in all"):
        build_lock(replace(config, paths=(), sources=both))


def test_settings_that_choose_no_files_share_a_lock() -> None:
    words = ["corpus=files", "corpus.paths=[data]"]
    path = lock_path(load(words))
    assert lock_path(load([*words, "corpus.max_bytes=5", "corpus.heldout_fraction=0.5"])) == path
    assert lock_path(load([*words, "corpus.text_field=body"])) != path  # it decides what a row group weighs
    assert lock_path(load(["corpus=files", "corpus.paths=[other]"])) != path


def test_a_hundred_thousand_files_cost_a_tenth_of_a_minute(tmp_path: Path) -> None:
    """So that the lock of a million files is written, read, parsed and cut into pieces in a minute of a core."""
    started = time.process_time()
    files = [
        LockedFile(f"/data/web/{n // 1000:05d}/{n:08d}.txt", "/data/web", "web", 20_000, f"sha256:{n:064x}", ())
        for n in range(100_000)
    ]
    lock = Lock.of(files)
    lock.write(tmp_path / "lock")
    again = read(tmp_path / "lock")
    assert again.files == tuple(files)
    assert len(pieces(again)) == 63  # 1,600 files of 20,000 bytes each
    assert (tmp_path / "lock").stat().st_size < 120 * 100_000
    assert time.process_time() - started < 6


def test_a_new_folder_is_noticed(config: CorpusConfig) -> None:
    index(config, Path("lock"))
    assert ensure(config, Path("lock"))[1] == []
    Path("data/c").mkdir()
    Path("data/c/four.txt").write_text("a new text")
    os.utime("data", (2, 2))  # whatever the file system's clock resolves
    assert ensure(config, Path("lock"))[1] == ["data/c/four.txt"]


def test_many_real_files_are_listed_and_hashed_once(config: CorpusConfig, hashed: list[str]) -> None:
    for number in range(3000):
        path = Path(f"many/{number // 100}/{number % 7}/{number}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text %d" % number)
    many = replace(config, paths=("many",))
    lock = index(many, Path("lock"))
    names = [file.name for file in lock.files]
    assert len(names) == len(hashed) == 3000 and names == sorted(names)
    assert lock.files[0].hash == f"sha256:{hashlib.sha256(Path(names[0]).read_bytes()).hexdigest()}"
    hashed.clear()
    Path(names[77]).write_bytes(b"changed")
    assert index(many, Path("lock")).hash != lock.hash
    assert hashed == [names[77]]


def test_checking_sources_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'transformers', 'tokenizers', 'wandb'}"
    code = f"import sys, headrace.corpus.lock, headrace.corpus.sources; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
