"""A tokenized dataset as other trainers read it: `headrace export <tokenize folder> <out> --format ...`.

Megatron reads the shards as they are: each `.bin` with its `.idx` is one dataset prefix. The bytes of `.bin`, documents
one after the other in 32 bits, are also what datatrove (with nanotron) and OLMo-core read, under other names and beside
another description of where documents end. So a view is hard links and small files, and takes no space:

    datatrove   <split>/<shard>.ds, .ds.index (u64 ends of documents, in tokens), .ds.metadata (tokenizer|4, tokens)
    olmo        <split>/<shard>.npy, .csv.gz (lines `start,end` of documents, in tokens)
    arrow       data/<split>-00000-of-00008.arrow: a row a document, for `datasets`; the tokens are copied

Each has the dataset's `tokenizer.json`, too. Everything is verified against the dataset's manifest first, which reads
it all, and `out` appears when it is whole.
"""

import gzip
import itertools
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import link_or_copy, read_json, sync_folder, write_atomic, write_json
from headrace.errors import UserError
from headrace.tokens.indexed import IndexedReader

Format = Literal["datatrove", "olmo", "arrow"]
TOKENIZER = "tokenizer.json"

_ROWS = 1000  # documents of one Arrow record batch: what `datasets` writes itself
_SCHEMA = pa.schema([("input_ids", pa.large_list(pa.uint32()))])  # large: a shard's tokens need more than 31 bits

_HOW_TO_READ = {
    "datatrove": 'DatatroveFolderDataset("{out}/train", seq_len=4096, token_size=4)  # nanotron reads the same folder',
    "olmo": 'NumpyFSLDatasetConfig.glob("{out}/train/**/*.npy", dtype=NumpyDatasetDType.uint32, ...)  # end: {eos}',
    "arrow": 'datasets.load_dataset("{out}")  # column input_ids, a row a document, end of sequence ({eos}) included',
}


@dataclass(frozen=True)
class Exported:
    """What a view holds."""

    shards: int
    documents: int
    tokens: int
    how_to_read: str


@dataclass(frozen=True)
class _Shard:
    """One of `count` shards of a split that hold anything: other readers cannot map an empty file."""

    split: str
    name: str
    number: int
    count: int
    documents: int
    tokens: int


def export(dataset: Path, out: Path, format: Format) -> Exported:  # noqa: A002
    """Write the view `format` of a tokenize result, its folder or the `artifact` in it, to the new folder `out`.

    Raises `UserError` for an unknown format, a folder that is no dataset or is damaged, an `out` that exists, or one on
    another file system than the dataset where the format needs hard links.
    """
    if format not in get_args(Format):
        raise UserError(f"--format {format}: give one of {', '.join(get_args(Format))}")
    if out.exists():
        raise UserError(f"{out}: already exists; name a new folder")
    folder = dataset / "artifact" if (dataset / "artifact").is_dir() else dataset
    manifest = manifests.verify(folder)
    shards, eos, tokenizer = _described(folder)
    how = _HOW_TO_READ[format].format(out=out, eos=eos)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir()
        for shard in shards:  # one is open at a time: there may be thousands
            _WRITERS[format](shard, folder / shard.name, staging, tokenizer)
        if TOKENIZER in manifest.files:
            link_or_copy(folder / TOKENIZER, staging / TOKENIZER)
        write_json(staging / "export.json", {"format": format, "dataset": manifest.hash, "eos": eos, "read": how})
        for path, _, _ in os.walk(staging, topdown=False):
            sync_folder(Path(path))
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return Exported(len(shards), sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards), how)


def _described(folder: Path) -> tuple[list[_Shard], int, str]:
    """The shards of all splits, the end-of-sequence id, and the tokenizer's hash."""
    description, shards = read_json(folder / "dataset.json"), []
    try:
        for split, held in description["splits"].items():
            full = [shard for shard in held["shards"] if shard["tokens"]]
            shards += [
                _Shard(split, shard["name"], number, len(full), shard["documents"], shard["tokens"])
                for number, shard in enumerate(full)
            ]
        return shards, int(description["eos"]), str(description["tokenizer"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'dataset.json'}: not a description of token shards") from None


def _link(shard: _Shard, prefix: Path, out: Path, suffix: str) -> Path:
    target = out / shard.split / f"{shard.name}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(prefix.with_name(f"{prefix.name}.bin"), target)
    except OSError as error:
        raise UserError(
            f"{out.parent}: cannot hold a hard link to {prefix}.bin ({error.strerror}); export to its file system"
        ) from None
    return target


def _write_datatrove(shard: _Shard, prefix: Path, out: Path, tokenizer: str) -> None:
    target, ends = _link(shard, prefix, out, ".ds"), IndexedReader(prefix).starts[1:]
    write_atomic(target.with_name(f"{target.name}.index"), ends.astype("<u8").tobytes())
    described = f"{tokenizer}|4\n{shard.tokens}\n{_metric(shard.tokens)}T"
    write_atomic(target.with_name(f"{target.name}.metadata"), described.encode())


def _write_olmo(shard: _Shard, prefix: Path, out: Path, tokenizer: str) -> None:
    del tokenizer  # OLMo-core's files do not say it
    target, starts = _link(shard, prefix, out, ".npy"), IndexedReader(prefix).starts
    lines = (f"{start},{end}\n" for start, end in itertools.pairwise(map(int, starts)))
    write_atomic(target.with_suffix(".csv.gz"), gzip.compress("".join(lines).encode(), mtime=0))


def _write_arrow(shard: _Shard, prefix: Path, out: Path, tokenizer: str) -> None:
    """Files are numbered within their split: `datasets` finds splits by these names."""
    del tokenizer
    path, reader = out / "data" / f"{shard.split}-{shard.number:05d}-of-{shard.count:05d}.arrow", IndexedReader(prefix)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, _SCHEMA) as stream:
            for first in range(0, len(reader), _ROWS):
                stream.write_batch(_record_batch(reader, first, first + _ROWS))
        file.flush()
        os.fsync(file.fileno())


_WRITERS: dict[str, Callable[[_Shard, Path, Path, str], None]] = {
    "datatrove": _write_datatrove,
    "olmo": _write_olmo,
    "arrow": _write_arrow,
}


def _record_batch(reader: IndexedReader, first: int, end: int) -> pa.RecordBatch:
    starts = reader.starts[first : end + 1]
    tokens = pa.array(reader.tokens[starts[0] : starts[-1]].view(np.uint32))
    return pa.record_batch([pa.LargeListArray.from_arrays(pa.array(starts - starts[0]), tokens)], schema=_SCHEMA)


def _metric(count: int) -> str:
    """Three digits and the prefix of the thousands: 2060000 is '2.06 M'."""
    thousands = max(0, (len(str(count)) - 1) // 3)
    digits = 2 - (len(str(count)) - 1) % 3
    return f"{count / 1000**thousands:.{digits}f} {'kMGTPE'[thousands - 1] if thousands else ''}"
