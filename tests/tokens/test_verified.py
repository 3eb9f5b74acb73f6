"""Files that answer for their bytes: block by block, before any of them is used."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.artifacts.files import hash_bytes, hash_file
from headrace.errors import UserError
from headrace.tokens import verified
from headrace.tokens.verified import VerifiedFile, describe, map_file


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(verified, "BLOCK", 100)
    return 100


def test_a_file_is_described_by_its_size_and_the_hashes_of_its_blocks(tmp_path: Path, small_blocks: int) -> None:
    data = os.urandom(250)
    (tmp_path / "a").write_bytes(data)
    hashes = "".join(xxhash.xxh3_64(data[begin : begin + 100]).hexdigest() for begin in (0, 100, 200))
    whole = hash_file(tmp_path / "a", "xxh3")
    assert describe(tmp_path / "a") == {"size": 250, "hash": whole, "blocks": hashes}


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert describe(tmp_path / "a") == {"size": 0, "hash": hash_bytes(b"", "xxh3"), "blocks": ""}
    assert len(VerifiedFile(tmp_path / "a", describe(tmp_path / "a")).bytes(0, 0)) == 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 350), place=st.integers(0, 349), bit=st.integers(0, 7), data=st.data())
def test_a_damaged_block_is_refused_and_the_others_are_read(
    tmp_path: Path, small_blocks: int, size: int, place: int, bit: int, data: st.DataObject
) -> None:
    place %= size
    path, whole = tmp_path / "a", os.urandom(size)
    path.write_bytes(whole)
    described = describe(path)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    begin = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(begin + 1, size))
    file = VerifiedFile(path, described)
    if begin // small_blocks <= place // small_blocks <= (end - 1) // small_blocks:
        with pytest.raises(UserError, match=rf"{path}: damaged: bytes {place // 100 * 100} to "):
            file.bytes(begin, end)
    else:
        assert file.bytes(begin, end).tobytes() == whole[begin:end]
    with pytest.raises(UserError, match="damaged"):
        file.verify()


def test_missing_truncated_and_badly_recorded_files_are_named(tmp_path: Path, small_blocks: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(250))
    described = describe(path)
    for blocks in (described["blocks"][:32], ["xxh3:00"], "no hex"):
        with pytest.raises(UserError, match=rf"{path}: its record has not one hash for each block"):
            VerifiedFile(path, {**described, "blocks": blocks})
    path.write_bytes(bytes(249))
    with pytest.raises(UserError, match=rf"{path}: 249 bytes instead of 250"):
        VerifiedFile(path, described)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: missing"):
        VerifiedFile(path, described)


def test_a_map_is_the_file_read_only_keeps_no_descriptor_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * mmap.PAGESIZE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    view = map_file(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert np.array_equal(view, np.fromfile(path, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    part = view[mmap.PAGESIZE : mmap.PAGESIZE + 4].view("<u4")
    del view
    assert str(path) in Path("/proc/self/maps").read_text() and part[0] == 0x03020100
    del part
    assert str(path) not in Path("/proc/self/maps").read_text()
