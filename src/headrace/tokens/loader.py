"""Token shards become training rows: nothing is copied, nothing is stored, any row can be read at once.

Opening reads `dataset.json` alone, a few megabytes for trillions of tokens. A shard is mapped when a row of it is first
wanted; its record is checked against the hash in `dataset.json`, its index of rows and each block of its tokens
against the hashes in the record before a byte of them is used.

Row i of length L is the piece of a shard that `.pack` says. In a batch it is L elements, inputs and targets in one, and
as many more as targets reach past its end: element p + 1 is the target of element p, and with multi-token prediction
p + 2 is one too. What a row's end means for them follows from how rows are packed. A row that ends within a document
is full, and the true continuation follows in the shard: those tokens are the targets, up to the document's end. A row
that ends with a document has nothing more to predict: the targets past its end, and all elements of a row that is
shorter than L, are absent (`IGNORED`). So no target is lost, and none is read from a document that a row does not hold.

Which row is read at which position is a pure function of seed, position and mixture (`order`), so the whole state of a
loader is a position and the mixture's segments, and neither workers nor restarts nor data parallelism change a batch.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.artifacts.files import hash_bytes, parse_json, read_bytes, read_json
from headrace.errors import UserError
from headrace.tokens.indexed import IndexedReader, pack_path, pack_starts, read_pack
from headrace.tokens.order import Ints, Mixture, Segment, rows_at
from headrace.tokens.verified import VerifiedFile

IGNORED = -1
"""An element of a row that is no token: nothing is to be predicted there."""
_INT32 = np.dtype("<i4")
_REMEDY = "run the tokenize stage again"


class Shard:
    """One shard of a dataset, opened when it is first read. `stated` is what `dataset.json` says of it."""

    def __init__(self, folder: Path, stated: Mapping[str, Any]) -> None:
        self.name, self.tokens = Path(str(stated["name"])).name, int(stated["tokens"])
        self.source = str(stated["source"])
        self.rows = {int(length): int(rows) for length, rows in stated["rows"].items()}
        self._prefix, self._record = folder / self.name, stated["record"]
        self._starts: dict[int, Ints] = {}

    def ends(self, row: int, row_length: int) -> tuple[int, int]:
        """The tokens at which a row begins and ends."""
        starts = self._starts.get(row_length)
        if starts is None:
            starts = self._open_pack(row_length)
        return int(starts[row]), int(starts[row + 1])

    def row(self, row: int, row_length: int, extra: int) -> NDArray[np.int32]:
        """int32: a verified view of a row, and where it is full of `extra` tokens more, as far as the shard goes."""
        begin, end = self.ends(row, row_length)
        if end - begin == row_length:
            end = min(end + extra, self.tokens)
        return self._bin.bytes(4 * begin, 4 * end).view(_INT32)

    def verify(self) -> None:
        """Verify every byte of every file, and that they fit together; `UserError` names the file that is damaged."""
        for name in self._files():
            self._file(name).verify()
        IndexedReader(self._prefix)
        for length, rows in self.rows.items():
            path = pack_path(self._prefix, length)
            if len(read_pack(path, length, self.tokens)) != rows + 1:
                raise UserError(f"{path}: not the {rows} rows that dataset.json has; {_REMEDY}")

    def _open_pack(self, row_length: int) -> Ints:
        path = pack_path(self._prefix, row_length)
        file = self._file(path.name)
        starts = pack_starts(path, file.bytes(0, file.size), row_length, self.tokens)
        if len(starts) != self.rows[row_length] + 1:
            raise UserError(f"{path}: {len(starts) - 1} rows instead of {self.rows[row_length]}; {_REMEDY}")
        self._starts[row_length] = starts
        return starts

    @functools.cached_property
    def _bin(self) -> VerifiedFile:
        file = self._file(f"{self.name}.bin")
        if file.size != 4 * self.tokens:
            raise UserError(f"{file.path}: {file.size} bytes instead of {4 * self.tokens}; {_REMEDY}")
        return file

    def _files(self) -> Mapping[str, Any]:
        """Files by name, from the shard's record, which `dataset.json` vouches for; too long to be kept as text."""
        path = self._prefix.with_name(f"{self.name}.json")
        data = read_bytes(path)
        if hash_bytes(data, "xxh3") != self._record["hash"]:
            raise UserError(f"{path}: damaged: its hash is not the one in dataset.json; {_REMEDY}")
        files: Mapping[str, Any] = parse_json(data, path)["files"]
        return files

    def _file(self, name: str) -> VerifiedFile:
        path, files = self._prefix.with_name(name), self._files()
        if name not in files:
            raise UserError(f"{path}: not in the shard's record; {_REMEDY}")
        return VerifiedFile(path, files[name])


class Split:
    """The rows of one split: those of its shards one after the other."""

    def __init__(self, name: str, shards: Sequence[Shard], eos: int) -> None:
        self.name, self.shards, self.eos = name, shards, eos

    @property
    def tokens(self) -> int:
        """Number of tokens, end-of-sequence tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @functools.cached_property
    def sources(self) -> list[str]:
        """Names of the sources that the shards are made of, in the order of the shards."""
        return list(dict.fromkeys(shard.source for shard in self.shards))

    def rows(self, row_length: int) -> int:
        """Number of rows of `row_length` tokens; `UserError` where the dataset has none of this length."""
        return int(self.ends(row_length)[-1])

    def row(self, index: int, row_length: int, extra: int = 0) -> NDArray[np.int32]:
        """int32 [row_length + extra]: a row and the targets past its end; `IGNORED` where there is no token."""
        out: NDArray[np.int32] = np.empty(row_length + extra, dtype=np.int32)
        self.read_into(out[None], *_found(self.ends(row_length), np.array([index])), row_length)
        return out

    def read_into(self, out: NDArray[np.integer], shards: Ints, rows: Ints, row_length: int) -> None:
        """Write rows [S] of shards [S], and their targets, into `out` [S, row_length + extra]."""
        extra = out.shape[1] - row_length
        for line, shard, row in zip(out, shards.tolist(), rows.tolist(), strict=True):
            tokens = self.shards[shard].row(row, row_length, extra)
            line[: len(tokens)] = tokens
            line[len(tokens) :] = IGNORED
        # Targets past the end of a row belong to its last document, or are none.
        ended = np.logical_or.accumulate(out[:, row_length - 1 : -1] == self.eos, axis=1)
        out[:, row_length:][ended] = IGNORED

    def ends(self, row_length: int, source: str | None = None) -> Ints:
        """int64 [shards + 1]: rows before each shard; of one source alone, if one is named."""
        key = row_length, source
        if key not in self._ends:
            for shard in self.shards:
                if row_length not in shard.rows:
                    raise UserError(
                        f"split {self.name!r}: no rows of {row_length} tokens, only of {sorted(shard.rows)}; "
                        f"add {row_length} to tokens.row_lengths and run the tokenize stage again"
                    )
            counts = [shard.rows[row_length] * (source in (None, shard.source)) for shard in self.shards]
            self._ends[key] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return self._ends[key]

    @functools.cached_property
    def _ends(self) -> dict[tuple[int, str | None], Ints]:
        return {}


class TokenDataset:
    """The folder of a tokenize artifact. Raises `UserError` where `dataset.json` is missing or none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: dict[str, Any] = read_json(folder / "dataset.json")
        try:
            self.eos, self.vocab_size = int(self.description["eos"]), int(self.description["vocab_size"])
            self._splits = {
                name: Split(name, [Shard(folder, stated) for stated in split["shards"]], self.eos)
                for name, split in self.description["splits"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{folder / 'dataset.json'}: not a description of token shards") from None

    def split(self, name: str) -> Split:
        """`train`, `validation` or `heldout`."""
        if name not in self._splits:
            raise UserError(f"{self.folder}: no split {name!r}; there are {sorted(self._splits)}")
        return self._splits[name]

    def verify(self) -> None:
        """Read and verify every byte of every shard; raises `UserError` that names the first file that is damaged."""
        for split in self._splits.values():
            for shard in split.shards:
                shard.verify()


class Batches:
    """Batches of a split: L tokens a row and `extra` more for targets, in the order that seed and mixture give.

    `segments` are those of an `order.State`, their weights in the order of `Split.sources`; without them all rows of
    the split are drawn alike. Raises `UserError` for a split without rows.
    """

    def __init__(
        self, split: Split, seed: int, sequence_length: int, extra: int, segments: Sequence[Segment] | None = None
    ) -> None:
        self.rows = split.rows(sequence_length)
        if self.rows < 1:
            raise UserError(f"split {split.name!r} has no text, and so no row; add documents to the corpus")
        self._split, self._seed, self._length, self._extra = split, seed, sequence_length, extra
        self._ends: list[Ints] = [split.ends(sequence_length)]
        self._mixture: Mixture | None = None
        if segments is not None:
            self._ends = [split.ends(sequence_length, source) for source in split.sources]
            self._mixture = Mixture(seed, split.sources, [int(ends[-1]) for ends in self._ends], segments)

    def places(self, first_position: int, sequences: int) -> tuple[Ints, Ints]:
        """Shards int64 [S] and rows within them int64 [S] at positions [first_position, first_position + S)."""
        positions = np.arange(first_position, first_position + sequences, dtype=np.int64)
        if self._mixture is None:
            return _found(self._ends[0], rows_at(self._seed, positions, self.rows))
        sources, rows = self._mixture.draw(positions)
        shards = np.empty_like(rows)
        for source in np.unique(sources):
            inside = sources == source
            shards[inside], rows[inside] = _found(self._ends[source], rows[inside])
        return shards, rows

    def row_indices(self, first_position: int, sequences: int) -> list[int]:
        """The rows of the split at positions [first_position, first_position + sequences)."""
        shards, rows = self.places(first_position, sequences)
        indices: list[int] = (self._split.ends(self._length)[shards] + rows).tolist()
        return indices

    def batch(self, first_position: int, sequences: int) -> Tensor:
        """int64 [sequences, L + extra]: the rows at these positions; a pure function of its arguments.

        Elements that are no tokens are `IGNORED`.
        """
        out = np.empty((sequences, self._length + self._extra), dtype=np.int64)
        self._split.read_into(out, *self.places(first_position, sequences), self._length)
        return torch.from_numpy(out)

    def cu_seqlens(self, batch: Tensor) -> list[Tensor]:
        """For each row of a batch int32 [documents + 1]: where its documents begin, from 0, and L behind the last.

        The end of a row and its padding end a document; the padding is a piece of its own.
        """
        inputs = batch[:, : self._length]
        return [_boundaries(torch.nonzero(row == self._split.eos)[:, 0], self._length) for row in inputs]


def _boundaries(eos: Tensor, length: int) -> Tensor:
    bounds: Tensor = torch.unique(torch.cat([eos.new_zeros(1), eos + 1, eos.new_full((1,), length)]))
    return bounds.to(torch.int32)


def _found(ends: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Rows counted over all shards to shards, and rows within them."""
    shards = np.searchsorted(ends, rows, side="right") - 1
    return shards, rows - ends[shards]
