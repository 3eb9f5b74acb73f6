"""The CUDA sources compile for Hopper without spills, with and without the loads that PTX leaves undefined.

The report's cache hints (DeepSeek-V3, section 3.2.2) are `ld.global.nc.L1::no_allocate.L2::256B`; in Hopper's machine
code that is a load with NA (no allocation in L1), LTC256B (fetch 256 bytes into L2) and CONSTANT (non-coherent).
Needs nvcc, not a GPU. Cannot show that the movers work.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ahead_of_time
import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = sorted(KERNELS.rglob("*.cu"))
SWITCH = "HEADRACE_PLAIN_LOADS"
HINTED_LOAD = re.compile(r"LDG\.E\.NA\.LTC256B\S*\.CONSTANT")
COHERENT_LOAD = re.compile(r"LDG\.E\.128\.STRONG\.SYS")

pytestmark = pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not on PATH: the CUDA sources were not compiled"
)


class Compiled(NamedTuple):
    """What ptxas reports for each kernel of a file, and how often each load instruction occurs in its machine code."""

    report: str
    loads: Counter


def compile_for_hopper(source: Path, folder: Path, *switches: str) -> Compiled:
    triton = pytest.importorskip(
        "triton", reason="the disassembler comes with Triton, which is published for Linux only"
    )
    binary = folder / "kernel.cubin"
    command = ["nvcc", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "--ptxas-options=-v,--warn-on-spills"]
    done = subprocess.run(
        [*command, *switches, "-cubin", "-o", binary, source], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    sass = subprocess.check_output([disassembler, "-c", binary], text=True, stderr=subprocess.DEVNULL)
    return Compiled(done.stderr, Counter(one.opcode for one in ahead_of_time.read_sass(sass)[0] if "LD" in one.opcode))


def spills(report: str) -> list[str]:
    """The lines of ptxas's report that admit spills; fails where it reports on no kernel at all."""
    found = re.findall(r".*bytes stack frame.*", report)
    assert found, f"ptxas reported no kernel:\n{report}"
    return [line.strip() for line in found if not re.search(r"\b0 bytes spill stores, 0 bytes spill loads", line)]


def count(loads: Counter, pattern: re.Pattern) -> int:
    return sum(number for opcode, number in loads.items() if pattern.fullmatch(opcode))


def test_there_is_something_to_compile():
    assert SOURCES, "no .cu under kernels/: where did the dispatch movers go?"


@pytest.mark.parametrize("switches", [(), (f"-D{SWITCH}",)], ids=["hinted", "plain"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_spills(source, switches, tmp_path):
    assert spills(compile_for_hopper(source, tmp_path, *switches).report) == []


@pytest.mark.parametrize("source", [path for path in SOURCES if SWITCH in path.read_text()], ids=lambda path: path.name)
def test_the_switch_replaces_hinted_loads_by_coherent_ones(source, tmp_path):
    hinted, plain = compile_for_hopper(source, tmp_path), compile_for_hopper(source, tmp_path, f"-D{SWITCH}")
    assert count(hinted.loads, HINTED_LOAD) > 0, hinted.loads
    assert count(plain.loads, HINTED_LOAD) == 0, plain.loads
    assert (
        count(plain.loads, COHERENT_LOAD)
        >= count(hinted.loads, re.compile(HINTED_LOAD.pattern.replace(r"\S*", r"\.128")))
        > 0
    )


def test_spills_would_be_seen(tmp_path):
    """Forty numbers that are alive at once do not fit 24 registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        """
        __global__ void __maxnreg__(24) spilling(float* x) {
          float kept[40];
          #pragma unroll
          for (int i = 0; i < 40; ++i) kept[i] = x[i * 32];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 40; ++i) x[i * 32] = kept[39 - i] * kept[(i * 7) % 40];
        }
        """
    )
    assert len(spills(compile_for_hopper(source, tmp_path).report)) == 1
