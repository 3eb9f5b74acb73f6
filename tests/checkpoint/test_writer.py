"""Writing beside training: what the caller waits for, what is copied, and what comes of a failure."""

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path

import pytest
import torch

from headrace.artifacts import retry
from headrace.checkpoint.reader import open_checkpoint, steps
from headrace.checkpoint.writer import Writer, abandon, clear_leftovers, publish
from headrace.parallel.assembly import fill
from headrace.parallel.shards import Piece, pieces_of
from saved import Kinds, kinds_of, put, save, simple, value_of


class Gate:
    """A disk on which nothing is written until the gate is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._open, self.waiting, write = threading.Event(), threading.Event(), os.write

        def gated(descriptor: int, data: memoryview) -> int:
            self.waiting.set()
            assert self._open.wait(30)
            return write(descriptor, data)

        patch.setattr(os, "write", gated)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def test_the_caller_waits_for_the_copy_only_and_may_change_everything_at_once(tmp_path: Path, gate: Gate) -> None:
    tensors = simple(5.0)
    writer = Writer(tmp_path, 0)
    assert writer.status() is None
    assert writer.wait() is None
    writer.begin(5, "abc", kinds_of(**tensors))
    assert gate.waiting.wait(30)
    status = writer.status()
    assert status is not None
    assert status.state == "writing"
    assert steps(tmp_path) == []
    for whole in tensors.values():
        for tensor in whole.values():
            tensor.zero_()  # training goes on
    with pytest.raises(AssertionError, match="not been taken"):
        writer.begin(6, "abd", kinds_of(**tensors))
    with pytest.raises(AssertionError, match="no save has come to its end"):
        writer.take()
    gate.open()
    writer.wait()
    done = writer.take()
    assert done.state == "written"
    assert loads(dumps(asdict(done))) == asdict(done)
    assert steps(tmp_path) == []
    path = publish(tmp_path, 5, "abc", [done.files], {"value": 5.0})
    assert value_of(open_checkpoint(path)) == 5.0
    assert writer.status() is None


def test_memory_is_kept_from_save_to_save(tmp_path: Path) -> None:
    writer, places = Writer(tmp_path, 0), set()
    for step, size in ((1, 1000), (2, 1000), (3, 900), (4, 1000)):
        writer.begin(step, "x", kinds_of(model={"w": torch.full((size,), float(step))}))
        places.add(writer._memory["model"].data_ptr())
        writer.wait()
        path = publish(tmp_path, step, "x", [writer.take().files], {})
        assert torch.equal(open_checkpoint(path).get("model", "w"), torch.full((size,), float(step)))
    assert len(places) == 1
    writer.begin(5, "x", kinds_of(model={"w": torch.full((5_000_000,), 5.0)}))
    writer.wait()
    path = publish(tmp_path, 5, "x", [writer.take().files], {})
    assert open_checkpoint(path).get("model", "w").unique().tolist() == [5.0]


def test_pieces_of_any_layout_in_memory_are_copied_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    parameter = torch.nn.Parameter(base.clone())
    kinds: Kinds = {
        "model": [
            Piece("turned", base.T, (6, 4)),
            Piece("every second", base[:, ::2], (4, 3)),
            Piece("parameter", parameter, (4, 6)),
            Piece("expanded", base[0, 0].expand(3), (3,)),
        ]
    }
    found = open_checkpoint(save(tmp_path, 1, kinds))
    for piece in kinds["model"]:
        assert torch.equal(found.get("model", piece.name), piece.tensor.detach())


def test_a_whole_checkpoint_of_the_step_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = put(tmp_path, 3, 3.0)
    assert put(tmp_path, 3, 4.0) == path
    assert value_of(open_checkpoint(path)) == 3.0
    content = bytearray((path / "optimizer-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer-00001.safetensors").write_bytes(content)
    put(tmp_path, 3, 4.0)
    assert value_of(open_checkpoint(path)) == 4.0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_part_is_said_and_leaves_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = Writer(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        writer.begin(2, "t", kinds_of(**simple(2.0)))
        writer.wait()
    status = writer.take()
    assert (status.state, status.errno, status.files) == ("failed", errno.ENOSPC, {})
    assert "No space left" in str(status.error)
    assert list((tmp_path / ".unfinished-2-t").iterdir()) == []
    abandon(tmp_path, 2, "t")
    assert list(tmp_path.iterdir()) == []
    writer.begin(2, "u", kinds_of(**simple(2.0)))  # the next save of the same writer gets through
    writer.wait()
    publish(tmp_path, 2, "u", [writer.take().files], {"value": 2.0})
    assert steps(tmp_path) == [2]


def test_bytes_that_read_back_wrong_are_written_again_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that turns between memory and the file."""
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    write, wrong = os.write, iter([True, False, True, True, False])

    def turning(descriptor: int, data: memoryview) -> int:
        turned = bytearray(data)
        turned[-1] ^= next(wrong, False)
        return write(descriptor, turned)

    monkeypatch.setattr(os, "write", turning)
    path = save(tmp_path, 1, kinds_of(model={"w": torch.ones(4)}), state={"value": 1.0})
    assert value_of(open_checkpoint(path)) == 1.0
    with pytest.raises(OSError, match="reads back other bytes"):
        wrong = iter([True] * 9)
        save(tmp_path, 2, kinds_of(model={"w": torch.ones(4)}))
    assert steps(tmp_path) == [1]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    assert value_of(open_checkpoint(put(tmp_path, 1))) == 1.0


def test_leftovers_of_a_killed_attempt_are_never_mixed_in(tmp_path: Path) -> None:
    dead = Writer(tmp_path, 1)
    dead.begin(2, "dead", kinds_of(**simple(9.0)))
    dead.wait()
    path = put(tmp_path, 2)
    assert value_of(open_checkpoint(path)) == 2.0
    assert (tmp_path / ".unfinished-2-dead").exists()
    clear_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    clear_leftovers(tmp_path / "nowhere")


def test_a_file_that_no_rank_spoke_of_or_that_is_missing_ends_the_save(tmp_path: Path) -> None:
    for harm in ("more", "missing", "cut"):
        writer = Writer(tmp_path, 0)
        writer.begin(1, harm, kinds_of(**simple(1.0)))
        writer.wait()
        staging = tmp_path / f".unfinished-1-{harm}"
        if harm == "more":
            (staging / "model-00007.safetensors").write_bytes(b"x")
        elif harm == "missing":
            (staging / "model-00000.safetensors").unlink()
        else:
            os.truncate(staging / "model-00000.safetensors", 9)
        with pytest.raises(AssertionError):
            publish(tmp_path, 1, harm, [writer.take().files], {})
        assert list(tmp_path.iterdir()) == []


def test_the_state_is_strict_json_and_of_this_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, kinds_of(), state={"loss": float("nan")})
    with pytest.raises(AssertionError, match="disagree"):
        save(tmp_path, 1, kinds_of(), state={"step": 2})
    clear_leftovers(tmp_path)
    assert open_checkpoint(save(tmp_path, 1, kinds_of(), state={"step": 1, "ä": [None]})).state == {
        "step": 1,
        "ä": [None],
    }


@pytest.mark.gpu
def test_pieces_on_a_gpu_are_copied_before_training_goes_on(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: would save from a GPU while its values change, and load into it")
    weights = {f"w{index}": torch.full((1 << 20,), float(index), device="cuda") for index in range(8)}
    writer = Writer(tmp_path, 0)
    writer.begin(1, "x", kinds_of(model=weights))
    for tensor in weights.values():
        tensor.zero_()
    assert writer._memory["model"].is_pinned()
    writer.wait()
    saved = open_checkpoint(publish(tmp_path, 1, "x", [writer.take().files], {})).tensors("model")
    fill(pieces_of(weights.items()), set(weights), saved)
    for index in range(8):
        assert (weights[f"w{index}"] == index).all()
