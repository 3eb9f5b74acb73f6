"""How fast the FP8 products are on this GPU, beside those of others: python kernels/fp8_gemm/benchmarks/benchmark.py

Every back end first has to give the reference's result; a wrong one is not timed. Shapes are DeepSeek-V3's: the linear
layers of a layer at 4,096 tokens, experts' up (N 4096, K 7168) and down (N 7168, K 2048) projections; for the weight
gradient the shape that torchao publishes. Times are medians over launches with a cold L2 cache and leave out both
quantisation and what a peer wants rearranged beforehand. Prints a table and, as its last line, one JSON object.
It exits with 1 where one of this package's own back ends fails, and with 0 where there is no GPU.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

PEAK = 1979.0  # TFLOPS of FP8 without sparsity, H100 SXM (NVIDIA data sheet); shares of it mean little on other cards
LARGEST_ERROR = 4e-3  # norm-wise: the rounding to BF16 alone is 1.7e-3; a wrong scale is 1e-1 and more
OURS = ("triton", "gluon")
DENSE = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
M_GROUPED = [(4, 8192), (8, 4096)]
M_GROUPED_WEIGHTS = [(4096, 7168), (7168, 2048)]
K_GROUPED = [(8, 32768, 2048, 7168)]  # E, S, N, K


@dataclass(frozen=True)
class Case:
    """One product of one shape. Tensors: a, a_scales, b, b_scales and, if grouped, groups of blocks or offsets."""

    kind: str
    shape: str
    flops: float
    tensors: tuple[torch.Tensor, ...]
    experts: int = 1


@dataclass(frozen=True)
class Prepared:
    """A back end ready for one case: ``run`` is timed, ``collect`` turns what it returns into the product."""

    run: Callable[[], Any]
    collect: Callable[[Any], torch.Tensor] = lambda result: result


def main() -> int:
    """Measure every case with every back end; the exit status."""
    if not torch.cuda.is_available():
        print("No CUDA device here: the FP8 products were not measured.")
        return 0
    back_ends, absent = find_back_ends()
    for name, reason in absent.items():
        print(f"{name}: absent ({reason})")
    print(f"{'product':10} {'shape':26} {'back end':10} {'us':>8} {'TFLOPS':>8} {'of peak':>8} {'error':>9}")
    rows = [row for case in cases() for row in measure_case(case, back_ends)]
    machine = {
        "card": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
    }
    print(json.dumps(machine | {"peak_tflops": PEAK, "absent": absent, "rows": rows}))
    return int(any(row["back_end"] in OURS and "failed" in row for row in rows))


def cases() -> Iterator[Case]:
    """The cases one after the other, so that one case's tensors are freed before the next one's are made."""
    for N, K in DENSE:
        M = 4096
        a, b = quantise(M, K, tile=(1, 128)), quantise(N, K, tile=(128, 128))
        yield Case("dense", f"M{M} N{N} K{K}", 2.0 * M * N * K, (*a, *b))
    for N, K in M_GROUPED_WEIGHTS:
        for E, M in M_GROUPED:
            groups = torch.arange(E, dtype=torch.int32, device="cuda").repeat_interleave(M // 128)
            a, b = quantise(E * M, K, tile=(1, 128)), quantise(E * N, K, tile=(128, 128))
            b = tuple(tensor.unflatten(0, (E, -1)) for tensor in b)
            yield Case("m_grouped", f"E{E} M{M} N{N} K{K}", 2.0 * E * M * N * K, (*a, *b, groups), E)
    for E, S, N, K in K_GROUPED:
        offsets = torch.arange(0, S + 1, S // E, dtype=torch.int32, device="cuda")
        left, right = quantise(N, S, tile=(1, 128)), quantise(K, S, tile=(1, 128))
        yield Case("k_grouped", f"E{E} S{S} N{N} K{K}", 2.0 * S * N * K, (*left, *right, offsets), E)


def quantise(rows: int, columns: int, tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal random numbers in E4M3 and their scales; those of 1x128 tiles with stride 1 along the rows."""
    x = torch.randn(rows, columns, device="cuda")
    padded = F.pad(x, (0, -columns % 128, 0, -rows % tile[0]))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, tile[0]))
    scales = tiles.abs().amax((1, 3)) / 448
    every = scales.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    codes = (x / every).to(torch.float8_e4m3fn)
    return codes, scales.T.contiguous().T if tile[0] == 1 else scales


def measure_case(case: Case, back_ends: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of the result for every back end that has this product."""
    expected = ours("reference", case, *([] if case.kind == "k_grouped" else [torch.float32])).run()
    rows = []
    for name, prepare in back_ends.items():
        if name == "torchao" and case.kind != "dense":
            continue  # its grouped products are DeepGEMM's
        row: dict[str, Any] = {"product": case.kind, "shape": case.shape, "back_end": name}
        try:
            row |= measure(prepare(case), expected, case.flops)
        except Exception as error:  # who cannot do a shape is a line of the table, not the end of it
            row["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print_row(row)
        rows.append(row)
    return rows


def measure(prepared: Prepared, expected: torch.Tensor, flops: float) -> dict[str, Any]:
    """Correctness, then the time."""
    from triton.testing import do_bench

    result = prepared.collect(prepared.run())
    error = ((result - expected).double().norm() / expected.double().norm()).item()
    if not error < LARGEST_ERROR:
        return {"failed": f"error {error:.2e} against the reference", "error": error}
    seconds = do_bench(prepared.run, warmup=50, rep=200, return_mode="median") * 1e-3
    tflops = flops / seconds / 1e12
    return {"microseconds": seconds * 1e6, "tflops": tflops, "share": tflops / PEAK, "error": error}


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    head = f"{row['product']:10} {row['shape']:26} {row['back_end']:10}"
    if "failed" in row:
        print(f"{head} {row['failed']}")
    else:
        print(f"{head} {row['microseconds']:8.1f} {row['tflops']:8.0f} {row['share']:8.1%} {row['error']:9.1e}")


# Back ends. Each prepares a case outside the time: imports, and what it wants laid out differently.


def find_back_ends() -> tuple[dict[str, Callable[[Case], Prepared]], dict[str, str]]:
    """Those that can be imported here, and why the others cannot."""
    candidates = {
        "triton": ("headrace_fp8_gemm.triton_gemm", lambda case: ours("triton_gemm", case)),
        "gluon": ("headrace_fp8_gemm.gluon_gemm", lambda case: ours("gluon_gemm", case)),
        "scaled_mm": ("torch.nn.functional", scaled_mm),
        "torchao": ("torchao.prototype.blockwise_fp8_training.kernels", torchao),
        "deep_gemm": ("deep_gemm", deep_gemm),
    }
    present, absent = {}, {}
    for name, (module, prepare) in candidates.items():
        try:
            importlib.import_module(module)
            present[name] = prepare
        except Exception as error:  # for want of a compiler or a library some fail in ways of their own
            absent[name] = f"{type(error).__name__}: {error}"
    return present, absent


def ours(module: str, case: Case, *options: Any) -> Prepared:
    """A back end of this package, by the name of its module."""
    product = getattr(importlib.import_module(f"headrace_fp8_gemm.{module}"), case.kind)
    if case.kind != "k_grouped":
        return Prepared(lambda: product(*case.tensors, *options))
    out = torch.empty(case.experts, case.tensors[0].shape[0], case.tensors[2].shape[0], device=case.tensors[0].device)
    return Prepared(lambda: product(*case.tensors, out))


def scaled_mm(case: Case) -> Prepared:
    """torch's blockwise path to cuBLASLt; expert after expert where there are several, which it has no product for."""
    tile = F.ScalingType
    if case.kind == "k_grouped":
        operands, right_tile, collect = _scaled_mm_weight_gradients(case), tile.BlockWise1x128, torch.stack
        out_dtype = torch.float32
    else:
        operands, right_tile, collect = _scaled_mm_rows(case), tile.BlockWise128x128, torch.cat
        out_dtype = torch.bfloat16

    def run() -> list[torch.Tensor]:
        return [
            F.scaled_mm(a, b, a_scales, tile.BlockWise1x128, b_scales, right_tile, output_dtype=out_dtype)
            for a, a_scales, b, b_scales in operands
        ]

    return Prepared(run, collect)


def _scaled_mm_rows(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """The operands of every expert. cuBLASLt wants a weight's scales padded to a multiple of four blocks of K."""
    a, a_scales, b, b_scales, *_ = case.tensors
    experts = case.experts
    b_scales = F.pad(b_scales, (0, -b_scales.shape[-1] % 4)).view(experts, -1, -(-b_scales.shape[-1] // 4) * 4)
    parts = zip(a.chunk(experts), a_scales.chunk(experts), b.view(experts, -1, b.shape[-1]), b_scales, strict=True)
    return [(a, _mn_major(a_scales), b.T, b_scales.T) for a, a_scales, b, b_scales in parts]


def _scaled_mm_weight_gradients(case: Case) -> list[tuple[torch.Tensor, ...]]:
    left, left_scales, right, right_scales, offsets = case.tensors
    operands = []
    for start, end in pairwise(offsets.tolist()):
        rows, tiles = slice(start, end), slice(start // 128, end // 128)
        left_part = left[:, rows].contiguous(), _mn_major(left_scales[:, tiles])
        operands.append((*left_part, right[:, rows].contiguous().T, _mn_major(right_scales[:, tiles])))
    return operands


def _mn_major(scales: torch.Tensor) -> torch.Tensor:
    """The same scales with stride 1 along the rows and no gap between the columns."""
    return scales.T.contiguous().T


def torchao(case: Case) -> Prepared:
    """torchao's Triton kernel."""
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    a, a_scales, b, b_scales = case.tensors
    return Prepared(
        lambda: kernels.triton_fp8_gemm_1x128_128x128(a, b.T, a_scales, b_scales.T, out_dtype=torch.bfloat16)
    )


def deep_gemm(case: Case) -> Prepared:
    """DeepGEMM, as built from its repository. Its weight gradient adds to the result, so that starts from zero."""
    library = importlib.import_module("deep_gemm")
    a, a_scales, b, b_scales, *groups = case.tensors
    if case.kind == "k_grouped":
        sizes = groups[0].diff()
        host_sizes = sizes.tolist()
        a, b = (torch.cat([part.flatten() for part in codes.split(host_sizes, 1)]) for codes in (a, b))
        out = torch.zeros(case.experts, a_scales.shape[0], b_scales.shape[0], device="cuda")
        product, more = library.k_grouped_fp8_gemm_nt_contiguous, (host_sizes, sizes, out)
    else:
        out = torch.empty(a.shape[0], b.shape[-2], dtype=torch.bfloat16, device="cuda")
        if case.kind == "dense":
            product, more = library.fp8_gemm_nt, ()
        else:
            product, more = library.m_grouped_fp8_gemm_nt_contiguous, (groups[0].repeat_interleave(128),)
    return Prepared(lambda: product((a, a_scales), (b, b_scales), out, *more), lambda _: out)


if __name__ == "__main__":
    sys.exit(main())
