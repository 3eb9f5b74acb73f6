"""Kernels run in Triton's interpreter where there is no CUDA device (kernels/interpreter.py says how and why).

Under pytest-xdist every worker, and all that it starts, keeps to its own share of the cores: torch's threads in several
processes on the same cores would slow each other down.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts the cores
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores) :: workers])

import pytest
import torch

from headrace.config import compose

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    path = Path(__file__).resolve().parents[1] / "kernels" / "interpreter.py"
    specification = importlib.util.spec_from_file_location("kernels_interpreter", path)
    assert specification is not None
    assert specification.loader is not None
    interpreter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(interpreter)
    interpreter.interpret()


_load, _loaded = compose.load, cache(lambda words: _load(words))


def load(overrides: Sequence[str] = (), conf: Path = compose.CONF) -> compose.Config:
    """The product's `load`, which takes half a second; the same words again give the same frozen `Config`."""
    return _loaded(tuple(overrides)) if conf == compose.CONF else _load(overrides, conf)


compose.load = load  # before any test or module imports it by name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole workflows first: they take longest, and workers should come to their ends together.

    Two workers begin with the first two files. The first one makes the run that all workflow tests copy; the second
    compiles the kernels meanwhile, which needs no such run.
    """
    first = next((item.path for item in items if item.get_closest_marker("workflow")), None)

    def place(item: pytest.Item) -> int:
        if item.path == first:
            return 0
        if item.path.name == "test_ahead_of_time.py":
            return 1
        return 2 if item.get_closest_marker("workflow") else 3

    items.sort(key=place)
