"""Files of which no byte is used before its hash was compared: mapped into memory, verified block by block as touched.

A shard of 8 GiB takes seconds to hash, a dataset of 59 TB hours; a reader that starts in a second can do neither first.
So a file is described by its size and the hash of every block of 1 MiB, and a block is hashed when a byte of it is
first wanted: rows are read in random order, and each reads the block around it. Smaller blocks would read less, but a
process that has seen all of 59 TB holds 9 bytes for each: 510 MB. The bytes hashed are the mapped ones that are then
used. The hash of the whole file is kept beside them for the dataset's manifest, which needs it of every shard: whoever
gathers the shards does not read them again.

Python's own `mmap` keeps a descriptor open for each file, and a process may have 1,024 of them; a dataset of thousands
of shards is therefore mapped through the C library, which needs none.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from headrace.errors import UserError

BLOCK = 1 << 20
"""Bytes that one hash covers."""
_HASH_BYTES = 8  # xxh3 of 64 bits: against damage, of which one in 2^64 would pass
_REMEDY = "run the tokenize stage again"
_FAILED = ctypes.c_void_p(-1).value


def describe(path: Path) -> dict[str, Any]:
    """Size and hashes of a file, read once, as JSON: {"size": bytes, "hash": "xxh3:...", "blocks": hex of all}."""
    blocks, block = bytearray(), memoryview(bytearray(min(BLOCK, max(1, path.stat().st_size))))
    whole = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while size := _fill(file, block):
            blocks += xxhash.xxh3_64_digest(block[:size])
            whole.update(block[:size])
    return {"size": path.stat().st_size, "hash": f"xxh3:{whole.hexdigest()}", "blocks": blocks.hex()}


class VerifiedFile:
    """A mapped file that answers for its bytes.

    `described` is what `describe` gave when it was written. Raises `UserError` that names the file where it is missing,
    has another size, or a block that is wanted has another hash.
    """

    def __init__(self, path: Path, described: Mapping[str, Any]) -> None:
        self.path, self.size = path, int(described["size"])
        try:
            self._hashes = bytes.fromhex(described["blocks"])
        except (TypeError, ValueError):
            self._hashes = b""
        if len(self._hashes) != _HASH_BYTES * -(-self.size // BLOCK):
            raise UserError(f"{path}: its record has not one hash for each block; {_REMEDY}")
        try:
            self._bytes = map_file(path)
        except OSError:
            raise UserError(f"{path}: missing; {_REMEDY}") from None
        if len(self._bytes) != self.size:
            raise UserError(f"{path}: {len(self._bytes)} bytes instead of {self.size}: truncated or damaged; {_REMEDY}")
        self._good = bytearray(-(-self.size // BLOCK))

    def bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        """uint8 [end - begin]: a read-only view of these bytes, all of them verified."""
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            if not self._good[block]:
                self._verify(block)
        return self._bytes[begin:end]

    def verify(self) -> None:
        """Verify every block."""
        self.bytes(0, self.size)

    def _verify(self, block: int) -> None:
        view = self._bytes[block * BLOCK : (block + 1) * BLOCK]
        if xxhash.xxh3_64_digest(view.data) != self._hashes[_HASH_BYTES * block :][:_HASH_BYTES]:
            raise UserError(
                f"{self.path}: damaged: bytes {block * BLOCK} to {block * BLOCK + len(view)} do not have the hash that "
                f"was recorded; {_REMEDY}"
            )
        self._good[block] = 1


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file as a read-only uint8 view, mapped without keeping a descriptor; `OSError` where it cannot be."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return np.empty(0, dtype=np.uint8)
        address = _c().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _c().munmap, address, size)  # when the last view is gone
    view: NDArray[np.uint8] = np.frombuffer(memoryview(memory), dtype=np.uint8)
    view.flags.writeable = False
    return view


def _c() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    )
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


def _fill(file: Any, block: memoryview) -> int:
    """Read until the block is full or the file ends; how many bytes were read."""
    filled = 0
    while filled < len(block) and (size := file.readinto(block[filled:])):
        filled += size
    return filled
