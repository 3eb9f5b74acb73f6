"""Round trips under any cut, reading no more than asked for, and finding the newest whole checkpoint."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from headrace.artifacts.tensors import save_tensors
from headrace.checkpoint import reader, slices
from headrace.checkpoint.reader import at_step, newest_first, newest_valid, open_checkpoint, steps, tensors_of
from headrace.errors import UserError
from headrace.parallel.assembly import MisfitError, fill
from headrace.parallel.shards import Piece
from saved import kinds_of, put, save, simple, value_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of random bits: NaNs with payloads, infinities, negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int, int]]:
    """(first, last, rank): runs that cover `size` elements exactly once, each on one of three ranks."""
    inner = draw(st.lists(st.integers(0, size), max_size=5))
    ends = sorted({0, *inner, size}) if size else [0, 0]
    return [(a, b, draw(st.integers(0, 2))) for a, b in pairwise(ends)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[dict[str, list[Piece]]], dict[str, list]]:
    """Whole tensors, the pieces of three ranks of them, and other cuts under which to read them."""
    wholes, ranks, others = {}, [{"model": [], "optimizer": []} for _ in range(3)], {}
    for index in range(draw(st.integers(1, 5))):
        name, shape = f"layer.{index}/part", draw(SHAPES)
        wholes[name] = bits(shape, draw(st.sampled_from(DTYPES)), index)
        for first, last, rank in draw(cuts(prod(shape))):
            piece = Piece(name, wholes[name].reshape(-1)[first:last], shape, first)
            ranks[rank]["optimizer" if index % 2 else "model"].append(piece)
        others[name] = draw(cuts(prod(shape)))
    return wholes, ranks, others


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from([8, 24, 64, 1 << 20]))
def test_what_is_saved_under_one_cut_is_read_bit_for_bit_under_another(layout: tuple, slice_bytes: int) -> None:
    wholes, ranks, others = layout
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SLICE_BYTES", slice_bytes)
        patch.setattr(os, "fsync", lambda _: None)  # nothing is going to crash here
        found = open_checkpoint(save(Path(name), 7, *ranks))
        found.verify()
        for kind, odd in (("model", 0), ("optimizer", 1)):
            tensors = {key: whole for index, (key, whole) in enumerate(wholes.items()) if index % 2 == odd}
            assert found.names(kind) == sorted(tensors)
            pieces, expected = [], []
            for key, whole in tensors.items():
                assert same(found.get(kind, key), whole)
                assert (found.info(kind, key).dtype, found.info(kind, key).shape) == (whole.dtype, whole.shape)
                for first, last, _ in others[key]:
                    expected.append(whole.reshape(-1)[first:last])
                    assert same(found.read(kind, key, first, last - first), expected[-1])
                    pieces.append(Piece(key, torch.zeros_like(expected[-1]), tuple(whole.shape), first))
            fill(pieces, set(tensors), found.tensors(kind))
            assert all(same(piece.tensor, wanted) for piece, wanted in zip(pieces, expected, strict=True))


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Sizes of all reads from slice files."""
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        preadv = os.preadv

        def counted(descriptor: int, into: list, offset: int) -> int:
            sizes.append(preadv(descriptor, into, offset))
            return sizes[-1]

        patch.setattr(os, "preadv", counted)
        yield sizes


def test_only_the_slices_touched_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six elements of FP32 in a slice; three ranks hold ten slices each."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 24)
    whole = torch.arange(180.0)
    ranks = [{"model": [Piece("w", whole[60 * r : 60 * r + 60], (180,), 60 * r)]} for r in range(3)]
    path = save(tmp_path, 1, *ranks)
    headers = slices.parsed((path / slices.TABLE).read_bytes()).files
    files = [headers[f"model-0000{rank}.safetensors"].bytes for rank in range(3)]
    for start, size, parts, touched in ((0, 6, 1, [0]), (5, 2, 2, [0]), (57, 6, 2, [0, 1]), (70, 0, 0, []),
                                        (59, 62, 12, [0, 1, 2]), (179, 1, 1, [2])):  # fmt: skip
        with counted_bytes() as sizes:
            found = open_checkpoint(path)
            assert torch.equal(found.read("model", "w", start, size), whole[start : start + size])
            assert sum(sizes) == 24 * parts + sum(files[rank] for rank in touched)
            del sizes[:]
            found.read("model", "w", start, size)
            assert sum(sizes) == 24 * parts, "headers are verified once"


def test_an_expert_rank_reads_its_experts_and_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 1 << 12)
    stack = torch.randn(16, 32, 64)
    found = open_checkpoint(save(tmp_path, 1, kinds_of(model={"experts": stack})))
    share = torch.empty(4, 32, 64)
    with counted_bytes() as sizes:
        fill([Piece("experts", share, (16, 32, 64), 8 * 32 * 64)], {"experts"}, found.tensors("model"))
    assert torch.equal(share, stack[8:12])
    assert share.nbytes <= sum(sizes) < share.nbytes + 16384


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """The library itself reads what a rank wrote."""
    path = put(tmp_path, 3)
    found = {name: tensor.tolist() for name, tensor in load_file(path / "model-00000.safetensors").items()}
    assert found == {"model.weight/0": [3.0] * 6, "model.bias/0": [3.0]}
    assert load_file(path / "optimizer-00001.safetensors")["model.weight/exp_avg/6"].dtype == torch.bfloat16


def test_tensors_of_reads_a_file_a_checkpoint_and_a_part_of_one(tmp_path: Path) -> None:
    whole, part = put(tmp_path, 5), tmp_path / "part"
    part.mkdir()
    for path in (whole / slices.TABLE, *whole.glob("model-*")):
        os.link(path, part / path.name)
    save_tensors(tmp_path / "plain.safetensors", simple(5.0)["model"])
    for path in (whole, part, tmp_path / "plain.safetensors"):
        with tensors_of(path) as source:
            assert sorted(source.keys()) == ["model.bias", "model.weight"]
            assert (source.info("model.weight").dtype, source.info("model.weight").shape) == ("F32", (3, 4))
            assert source.info("model.weight").bytes == 48
            assert same(source.get("model.weight"), torch.full((3, 4), 5.0))
            assert same(source.get("model.bias"), torch.tensor(5.0))
            assert source.path == path
            with pytest.raises(UserError, match="'head' is missing"):
                source.get("head")
    with tensors_of(part, "optimizer") as source, pytest.raises(UserError, match="optimizer-00000"):
        source.get("model.weight/exp_avg")
    with pytest.raises(UserError, match="no tensors of kind 'ema', only model, optimizer"), tensors_of(whole, "ema"):
        pass
    with pytest.raises(UserError, match="no such file"), tensors_of(tmp_path):
        pass


def test_fill_refuses_what_does_not_fit_before_it_fills_anything(tmp_path: Path) -> None:
    path = save(tmp_path, 1, kinds_of(model={"a": torch.ones(4), "b": torch.ones(2, 3)}))
    saved = open_checkpoint(path).tensors("model")
    target = torch.zeros(4)
    mine = Piece("a", target, (4,))
    for other, known, says in (
        (Piece("b", torch.zeros(6), (3, 2)), {"a", "b"}, r"'b' is torch.float32 \[2, 3\].* \[3, 2\]"),
        (Piece("b", torch.zeros(6, dtype=torch.bfloat16), (2, 3)), {"a", "b"}, "needs torch.bfloat16"),
        (mine, {"a"}, "holds an unknown tensor 'b'"),
        (mine, {"a", "b", "c"}, "has no tensor 'c'"),
    ):
        with pytest.raises(MisfitError, match=says):
            fill([mine, other], known, saved)
        assert not target.any()


def test_filling_a_parameter_outdates_what_was_made_of_it(tmp_path: Path) -> None:
    saved = open_checkpoint(save(tmp_path, 1, kinds_of(model={"a": torch.ones(2, 3)}))).tensors("model")
    parameter = torch.nn.Parameter(torch.zeros(3, 2).T)  # no contiguous memory
    whole = torch.nn.Parameter(torch.zeros(2, 3))
    for target in (parameter, whole):
        before = target._version
        fill([Piece("a", target, (2, 3))], {"a"}, saved)
        assert target._version > before
        assert torch.equal(target.detach(), torch.ones(2, 3))


def test_newest_is_by_step_and_never_by_time(tmp_path: Path) -> None:
    for number, step in enumerate((30, 4, 200)):
        path = put(tmp_path, step)
        for changed in (path, *path.iterdir()):
            os.utime(changed, (2e9 - number, 2e9 - number))  # the older, the newer it looks; in the year 2033
    assert steps(tmp_path) == [4, 30, 200]
    assert [found.step for found in newest_first(tmp_path)] == [200, 30, 4]
    newest = newest_valid(tmp_path)
    assert newest is not None
    assert value_of(newest) == newest.step == 200


@pytest.mark.parametrize(
    "name", ["model-00001.safetensors", "optimizer-00000.safetensors", "slices.json", "state.json"]
)
def test_fall_back_is_loud_and_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        newest = newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert f"step-00000002/{name}" in caplog.text


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)

    def listed(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", listed)
    with pytest.raises(reader.Unreadable, match=rf"{tmp_path}: cannot be read: Permission denied"):
        steps(tmp_path)


def test_no_whole_checkpoint_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_valid(tmp_path / "absent") is None
    assert not caplog.records
    (put(tmp_path, 1) / reader.STATE).unlink()
    assert newest_valid(tmp_path) is None
    assert "none of 1 checkpoints is whole" in caplog.text


def test_at_step_names_the_steps_that_there_are(tmp_path: Path) -> None:
    put(tmp_path, 4)
    assert at_step(tmp_path, 4).step == 4
    with pytest.raises(UserError, match="no checkpoint of step 5; kept steps: 4"):
        at_step(tmp_path, 5)


def test_a_whole_folder_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(UserError, match="another step"):
        open_checkpoint(tmp_path / "step-00000009")


Harm = Callable[[Path, Path], object]
HARM: dict[str, Harm] = {
    "deleted": lambda path, other: path.unlink(),
    "replaced": lambda path, other: shutil.copy(other, path),
    "renamed over": lambda path, other: other.rename(path),
    "cut": lambda path, other: os.truncate(path, 10),
    "emptied": lambda path, other: os.truncate(path, 0),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
    "the whole checkpoint removed": lambda path, other: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_that_changes_while_loading_is_an_error(tmp_path: Path, harm: str, begun: bool) -> None:
    other = put(tmp_path / "other run", 2, 7.0) / "model-00000.safetensors"
    found = open_checkpoint(put(tmp_path, 2))
    if begun:
        assert found.read("model", "model.weight", 0, 1).item() == 2.0
    HARM[harm](found.folder / other.name, other)
    with pytest.raises(UserError, match=r"step-00000002/model-00000\.safetensors"):
        found.get("model", "model.weight")
    with pytest.raises(UserError, match="step-00000002"):
        found.verify()
