"""From tensors that are saved whole to the pieces that ranks hold: how a checkpoint fits any layout.

A checkpoint knows tensors by name and whole shape. What a rank has of them is a list of `Piece`: parameters it holds,
moments of what it owns, experts of its expert rank. Loading needs no messages: every rank reads the runs of elements
that its pieces are. Saving needs none either: every rank writes what it owns.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.autograd.graph import increment_version

from headrace.errors import UserError
from headrace.parallel.mesh import Mesh
from headrace.parallel.shards import Piece


class MisfitError(UserError):
    """What is saved belongs to another model or optimizer."""


class Described(Protocol):
    """A saved tensor's dtype and whole shape."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Saved(Protocol):
    """Saved tensors, of which runs of the flattened elements can be read into CPU memory."""

    @property
    def path(self) -> Any: ...
    def keys(self) -> list[str]: ...
    def entry(self, name: str, /) -> Described: ...
    def read_into(self, name: str, start: int, target: Tensor, /) -> None: ...


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


def names_everywhere(pieces: Iterable[Piece], mesh: Mesh, device: torch.device) -> set[str]:
    """Names of all tensors of which any rank has a piece; called by all ranks."""
    return set().union(*exchange([piece.name for piece in pieces], mesh, device))


@torch.no_grad()
def fill(pieces: Iterable[Piece], known: set[str], saved: Saved) -> None:
    """Fill every piece with its run of elements; reads nothing else.

    `known` are the names that all ranks' pieces have together. What is saved without one of them, under a name that is
    not among them, or with another shape or dtype is `MisfitError`, raised before anything is filled. Damage, any other
    `UserError`, shows while reading: pieces then hold anything and have to be filled again.
    """
    for name in sorted(set(saved.keys()) ^ known):
        fault = "has no" if name in known else "holds an unknown"
        raise MisfitError(
            f"{saved.path}: {fault} tensor {name!r}; it was written by another model or optimizer configuration"
        )
    wanted = list(pieces)
    for piece in wanted:
        found, tensor = saved.entry(piece.name), piece.tensor
        if tuple(found.shape) != piece.shape or found.dtype != tensor.dtype:
            raise MisfitError(
                f"{saved.path}: tensor {piece.name!r} is {found.dtype} {list(found.shape)}, "
                f"the configuration needs {tensor.dtype} {list(piece.shape)}"
            )
    for piece in wanted:
        _read(piece, saved)


def _read(piece: Piece, saved: Saved) -> None:
    tensor = piece.tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        saved.read_into(piece.name, piece.start, tensor)
        increment_version(piece.tensor)  # what was made of the values before must not be used again
        return
    here = torch.empty(tensor.shape, dtype=tensor.dtype)
    saved.read_into(piece.name, piece.start, here)
    piece.tensor.copy_(here)
