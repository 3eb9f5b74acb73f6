"""A scan read back, as numpy arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.corpus.scan import DIGEST_BYTES
from headrace.corpus.sealed import open_sealed


@dataclass(frozen=True)
class Coded:
    """A column of names: `names[codes[i]]` is row i's; the code -1 stands for none."""

    codes: NDArray[np.int32]
    names: list[str]


@dataclass(frozen=True)
class Columns:
    """Rows [n] of a scan in reading order."""

    digests: NDArray[np.uint64]  # [n, 2]: the digest's two halves as big-endian numbers
    bytes: NDArray[np.int64]
    group: Coded
    kind: Coded
    root: Coded
    rule: Coded
    contaminated: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.bytes)


def read_columns(path: Path) -> Columns:
    """All columns but the signatures; raises `UserError` for a damaged scan."""
    names = ["digest", "bytes", "group", "kind", "root", "rule", "contaminated"]
    table = open_sealed(path).read(names, use_threads=False).unify_dictionaries().combine_chunks()
    digests = _fixed(table["digest"], DIGEST_BYTES).view(">u8").reshape(-1, 2).astype(np.uint64)
    coded = {name: _coded(table[name]) for name in ("group", "kind", "root", "rule")}
    return Columns(digests, table["bytes"].to_numpy(), contaminated=table["contaminated"].to_numpy(), **coded)


def read_signatures(path: Path) -> list[bytes | None]:
    """The MinHash signatures of a scan's rows."""
    return list(open_sealed(path).read(["signature"], use_threads=False)["signature"].to_pylist())


def _fixed(column: Any, width: int) -> NDArray[np.uint8]:
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        for chunk in column.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


def _coded(column: Any) -> Coded:
    if not column.num_chunks:
        return Coded(np.zeros(0, dtype=np.int32), [])
    codes = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return Coded(np.concatenate(codes).astype(np.int32), column.chunk(0).dictionary.to_pylist())
