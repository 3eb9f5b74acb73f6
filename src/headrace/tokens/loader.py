"""Token shards become training rows: nothing is copied, nothing is stored, any row can be read at once.

The shards of a split are one stream of tokens, read as a ring: row i of length L starts at token i * L, and targets
that reach past the last token are the stream's first ones. Which row is read at which position is a pure function of
seed and position (`order`), so the whole state of a loader is one integer, and neither workers nor restarts nor
shards change a batch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.artifacts.files import hash_file, read_json
from headrace.errors import UserError
from headrace.tokens.indexed import map_tokens
from headrace.tokens.order import row_at


class Split:
    """The tokens of one split: the shards' tokens one after the other, as a ring."""

    def __init__(self, name: str, shards: list[NDArray[np.int32]]) -> None:
        self.name = name
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])

    @property
    def tokens(self) -> int:
        """Number of tokens, end-of-sequence tokens included."""
        return int(self._starts[-1])

    def rows(self, sequence_length: int) -> int:
        """Number of whole rows of `sequence_length` tokens; the last, partial one is not a row."""
        return self.tokens // sequence_length

    def row(self, index: int, length: int, *, sequence_length: int) -> NDArray[np.int32]:
        """int32 [length]: tokens [index * sequence_length, index * sequence_length + length) of the ring."""
        return self.read(index * sequence_length, length)

    def read(self, start: int, length: int) -> NDArray[np.int32]:
        """int32 [length]: a copy of the ring's tokens from `start` on."""
        out = np.empty(length, dtype=np.int32)
        filled = 0
        while filled < length:
            position = (start + filled) % self.tokens
            shard = int(np.searchsorted(self._starts, position, side="right")) - 1
            offset = position - int(self._starts[shard])
            piece = self._shards[shard][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out


class TokenDataset:
    """The folder of a tokenize artifact, verified: every file has the size and xxh3 hash that `dataset.json` states.

    Raises `UserError` that names the file which is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: dict[str, Any] = read_json(folder / "dataset.json")
        try:
            self._splits = {name: self._open(name, split) for name, split in self.description["splits"].items()}
            self.eos, self.vocab_size = int(self.description["eos"]), int(self.description["vocab_size"])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / 'dataset.json'}: not a description of token shards") from None

    def split(self, name: str) -> Split:
        """`train`, `validation` or `heldout`."""
        if name not in self._splits:
            raise UserError(f"{self.folder}: no split {name!r}; there are {sorted(self._splits)}")
        return self._splits[name]

    def _open(self, name: str, split: Mapping[str, Any]) -> Split:
        for shard in split["shards"]:
            for file, kept in shard["files"].items():
                self._verify(self.folder / Path(file).name, kept)
        bins = [
            map_tokens(self.folder / Path(f"{shard['name']}.bin").name, shard["tokens"]) for shard in split["shards"]
        ]
        return Split(name, bins)

    def _verify(self, path: Path, kept: Mapping[str, Any]) -> None:
        if not path.is_file():
            raise UserError(f"{path}: missing; run the tokenize stage again")
        size = path.stat().st_size
        if size != kept["size"]:
            raise UserError(f"{path}: {size} bytes instead of {kept['size']}: truncated; run the tokenize stage again")
        if hash_file(path, "xxh3") != kept["hash"]:
            raise UserError(f"{path}: damaged: its hash is not the one in dataset.json; run the tokenize stage again")


class Batches:
    """Batches of a split: L tokens a row and `extra` more for targets, in the order that `seed` gives."""

    def __init__(self, split: Split, seed: int, sequence_length: int, extra: int) -> None:
        self.rows = split.rows(sequence_length)
        if self.rows < 1:
            raise UserError(
                f"split {split.name!r} has {split.tokens} tokens, less than one row of {sequence_length}; "
                "add text or lower recipe.sequence_length"
            )
        self._split, self._seed, self._length, self._extra = split, seed, sequence_length, extra

    def row_indices(self, first_position: int, sequences: int) -> list[int]:
        """The rows at positions [first_position, first_position + sequences)."""
        return [row_at(self._seed, first_position + step, self.rows) for step in range(sequences)]

    def batch(self, first_position: int, sequences: int) -> Tensor:
        """int64 [sequences, L + extra]: the rows at these positions; a pure function of its arguments."""
        indices = self.row_indices(first_position, sequences)
        starts = [index * self._length for index in indices]
        return torch.from_numpy(
            np.stack([self._split.read(s, self._length + self._extra) for s in starts]).astype(np.int64)
        )
