"""The device: what is asked for and missing is an error, `auto` picks."""

import os

import pytest
import torch

from headrace.errors import UserError
from headrace.launch.device import resolve, use_threads


def test_cuda_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"launch\.device=cuda.*docs/install\.md"):
        resolve("cuda")
    assert resolve("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve("auto") == torch.device("cuda")
    assert resolve("cpu") == torch.device("cpu")


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        assert use_threads(1) == 1
        assert torch.get_num_threads() == 1
        assert use_threads(None) >= 1
    finally:
        torch.set_num_threads(before)


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    before = torch.get_num_threads()
    try:
        assert use_threads(None) == 8
        assert use_threads(None, ranks_here=3) == 2
        assert use_threads(None, ranks_here=16) == 1
        assert use_threads(5, ranks_here=16) == 5
    finally:
        torch.set_num_threads(before)
