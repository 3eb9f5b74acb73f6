"""A checkpoint of weights alone, written tensor by tensor: what comes from elsewhere and training goes on from.

It is like any other checkpoint, of one file, without moments, and memory is one tensor whatever the model's size.
"""

import mmap
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.files import hash_file, sync_folder
from headrace.checkpoint.reader import LEFTOVER
from headrace.checkpoint.slices import FilePlan
from headrace.checkpoint.writer import publish
from headrace.parallel.shards import Piece

KIND = "model"


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[tuple[str, int, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of step 0 under `folder`; returns its folder, which appears by one rename.

    values: (name, first element, FP32 values) until every element of every tensor of `shapes` was given once.
    """
    token = f"{secrets.token_hex(6)}n000000"
    staging = folder / f"{LEFTOVER}0-{token}"
    staging.mkdir(parents=True)
    path = staging / f"{KIND}-00000.safetensors"
    pieces = [Piece(name, torch.empty(shape, device="meta"), shape) for name, shape in shapes.items()]
    plan = FilePlan(pieces, {"step": "0", "token": token, "kind": KIND})
    begins = {placed.piece.name: placed.offset for placed in plan.placed}
    left = sum(placed.bytes for placed in plan.placed)
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)
        for name, start, tensor in values:
            assert tensor.dtype == torch.float32, f"{name}: {tensor.dtype}"
            data = tensor.detach().contiguous().view(-1).numpy().data.cast("B")
            file.seek(begins[name] + 4 * start)
            file.write(data)
            left -= len(data)
        assert left == 0, "every element is given once"
        file.flush()
        os.fsync(file.fileno())
    sync_folder(staging)
    with path.open("rb") as written, mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        said = plan.described(path.name, view)
        view.release()
    return publish(folder, 0, token, [{KIND: {**said, "bytes": plan.size, "hash": hash_file(path, "xxh3")}}], state)
