"""The device that a stage computes on: `cpu`, `cuda`, or `auto`, which says what it picked."""

import os

import torch

from headrace.errors import UserError


def resolve(device: str) -> torch.device:
    """`auto` picks CUDA where there is a GPU; `cuda` without one is a `UserError`, never a fall-back."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            f"launch.device=cuda: torch {torch.__version__} sees no GPU; install a CUDA build of torch "
            "(docs/install.md) or use launch.device=cpu"
        )
    if device == "auto":
        device = "cuda" if available else "cpu"
    return torch.device(device)


def use_threads(threads: int | None, ranks_here: int = 1) -> int:
    """Set torch's CPU threads; null shares the cores that this process may run on among the machine's `ranks_here`.

    Returns the number.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)
    torch.set_num_threads(count)
    return count
