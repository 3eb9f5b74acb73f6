"""Tests of kernels: compiled kernels on a CUDA device, elsewhere Triton's interpreter (see interpreter.py).

pytest loads this file before it imports any test module below, so that TRITON_INTERPRET is set before triton is.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _load(name: str) -> ModuleType:
    """A module beside this file, which pytest's importlib mode leaves off the path."""
    specification = importlib.util.spec_from_file_location(f"kernels_{name}", Path(__file__).with_name(f"{name}.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


INTERPRETER = _load("interpreter")
if not torch.cuda.is_available():
    INTERPRETER.interpret()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels under test run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def interpreter() -> ModuleType:
    """kernels/interpreter.py, repaired; skips where compiled kernels run instead."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device runs the compiled kernels; the interpreter and its repair are not in use")
    return INTERPRETER
