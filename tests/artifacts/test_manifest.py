"""Manifests: every byte is covered, nothing half-written is taken for finished, nothing is overwritten."""

import json
from pathlib import Path

import pytest

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
            # A manifest's white space is outside its hash: what it says is then unchanged.
            if path.name == "manifest.json" and _same_json(whole, bytes(damaged)):
                continue
            with pytest.raises(UserError, match=path.name):
                manifests.verify(folder)
        path.write_bytes(whole)
    assert manifests.verify(folder) == manifest


def _same_json(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


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
