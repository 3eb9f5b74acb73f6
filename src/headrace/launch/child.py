"""Runs a Python program that does not outlive its parent: `python -m headrace.launch.child PARENT -m module ...`.

A rank learns of its parent's end at its next heartbeat, but what it imports before the first takes seconds, in which
whoever runs the stage again would find the ranks of before. So the kernel is asked, before anything is imported, to end
this process with its parent (Linux: prctl(2), PR_SET_PDEATHSIG; elsewhere the heartbeat alone has to do). The kernel
means the thread that started the process: ranks are started from a thread that lives as long as they.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run `-m module` or a script, with what follows as its arguments."""
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before it could be asked
        sys.exit(1)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
