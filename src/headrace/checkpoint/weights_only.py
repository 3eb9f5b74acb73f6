"""A checkpoint of weights alone, written shard by shard: what comes from elsewhere and training goes on from.

It is like any other checkpoint, without moments. Its files are planned from shapes alone and made one after the other,
each in memory: that is one file and one part of a tensor, whatever the model's size. What `described` a finished file
is written down beside the files. A run that was killed finds what it has made, verifies it, and goes on with the next
file. The token of the save is a hash of state and plan, so files of another source are never taken over, and whoever
is killed gets the bytes of whoever is not.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.files import hash_bytes, hash_file, json_bytes, read_json, sync_folder, write_json
from headrace.artifacts.manifest import discard
from headrace.checkpoint.reader import LEFTOVER
from headrace.checkpoint.slices import FilePlan, as_bytes
from headrace.checkpoint.writer import publish, write_planned
from headrace.parallel.shards import Piece

KIND = "model"
_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Part:
    """What is handed over at once: `size` elements from `start` on of the flattened tensor `name`."""

    name: str
    start: int
    size: int


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterable[Part],
    read: Callable[[Part], Tensor],
    state: Mapping[str, Any],
    max_shard_bytes: int,
) -> Path:
    """Write the checkpoint of step 0 under `folder`, which is its alone; returns its folder, made by one rename.

    parts: together every element of every tensor of `shapes`, once. read: the FP32 values of a part. state: JSON that
    stands for the values too. A file holds at most `max_shard_bytes` of weights, or one part that alone is larger.
    Where this raises, the files that are finished stay for the next attempt.
    """
    shards = list(_filled(_ordered(parts, shapes), max_shard_bytes))
    token = _token(state, shapes, shards)
    staging, records = folder / f"{LEFTOVER}0-{token}", folder / f"{LEFTOVER}records-{token}"
    for left in folder.glob(f"{LEFTOVER}*"):
        if left not in (staging, records):
            discard(left)
    for made in (staging, records):
        made.mkdir(parents=True, exist_ok=True)
    plans = [_plan(shard, shapes, token) for shard in shards]
    content = torch.empty(max(plan.size for plan in plans), dtype=torch.uint8)
    said = []
    for number, (shard, plan) in enumerate(zip(shards, plans, strict=True)):
        path = staging / f"{KIND}-{number:05d}.safetensors"
        record = records / f"{path.stem}.json"
        if (known := _finished(path, record)) is None:
            _fill(content[: plan.size], plan, shard, read)
            known = write_planned(path, plan, as_bytes(content[: plan.size]))
            write_json(record, known)
        said.append({KIND: known})
    for path in staging.iterdir():  # of an attempt that was killed behind them
        if path.name not in {one[KIND]["file"] for one in said}:
            path.unlink()
    sync_folder(staging)
    final = publish(folder, 0, token, said, state)
    discard(records)
    return final


def _ordered(parts: Iterable[Part], shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """The parts as the tensors follow each other in `shapes`."""
    order = {name: number for number, name in enumerate(shapes)}
    ordered = sorted(parts, key=lambda part: (order[part.name], part.start))
    ends = dict.fromkeys(shapes, 0)
    for part in ordered:
        assert part.start == ends[part.name], f"{part.name}: every element is given once"
        ends[part.name] += part.size
    assert ends == {name: prod(shape) for name, shape in shapes.items()}, "every element is given once"
    return ordered


def _filled(parts: Sequence[Part], max_shard_bytes: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    for part in parts:
        if shard and sum(one.size for one in [*shard, part]) * _BYTES > max_shard_bytes:
            yield shard
            shard = []
        shard.append(part)
    yield shard


def _token(state: Mapping[str, Any], shapes: Mapping[str, Any], shards: Sequence[Sequence[Part]]) -> str:
    plan = json.dumps([list(shapes.items()), [list(map(astuple, shard)) for shard in shards]])
    return hash_bytes(json_bytes(state) + plan.encode(), "sha256").removeprefix("sha256:")[:12] + "n000000"


def _finished(path: Path, record: Path) -> dict[str, Any] | None:
    """What the record says of a file that is finished and whole."""
    if not record.exists():
        return None
    known: dict[str, Any] = read_json(record)
    whole = path.is_file() and path.stat().st_size == known["bytes"] and hash_file(path, "xxh3") == known["hash"]
    return known if whole else None


def _plan(shard: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], token: str) -> FilePlan:
    """Where the parts of one file lie; those of a tensor are one piece."""
    pieces = []
    for name, run in groupby(shard, key=lambda part: part.name):
        together = list(run)
        size = sum(part.size for part in together)
        pieces.append(Piece(name, torch.empty(size, device="meta"), shapes[name], together[0].start))
    return FilePlan(pieces, {"step": "0", "token": token, "kind": KIND})


def _fill(content: Tensor, plan: FilePlan, shard: Sequence[Part], read: Callable[[Part], Tensor]) -> None:
    begins = {placed.piece.name: placed.offset - _BYTES * placed.piece.start for placed in plan.placed}
    content[: len(plan.header)] = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
    for part in shard:
        values, begin = read(part), begins[part.name] + _BYTES * part.start
        assert values.dtype == torch.float32 and values.numel() == part.size, f"{part}: {values.dtype}"
        content[begin : begin + _BYTES * part.size] = values.contiguous().view(-1).view(torch.uint8)
