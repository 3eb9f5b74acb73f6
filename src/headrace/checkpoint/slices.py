"""How a checkpoint's tensors lie on disk: as slices, with a table that says where each is and what it hashes to.

A tensor is known by name, dtype and whole shape. Its elements, flattened, are cut into slices wherever the ranks that
wrote them happened to be cut, and every `SLICE_BYTES` at the latest. A rank writes its slices of one kind (`model`,
`optimizer`, `ema`) one behind the other into a safetensors file of 1-D tensors `<name>/<first element>`. The table
`slices.json` joins them again:

    {"version", "step", "token", "files": {file: {"header_bytes", "header_hash"}}, "hash",
     "kinds": {kind: {name: {"dtype", "shape", "slices": [{"file", "start", "size", "offset", "hash"}]}}}}

`start` and `size` count elements, `offset` bytes from the file's beginning. Whoever reads a range of elements touches
the slices it overlaps and verifies exactly those; so slices are neither so small that the table grows large nor so
large that a rank of another layout reads much more than it needs.

This module plans files and reads and writes the table; it opens no file of tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.files import hash_bytes
from headrace.parallel.shards import Piece

TABLE = "slices.json"
SLICE_BYTES = 16 << 20
_VERSION = 1
_ALIGNMENT = 64
_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_FILE = re.compile(r"[a-z]+-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Slice:
    """Elements from `start` on of a tensor, in `file` at byte `offset`; `hash` is of their bytes."""

    file: str
    start: int
    size: int
    offset: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: dtype, whole shape, and its slices in order, which cover it exactly once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: tuple[Slice, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def spelling(self) -> str:
        """The dtype as safetensors spell it."""
        return _NAMES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The first bytes of a slice file, which bind it to a step and a save."""

    bytes: int
    hash: str


@dataclass(frozen=True)
class Table:
    """What `slices.json` says."""

    step: int
    token: str
    files: Mapping[str, Header]
    kinds: Mapping[str, Mapping[str, Entry]]


@dataclass(frozen=True)
class Placed:
    """A piece and the byte of the file at which its elements begin."""

    piece: Piece
    offset: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.piece.tensor.numel() * self.piece.tensor.element_size()


class FilePlan:
    """Where the pieces of one file lie: `header` first, then each of `placed`, `size` bytes in all.

    Wide elements come first, so that every slice is aligned to its elements. The header names step and save.
    """

    def __init__(self, pieces: Iterable[Piece], binding: Mapping[str, str]) -> None:
        ordered = sorted(pieces, key=lambda p: (-p.tensor.element_size(), p.name, p.start))
        self._cuts = [(piece, list(_cut(piece))) for piece in ordered]
        self.header = self._make_header(binding)
        self.placed, end = [], len(self.header)
        for piece in ordered:
            self.placed.append(Placed(piece, end))
            end += self.placed[-1].bytes
        self.size = end

    def _make_header(self, binding: Mapping[str, str]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **binding}}
        begin = 0
        for piece, cuts in self._cuts:
            for start, size in cuts:
                end = begin + size * piece.tensor.element_size()
                spelling = _NAMES[piece.tensor.dtype]
                header[f"{piece.name}/{start}"] = {"dtype": spelling, "shape": [size], "data_offsets": [begin, end]}
                begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def described(self, file: str, data: memoryview) -> dict[str, Any]:
        """What the table needs to know of the file, as JSON; `data` is its whole content."""
        tensors: dict[str, dict[str, Any]] = {}
        for placed, (piece, cuts) in zip(self.placed, self._cuts, strict=True):
            known = {"dtype": _NAMES[piece.tensor.dtype], "shape": list(piece.shape), "slices": []}
            said = tensors.setdefault(piece.name, known)
            width, offset = piece.tensor.element_size(), placed.offset
            for start, size in cuts:
                end = offset + size * width
                said["slices"].append(asdict(Slice(file, start, size, offset, hash_bytes(data[offset:end], "xxh3"))))
                offset = end
        header = {"header_bytes": len(self.header), "header_hash": hash_bytes(self.header, "xxh3")}
        return {"file": file, **header, "tensors": tensors}


def _cut(piece: Piece) -> Iterable[tuple[int, int]]:
    """Starts and sizes, in elements of the whole tensor, of the slices of a piece; an empty one has none."""
    most, size = SLICE_BYTES // piece.tensor.element_size(), piece.tensor.numel()
    return ((piece.start + at, min(most, size - at)) for at in range(0, size, most))


def joined(step: int, token: str, said: Sequence[Mapping[str, Mapping[str, Any]]]) -> bytes:
    """The text of the table, from what every rank's files were `described` as, by kind.

    Ranks that disagree about a tensor, or leave out or repeat some of its elements, are our own mistake.
    """
    files: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for kind, file in ((kind, file) for one in said for kind, file in one.items()):
        assert file["file"] not in files, f"two ranks wrote {file['file']}"
        files[file["file"]] = {key: file[key] for key in ("header_bytes", "header_hash")}
        for name, tensor in file["tensors"].items():
            whole = kinds.setdefault(kind, {}).setdefault(name, {**tensor, "slices": []})
            assert all(whole[key] == tensor[key] for key in ("dtype", "shape")), f"ranks disagree about {name}"
            whole["slices"] += tensor["slices"]
        kinds.setdefault(kind, {})
    for name, whole in ((name, whole) for tensors in kinds.values() for name, whole in tensors.items()):
        whole["slices"].sort(key=lambda part: part["start"])
        assert _covers(whole["slices"], whole["shape"]), f"{name}: some of its elements are written by none, or twice"
    body = {"version": _VERSION, "step": step, "token": token, "files": files, "kinds": kinds}
    return _text({**body, "hash": hash_bytes(_text(body), "xxh3")})


def parsed(data: bytes) -> Table:
    """The table in the bytes of `slices.json`; `ValueError` where a byte of them is not as it was written."""
    raw = json.loads(data)
    try:
        body = {key: value for key, value in raw.items() if key != "hash"}
        if data != _text(raw) or raw["hash"] != hash_bytes(_text(body), "xxh3"):
            raise ValueError("damaged (its hash does not match its content)")
        if raw["version"] != _VERSION:
            raise ValueError(f"written by version {raw['version']}, this one reads {_VERSION}")
        files = {name: Header(said["header_bytes"], said["header_hash"]) for name, said in raw["files"].items()}
        kinds = {
            kind: {name: _entry(name, said, files) for name, said in tensors.items()}
            for kind, tensors in raw["kinds"].items()
        }
        return Table(int(raw["step"]), str(raw["token"]), files, kinds)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not a table of slices") from None


def _entry(name: str, said: Mapping[str, Any], files: Mapping[str, Header]) -> Entry:
    slices = tuple(Slice(**part) for part in said["slices"])
    inside = all(part.file in files and part.offset >= 0 and _FILE.fullmatch(part.file) for part in slices)
    if not inside or not _covers(said["slices"], said["shape"]):
        raise ValueError(f"the slices of {name!r} do not make it up")
    return Entry(_DTYPES[said["dtype"]], tuple(said["shape"]), slices)


def _covers(slices: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> bool:
    end = 0
    for part in slices:
        if part["start"] != end or part["size"] <= 0:
            return False
        end += part["size"]
    return end == prod(shape)


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False) + "\n").encode()


@torch.no_grad()
def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
