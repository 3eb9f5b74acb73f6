"""A disk that fails, or a process that dies, at the n-th operation on files: every one of them, not a sample.

    operations(act)                   what `act` does to files, in order
    dies_at(number, act)              `act` in a child process that dies right before the operation of that number
    dies_at(number, act, half=True)   the same, but a write gets half of its bytes out
    fails_at(number, code)            in this process: the operation raises OSError(code), and unless `once` later ones

Python's own operations are wrapped, in all threads: whatever makes, changes or removes files in `headrace` goes through
them; that nothing goes around them is checked with strace (`test_crashes.test_the_shim_sees_every_operation`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

OPERATIONS = (
    "open",
    "write",
    "fsync",
    "rename",
    "replace",
    "link",
    "mkdir",
    "unlink",
    "rmdir",
    "truncate",
    "ftruncate",
)
MAKING = frozenset({"open", "write", "fsync", "rename", "replace", "link", "mkdir"})
"""Operations for which a full disk has no room, or may say so late."""
Before = Callable[[int, str, tuple[Any, ...]], None]


@contextmanager
def watched(before: Before) -> Iterator[list[str]]:
    """Calls `before(number, operation, arguments)` ahead of each operation; yields the list of those so far."""
    done: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                done.append(name)
                before(len(done) - 1, name, arguments)
            return original(*arguments, **keywords)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield done


def operations(act: Callable[[], object]) -> list[str]:
    """What `act` does to files."""
    with watched(lambda *_: None) as done:
        act()
    return done


def dies_at(number: int, act: Callable[[], object], half: bool = False) -> bool:
    """Run `act` in a child that dies at an operation; whether it got there."""
    write = os.write

    def die(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            if half and name == "write":
                write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            with watched(die):
                act()
            os._exit(0)
        finally:  # an exception must not bring a second pytest to life
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the child has failed instead of dying"
    return code == 9


@contextmanager
def fails_at(number: int, code: int, once: bool = False, of: frozenset[str] = MAKING) -> Iterator[list[str]]:
    """The operation raises OSError(code), and so do all later ones `of` those kinds unless `once`."""

    def fail(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name in of and (count == number or (count > number and not once)):
            raise OSError(code, os.strerror(code))

    with watched(fail) as done:
        yield done
