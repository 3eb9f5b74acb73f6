"""How fast the quantisers run on this GPU, in TB/s: python kernels/fp8_quantisation/benchmarks/benchmark.py

Every kernel first has to give the reference's result; a wrong one is not timed. Shapes are DeepSeek-V3's: 4,096 tokens
of width 7168, experts of 7168 x 2048 with 32,768 rows, 128 heads. Bytes are those that must move, inputs once and
outputs once; times are medians over launches with a cold L2 cache. A plain copy, measured in the same run, is the
ceiling. Prints a table and, as its last line, one JSON object. It exits with 1 where a result is wrong, and with 0
where there is no GPU.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 512 << 20  # overwritten between launches: ten times the L2 of an H100, and long enough to queue the next
LAUNCHES = 30
DIFFERING_CODES = 1e-3  # where an exponential or a long sum precedes the quantiser; elsewhere no byte may differ


class Case(NamedTuple):
    """A kernel with its inputs; `exact` says that no byte may differ from the reference's."""

    name: str
    shape: str
    inputs: tuple[Any, ...]
    exact: bool


def main() -> int:
    """Check and measure every case; the exit status."""
    if not torch.cuda.is_available():
        print("No CUDA device here: the quantisers were not measured.")
        return 0
    package = importlib.import_module("headrace_fp8_quantisation")
    reference = importlib.import_module("headrace_fp8_quantisation.reference")
    copied = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    ceiling = 2 * copied.numel() / median_seconds(lambda: copied.clone()) / 1e12
    print(f"{'kernel':28} {'shape':24} {'us':>8} {'TB/s':>7} {'of copy':>8}   a copy: {ceiling:.2f} TB/s")
    rows = []
    for case in cases():
        kernel = getattr(package, case.name)
        outputs = kernel(*case.inputs)
        row: dict[str, Any] = {"kernel": case.name, "shape": case.shape}
        wrong = difference(outputs, getattr(reference, case.name)(*case.inputs), case.exact)
        if wrong:
            row["wrong"] = wrong
            print(f"{case.name:28} {case.shape:24} wrong: {wrong}")
        else:
            seconds = median_seconds(lambda kernel=kernel, case=case: kernel(*case.inputs))
            speed = (bytes_of(case.inputs) + bytes_of(outputs)) / seconds / 1e12
            row |= {"us": round(seconds * 1e6, 1), "tb_s": round(speed, 3), "of_copy": round(speed / ceiling, 3)}
            print(f"{case.name:28} {case.shape:24} {seconds * 1e6:8.1f} {speed:7.2f} {speed / ceiling:8.0%}")
        rows.append(row)
    machine = {
        "card": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
    }
    print(json.dumps(machine | {"copy_tb_s": round(ceiling, 3), "rows": rows}))
    return int(any("wrong" in row for row in rows))


def cases() -> Iterator[Case]:
    """The cases one after the other, so that one case's tensors are freed before the next one's are made."""
    hidden = normal(4096, 7168)
    yield Case("quantise_rows", "4096 x 7168", (hidden,), True)
    yield Case("quantise_rows", "4096 x 7168, 2^n", (hidden, True), True)
    yield Case("quantise_rows_and_columns", "4096 x 7168", (hidden,), True)
    codes = torch.randint(0, 0x7F, (4096, 7168), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    yield Case("requantise_columns", "4096 x 7168", (codes, torch.rand(56, 4096, device="cuda").t()), True)
    weight = normal(7168, 16384).float()
    yield Case("quantise_weight", "7168 x 16384 FP32", (weight,), True)
    yield Case("quantise_weight", "7168 x 16384 FP32, both", (weight, True), True)
    yield Case("quantise_weight", "8 x 2048 x 7168, both", (normal(8, 2048, 7168), True), True)
    gate, up, routing = normal(32768, 2048), normal(32768, 2048), torch.rand(32768, device="cuda")
    yield Case("swiglu_quantise", "32768 x 2048", (gate, up, routing), False)
    yield Case("swiglu_backward_quantise", "32768 x 2048", (normal(32768, 2048), gate, up, routing), False)
    for width in (7168, 1536, 512):
        inputs = normal(4096, width), torch.rand(width, device="cuda"), 1e-6
        yield Case("rmsnorm_quantise", f"4096 x {width}", inputs, False)
    angles = torch.rand(4096, 32, device="cuda")
    tables = angles.cos(), angles.sin(), 0.07
    heads = normal(1, 4096, 128, 192), normal(1, 4096, 128, 256), normal(1, 4096, 64)
    yield Case("rope_concat", "4096 x 128 heads", (*heads, *tables), False)
    gradients = normal(1, 128, 4096, 192), normal(1, 128, 4096, 192), normal(1, 128, 4096, 128)
    yield Case("rope_concat_backward", "4096 x 128 heads", (*gradients, *tables), False)


def normal(*shape: int) -> Tensor:
    """Normal random numbers in BF16."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def bytes_of(tensors: tuple[Any, ...]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def difference(found: tuple[Any, ...], wanted: tuple[Any, ...], exact: bool) -> str:
    """What is wrong, or nothing."""
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one is None or other is None:
            right = one is other
        elif one.dtype == torch.float8_e4m3fn:
            differing = one.view(torch.uint8) != other.view(torch.uint8)
            right = differing.float().mean().item() <= (0 if exact else DIFFERING_CODES)
        elif exact:
            right = torch.equal(one, other)
        else:
            tolerance = 1e-2 if one.dtype == torch.bfloat16 else 1e-4
            typical = other.float().abs().mean().item()
            right = torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * typical)
        if not right:
            return f"output {place} differs from the reference's"
    return ""


def median_seconds(run: Callable[[], object]) -> float:
    """Of one launch, measured on the device, with nothing of its inputs in the cache."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(LAUNCHES + 5):
        cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times[5:]) / 1e3


if __name__ == "__main__":
    sys.exit(main())
