"""Kernels run in Triton's interpreter where there is no CUDA device (kernels/interpreter.py says how and why)."""

import importlib.util
from pathlib import Path

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    path = Path(__file__).resolve().parents[1] / "kernels" / "interpreter.py"
    specification = importlib.util.spec_from_file_location("kernels_interpreter", path)
    assert specification is not None
    assert specification.loader is not None
    interpreter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(interpreter)
    interpreter.interpret()
