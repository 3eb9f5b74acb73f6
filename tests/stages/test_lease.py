"""Leases: one holder; dead holders are replaced, live ones never."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.stages import lease as leases
from headrace.stages.lease import Lease

HOLD = """
import sys, time
from pathlib import Path
from headrace.stages.lease import Lease
holder = Lease(Path(sys.argv[1])).try_acquire()
print("held" if holder is None else "refused", flush=True)
time.sleep(60 if holder is None else 0)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_and_a_killed_one_replaced(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    holder = Lease(tmp_path).try_acquire()
    assert holder is not None
    assert holder.pid == process.pid
    process.kill()
    # Not reaped yet: a zombie holds nothing.
    deadline = time.monotonic() + 5
    mine = Lease(tmp_path)
    while mine.try_acquire() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()
    mine.release()
    assert not (tmp_path / "lease.json").exists()


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    words = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.kill()
        process.wait()
    assert sorted(words) == ["held\n"] + ["refused\n"] * 5


def test_a_used_again_pid_is_not_the_holder(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    assert first.try_acquire() is None
    path = tmp_path / "lease.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "started": content["started"] - 1}))
    second = Lease(tmp_path)
    assert second.try_acquire() is None
    first.release()
    assert path.exists(), "who no longer holds it cannot give it up"
    second.release()


def test_another_hosts_holder_is_believed_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "started": 1}))
    holder = Lease(tmp_path).try_acquire()
    assert holder is not None
    assert holder.host == "elsewhere"
    old = time.time() - leases.STALE_SECONDS - 1
    os.utime(path, (old, old))
    mine = Lease(tmp_path)
    assert mine.try_acquire() is None
    mine.release()


STOLEN = """
import json, sys, time
from pathlib import Path
from headrace.stages import lease
lease.HEARTBEAT_SECONDS = 0.05
folder = Path(sys.argv[1])
assert lease.Lease(folder).try_acquire() is None
(folder / "lease.json").write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "started": 1}))
time.sleep(10)
print("still here")
"""


def test_a_holder_whose_lease_was_taken_stops(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", STOLEN, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert result.returncode == leases.LOST_LEASE_EXIT
    assert "taken over" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["lease", "batch-00003"])
def test_leases_of_different_names_do_not_meet(tmp_path: Path, name: str) -> None:
    one, other = Lease(tmp_path, name), Lease(tmp_path, "other")
    assert one.try_acquire() is None
    assert other.try_acquire() is None
    one.release()
    other.release()
