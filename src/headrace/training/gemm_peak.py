"""The matrix-product rate that this machine reaches here and now: the denominator of MFU.

A vendor's peak is never reached, and two machines of a kind differ; what a plain large product reaches in this
process, with its threads, in the dtype of the run, is the rate that training can be measured against. The best of
several tries counts, since anything else that runs beside can only slow a try down.
"""

import time

import torch

from headrace.fp8.products import mm

_SIZE = {"cpu": 1024, "cuda": 8192}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gemm_peak(compute: str, device: torch.device, seconds: float = 0.5) -> float:
    """Best rate in FLOP/s of a square product in `compute` (`fp32` or `bf16`) within about `seconds`."""
    size = _SIZE[device.type]
    own = torch.Generator(device).manual_seed(0)  # the run's random state must not depend on how often it starts
    left, right = (torch.randn(size, size, device=device, generator=own).to(_DTYPES[compute]) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(2):  # the first calls choose kernels and fault pages in
        mm(left, right, out=out)
    best, ends, tries = float("inf"), time.perf_counter() + seconds, 0
    while tries < 3 or time.perf_counter() < ends:
        best, tries = min(best, _timed_product(left, right, out)), tries + 1
    return 2 * size**3 / best


def _timed_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    mm(left, right, out=out)
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
