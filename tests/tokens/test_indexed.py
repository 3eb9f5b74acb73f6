"""Megatron's file format and that of rows, byte by byte, and the refusal of files that are not whole."""

import struct
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import UserError
from headrace.tokens.indexed import IndexedReader, IndexedWriter, read_pack

DOCUMENTS = [[5, 6, 7, 1], [1], [2**31 - 1, 1]]
TOKENS = [5, 6, 7, 1, 1, 2**31 - 1, 1]


def write(prefix: Path) -> None:
    with IndexedWriter(prefix) as writer:
        writer.add(np.array(TOKENS[:5], np.int32), np.array([4, 1], np.int32))
        writer.add(np.array(TOKENS[5:], np.int32), np.array([2], np.int32))


def test_the_files_are_megatrons_byte_by_byte(tmp_path: Path) -> None:
    write(tmp_path / "a")
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + b"\x04" + struct.pack("<QQ", 3, 4)
    expected += struct.pack("<3i", 4, 1, 2) + struct.pack("<3q", 0, 16, 20) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert len(expected) == 42 + 20 * 3
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<7i", *TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_documents_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "a")
    reader = IndexedReader(tmp_path / "a")
    assert [reader.document(number).tolist() for number in range(len(reader))] == DOCUMENTS
    assert reader.tokens.tolist() == TOKENS and reader.lengths.tolist() == [4, 1, 2]


def test_an_empty_shard_is_whole(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a"):
        pass
    assert (tmp_path / "a.idx").stat().st_size == 42
    assert len(IndexedReader(tmp_path / "a")) == 0


def test_a_failure_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), IndexedWriter(tmp_path / "a") as writer:
        writer.add(np.array([1], np.int32), np.array([1], np.int32))
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_every_damaged_byte_of_the_index_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a")
    whole = (tmp_path / "a.idx").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "a.idx").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"/a\.(idx|bin): "):
            IndexedReader(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_every_truncation_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a")
    path = tmp_path / f"a{suffix}"
    whole = path.read_bytes()
    for size in [*range(len(whole)), None]:
        path.write_bytes(whole + b"\x00" if size is None else whole[:size])
        with pytest.raises(UserError, match=rf"/a{suffix}: "):
            IndexedReader(tmp_path / "a")
    path.unlink()
    with pytest.raises(UserError, match=rf"/a{suffix}: missing"):
        IndexedReader(tmp_path / "a")


def write_rows(prefix: Path) -> None:
    """The same documents in rows of at most 5 and at most 2 tokens."""
    five, two = ([np.array(part) for part in parts] for parts in ([[0, 5], [0, 2]], [[0, 2, 4, 5], [0, 2]]))
    with IndexedWriter(prefix, [5, 2]) as writer:
        writer.add(np.array(TOKENS[:5], np.int32), np.array([4, 1], np.int32), [five[0], two[0]])
        writer.add(np.array(TOKENS[5:], np.int32), np.array([2], np.int32), [five[1], two[1]])


def test_the_index_of_rows_byte_by_byte(tmp_path: Path) -> None:
    write_rows(tmp_path / "a")
    expected = b"DPACK\x00\x00\x01" + struct.pack("<IIQ", 5, 0, 2) + struct.pack("<3Q", 0, 5, 7)
    assert (tmp_path / "a.L5.pack").read_bytes() == expected
    expected = b"DPACK\x00\x00\x01" + struct.pack("<IIQ", 2, 0, 4) + struct.pack("<5Q", 0, 2, 4, 5, 7)
    assert (tmp_path / "a.L2.pack").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.L2.pack", "a.L5.pack", "a.bin", "a.idx"]
    assert read_pack(tmp_path / "a.L5.pack", 5, 7).tolist() == [0, 5, 7]
    assert read_pack(tmp_path / "a.L2.pack", 2, 7).tolist() == [0, 2, 4, 5, 7]


def test_every_damaged_byte_and_every_truncation_of_an_index_of_rows_is_refused_by_name(tmp_path: Path) -> None:
    """But a row border that still lies between its neighbours: that one, only the recorded hash finds."""
    write_rows(tmp_path / "a")
    path = tmp_path / "a.L2.pack"
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                starts = read_pack(path, 2, 7)
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
            else:
                assert 32 <= place < 56 and (np.diff(starts) > 0).all() and starts[-1] == 7
    assert refused >= 8 * len(whole) - 4
    for content in [*(whole[:size] for size in range(len(whole))), whole + b"\x00"]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"/a\.L2\.pack: "):
            read_pack(path, 2, 7)
    path.unlink()
    with pytest.raises(UserError, match=r"/a\.L2\.pack: missing"):
        read_pack(path, 2, 7)


def test_rows_of_another_length_and_of_another_shard_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a")
    with pytest.raises(UserError, match="rows of 5 tokens with flags 0 instead of 4"):
        read_pack(tmp_path / "a.L5.pack", 4, 7)
    with pytest.raises(UserError, match="end at token 7 instead of 8"):
        read_pack(tmp_path / "a.L5.pack", 5, 8)
