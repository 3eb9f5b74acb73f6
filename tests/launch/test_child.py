"""A child ends with its parent, from its first moment, and runs what it is told to as Python itself would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SHOW = "import json, sys; print(json.dumps([__name__, sys.argv[1:]]))"


def child(*program: str, parent: int | None = None) -> list[str]:
    return [sys.executable, "-m", "headrace.launch.child", str(parent or os.getpid()), *program]


def test_a_script_and_a_module_see_their_arguments(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    for program in ([str(tmp_path / "show.py")], ["-m", "show"]):
        said = subprocess.run(
            child(*program, "a b", "--c"),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ).stdout
        assert json.loads(said) == ["__main__", ["a b", "--c"]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the heartbeat has to do")
def test_it_ends_with_its_parent_whatever_it_is_at(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time; print('here', flush=True); time.sleep(600)")
    starts = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, '-m', 'headrace.launch.child', "
        f"str(os.getpid()), {str(tmp_path / 'sleep.py')!r}]); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"here\n"
    [sleeper] = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    psutil.wait_procs([sleeper], timeout=5)
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


def test_it_does_nothing_where_its_parent_is_gone_already(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    began = time.monotonic()
    ended = subprocess.run(child(str(tmp_path / "show.py"), parent=gone.pid), capture_output=True)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert time.monotonic() - began < 30
