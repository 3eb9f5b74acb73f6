"""Weights that come from elsewhere become a checkpoint like any other, file by file, however often it is killed."""

import errno
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from failing_disk import MAKING, dies_at, fails_at, operations
from headrace.artifacts import retry
from headrace.checkpoint.reader import open_checkpoint, steps, tensors_of
from headrace.checkpoint.weights_only import Part, write_weights
from headrace.errors import UserError

SHAPES = {"a.weight": (300, 70), "b.bias": (5,), "experts": (4, 9, 11)}
EXPERTS = [Part("experts", 99 * expert, 99) for expert in (2, 0, 3, 1)]
PARTS = [EXPERTS[0], Part("a.weight", 0, 21_000), *EXPERTS[1:], Part("b.bias", 0, 5)]
MOST = 1000  # bytes to a file: the matrix alone, the bias with two experts, the other two


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(
    folder: Path, parts: Iterable[Part] = PARTS, most: int = MOST, told: Callable[[Part], object] = lambda part: None
) -> Path:
    whole = tensors()

    def read(part: Part) -> torch.Tensor:
        told(part)
        return whole[part.name].view(-1)[part.start : part.start + part.size]

    return write_weights(folder, SHAPES, parts, read, {"fingerprint": "imported"}, most)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("most", "files"), [(1, 6), (MOST, 3), (1 << 30, 1)])
def test_every_element_is_where_it_belongs_in_whatever_order_it_came(most: int, files: int, tmp_path: Path) -> None:
    folder = write(tmp_path, most=most)
    assert steps(tmp_path) == [0] and list(tmp_path.iterdir()) == [folder]
    assert len(list(folder.glob("model-*.safetensors"))) == files
    found = open_checkpoint(folder)
    found.verify()
    assert found.step == 0
    with tensors_of(folder) as source:
        for name, tensor in tensors().items():
            assert torch.equal(source.get(name), tensor), name


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "model-00000.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="model-00000"):
        open_checkpoint(folder).verify()


@pytest.mark.parametrize("parts", [[Part("b.bias", 0, 5)], [*PARTS, PARTS[0]], PARTS[1:]])
def test_what_is_missing_or_given_twice_is_no_checkpoint(parts: list[Part], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="every element"):
        write(tmp_path, parts)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("half", [False, True])
def test_a_process_that_dies_at_any_operation_is_gone_on_behind(half: bool, tmp_path: Path) -> None:
    undisturbed = content(write(tmp_path / "whole").parent)
    done = operations(lambda: write(tmp_path / "counted"))
    assert len(done) > 3 * 8
    spared = set()
    for number in (number for number, name in enumerate(done) if name == "write" or not half):
        folder = tmp_path / str(number)
        assert dies_at(number, lambda folder=folder: write(folder), half)
        whole = steps(folder) == [0]
        finished = len(list(folder.glob(".unfinished-records-*/*.json")))
        read: list[Part] = []
        write(folder, told=read.append)
        assert content(folder) == undisturbed, number
        if not whole:
            assert len(read) == [6, 5, 2, 0][finished], number
            spared.add(finished)
    assert spared == {0, 1, 2, 3}


def test_a_disk_that_is_full_at_any_operation_leaves_what_is_finished(tmp_path: Path) -> None:
    undisturbed = content(write(tmp_path / "whole").parent)
    done = operations(lambda: write(tmp_path / "counted"))
    for number in (number for number, name in enumerate(done) if name in MAKING):
        folder = tmp_path / str(number)
        with pytest.raises(OSError, match="No space left"), fails_at(number, errno.ENOSPC):
            write(folder)
        assert steps(folder) == [] or done[number:].count("fsync") == 1  # the last one is behind the rename
        write(folder)
        assert content(folder) == undisturbed, number


def test_files_that_are_damaged_or_of_another_plan_are_made_again(tmp_path: Path) -> None:
    undisturbed = content(write(tmp_path / "whole").parent)
    folder = tmp_path / "again"

    def stop(part: Part) -> None:
        if part.name == "experts" and part.start == 297:
            raise KeyboardInterrupt

    for most in (1, MOST):
        with pytest.raises(KeyboardInterrupt):
            write(folder, most=most, told=stop)
    assert len(list(folder.iterdir())) == 2  # nothing of the other plan
    (path,) = folder.glob("*/model-00001.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    read: list[Part] = []
    write(folder, told=read.append)
    assert [part.name for part in read] == ["b.bias", *["experts"] * 4]
    assert content(folder) == undisturbed
