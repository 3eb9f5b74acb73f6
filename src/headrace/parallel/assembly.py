"""Whole tensors from the pieces that ranks hold, and back: how a checkpoint is the same whatever the layout.

A checkpoint holds whole tensors by name. What a rank has of them is a list of `Piece`: parameters it owns, moments of
what it owns, experts of its expert rank. Saving collects them on rank 0, one tensor at a time; loading needs no
messages, since every rank reads the file and takes its runs of elements.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed

from headrace.errors import UserError
from headrace.parallel.mesh import Mesh
from headrace.parallel.shards import Piece


def exchange(value: Any, mesh: Mesh, device: torch.device) -> list[Any]:
    """What every rank passed, in the order of ranks; called by all of them. Values are what JSON has."""
    if mesh.world == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(mesh.world)]
    distributed.all_gather(sizes, torch.tensor([len(text)], device=device))
    padded = text.new_zeros(int(torch.cat(sizes).max()))
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(texts, padded)
    return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


@torch.no_grad()
def gather(pieces: Iterable[Piece], mesh: Mesh, device: torch.device) -> dict[str, Tensor]:
    """Whole tensors by name on rank 0, on the CPU where they had to be put together; nothing on the other ranks.

    Called by all ranks, whose pieces cover every tensor exactly once. Where rank 0 has a whole one it is not copied.
    """
    mine = sorted(pieces, key=lambda piece: (piece.name, piece.start))
    said = exchange([[p.name, p.shape, p.start, p.tensor.numel(), _name(p.tensor)] for p in mine], mesh, device)
    if mesh.rank:
        for piece in mine:
            distributed.send(piece.tensor.detach().contiguous(), 0)
        return {}
    here = iter(mine)
    result: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, rank, shape, start, size, dtype in sorted(
        (name, rank, *rest) for rank, entries in enumerate(said) for name, *rest in entries
    ):
        missing[name] = missing.get(name, prod(shape)) - size
        run = None if rank else next(here).tensor.detach()
        if run is not None and size == prod(shape):
            result[name] = run.view(shape)
            continue
        if name not in result:
            result[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if run is None:
            run = torch.empty(size, dtype=result[name].dtype, device=device)
            distributed.recv(run, rank)
        result[name].view(-1)[start : start + size] = run.reshape(-1)
    assert not any(missing.values()), "a tensor has elements that no rank gave, or two"
    return result


def names_everywhere(pieces: Iterable[Piece], mesh: Mesh, device: torch.device) -> set[str]:
    """Names of all tensors of which any rank has a piece; called by all ranks."""
    return set().union(*exchange([piece.name for piece in pieces], mesh, device))


@torch.no_grad()
def fill(
    pieces: Iterable[Piece], known: set[str], read: Callable[[str], Tensor], names: Sequence[str], where: str
) -> None:
    """Fill every piece from the whole tensor `read(name)` of a file with tensors `names`.

    `known` are the names that all ranks' pieces have together. What the file `where` lacks, has too many of, or has in
    another shape or dtype is a `UserError`.
    """
    for name in sorted(set(names) ^ known):
        fault = "has no" if name in known else "holds an unknown"
        raise UserError(f"{where}: {fault} tensor {name!r}; it was written by another model or optimizer configuration")
    for piece in pieces:
        source, tensor = read(piece.name), piece.tensor
        if tuple(source.shape) != piece.shape or source.dtype != tensor.dtype:
            raise UserError(
                f"{where}: tensor {piece.name!r} is {source.dtype} {list(source.shape)}, "
                f"the configuration needs {tensor.dtype} {list(piece.shape)}"
            )
        tensor.copy_(source.reshape(-1)[piece.start : piece.start + tensor.numel()].view(tensor.shape))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
