"""Every kind of damage to a published checkpoint is detected before anything of it is used."""

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from headrace.artifacts import manifest, retry
from headrace.checkpoint.reader import newest_valid, open_checkpoint, tensors_of
from headrace.checkpoint.slices import TABLE
from headrace.errors import UserError
from saved import flips_that_pass, kinds_of, put, save, use, value_of

FLIPS = 10_000
NAMES = [
    *(f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in range(2)),
    "slices.json", "state.json", "manifest.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("whole"), 2)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / whole.name)


def test_every_one_of_ten_thousand_flipped_bits_is_detected(copy: Path) -> None:
    assert sorted(path.name for path in copy.iterdir()) == sorted(NAMES)
    assert flips_that_pass(copy, FLIPS) == []
    use(copy)
    open_checkpoint(copy).verify()


def test_a_flipped_bit_is_detected_where_no_manifest_is(copy: Path) -> None:
    """In a part of a checkpoint, as the artifact of a run has it, the table stands for itself and for the slices."""
    (copy / "manifest.json").unlink()
    for name in ("slices.json", "model-00000.safetensors", "model-00001.safetensors"):
        sound = (copy / name).read_bytes()
        for bit in range(0, 8 * len(sound), 7):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            (copy / name).write_bytes(damaged)
            with pytest.raises(UserError, match=name), tensors_of(copy) as source:
                for key in source.keys():  # noqa: SIM118
                    source.get(key)
        (copy / name).write_bytes(sound)


@pytest.mark.parametrize("name", NAMES)
def test_truncation_at_every_length_is_detected(copy: Path, name: str) -> None:
    sound = (copy / name).read_bytes()
    for length in range(len(sound)):
        (copy / name).write_bytes(sound[:length])
        with pytest.raises(UserError, match=name):
            use(copy)
    for more in (b"\0", b"\n", b" ", sound):
        (copy / name).write_bytes(sound + more)
        with pytest.raises(UserError, match=name):
            use(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        use(copy)
    (copy / name).symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"link|JSON"):
        use(copy)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slices of 16 MiB and some."""
    tensors = {"a": torch.randn(9_000_000), "b": torch.randn(1000)}
    return save(tmp_path_factory.mktemp("large"), 1, kinds_of(model=tensors))


def test_zeroed_pages_and_cuts_of_a_large_file_are_detected(large: Path) -> None:
    path = large / "model-00000.safetensors"
    size, page, generator = path.stat().st_size, 4096, random.Random(1)
    use(large)
    last = size // page
    for number in [0, 1, last - 1, last, *generator.sample(range(last), 12)]:
        with path.open("r+b", buffering=0) as file:
            sound = os.pread(file.fileno(), page, number * page)
            os.pwrite(file.fileno(), bytes(len(sound)), number * page)
            for check in (use, lambda path: open_checkpoint(path).verify()):
                with pytest.raises(UserError, match=path.name):
                    check(large)
            os.pwrite(file.fileno(), sound, number * page)
    sound = shutil.copyfile(path, large.parent / "sound")
    for length in sorted(generator.sample(range(size), 40), reverse=True):
        os.truncate(path, length)
        with pytest.raises(UserError, match=path.name):
            use(large)
    sound.replace(path)
    use(large)


def test_no_mix_of_two_checkpoints_is_used(tmp_path: Path) -> None:
    """Every choice of files from another step, another run's same step, and another save of the same bits."""
    ours = put(tmp_path / "ours", 2)
    others = [put(tmp_path / "ours", 1), put(tmp_path / "run", 2, 7.0), put(tmp_path / "again", 2)]
    work = tmp_path / "work" / ours.name
    for other in others:
        different = [name for name in NAMES if (ours / name).read_bytes() != (other / name).read_bytes()]
        assert len(different) >= len(NAMES) - 1  # a state says nothing of the save that it is in
        for count in range(1, len(different)):
            for swapped in itertools.combinations(different, count):
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(ours, work)
                for name in swapped:
                    shutil.copy(other / name, work / name)
                with pytest.raises(UserError, match=work.name):
                    use(work)


@pytest.mark.parametrize("name", NAMES)
def test_the_run_falls_back_from_any_damage(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2) / name
    path.write_bytes(b"")
    newest = newest_valid(tmp_path)
    assert newest is not None
    assert value_of(newest) == newest.step == 1


@pytest.mark.parametrize("name", ["extra", "model-00002.safetensors", "sub/x"])
def test_a_file_that_is_not_listed_is_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    with pytest.raises(UserError, match="not listed"):
        use(copy)


def test_a_read_error_is_tried_again_and_then_is_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    preadv, failures = os.preadv, iter([True, True, False] + [True] * 100)

    def failing(*arguments: object) -> int:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return preadv(*arguments)  # type: ignore[arg-type]

    found = open_checkpoint(copy)
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UserError, match=r"model-00000\.safetensors: cannot be read: Input/output error"):
        found.get("model", "model.weight")
    assert sum(1 for _ in failures) == 103 - 3 - 3, "the header at the third attempt, the slice never"


def test_what_is_this_process_s_trouble_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files must not make a run fall back to an older checkpoint."""
    found = open_checkpoint(copy)

    def failing(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(OSError, match="Too many open files"):
        found.get("model", "model.weight")
    with pytest.raises(OSError, match="Too many open files"):
        monkeypatch.setattr(manifest, "read_bytes", failing)
        newest_valid(copy.parent)


def test_a_table_that_is_made_up_is_refused(tmp_path: Path) -> None:
    for text in (b"", b"{}\n", b"[]\n", b"null\n", b"[" * 100_000, b'{"a":1}\n', b"\xff"):
        (tmp_path / TABLE).write_bytes(text)
        with pytest.raises(UserError, match=TABLE), tensors_of(tmp_path):
            pass
