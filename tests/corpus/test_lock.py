"""The lock: same files give the same hash, an edit is refused by name, and a check does not hash what it has seen."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig
from headrace.corpus import lock as lock_module
from headrace.corpus.lock import build_lock, check, ensure, index, read
from headrace.errors import UserError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one.txt", "a/two.txt", "b/three.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(f"this is {name}")
    return replace(load(["corpus=files", "corpus.paths=[data]"]).corpus)


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
        "data/a/one.txt",
        "data/a/two.txt",
        "data/b/three.txt",
    ]
    assert [s.name for s in build_lock(config).files] == ["data/a/one.txt", "data/a/two.txt", "data/b/three.txt"]


def test_checking_sources_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'transformers', 'tokenizers', 'wandb'}"
    code = f"import sys, headrace.corpus.lock, headrace.corpus.sources; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
