"""Durable files: whole or absent; strict JSON; hashes of the standard tools."""

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from headrace.artifacts.files import hash_bytes, hash_file, link_or_copy, read_json, write_atomic, write_json
from headrace.errors import UserError


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value"
    seen = set()
    for fail_at in range(10):
        write_atomic(path, b"old")
        calls = 0

        def crash(real, *arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > fail_at:  # noqa: B023
                raise OSError("crash")
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (os, "open"), (os, "write")):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, _real=real, **k: crash(_real, *a, **k))
            with contextlib.suppress(OSError):
                write_atomic(path, b"new")
        seen.add(path.read_bytes())
        assert list(tmp_path.iterdir()) == [path]
    assert seen == {b"old", b"new"}


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, data = os.write, bytes(range(256)) * 5
    monkeypatch.setattr(os, "write", lambda descriptor, block: write(descriptor, block[:100]))
    write_atomic(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data


def test_json_refuses_what_is_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(UserError, match="duplicate key 'a'"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "missing.json")


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(5_000_000))
    assert hash_file(path, "sha256") == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_file(path, "xxh3") == hash_bytes(path.read_bytes(), "xxh3")
    assert hash_bytes(b"", "xxh3") == "xxh3:99aa06d3014798d86001c324468d497f"  # published with the algorithm


def test_a_link_is_a_copy_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"x")
    link_or_copy(source, tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == source.stat().st_ino

    def refuse(*_: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"x"
