"""A process that dies, and a disk that fails, at every single operation of a save and of a retention."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from failing_disk import MAKING, dies_at, fails_at, operations, watched
from headrace.artifacts import retry
from headrace.checkpoint.reader import newest_valid, open_checkpoint, steps
from headrace.checkpoint.retain import retain
from headrace.checkpoint.writer import clear_leftovers, remove
from saved import kinds_of, put, save, value_of

Act = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    put(folder, 1)
    put(folder, 2)
    return folder


def replace_damaged(folder: Path) -> None:
    """Save step 2 where a damaged checkpoint of it lies."""
    put(folder, 2)


ACTS: dict[str, tuple[Act, set[int]]] = {  # what is done to `two`, and the steps that may be the newest whole one then
    "save": (lambda folder: put(folder, 3), {2, 3}),
    "retention": (lambda folder: retain(folder, 1, None), {2}),
    "save, retention": (lambda folder: (put(folder, 3), retain(folder, 1, None)), {2, 3}),
    "save again": (lambda folder: put(folder, 2), {2}),
    "save over a damaged one": (replace_damaged, {1, 2}),
    "clear": (lambda folder: (clear_leftovers(folder), put(folder, 3)), {2, 3}),
}


def prepared(two: Path, folder: Path, name: str) -> Path:
    """A copy of `two` as the act finds it."""
    shutil.copytree(two, folder)
    if name == "save over a damaged one":
        os.truncate(folder / "step-00000002" / "model-00000.safetensors", 5)
    if name == "clear":
        shutil.copytree(two / "step-00000002", folder / ".unfinished-3-dead")
    return folder


def check(folder: Path, allowed: set[int]) -> int:
    """What is whole is no mix, and the newest whole one is one of those `allowed`; returns its step."""
    for step in steps(folder):
        path = folder / f"step-{step:08d}"
        if (path / "model-00000.safetensors").stat().st_size > 5:  # not the one that was damaged before
            assert value_of(open_checkpoint(path)) == step
    newest = newest_valid(folder)
    assert newest is not None
    assert newest.step in allowed
    return newest.step


@pytest.mark.parametrize("half", [False, True], ids=["before", "half of a write"])
@pytest.mark.parametrize("name", ACTS)
def test_death_at_every_operation_leaves_the_old_or_the_new(two: Path, tmp_path: Path, name: str, half: bool) -> None:
    act, allowed = ACTS[name]
    dry = prepared(two, tmp_path / "dry", name)
    done = operations(lambda: act(dry))
    numbers = [number for number, kind in enumerate(done) if not half or kind == "write"]
    seen = set()
    for number in numbers:
        folder = prepared(two, tmp_path / str(number), name)
        assert dies_at(number, lambda: act(folder), half)  # noqa: B023
        seen.add(check(folder, allowed))
        clear_leftovers(folder)
        put(folder, 3)  # the next attempt gets through, and nothing is left of the dead one
        assert check(folder, {3}) == 3
        assert {path.name[:5] for path in folder.iterdir()} == {"step-"}
        shutil.rmtree(folder)
    if not half and "save" in name:
        assert len(numbers) > 25 or name == "save again"
        assert seen == allowed


def system_call(line: str) -> str | None:
    """The operation of `failing_disk.OPERATIONS` that a line of strace stands for."""
    call = re.search(r"(\w+)\(", line)
    name = call[1].removesuffix("at").removesuffix("at2") if call else ""
    if name == "open" and "O_CREAT" not in line:
        return None
    if name == "unlink" and "AT_REMOVEDIR" in line:
        return "rmdir"
    return "rename" if name == "replace" else name


def test_the_shim_sees_every_operation(tmp_path: Path) -> None:
    """The kernel's view of the same save and retention, by strace: nothing goes around the wrapped functions."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    here, there = tmp_path / "here", tmp_path / "there"
    ours = operations(lambda: (put(here, 1), put(here, 2), retain(here, 1, None)))
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\nfrom headrace.checkpoint.retain import retain\nfrom saved import put\n"
        f"here = Path({str(there)!r}); put(here, 1); put(here, 2); retain(here, 1, None)\n"
    )
    calls = "open,openat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,mkdirat"
    calls += ",unlink,unlinkat,rmdir,truncate,ftruncate,sendfile,copy_file_range"
    options = ["-f", "-y", "--seccomp-bpf", "-e", f"trace={calls}", "-o", str(tmp_path / "trace")]
    subprocess.run(["strace", *options, sys.executable, "-c", program], check=True)
    lines = [line for line in (tmp_path / "trace").read_text().splitlines() if str(there) in line]
    theirs = Counter(filter(None, map(system_call, lines)))
    expected = Counter("rename" if name == "replace" else name for name in ours)
    # A folder that is there already is not made again by Python, but asked for.
    assert theirs == expected


def name_of(descriptor: int) -> str:
    """The path of an open file."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def unsynced(act: Callable[[], object], final: Path, without: int | None = None) -> tuple[list[str], list[str]]:
    """What was not on the disk when it had to be, as paths; and what was synced, in order.

    At the publishing rename that is all content and all entries of the folder, at the end the new name. `without` is
    the number of an fsync that is taken not to have happened.
    """
    dirty, synced = set[str](), list[str]()  # files with unsynced content and folders with unsynced entries; all fsyncs
    late: list[str] = []

    def before(_: int, name: str, arguments: tuple) -> None:
        if name == "write":
            dirty.add(name_of(arguments[0]))
        elif name == "fsync":
            synced.append(name_of(arguments[0]))
            if len(synced) - 1 != without:
                dirty.discard(synced[-1])
        else:
            changed = [str(path) for path in arguments[: 2 if name in ("rename", "replace") else 1]]
            if changed[-1] == str(final):
                late.extend(sorted(path for path in dirty if path.startswith(changed[0])))
            if changed[0] in dirty:
                dirty.remove(changed[0])
                dirty.add(changed[-1])
            dirty.update(str(Path(path).parent) for path in changed)

    with watched(before):
        act()
    return late + sorted(dirty.intersection([str(final.parent)])), synced


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(tmp_path: Path) -> None:
    """And each fsync is needed: leave one out and something is late, unless the same folder is synced again."""
    put(tmp_path, 1)
    late, synced = unsynced(lambda: put(tmp_path, 2), tmp_path / "step-00000002")
    assert late == []
    assert len({path for path in synced if Path(path).suffix}) == 7  # every file of it
    for number in range(len(synced)):
        folder = tmp_path / str(number)
        late, again = unsynced(lambda: put(folder, 2), folder / "step-00000002", number)  # noqa: B023
        assert len(again) == len(synced)
        assert bool(late) == (again[number] not in again[number + 1 :]), again[number]


@pytest.mark.parametrize("once", [True, False], ids=["for a moment", "for good"])
def test_a_full_disk_at_every_operation_leaves_no_part_of_the_new(two: Path, tmp_path: Path, once: bool) -> None:
    dry = prepared(two, tmp_path / "dry", "save")
    done = operations(lambda: put(dry, 3))
    for number, kind in enumerate(done):
        if kind not in MAKING:
            continue
        folder = prepared(two, tmp_path / str(number), "save")
        if once and kind == "mkdir" and "mkdir" in done[:number]:
            continue  # what is there already need not be made
        with fails_at(number, errno.ENOSPC, once) as tried, pytest.raises(OSError, match="No space left"):
            put(folder, 3)
        assert tried[: number + 1] == done[: number + 1]
        last = number == len(done) - 1  # the fsync of the parent: the rename is done, and only its durability in doubt
        assert {path.name for path in folder.iterdir()} == {f"step-0000000{step}" for step in (1, 2, 3)[: 2 + last]}
        check(folder, {3} if last else {2})


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_an_error_that_passes_is_outlived_and_one_that_stays_is_not(two: Path, tmp_path: Path, code: int) -> None:
    dry = prepared(two, tmp_path / "dry", "save")
    done = operations(lambda: put(dry, 3))
    for number, kind in enumerate(done):
        if kind not in MAKING:
            continue
        folder = prepared(two, tmp_path / f"once {number}", "save")
        with fails_at(number, code, once=True):
            put(folder, 3)
        assert check(folder, {3}) == 3
        folder = prepared(two, tmp_path / f"stays {number}", "save")
        with fails_at(number, code) as tried, pytest.raises(OSError, match=os.strerror(code)):
            put(folder, 3)
        assert len(tried) < 3 * len(done), "retries are bounded"
        check(folder, {2, 3} if number == len(done) - 1 else {2})


def test_deleting_fails_loudly_and_stops_nothing(two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = prepared(two, tmp_path / "x", "retention")
    with fails_at(0, errno.EROFS, of=frozenset({"rename", "unlink", "rmdir"})):
        assert retain(folder, 1, None) == []
    assert "the checkpoint of step 1 cannot be deleted: [Errno 30] Read-only file system" in caplog.text
    check(folder, {2})


def test_a_removal_that_fails_half_way_lists_nothing_damaged(two: Path, tmp_path: Path) -> None:
    dry = shutil.copytree(two, tmp_path / "dry")
    done = operations(lambda: remove(dry / "step-00000001"))
    for number in range(len(done)):
        folder = shutil.copytree(two, tmp_path / str(number))
        with fails_at(number, errno.EIO, of=frozenset({"rename", "unlink", "rmdir"})), pytest.raises(OSError):
            remove(folder / "step-00000001")
        check(folder, {2})
        assert steps(folder) == ([1, 2] if number == 0 else [2])
        if number:
            shutil.copytree(two / "step-00000001", folder / "step-00000001")
        remove(folder / "step-00000001")  # what the failed one left is not in the way
        assert [path.name for path in folder.iterdir()] == ["step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_full_after_any_number_of_pages(small_disk: Path) -> None:
    folder, ballast, page = small_disk / "checkpoints", small_disk / "ballast", 4096
    put(folder, 1)
    kinds = kinds_of(model={"w": torch.full((60_000,), 2.0)}, optimizer={"w/m": torch.full((30_000,), 2.0)})
    outcomes = []
    for free in range(0, 110, 2):  # the checkpoint needs about 94 pages
        with ballast.open("wb") as file:
            room = os.statvfs(small_disk).f_bavail
            file.write(bytes((room - free) * page))
        try:
            save(folder, 2, kinds, state={"value": 2.0})
            outcomes.append(True)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            outcomes.append(False)
        ballast.unlink()
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"][: 1 + outcomes[-1]]
        check(folder, {2} if outcomes[-1] else {1})
        if outcomes[-1]:
            remove(folder / "step-00000002")
    assert outcomes == sorted(outcomes)
    assert 40 < outcomes.index(True) < 54
