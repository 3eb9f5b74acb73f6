"""Manifests: every byte is covered, nothing half-written is taken for finished, nothing is overwritten."""

import json
import signal
import time
from pathlib import Path

import pytest

from headrace.artifacts import files
from headrace.artifacts import manifest as manifests
from headrace.errors import UserError


def make(folder: Path, algorithm: str = "xxh3") -> manifests.Manifest:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"hello")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
    return manifests.build(
        folder, kind="test", producer={"p": 1}, inputs={"in": "sha256:0"}, summary={"n": 2}, algorithm=algorithm
    )


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256"])
def test_every_flipped_bit_is_detected(tmp_path: Path, algorithm: str) -> None:
    folder = tmp_path / "x"
    manifest = make(folder, algorithm)
    assert manifests.verify(folder) == manifest
    for path in (folder / "a.txt", folder / "sub" / "b.bin", folder / "manifest.json"):
        whole = path.read_bytes()
        for bit in range(0, len(whole) * 8, 37):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                manifests.verify(folder)
        path.write_bytes(whole)
    assert manifests.verify(folder) == manifest


def test_a_manifest_that_says_the_same_in_other_bytes_is_damaged(tmp_path: Path) -> None:
    make(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    whole = path.read_bytes()
    for other in (whole[:-1], whole + b"\n", json.dumps(json.loads(whole)).encode(), whole.replace(b"{", b"{ ", 1)):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"manifest\.json: damaged"):
            manifests.verify(tmp_path / "x")


def test_files_that_were_hashed_as_they_were_written_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "x")
    (tmp_path / "x" / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "hash_file", None)
        given = {"kind": "test", "producer": {"p": 1}, "inputs": {"in": "sha256:0"}, "summary": {"n": 2}}
        assert manifests.build(tmp_path / "x", **given, known=made.files) == made
        with pytest.raises(AssertionError, match="lacks"):
            manifests.build(tmp_path / "x", **given, known={**made.files, "c": made.files["a.txt"]})
        (tmp_path / "x" / "a.txt").write_bytes(b"hell")
        with pytest.raises(AssertionError, match="its size"):
            manifests.build(tmp_path / "x", **given, known=made.files)


def test_json_is_verified_however_large_and_other_large_files_are_left_to_their_readers(tmp_path: Path) -> None:
    """JSON has the hashes that the readers of the others go by."""
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("index.json", "large.bin"):
        (folder / name).write_text('"' + "x" * 200 + '"')
    manifests.build(folder, kind="test", producer={}, inputs={}, summary={})
    (folder / "large.bin").write_text('"' + "y" * 200 + '"')
    manifests.verify(folder, hash_up_to=100)
    (folder / "index.json").write_text('"' + "y" * 200 + '"')
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        manifests.verify(folder, hash_up_to=100)


def test_content_is_verified_as_it_is_read(tmp_path: Path) -> None:
    made = make(tmp_path / "x")
    assert manifests.content(tmp_path / "x", made, "a.txt") == b"hello"
    for other in (b"hellO", b"hell", b"hello\n"):
        (tmp_path / "x" / "a.txt").write_bytes(other)
        with pytest.raises(UserError, match=r"a\.txt: damaged"):
            manifests.content(tmp_path / "x", made, "a.txt")


def test_files_missing_added_cut_or_linked_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    make(folder)
    (folder / "extra").write_text("x")
    with pytest.raises(UserError, match="extra"):
        manifests.verify(folder)
    (folder / "extra").unlink()
    (folder / "a.txt").write_bytes(b"hell")
    with pytest.raises(UserError, match=r"a\.txt.*4 bytes"):
        manifests.verify(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: missing"):
        manifests.verify(folder)
    (folder / "a.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="link"):
        manifests.verify(folder)


def test_commit_needs_a_manifest_and_never_overwrites(tmp_path: Path) -> None:
    staging, final = tmp_path / "staging", tmp_path / "final"
    staging.mkdir()
    with pytest.raises(AssertionError):
        manifests.commit(staging, final)
    staging.rmdir()
    make(staging)
    manifests.commit(staging, final)
    assert not staging.exists()
    make(staging)
    with pytest.raises(UserError, match="never overwritten"):
        manifests.commit(staging, final)


def test_equal_folders_have_equal_manifests(tmp_path: Path) -> None:
    assert make(tmp_path / "one").hash == make(tmp_path / "two").hash


def test_a_signal_does_not_wait_until_everything_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of many chunks, each of which takes a while."""
    for number in range(4):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{number}.bin").write_bytes(bytes(8 << 20))
    manifests.build(tmp_path / "x", kind="k", producer={}, inputs={}, summary={}, algorithm="xxh3")

    class Slow:
        def update(self, _: memoryview) -> None:
            time.sleep(0.2)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setitem(files._HASHERS, "xxh3", Slow)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            manifests.verify(tmp_path / "x")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 1.5


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
