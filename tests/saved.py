"""Checkpoints for tests: made in one process, as if by several ranks, from pieces cut wherever a test likes."""

import os
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.checkpoint.reader import Checkpoint, open_checkpoint
from headrace.checkpoint.writer import Writer, abandon, publish
from headrace.errors import UserError
from headrace.parallel.shards import Piece, pieces_of

Kinds = Mapping[str, Sequence[Piece]]


def kinds_of(**kinds: Mapping[str, Tensor]) -> Kinds:
    """Whole tensors by kind and name, as one rank has them that is alone."""
    return {kind: pieces_of(tensors.items()) for kind, tensors in kinds.items()}


def save(folder: Path, step: int, *ranks: Kinds, state: Mapping[str, Any] | None = None) -> Path:
    """Publish a checkpoint of what each of `ranks` hands over, or abandon it; `OSError` where a part has failed."""
    writers = [Writer(folder, rank) for rank in range(len(ranks))]
    token = secrets.token_hex(4)
    for writer, kinds in zip(writers, ranks, strict=True):
        writer.begin(step, token, kinds)
        writer.wait()
    found = [writer.take() for writer in writers]
    failed = [status for status in found if status.state == "failed"]
    if failed:
        abandon(folder, step, token)
        raise OSError(failed[0].errno, failed[0].error)
    return publish(folder, step, token, [status.files for status in found], state or {})


def simple(value: float) -> dict[str, Mapping[str, Tensor]]:
    """A small model and its moments, every element of which is `value`."""
    return {
        "model": {"model.weight": torch.full((3, 4), value), "model.bias": torch.tensor(value)},
        "optimizer": {"model.weight/exp_avg": torch.full((3, 4), value, dtype=torch.bfloat16)},
    }


def put(folder: Path, step: int, value: float | None = None) -> Path:
    """A checkpoint that holds nothing but `value`, by default its step, in all its files; made by two ranks."""
    value = float(step) if value is None else value
    whole = simple(value)
    halves = [{kind: [half(p, rank) for p in pieces_of(t.items())] for kind, t in whole.items()} for rank in range(2)]
    state = {"fingerprint": "ab12", "value": value, "history": [1.5, 2.5]}
    return save(folder, step, *halves, state=state)


def half(piece: Piece, rank: int) -> Piece:
    """The first or the second half of a piece that is whole."""
    flat = piece.tensor.view(-1)
    middle = (flat.numel() + 1) // 2
    return Piece(piece.name, flat[middle:] if rank else flat[:middle], piece.shape, middle if rank else 0)


def value_of(checkpoint: Checkpoint) -> float:
    """The one number that everything in a checkpoint made by `put` must agree on."""
    values = {checkpoint.state["value"]}
    for kind in checkpoint.kinds:
        for name in checkpoint.names(kind):
            values |= set(checkpoint.get(kind, name).float().flatten().tolist())
    assert len(values) == 1, "a mix of two checkpoints"
    return float(values.pop())


def use(path: Path) -> None:
    """Open the checkpoint and read all of its tensors, as a resume does; nothing else verifies anything."""
    found = open_checkpoint(path)
    for kind in found.kinds:
        for name in found.names(kind):
            found.get(kind, name)


def flips_that_pass(folder: Path, flips: int) -> list[tuple[str, int]]:
    """Flip so many random bits of a checkpoint's files, one at a time and back; (file, bit) of those not detected."""
    bits = [(path, 8 * path.stat().st_size) for path in sorted(folder.iterdir())]
    chance, missed = random.Random(0), []
    for at in chance.sample(range(sum(size for _, size in bits)), flips):
        for path, size in bits:  # noqa: B007
            if at < size:
                break
            at -= size
        with path.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, at // 8)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), at // 8)
            try:
                use(folder)
                missed.append((path.name, at))
            except UserError as error:
                assert folder.name in str(error)
            os.pwrite(file.fileno(), bytes([byte]), at // 8)
    return missed
