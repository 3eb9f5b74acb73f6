"""Every kernel compiles for its GPUs with both releases of Triton, without spills, and its hot loop has not grown."""

import json
import sys
import textwrap
from pathlib import Path

import ahead_of_time
import pytest
from ahead_of_time import BUDGET, INSTALL_NEWEST, NEWEST, PACKAGES

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only"),
    pytest.mark.timeout(1500),  # compiling everything takes two minutes of CPU time, which a busy machine spreads out
]

RELEASES = {"pinned": None, "newest": NEWEST}
each_package = pytest.mark.parametrize("package", PACKAGES)
each_release = pytest.mark.parametrize(
    "compiled", ["pinned", pytest.param("newest", marks=pytest.mark.slow)], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, dict | RuntimeError]:
    """Every package with one release of Triton."""
    folder = RELEASES[request.param]
    if folder and not folder.exists():
        pytest.fail(f"the newest Triton is not in {folder}: run `make setup`, or {INSTALL_NEWEST}", pytrace=False)
    return ahead_of_time.compile_everything(folder)


def result_of(compiled: dict[str, dict | RuntimeError], package: str) -> dict:
    result = compiled[package]
    if isinstance(result, RuntimeError):
        pytest.fail(str(result), pytrace=False)
    return result


def complaints(kernel: dict) -> list[str]:
    """What one kernel breaks of its promises, in words."""
    expects = kernel["expects"]
    spills = kernel["spill_loads"] + kernel["spill_stores"]
    broken = {
        f"{spills} instructions spill registers to memory": spills > 0,
        "no FP8 matrix instruction": expects["fp8_mma"] and not kernel["fp8_mma"],
        "no loop around the matrix instruction": bool(kernel["fp8_mma"]) and kernel["loop_per_128"] is None,
        "no asynchronous copy": expects["async_copy"] and not kernel["async_copies"],
        f"{kernel['registers']} registers, above {expects['max_registers']}": kernel["registers"]
        > expects["max_registers"],
        f"{kernel['shared']} bytes of shared memory, above {expects['max_shared']}": kernel["shared"]
        > expects["max_shared"],
    }
    return [words for words, fails in broken.items() if fails]


@each_package
@each_release
def test_what_the_variants_promise(compiled, package):
    result = result_of(compiled, package)
    assert result["kernels"], f"{package} offers no variant"
    broken = [f"{key}: {words}" for key, kernel in result["kernels"].items() for words in complaints(kernel)]
    assert not broken, f"{package} with Triton {result['triton']}\n" + "\n".join(broken)


@each_package
@each_release
def test_no_loop_grew(compiled, package):
    result = result_of(compiled, package)
    budget = json.loads(BUDGET.read_text())[package].get(result["triton"], {})
    rewrite = "python tests/kernels/ahead_of_time.py write-budget"
    assert budget.keys() == result["kernels"].keys(), (
        f"{package} with Triton {result['triton']}: variants and budget name different kernels: "
        f"{sorted(budget.keys() ^ result['kernels'].keys())}; `{rewrite}` rewrites the budget"
    )
    grown = [
        f"{key}: {what} is {now}, the budget {budget[key].get(what)}; the loop holds {kernel['loop_opcodes']}"
        for key, kernel in result["kernels"].items()
        for what, now in ahead_of_time.budget_of(kernel).items()
        if now > budget[key].get(what, -1)
    ]
    assert not grown, f"{package} with Triton {result['triton']} (`{rewrite}` if it is worth it)\n" + "\n".join(grown)


@each_release
def test_the_consumers_of_the_gluon_kernels_never_wait_for_the_whole_block(compiled):
    """The point of warp specialisation; and Triton's own loop is there to show that such waits would be seen."""
    kernels = result_of(compiled, "headrace_fp8_gemm")["kernels"]
    waits = {
        name: sorted({kernels[key]["loop_barriers"] for key in kernels if key.startswith(name)})
        for name in ("gluon", "triton")
    }
    assert waits["gluon"] == [0], waits
    assert min(waits["triton"]) > 0, waits


BAD_KERNELS = """
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(a_ptr, b_ptr, y_ptr, K, N: tl.constexpr, CODES: tl.constexpr):
        rows, columns, inner = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 128)
        total = tl.zeros((128, N), dtype=tl.float32)
        for block in range(K // 128):
            k = block * 128 + inner
            a = tl.load(a_ptr + rows[:, None] * K + k[None, :]).to(CODES)
            b = tl.load(b_ptr + columns[None, :] * K + k[:, None]).to(CODES)
            total += tl.dot(a, b) * tl.load(y_ptr + rows)[:, None]
        tl.store(y_ptr + rows[:, None] * N + columns[None, :], total)

    def variant(name, N, codes):
        return {
            "name": name,
            "kernel": multiply,
            "signature": {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "y_ptr": "*fp32", "K": "i32"},
            "constants": {"N": N, "CODES": codes},
            "options": {"num_warps": 4, "num_stages": 3},
            "attributes": {"a_ptr": 16, "b_ptr": 16, "y_ptr": 16, "K": 16},
            "targets": ["sm_90"],
            "expects": {"fp8_mma": True, "async_copy": True, "max_registers": 255, "max_shared": 100_000},
        }

    def variants():
        return [
            variant("good", 64, tl.float8e4nv),
            variant("spilling", 256, tl.float8e4nv),
            variant("upcast", 64, tl.bfloat16),
        ]
"""


def test_the_harness_sees_spills_and_missing_matrix_instructions(tmp_path: Path):
    """One kernel three times: four warps cannot hold two sums of 128x256, and BF16 products are no FP8 products."""
    package = tmp_path / "bad_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "variants.py").write_text(textwrap.dedent(BAD_KERNELS))
    kernels = ahead_of_time.compile_package("bad_kernels", beside=tmp_path)["kernels"]
    assert complaints(kernels["good sm_90"]) == []
    assert any("spill registers" in words for words in complaints(kernels["spilling sm_90"]))
    assert "no FP8 matrix instruction" in complaints(kernels["upcast sm_90"])


def test_a_kernel_that_does_not_compile_is_an_error_with_the_compilers_words(tmp_path: Path):
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels" / "variants.py").write_text("raise SyntaxError('no such thing')")
    with pytest.raises(RuntimeError, match=r"broken_kernels did not compile:(.|\n)*no such thing"):
        ahead_of_time.compile_package("broken_kernels", beside=tmp_path)


# A loop (0x20 to 0x60) in a loop (0x10 to 0x80) with a wait whose retry stands behind EXIT, as ptxas places it.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x2, 0x80 ;
        /*0080*/               @P2 BRA `(.L_x_3) ;
        /*0090*/                   EXIT ;
.L_x_0:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00b0*/              @!P0 BRA `(.L_x_0) ;
        /*00c0*/                   BRA `(.L_x_2) ;
"""


def test_the_hot_loop_is_the_innermost_with_its_retries():
    found = ahead_of_time.describe_sass(SASS, "sm_90")
    assert found["loop_opcodes"] == {"BRA": 4, "SYNCS": 2, "QGMMA": 1, "BAR": 1}
    assert found["loop_per_128"] == 8 * 4  # one matrix instruction is a quarter of 128 values
    assert found["loop_barriers"] == 1  # the named barrier outside concerns four warps and is not in this loop
    assert (found["fp8_mma"], found["spill_loads"], found["async_copies"]) == (1, 0, 0)
