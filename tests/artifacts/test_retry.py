"""Patience with a disk that fails for a moment, none with any other error."""

import errno
import time

import pytest

from headrace.artifacts.retry import retried


def test_retries_wait_longer_each_time_and_name_what_they_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def failing() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        retried(failing, "the file")
    assert waited == sorted(waited)
    assert len(waited) == 3
    assert sum(waited) < 30
    assert caplog.text.count("the file: ") == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EMFILE])
def test_what_does_not_pass_is_tried_once(code: int) -> None:
    calls = []

    def failing() -> None:
        calls.append(code)
        raise OSError(code, "no")

    with pytest.raises(OSError, match="no"):
        retried(failing, "the file")
    assert calls == [code]


def test_the_first_success_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    outcomes = iter([errno.EROFS, errno.ESTALE, 0])

    def passing() -> str:
        if code := next(outcomes):
            raise OSError(code, "wait")
        return "done"

    assert retried(passing, "the file") == "done"
